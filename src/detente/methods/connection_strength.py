"""Connection strength-based optimization: learn which channels serve which task, then protect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from detente.gramian import Partition
from detente.method import Context, GramianMethod, Paper, Seeded, Session, Update, one_of
from detente.nn import TaskBatchNorm1d, TaskBatchNorm2d, TaskLayerNorm, TaskNorm, TaskRMSNorm
from detente.solvers import Array

__all__ = ["ConnectionStrength", "Pair"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_LAYERS = (*Convolution.__args__, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (TaskBatchNorm1d, TaskBatchNorm2d)
_TOKEN_NORMS = (TaskLayerNorm, TaskRMSNorm)


_OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class Pair:
    """A shared layer and the task norm that scales its channels.

    Attributes:
        name: where the layer and the norm are in the model.
        layer: convolution (transposed and grouped too) or linear layer.
        norm: the task norm behind the layer, or in front of it where ``form`` is ``"pre"``.
        form: ``"batch"`` (BatchNorm behind the layer), ``"post"`` (LayerNorm or RMSNorm behind a linear layer),
            ``"pre"`` (LayerNorm or RMSNorm in front of a linear layer: it scales input channels).
    """

    name: str
    layer: nn.Module
    norm: TaskNorm[Any]
    form: Literal["batch", "post", "pre"]

    @property
    def weight(self) -> Tensor:
        """The layer's weight."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def channels(self) -> tuple[tuple[int, ...], Tensor]:
        """Channel of every slice of the weight: ``(dims, index)`` over the dimensions ``dims``."""
        if self.form == "pre":
            return (1,), torch.arange(self.weight.shape[1])
        if isinstance(self.layer, _TRANSPOSED):
            inputs, outputs = self.weight.shape[:2]  # [in, out / groups, *kernel]
            group = torch.arange(inputs) // (inputs // self.layer.groups)
            return (0, 1), group[:, None] * outputs + torch.arange(outputs)
        return (0,), torch.arange(self.weight.shape[0])

    def strengths(self, tasks: Sequence[str]) -> Tensor:
        """Normalised connection strengths ``[tasks, channels]``, float64, each row summing to 1 (Eq. 4 to 7)."""
        dims, index = self.channels()
        others = tuple(d for d in range(self.weight.dim()) if d not in dims)
        squares = _whole(self.weight).double().square().sum(others).cpu()
        index = index.expand(squares.shape)
        connections = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
        connections.index_add_(0, index.reshape(-1), squares.reshape(-1))
        rows = []
        for task in tasks:
            norm = self.norm[task]
            strength = connections.clone()
            if norm.weight is not None:
                strength *= _whole(norm.weight).double().cpu().square()
            if self.form == "batch":
                strength /= norm.running_var.double().cpu() + norm.eps
            total = strength.sum()
            rows.append(strength / total if total > 0 else strength)
        return torch.stack(rows)


def _whole(parameter: Tensor) -> Tensor:
    """The values of a parameter, also where it is spread over processes."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter.detach() if gather is None else gather().detach()


def find_pairs(model: nn.Module) -> list[Pair]:
    """Pair shared layers with task norms by the order in which the modules were registered.

    A task BatchNorm belongs to the layer right before it with as many output channels. A task LayerNorm or RMSNorm
    belongs to the linear layer right before it when both are neighbours in one ``Sequential``, else to the linear
    layer right after it whose input it normalises (pre-norm), else to the linear layer right before it. Nothing is
    paired across or inside PyTorch's own attention and transformer layers, which register their parts in another order
    than they run; name those with ``pairs``.
    """
    kinds = _LAYERS + _BATCH_NORMS + _TOKEN_NORMS + _OPAQUE
    closed = [m for m in model.modules() if isinstance(m, (TaskNorm, *_OPAQUE))]
    inside = {id(part) for m in closed for part in m.modules() if part is not m}
    order = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and id(m) not in inside]
    pairs = []
    for k, (name, norm) in enumerate(order):
        if not isinstance(norm, TaskNorm):
            continue
        before = order[k - 1] if k else ("", None)
        after = order[k + 1] if k + 1 < len(order) else ("", None)
        behind = _LAYERS if isinstance(norm, _BATCH_NORMS) else (nn.Linear,)
        fits_before = isinstance(before[1], behind) and _fits(norm, _outputs(before[1]))
        fits_after = isinstance(after[1], nn.Linear) and _fits(norm, after[1].in_features)
        chosen: tuple[tuple[str, nn.Module | None], Literal["batch", "post", "pre"]] | None = None
        if isinstance(norm, _BATCH_NORMS):
            chosen = (before, "batch") if fits_before else None
        elif fits_before and (_neighbours(model, before[0], name) or not fits_after):
            chosen = (before, "post")
        elif fits_after:
            chosen = (after, "pre")
        if chosen is not None:
            (layer_name, layer), form = chosen
            assert layer is not None
            pairs.append(Pair(f"{layer_name or '(model)'} with {name}", layer, norm, form))
    return pairs


def _outputs(layer: nn.Module) -> int:
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert isinstance(outputs, int)
    return outputs


def _fits(norm: TaskNorm[Any], channels: int) -> bool:
    inner = norm[norm.tasks[0]]
    if isinstance(norm, _BATCH_NORMS):
        return bool(inner.num_features == channels and inner.running_var is not None)
    return tuple(inner.normalized_shape) == (channels,)


def _neighbours(model: nn.Module, first: str, second: str) -> bool:
    parent, _, a = first.rpartition(".")
    other, _, b = second.rpartition(".")
    return parent == other and isinstance(model.get_submodule(parent), nn.Sequential) and int(b) == int(a) + 1


class ConnectionStrength(Seeded, GramianMethod):
    """Connection strength: phase 1 learns which channels serve which task, phase 2 protects them.

    *Phase 1*: for each task in order, forward the batch, take the task's gradient alone and step the optimizer (Jeong
    and Yoon 2024, Eq. 9). *Phase 2*: the strength of an output channel for a task is ``gamma^2 / (var + eps)`` of the
    task's own norm times the sum of its squared weights, normalised over the layer's channels; the strongest task owns
    the channel (Eq. 4 to 10). In each layer and for each owner, every other task's gradient on the owner's channels
    loses its component against the owner's where they conflict; all gradients are then summed. Layers without a task
    norm, biases and norms get the plain sum, as does a layer whose channels all have one owner. By default each epoch e
    of E is a phase-1 epoch with probability ``1 - e / E`` (Algorithm 1), so that priorities are learned early and
    protected late. ::

        in every epoch e of E, with P ~ uniform(0, 1):
        phase 1, if P >= e / E:   for each task i:  theta <- theta - lr (gradient of L_i at the current theta)
        phase 2, else:            for each layer l and task i:
            S_ip  = gamma_ip^2 / (var_ip + eps) sum of W[p, ...]^2       divided by its sum over p
            C_i   = {channels p : S_ip is the largest over the tasks}
            v_j   = gradient of task j on the weights of C_i
            v_j  -= (v_j . v_i) / ||v_i||^2 v_i   where v_j . v_i < 0
            d on C_i = sum_j v_j

    Needs a trunk with one norm per task (:func:`detente.nn.convert_task_norm`), a forward pass per task under
    :func:`detente.nn.active_task`, and :func:`detente.step` unless ``phase=2``. Tell it the end of each epoch with
    :meth:`next_epoch`. ``print(method)`` shows which layers it paired with which norms.

    Task-specific parameters follow their own loss.

    Args:
        model: the network; its shared layers are read in every phase-2 step.
        epochs: length E of the training, for the mixed schedule.
        phase: 1 or 2 fixes the phase; None mixes.
        draw: draw the phase once per ``"epoch"`` (the paper) or per ``"batch"`` (the authors' example).
        pairs: ``[(layer, norm), ...]``, names or modules; None pairs them by the order of the modules. A LayerNorm or
            RMSNorm whose width is not the layer's output is taken as in front of the layer.
        seed: of the draws; the generator is part of the state.

    Raises:
        ValueError: no task norm could be paired, ``epochs`` is missing for the mixed schedule, or an option is out of
            range.

    Limits:
        In phase 1 each batch takes T optimizer steps, one task after the other: the last one has the last word, and
        Adam's moments mix all tasks. Owners are read in every step and the strongest task takes all, be it by a hair: a
        change of a norm's scale by 1% moved channels to another owner. Every task has norms of its own, so that
        inference too needs a pass through the trunk for each task.

    Example:
        >>> import torch, detente
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
        >>> trunk = detente.nn.convert_task_norm(trunk, ["a", "b"])
        >>> method = detente.ConnectionStrength(trunk, phase=2)
        >>> x, losses = torch.randn(8, 3), {}
        >>> for task in ("a", "b"):
        ...     with detente.nn.active_task(task):
        ...         losses[task] = trunk(x).square().mean()
        >>> sorted(detente.backward(losses, method).weights)
        ['a', 'b']
    """

    name = "connection_strength"
    paper = Paper(
        "jeong2024quantifying",
        "Quantifying Task Priority for Multi-Task Optimization",
        "Jeong, Wooseong and Yoon, Kuk-Jin",
        "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
        2024,
        "2406.02996",
    )
    kind = "schedule"
    needs = frozenset({"gramian", "model", "epochs"})
    backwards = "T, and T optimizer steps in phase 1"
    native_granularity = "layer"
    per_parameter = True
    exempt = {"all": "works on the channels of a model; tests/methods/test_connection_strength.py is its own suite"}  # noqa: RUF012
    state = ("generator", "epoch", "drawn")

    def __init__(
        self,
        model: nn.Module,
        epochs: int | None = None,
        phase: Literal[1, 2] | None = None,
        draw: Literal["epoch", "batch"] = "epoch",
        pairs: Sequence[tuple[str | nn.Module, str | nn.Module]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if phase not in (None, 1, 2):
            raise ValueError(f"phase must be None (mixed), 1 or 2; got {phase!r}.")
        if phase is None and (epochs is None or epochs < 1):
            raise ValueError(
                f"the mixed schedule needs the length of the training; got epochs={epochs!r}. "
                "Pass epochs=..., or fix phase=1 or phase=2."
            )
        self.epochs = epochs
        self.phase = phase
        self.draw = one_of("draw", draw, ("epoch", "batch"))
        self.pairs = tuple(find_pairs(model) if pairs is None else (_pair(model, *pair) for pair in pairs))
        if not self.pairs:
            raise ValueError(
                "no shared layer with a task norm was found in the model. Connection strength reads the priorities "
                "from one norm per task: call detente.nn.convert_task_norm(trunk, tasks) first, use "
                "detente.nn.TaskBatchNorm2d and its kin, or name the layers with pairs=[(layer, norm), ...]."
            )
        self.tasks = self.pairs[0].norm.tasks
        for pair in self.pairs:
            if set(pair.norm.tasks) != set(self.tasks):
                raise ValueError(f"{pair.name}: its tasks {pair.norm.tasks} are not those of the others {self.tasks}.")
        self.seed = seed
        self.start()

    @property
    def requires_step(self) -> bool:  # type: ignore[override]
        """True unless ``phase=2``."""
        return self.phase != 2

    def extra_repr(self) -> str:
        """The pairs of layers and norms."""
        return "\n".join(f"{pair.form}: {pair.name}" for pair in self.pairs)

    def start(self) -> None:
        super().start()
        self.epoch = 0
        self.drawn = 0  # phase drawn for this epoch, 0 before the draw

    def next_epoch(self) -> None:
        self.epoch += 1
        self.drawn = 0
        super().next_epoch()

    def sequential(self) -> bool:
        """Whether the coming step is of phase 1; draws the phase where the schedule is mixed."""
        if self.phase is not None:
            return self.phase == 1
        assert self.epochs is not None
        if self.draw == "batch" or self.drawn == 0:
            first = float(torch.rand((), generator=self.generator)) >= self.epoch / self.epochs
            self.drawn = 1 if first else 2
        return self.drawn == 1

    without_step = ", or fix phase=2"

    def why_step(self) -> str:
        return "its first phase runs one optimizer step per task."

    def take_step(self, session: Session) -> Update:
        before = self.get_extra_state()
        if not self.sequential():
            return super().take_step(session)
        try:
            return session.one_by_one(self.tasks)
        except Exception:
            if not session.descents:
                self.set_extra_state(before)  # nothing has been trained: the draw of the phase was for nothing
            raise

    def owners(self, pair: Pair) -> Tensor:
        """Position in ``self.tasks`` of the task that owns each channel of a layer (the first on a tie)."""
        strengths = pair.strengths(self.tasks)
        return (strengths == strengths.max(0).values).int().argmax(0)

    def partition(self, parameters: Sequence[Tensor], tasks: tuple[str, ...], granularity: str) -> Partition:
        """Blocks of channels with one owner: per layer (``"layer"``, the paper), per channel, or over the model."""
        one_of("granularity", granularity, ("model", "layer", "channel"))
        unknown = [t for t in tasks if t not in self.tasks]
        if unknown:
            raise ValueError(
                f"task {unknown[0]!r} has no norm in the model; the task norms know {list(self.tasks)}. "
                "Convert the trunk with the names that the losses have."
            )
        position = torch.tensor([tasks.index(t) if t in tasks else -1 for t in self.tasks])
        by_weight = {id(pair.weight): pair for pair in self.pairs}
        if not any(id(p) in by_weight for p in parameters):
            raise ValueError(
                "none of the paired layers' weights is a shared parameter of this step. Was the model copied or "
                "rebuilt after the method was built, or are these layers frozen? Build the method from the model you "
                "train."
            )
        owners = [-1]  # block 0: the plain sum
        if granularity == "model":
            owners += position.tolist()
        members: list[tuple[tuple[int, ...], Tensor]] = []
        for p in parameters:
            pair = by_weight.get(id(p))
            owner = None if pair is None else self.owners(pair)
            if pair is None or owner is None or bool((owner == owner[0]).all()):
                members.append(((), torch.tensor(0)))
                continue
            if granularity == "model":
                block = 1 + owner
            elif granularity == "layer":
                block = len(owners) + owner
                owners += position.tolist()
            else:
                block = len(owners) + torch.arange(len(owner))
                owners += position[owner].tolist()
            dims, index = pair.channels()
            members.append((dims, block[index]))
        return Partition(len(owners), tuple(members), torch.tensor(owners))

    def rule(self, gramian: Array, context: Context) -> Array:
        owners = None if context.partition is None else context.partition.owners
        if owners is None:
            raise ValueError(
                "connection_strength needs the blocks of a model's channels; use detente.backward or detente.step."
            )
        weights = np.ones(gramian.shape[:-1])
        owned = np.flatnonzero(owners.numpy() >= 0)
        owner = owners.numpy()[owned]
        row = gramian[owned, owner]  # products with the owner's gradient, [owned blocks, T]
        squared = row[np.arange(len(owned)), owner]
        against = np.minimum(row, 0).sum(1)  # the owner's own product is not negative
        positive = squared > 0
        weights[owned, owner] -= np.where(positive, against / np.where(positive, squared, 1.0), 0.0)
        context.stats["phase"] = 2
        context.stats["protected"] = int((against < 0).sum())
        return weights


def _pair(model: nn.Module, layer: str | nn.Module, norm: str | nn.Module) -> Pair:
    def resolve(what: str | nn.Module) -> tuple[str, nn.Module]:
        if isinstance(what, str):
            try:
                return what, model.get_submodule(what)
            except AttributeError:
                raise ValueError(f"pairs names {what!r}, which the model does not have.") from None
        return next((name for name, m in model.named_modules() if m is what), type(what).__name__), what

    (layer_name, found), (norm_name, scale) = resolve(layer), resolve(norm)
    if not isinstance(found, _LAYERS) or not isinstance(scale, _BATCH_NORMS + _TOKEN_NORMS):
        raise ValueError(
            f"pairs: expected a convolution or linear layer and a task norm; got {type(found).__name__} at "
            f"{layer_name!r} and {type(scale).__name__} at {norm_name!r}."
        )
    name = f"{layer_name} with {norm_name}"
    if isinstance(scale, _TOKEN_NORMS) and isinstance(found, nn.Linear) and not _fits(scale, found.out_features):
        if _fits(scale, found.in_features):
            return Pair(name, found, scale, "pre")
    elif _fits(scale, _outputs(found)):
        return Pair(name, found, scale, "batch" if isinstance(scale, _BATCH_NORMS) else "post")
    raise ValueError(
        f"pairs: {name} do not fit: the norm's width is not the layer's number of output channels"
        f"{', or it keeps no running variance' if isinstance(scale, _BATCH_NORMS) else ''}."
    )
