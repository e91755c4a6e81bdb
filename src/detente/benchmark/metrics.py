"""Evaluation metrics and the two summaries of a multi-task result, delta-m and the mean rank.

Every per-task metric takes the predictions for a whole evaluation set at once, so pixels are pooled over the set and
never averaged batch by batch. Figures of code that averages per batch or per image are not comparable; the median
angle and the mIoU differ most. Shares (accuracy, mIoU, within_11 ...) are fractions in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

Sign = Literal["lower_better", "higher_better"]


def accuracy(prediction: Tensor, target: Tensor) -> float:
    """Share of correct labels. `prediction`: logits [N, C, ...] or labels [N, ...]; `target`: labels [N, ...].

    Raises ValueError if the shapes do not fit or there is nothing to score.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    0.5
    """
    labels = _labels(prediction, target)
    if not target.numel():
        raise ValueError("accuracy needs at least one target; the evaluation set is empty.")
    return (labels == target).double().mean().item()


def segmentation(prediction: Tensor, target: Tensor, classes: int, ignore: int = -1) -> dict[str, float]:
    """`miou` and `pixel_accuracy` from one confusion matrix over the whole evaluation set.

    `prediction`: logits [N, C, ...] or labels [N, ...]; `target`: labels [N, ...] in [0, classes), or `ignore`, which
    is left out. IoU of a class is hits / (predicted + present - hits); a class that is neither predicted nor present
    has no IoU and does not enter the mean (nan-mean). Raises ValueError on labels outside the range, or if no pixel is
    labelled.
    """
    return overlap(confusion(prediction, target, classes, ignore))


def confusion(prediction: Tensor, target: Tensor, classes: int, ignore: int = -1) -> Tensor:
    """How many pixels of each class (row) were given each label (column), float64; of several batches they add up.

    Arguments and errors as in `segmentation`, but that nothing needs to be labelled.
    """
    labels = _labels(prediction, target)
    labelled = target != ignore
    predicted, present = labels[labelled].long(), target[labelled].long()
    for name, values in (("prediction", predicted), ("target", present)):
        if values.numel() and (values.min() < 0 or values.max() >= classes):
            raise ValueError(
                f"`{name}` holds label(s) outside 0..{classes - 1}: from {int(values.min())} to {int(values.max())}. "
                f"Is `classes={classes}` right, and is {ignore} the label of unlabelled pixels?"
            )
    return torch.bincount(present * classes + predicted, minlength=classes**2).view(classes, classes).double()


def overlap(confusion: Tensor) -> dict[str, float]:
    """The figures of `segmentation` from a `confusion` matrix."""
    if not confusion.any():
        raise ValueError("segmentation found no labelled pixel: every target equals `ignore`.")
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return {"miou": iou.nanmean().item(), "pixel_accuracy": (hits.sum() / confusion.sum()).item()}


def depth_errors(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """`absolute_error` (in the target's unit) and `relative_error` (error / target), means over all valid pixels.

    Both tensors have one shape; a pixel is valid where `target > 0`. Raises ValueError if none is.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target must have one shape; got {_shape(prediction)} and {_shape(target)}.")
    valid = target > 0
    if not valid.any():
        raise ValueError("depth_errors found no valid pixel: no target is above 0.")
    truth = target[valid].double()
    error = (prediction[valid].double() - truth).abs()
    return {"absolute_error": error.mean().item(), "relative_error": (error / truth).mean().item()}


def angle_errors(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Angles between two fields of directions [N, 3, ...], in degrees, pooled over all valid pixels.

    Returns `mean_angle`, `median_angle` (mean of the middle two for an even count) and the shares `within_11` (below
    11.25 degrees), `within_22` (22.5) and `within_30`. Lengths do not matter, except that a zero target marks an
    invalid pixel and a zero prediction counts as 90 degrees. Raises ValueError if no pixel is valid.
    """
    angles = valid_angles(prediction, target).sort().values
    if not len(angles):
        raise ValueError("angle_errors found no valid pixel: every target is the zero vector.")
    middle = angles[(len(angles) - 1) // 2] + angles[len(angles) // 2]
    return {
        "mean_angle": angles.mean().item(),
        "median_angle": middle.item() / 2,
        "within_11": (angles < 11.25).double().mean().item(),
        "within_22": (angles < 22.5).double().mean().item(),
        "within_30": (angles < 30.0).double().mean().item(),
    }


def valid_angles(prediction: Tensor, target: Tensor) -> Tensor:
    """The angles of `angle_errors`, one per valid pixel, float64."""
    if prediction.shape != target.shape or target.ndim < 2 or target.shape[1] != 3:
        raise ValueError(f"both fields must be [N, 3, ...]; got {_shape(prediction)} and {_shape(target)}.")
    found, truth = (x.movedim(1, -1).reshape(-1, 3).double() for x in (prediction, target))
    valid = truth.any(dim=-1)
    found, truth = (torch.nn.functional.normalize(x[valid], dim=-1) for x in (found, truth))
    # 2 atan2(|p - g|, |p + g|) is the angle of unit vectors; unlike arccos it keeps its digits near 0 and 180 degrees
    return torch.rad2deg(2 * torch.atan2((found - truth).norm(dim=-1), (found + truth).norm(dim=-1)))


def delta_m(
    values: Sequence[float],
    baseline: Sequence[float],
    higher_better: Sequence[bool],
    groups: Sequence[Hashable] | None = None,
    sign: Sign = "lower_better",
) -> float:
    """Average relative change against the single-task baseline, in percent.

    With the default `sign="lower_better"` (CAGrad, Nash-MTL, FAMO) it is a drop, negative where the method beats the
    baseline; `"higher_better"` (Maninis et al. 2019, LibMTL, CDTT) is its negative. `groups=None` averages over all
    metrics alike; a group per metric, usually its task, averages within each group first and then over the groups. That
    choice can change the ranking: state it, and the sign, beside every figure. The change is divided by |baseline|:
    the published formula for positive baselines, and better stays better for negative ones.

    Raises ValueError if the lengths differ, nothing is given, or a baseline is 0 or not finite.

    >>> round(delta_m([40.0, 0.55], [38.0, 0.5], [True, False]), 2)     # mIoU 5.26 % better, error 10 % worse
    2.37
    """
    if not len(values) == len(baseline) == len(higher_better) >= 1:
        raise ValueError(
            "delta_m needs one value, baseline and direction per metric, and at least one metric; "
            f"got {len(values)}, {len(baseline)} and {len(higher_better)}."
        )
    if sign not in ("lower_better", "higher_better"):
        raise ValueError(f"sign must be 'lower_better' or 'higher_better'; got {sign!r}.")
    for index, base in enumerate(baseline):
        if base == 0 or not math.isfinite(base):
            raise ValueError(
                f"baseline[{index}] is {base}, so a relative change is undefined. Did the single-task run fail? "
                "Otherwise leave this metric out of delta_m."
            )
    flip = sign == "higher_better"
    drops = [
        (-1.0 if higher != flip else 1.0) * 100 * (value - base) / abs(base)
        for value, base, higher in zip(values, baseline, higher_better, strict=True)
    ]
    return _mean(drops, groups)


def mean_rank(
    values: Sequence[Sequence[float]], higher_better: Sequence[bool], groups: Sequence[Hashable] | None = None
) -> list[float]:
    """Average rank of every method over the metrics; 1 is best.

    `values`: one row per method, one column per metric. Methods that tie share the mean of the ranks they cover
    ("average" ranks, not dense ones); a NaN ranks last. `groups` averages within groups first, as in `delta_m`.

    >>> mean_rank([[0.9, 3.0], [0.9, 2.0], [0.1, 1.0]], [True, False])
    [2.25, 1.75, 2.0]
    """
    if any(len(row) != len(higher_better) for row in values) or not higher_better:
        raise ValueError(f"mean_rank needs {len(higher_better)} values (and at least one) in every method's row.")
    ranks = []
    for column, higher in zip(zip(*values, strict=True), higher_better, strict=True):
        scores = [-math.inf if math.isnan(value) else value if higher else -value for value in column]
        ranks.append([1 + sum(x > s for x in scores) + (scores.count(s) - 1) / 2 for s in scores])
    return [_mean(row, groups) for row in zip(*ranks, strict=True)]


def _mean(values: Sequence[float], groups: Sequence[Hashable] | None) -> float:
    """Mean over the groups of the mean within each; without groups the plain mean."""
    if groups is None:
        return sum(values) / len(values)
    if len(groups) != len(values):
        raise ValueError(f"groups must name one group per metric; got {len(groups)} for {len(values)} metrics.")
    members: dict[Hashable, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        members.setdefault(group, []).append(value)
    return _mean([_mean(inside, None) for inside in members.values()], None)


def _labels(prediction: Tensor, target: Tensor) -> Tensor:
    """Labels in the shape of `target`, from logits [N, C, ...] or from labels."""
    labels = prediction.argmax(dim=1) if prediction.ndim == target.ndim + 1 else prediction
    if labels.shape != target.shape:
        raise ValueError(
            f"prediction must be labels of the target's shape {_shape(target)}, or logits with one more dimension, "
            f"the classes, in second place; got {_shape(prediction)}."
        )
    return labels


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
