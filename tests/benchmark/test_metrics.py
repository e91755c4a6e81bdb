"""Metrics against plain loops, hand-computed cases and published rows."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detente.benchmark.metrics import accuracy, angle_errors, delta_m, depth_errors, mean_rank, segmentation

# NYUv2, shared/benchmarks.md section 4: mIoU, pixel accuracy, absolute, relative, mean, median, <11, <22, <30
SINGLE = [38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15]
EQUAL = [39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08]
CAGRAD = [39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58]
NASH = [40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.40, 55.47, 68.15]
HIGHER = [True, True, False, False, False, False, True, True, True]
TASKS = ["segmentation"] * 2 + ["depth"] * 2 + ["normals"] * 5

values = st.floats(-1e3, 1e3)
baselines = values.filter(lambda x: abs(x) > 1e-3)
rows = st.lists(st.tuples(values, baselines, st.booleans()), min_size=1, max_size=9)


def test_accuracy_takes_logits_or_labels():
    logits = torch.tensor([[1.0, 2.0, 0.0], [5.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    target = torch.tensor([1, 0, 1, 1])
    assert accuracy(logits, target) == 0.75
    assert accuracy(logits.argmax(1), target) == 0.75
    with pytest.raises(ValueError, match="class"):
        accuracy(logits, torch.tensor([[1], [0], [1], [1]]).expand(4, 2))
    with pytest.raises(ValueError, match="empty"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


def test_segmentation_by_hand():
    target = torch.tensor([[[0, 0, 1], [1, -1, 0]]])
    found = torch.tensor([[[0, 1, 1], [1, 2, 0]]])  # the 2 lies on an unlabelled pixel
    # class 0: 2 hits, union 3; class 1: 2 hits, union 3; classes 2 and 3 are empty and left out
    assert segmentation(found, target, 4) == {"miou": pytest.approx(2 / 3), "pixel_accuracy": pytest.approx(4 / 5)}


def test_segmentation_matches_a_loop_over_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 6, 7, generator=generator)
    target = torch.randint(-1, 4, (5, 6, 7), generator=generator)
    hits, union, right, total = [0] * 4, [0] * 4, 0, 0
    for found, truth in zip(logits.argmax(1).flatten().tolist(), target.flatten().tolist(), strict=True):
        if truth == -1:
            continue
        total += 1
        right += found == truth
        for k in range(4):
            hits[k] += found == truth == k
            union[k] += k in (found, truth)
    expected = {
        "miou": statistics.mean(h / u for h, u in zip(hits, union, strict=True)),
        "pixel_accuracy": right / total,
    }
    assert segmentation(logits, target, 4) == pytest.approx(expected)  # the same counts, divided in float64


def test_segmentation_pools_the_whole_set():
    """One image all wrong, one all right: the pooled mIoU is not the mean of the images' mIoU."""
    target, found = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert segmentation(found, target, 2)["miou"] == pytest.approx((2 / 6 + 2 / 6) / 2)


def test_segmentation_names_bad_labels():
    good = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=r"`target` holds label\(s\) outside 0..1"):
        segmentation(good, torch.tensor([[0, 255]]), 2)
    with pytest.raises(ValueError, match=r"`prediction` holds"):
        segmentation(torch.tensor([[0, 5]]), good, 2)
    with pytest.raises(ValueError, match="no labelled pixel"):
        segmentation(good, torch.full((1, 2), -1), 2)


def test_depth_errors_leave_out_invalid_pixels():
    target, found = torch.tensor([[[[2.0, 0.0, 4.0]]]]), torch.tensor([[[[3.0, 9.0, 3.0]]]])
    assert depth_errors(found, target) == {"absolute_error": 1.0, "relative_error": (1 / 2 + 1 / 4) / 2}
    with pytest.raises(ValueError, match="no valid pixel"):
        depth_errors(found, torch.zeros_like(target))
    with pytest.raises(ValueError, match="one shape"):
        depth_errors(found[:, 0], target)


def test_angle_errors_of_known_rotations():
    degrees = [0.0, 5.0, 12.0, 25.0, 90.0, 180.0]
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    found = 3 * torch.stack([turn.sin(), torch.zeros_like(turn), turn.cos()])[None]  # length must not matter
    target = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[None, :, None].repeat(1, 1, len(degrees))
    expected = {"mean_angle": 52.0, "median_angle": 18.5, "within_11": 2 / 6, "within_22": 3 / 6, "within_30": 4 / 6}
    assert angle_errors(found, target) == pytest.approx(expected)  # float64 trigonometry

    hole = torch.cat([target, torch.zeros(1, 3, 1, dtype=torch.float64)], dim=2)
    assert angle_errors(torch.cat([found, target[:, :, :1]], dim=2), hole) == pytest.approx(expected)
    assert angle_errors(torch.zeros_like(found), target)["mean_angle"] == pytest.approx(90)


def test_angle_errors_match_a_loop_over_pixels():
    found, target = torch.randn(2, 2, 3, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = []
    for n in range(2):
        for i in range(5):
            for j in range(3):
                p, g = found[n, :, i, j].tolist(), target[n, :, i, j].tolist()
                cosine = sum(a * b for a, b in zip(p, g, strict=True)) / math.hypot(*p) / math.hypot(*g)
                angles.append(math.degrees(math.acos(cosine)))
    errors = angle_errors(found, target)
    # random directions are far from 0 and 180 degrees, where arccos would lose digits
    assert errors["mean_angle"] == pytest.approx(statistics.mean(angles))
    assert errors["median_angle"] == pytest.approx(statistics.median(angles))
    assert errors["within_30"] == sum(a < 30 for a in angles) / len(angles)


def test_angle_errors_keep_their_digits_near_zero():
    target = torch.tensor([[[0.0], [0.0], [1.0]]])
    tilted = torch.tensor([[[1e-4], [0.0], [1.0]]])  # arccos in float32 would return 0
    # the input itself is float32: 1e-4 is held to 6e-8 of its size
    assert angle_errors(tilted, target)["mean_angle"] == pytest.approx(math.degrees(1e-4), rel=1e-6)


def test_angle_errors_need_directions():
    with pytest.raises(ValueError, match="no valid pixel"):
        angle_errors(torch.ones(1, 3, 2), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match=r"\[N, 3"):
        angle_errors(torch.ones(1, 2, 3), torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    ("row", "flat", "per_task"),
    [(EQUAL, 5.59, -0.88), (CAGRAD, 0.194, -4.33), (NASH, -4.04, -7.65)],
    ids=["equal", "cagrad", "nash"],
)
def test_delta_m_of_published_rows(row: list[float], flat: float, per_task: float):
    # the published metrics carry four digits, their delta-m two decimals: one unit of the last is rounding
    assert delta_m(row, SINGLE, HIGHER) == pytest.approx(flat, abs=0.01)
    assert delta_m(row, SINGLE, HIGHER, groups=TASKS) == pytest.approx(per_task, abs=0.01)
    assert delta_m(row, SINGLE, HIGHER, sign="higher_better") == pytest.approx(-flat, abs=0.01)


@settings(deadline=None, derandomize=True)
@given(rows)
def test_delta_m_of_the_baseline_itself_is_zero(row: list[tuple[float, float, bool]]):
    _, baseline, higher = zip(*row, strict=True)
    assert delta_m(baseline, baseline, higher) == 0


@settings(deadline=None, derandomize=True)
@given(rows)
def test_delta_m_identities(row: list[tuple[float, float, bool]]):
    found, baseline, higher = zip(*row, strict=True)
    flat = delta_m(found, baseline, higher)
    assert delta_m(found, baseline, higher, sign="higher_better") == -flat
    assert delta_m(found, baseline, higher, groups=range(len(row))) == flat
    assert delta_m(found, baseline, higher, groups=["one"] * len(row)) == flat
    # scaling a metric's unit (here by a power of two, exact in floating point) changes nothing
    assert delta_m([8 * x for x in found], [8 * x for x in baseline], higher) == flat


@given(baselines, st.floats(1e-3, 1e3))
def test_better_is_a_negative_drop_whatever_the_sign_of_the_baseline(baseline: float, gain: float):
    assert delta_m([baseline + gain], [baseline], [True]) < 0
    assert delta_m([baseline - gain], [baseline], [False]) < 0


def test_groups_weigh_tasks_alike():
    # task a: +10 % and +30 % error, task b: -8 %
    found, baseline = [1.1, 1.3, 0.92], [1.0, 1.0, 1.0]
    assert delta_m(found, baseline, [False] * 3, groups="aab") == pytest.approx((20 - 8) / 2)
    assert delta_m(found, baseline, [False] * 3) == pytest.approx(32 / 3)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_delta_m_refuses_a_baseline_without_a_relative_change(bad: float):
    with pytest.raises(ValueError, match=r"baseline\[1\] is"):
        delta_m([1.0, 1.0], [1.0, bad], [True, True])


def test_delta_m_refuses_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="got 2, 1 and 2"):
        delta_m([1.0, 1.0], [1.0], [True, True])
    with pytest.raises(ValueError, match="at least one"):
        delta_m([], [], [])
    with pytest.raises(ValueError, match="got 1 for 2"):
        delta_m([1.0, 1.0], [1.0, 2.0], [True, True], groups=["a"])
    with pytest.raises(ValueError, match="sign"):
        delta_m([1.0], [1.0], [True], sign="up")  # type: ignore[arg-type]


def test_mean_rank_by_hand():
    table = [[0.9, 1.0, 5.0], [0.9, 2.0, 4.0], [0.5, 3.0, 3.0]]
    # ranks: 1.5 1.5 3 | 1 2 3 | 3 2 1
    assert mean_rank(table, [True, False, False]) == pytest.approx([5.5 / 3, 5.5 / 3, 7 / 3])
    assert mean_rank(table, [True, False, False], groups="aab") == pytest.approx([2.125, 1.875, 2.0])


def test_mean_rank_puts_failures_last():
    nan = float("nan")
    assert mean_rank([[nan], [0.1], [nan], [0.2]], [True]) == [3.5, 2.0, 3.5, 1.0]
    assert mean_rank([[nan], [0.1], [0.2]], [False]) == [3.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="every method"):
        mean_rank([[1.0, 2.0], [1.0]], [True, True])


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6))
def test_mean_ranks_average_to_the_middle(table: list[list[int]]):
    ranks = mean_rank(table, [True, False, True])
    # ties share ranks, so a metric's ranks always sum to n (n + 1) / 2; sums of thirds carry float64 rounding
    assert statistics.mean(ranks) == pytest.approx((len(table) + 1) / 2)
