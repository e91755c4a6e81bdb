"""CDTT against the angle form with explicit vectors, over runs long enough to fill its windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import detente
import matrices
from detente.method import Context
from reference import directions, geometry, tensioner
from reference.agreement import assert_agrees


def run(name: str, T: int, steps: int, seed: int = 0):
    """Gradients that change from step to step, and losses from 0.1 to 10."""
    losses = 10 ** (2 * torch.rand(steps, T, generator=matrices.generator(seed), dtype=torch.float64) - 1)
    return [(matrices.SAMPLERS[name](T, seed + 10 * t), losses[t]) for t in range(steps)]


def compare(history, **options):
    expected = tensioner.cdtt([(J.numpy(), losses.tolist()) for J, losses in history], **options)
    method = detente.CDTT(**options)
    for (J, losses), d in zip(history, expected, strict=True):
        T = len(losses)
        actual = detente.aggregate(J, method, losses=losses)
        # the tensions have lengths of their own, below 1 (or alpha) per task
        assert_agrees(actual, d, terms=geometry.norms(J.numpy()).mean() + T, T=T)


@pytest.mark.parametrize("name", ["random", "conflicting", "duplicated", "low_rank"])
@pytest.mark.parametrize("T", [1, 3, 10, 40])
def test_over_a_run(name, T):
    compare(run(name, T, 14))


@pytest.mark.parametrize("name", ["random", "conflicting"])
@pytest.mark.parametrize("T", [2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("tension_scale", ["absolute", "relative"])
def test_options(name, T, alpha, tension_scale):
    for scale in (0.02, 1.0):  # small gradients: the tensions rule and the feasibility pass has work
        history = [(scale * J, losses) for J, losses in run(name, T, 8, seed=1)]
        compare(history, alpha=alpha, window=3, tension_scale=tension_scale)


@pytest.mark.parametrize("T", [2, 3, 5])
def test_passes_until_feasible(T):
    history = [(0.02 * J, losses) for J, losses in run("random", T, 12, seed=2)]
    compare(history, window=2, passes="until_feasible")
    method = detente.CDTT(window=2, passes="until_feasible")
    for J, losses in history:
        d = detente.aggregate(J, method, losses=losses)
        assert ((J @ d) / J.norm(dim=1) >= -1e-9 * d.norm()).all()


def test_row_scales_before_the_windows_are_full():
    for J, losses in run("row_scaled", 3, 5):
        beta, d = directions.edm(J.numpy())
        actual = detente.aggregate(J, detente.CDTT(), losses=losses)
        assert_agrees(actual, d, terms=beta @ geometry.norms(J.numpy()), T=3)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3, 1e8])
def test_row_scales_with_tension(scale):
    scales = torch.tensor([[1.0], [scale], [3.0]], dtype=torch.float64)
    history = [(scales * J, losses) for J, losses in run("random", 3, 6)]
    compare(history, window=2)


def test_tensions_start_once_two_windows_are_full():
    history = run("random", 3, 12)
    method = detente.CDTT()
    for call, (J, losses) in enumerate(history, 1):
        d = detente.aggregate(J, method, losses=losses)
        centre = directions.edm(J.numpy())[1]
        assert (np.linalg.norm(d.numpy() - centre) > 1e-3) == (call >= 11)


def test_a_vanishing_loss_pulls_least():
    history = [(J, losses.clone()) for J, losses in run("random", 3, 6)]
    for _, losses in history:
        losses[0] = 0.0
    compare(history, window=2)


def test_a_zero_gradient_is_left_out_and_enters_its_window():
    history = [(J.clone(), losses) for J, losses in run("random", 3, 9)]
    for t in (1, 2, 3, 6):
        history[t][0][1] = 0
    compare(history, window=2)


def test_negative_losses_are_refused():
    J, method = matrices.random(2), detente.CDTT()
    with pytest.raises(ValueError, match="negative"):
        detente.aggregate(J, method, losses=[1.0, -0.5])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from([0.01, 1.0]))
def test_invariants(seed, T, scale):
    method = detente.CDTT(window=1)
    for t in range(3):
        J = scale * matrices.random(T, seed + t)
        losses = torch.ones(T, dtype=torch.float64)
        d = detente.aggregate(J, method, losses=losses)
        after = detente.CDTT(window=1)
        after.load_state_dict(method.state_dict())
        a = after.weights(J @ J.T, detente.method.Context(tuple(map(str, range(T))), losses=losses))
        assert abs(float(a.sum()) - 1) <= 1e-9 * float(a.abs().sum())
    products = (J @ d) / J.norm(dim=1)
    assert products[-1] >= -1e-9 * d.norm()  # a conflict of the last task would have been fixed last


def test_equal_tensions_of_two_tasks_cancel():
    """T = 2: b lies between g_1 and g_2, so equal tensions pull it with opposite unit vectors."""
    method = detente.CDTT(alpha=0.0, window=1)
    for t in range(4):
        J = matrices.conflicting(2, t) * torch.tensor([[1.0], [30.0]])
        d = detente.aggregate(J, method, losses=[1.0, 5.0])
        assert_agrees(d, directions.edm(J.numpy())[1], terms=geometry.norms(J.numpy()).max(), T=2)


def test_blocks_with_different_zero_rows_are_tensioned_by_their_own_history():
    """Layer by layer: a task that misses one layer must not shift the histories of the other layers' blocks."""
    together, alone = detente.CDTT(window=2), [detente.CDTT(window=2) for _ in range(3)]
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    context = Context(("a", "b", "c"), losses=losses)
    for step in range(5):
        J = torch.stack([0.1 * (1 + block) * matrices.normal(3, 8, 10 * step + block) for block in range(3)])
        J[1, 2] = 0.0  # the second block's last task, in every step
        G = J @ J.transpose(1, 2)
        expected = torch.stack([method.weights(g, context) for method, g in zip(alone, G, strict=True)])
        # the same operations in the same order, block by block
        torch.testing.assert_close(together.weights(G, context), expected, rtol=1e-12, atol=1e-12)
