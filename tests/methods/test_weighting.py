"""Rules on losses, metrics and chance against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detente
import matrices
from reference import directions, weighting

LOSSES = (10 ** matrices.normal(9, 3, 1)).tolist()  # nine steps of three positive losses


def weights(method, losses):
    return method.weights(torch.tensor(losses, dtype=torch.float64)).tolist()


def means(steps):
    return np.mean(steps, axis=0).tolist()


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_dwa(temperature):
    method = detente.DWA(temperature=temperature)
    past = []
    for epoch in range(3):
        for losses in LOSSES[3 * epoch : 3 * epoch + 3]:
            assert weights(method, losses) == pytest.approx(
                weighting.dwa(past, temperature) if past else [1.0] * 3, rel=1e-12
            )
        past.append(means(LOSSES[3 * epoch : 3 * epoch + 3]))
        method.next_epoch()
    assert weights(method, LOSSES[0]) == pytest.approx(weighting.dwa(past, temperature), rel=1e-12)


def test_dwa_ignores_the_unit_of_a_loss():
    one, other = detente.DWA(), detente.DWA()
    for losses in LOSSES:
        a, b = weights(one, losses), weights(other, [1000 * losses[0], losses[1], losses[2] / 7])
        assert a == pytest.approx(b, rel=1e-12)
        assert sum(a) == pytest.approx(3)
        one.next_epoch()
        other.next_epoch()


@pytest.mark.parametrize(("lr", "init"), [(0.025, 0.0), (0.1, -0.5)])
def test_uw(lr, init):
    method = detente.UW(lr=lr, init=init)
    for losses, expected in zip(LOSSES, weighting.uw(LOSSES, lr, init), strict=True):
        # the oracle's slope is a difference quotient, right to about 1e-11; Adam's first steps only use its sign
        assert weights(method, losses) == pytest.approx(expected, rel=1e-8)


def test_uw_tends_to_half_the_inverse_loss():
    method = detente.UW(lr=0.05)
    for _ in range(600):
        w = weights(method, [4.0, 0.25])
    assert w == pytest.approx([0.125, 2.0], rel=1e-2)  # Adam circles its goal at about lr


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_dtp(gamma):
    method = detente.DTP(gamma=gamma, momentum=0.3)
    assert weights(method, [1.0, 1.0]) == [1.0, 1.0]  # no figure yet
    average = {"0": 0.9, "1": 0.2}
    method.observe_metrics(average)
    for figures in ({"0": 0.5, "1": 0.4}, {"0": 0.7}, {"1": 0.95}):
        method.observe_metrics(figures)
        for task, k in figures.items():
            average[task] = 0.3 * k + 0.7 * average[task]
        expected = [weighting.dtp(average[t], gamma) for t in ("0", "1")]
        assert weights(method, [3.0, 0.1]) == pytest.approx(expected, rel=1e-12)


def test_dtp_edges_are_finite_and_monotone():
    w = []
    for k in (0.0, 0.1, 0.5, 0.9, 1.0):
        method = detente.DTP()
        method.observe_metrics({"0": k})
        w += weights(method, [1.0])
    assert np.isfinite(w).all()
    assert w == sorted(w, reverse=True)
    assert w[-1] == 0


def test_gls_weights_are_the_derivative_of_the_geometric_mean():
    for losses in LOSSES:
        assert weights(detente.GLS(), losses) == pytest.approx(weighting.gls(losses), rel=1e-12)
        leaves = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
        (leaves.prod() ** (1 / 3)).backward()
        assert weights(detente.GLS(), losses) == pytest.approx(leaves.grad.tolist(), rel=1e-10)
    assert all(np.isfinite(weights(detente.GLS(), [1e-200, 1e-200, 1e200])))


def test_gls_direction_does_not_see_loss_scales():
    J, s = matrices.random(3), torch.tensor([[3.0], [0.01], [700.0]], dtype=torch.float64)
    a = detente.aggregate(J, detente.GLS(), losses=LOSSES[0])
    scaled = s[:, 0] * torch.tensor(LOSSES[0], dtype=torch.float64)
    b = detente.aggregate(s * J, detente.GLS(), losses=scaled)
    assert torch.allclose(a / a.norm(), b / b.norm(), rtol=0, atol=1e-12)


def test_losses_that_are_not_positive_are_refused():
    for method in (detente.GLS(), detente.LossPower()):
        with pytest.raises(ValueError, match="positive"):
            weights(method, [1.0, 0.0])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_loss_power(gamma):
    method = detente.LossPower(gamma=gamma)
    expected = [1 / 3] * 3
    for epoch in range(3):
        for losses in LOSSES[3 * epoch : 3 * epoch + 3]:
            assert weights(method, losses) == pytest.approx(expected, rel=1e-12)
        method.next_epoch()
        expected = weighting.loss_power(means(LOSSES[3 * epoch : 3 * epoch + 3]), gamma)


def test_rlw_in_distribution():
    """log w_i - log w_j = z_i - z_j is normal with variance 2; the weights average to 1 / T."""
    method = detente.RLW(seed=5)
    w = np.array([weights(method, [1.0] * 4) for _ in range(4000)])
    assert np.abs(w.sum(1) - 1).max() <= 1e-12
    assert np.abs(w.mean(0) - 0.25).max() <= 4.5 * w.std() / np.sqrt(len(w))  # 4.5 sigma, seeded
    z = np.log(w[:, 0]) - np.log(w[:, 1])
    assert abs(z.mean()) <= 4.5 * np.sqrt(2 / len(z))
    assert abs(z.var() - 2) <= 4.5 * np.sqrt(8 / len(z))
    # a normal's fourth moment is 3 var^2, and z^4 has the variance 96 var^4
    assert abs((z**4).mean() - 12) <= 4.5 * np.sqrt(96 * 16 / len(z))


def test_weights_multiply_the_rows():
    J = matrices.random(3)
    for method in (detente.GLS(), detente.UW(init=0.3), detente.DWA(), detente.LossPower()):
        fresh = detente.get_method(method.name, **({"init": 0.3} if method.name == "uw" else {}))
        d = detente.aggregate(J, method, losses=LOSSES[0])
        expected = directions.gd(J.numpy(), np.array(weights(fresh, LOSSES[0])))
        assert np.allclose(d.numpy(), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
