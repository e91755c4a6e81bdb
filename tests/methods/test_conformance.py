"""What every method of the registry must do; the properties a class declares pick its checks."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

import detente
import matrices
from reference import geometry
from reference.agreement import EPS, assert_agrees

CLASSES = {n: c for n in detente.list_methods() if "model" not in (c := detente.method.method_class(n)).needs}
GRAMIAN = [name for name, cls in CLASSES.items() if issubclass(cls, detente.GramianMethod)]
LOSSES = [name for name in CLASSES if name not in GRAMIAN]
EQUIVARIANT = [n for n, c in CLASSES.items() if c.permutation_equivariant and not c.stochastic]

every_method = pytest.mark.parametrize("name", CLASSES)
every_gramian_method = pytest.mark.parametrize("name", GRAMIAN)


def build(name: str, **options):
    """A method past the point where it needs figures; connection strength has a suite of its own (it needs a model)."""
    method = detente.get_method(name, **options)
    if "metrics" in method.needs:
        method.observe_metrics({str(t): 0.1 + 0.8 * t / 40 for t in range(41)})
    return method


def losses(T: int, step: int = 0) -> torch.Tensor:
    return 10 ** matrices.normal(1, T, 100 + step)[0]


def steps(T: int, count: int = 13):
    """More steps than any default window is long."""
    return [(matrices.conflicting(T, s), losses(T, s)) for s in range(count)]


def run(method, history, first: int = 0):
    """Updates of a run; an epoch is four steps long."""
    updates = []
    for k, (J, L) in enumerate(history, first + 1):
        updates.append(detente.aggregate(J, method, losses=L))
        if k % 4 == 0:
            method.next_epoch()
    return updates


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def terms(method, J) -> float:
    """Length of what is added up: coefficients times row norms."""
    n = geometry.norms(J.numpy())
    if isinstance(method, detente.GramianMethod):
        context = detente.method.Context(tuple(map(str, range(len(J)))), losses=losses(len(J)))
        a = method.weights(J @ J.T, context).abs().numpy()
        return float(a @ n)
    return float(n.sum())


def test_declarations():
    for name in detente.list_methods():
        cls = detente.method.method_class(name)
        assert cls.name == name
        assert cls.paper.title
        assert cls.paper.year >= 1997
        assert detente.cite(name).startswith("@")
        assert isinstance(cls.stochastic, bool)
        assert isinstance(cls.nonconflicting, bool)
        assert isinstance(cls.permutation_equivariant, bool)
        assert cls.homogeneity is None or isinstance(cls.homogeneity, float)
        assert isinstance(cls.needs, frozenset)
        assert issubclass(cls, detente.GramianMethod) == ("gramian" in cls.needs)


@every_method
@pytest.mark.parametrize("T", [2, 3, 10])
@pytest.mark.parametrize("sampler", matrices.SAMPLERS)
def test_awkward_gradients_give_a_finite_update(name, T, sampler):
    J = matrices.SAMPLERS[sampler](T, 1)
    d = detente.aggregate(J, build(name), losses=losses(T))
    assert d.shape == J[0].shape
    assert d.dtype == J.dtype
    assert d.isfinite().all()


@pytest.mark.parametrize("name", EQUIVARIANT)
@pytest.mark.parametrize("sampler", matrices.SAMPLERS)
def test_permutation(name, sampler):
    for T in (2, 3, 10):
        J, L = matrices.SAMPLERS[sampler](T, 2), losses(T)
        order = torch.randperm(T, generator=matrices.generator(T))
        if T == 2:
            order = torch.tensor([1, 0])
        one, other = build(name), build(name)
        if "metrics" in one.needs:
            other.reset()
            other.observe_metrics({str(k): one.figures[str(int(order[k]))] for k in range(T)})
        d = detente.aggregate(J, one, losses=L)
        assert_agrees(detente.aggregate(J[order], other, losses=L[order]), d, terms=terms(build(name), J), T=T)


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if c.homogeneity is not None])
@pytest.mark.parametrize("s", [1e-6, 1e6])
@pytest.mark.parametrize("sampler", matrices.SAMPLERS)
def test_common_scale(name, s, sampler):
    for T in (1, 2, 3, 10):
        J, L = matrices.SAMPLERS[sampler](T, 3), losses(T)
        method = build(name)
        d = detente.aggregate(J, method, losses=L)
        scaled = detente.aggregate(s * J, build(name), losses=L) / s**method.homogeneity
        assert_agrees(scaled, d, terms=terms(build(name), J), T=T)


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if c.nonconflicting])
@pytest.mark.parametrize("sampler", matrices.SAMPLERS)
def test_declared_nonconflicting(name, sampler):
    for T in (1, 2, 3, 10, 40):
        for seed in range(3):
            J = matrices.SAMPLERS[sampler](T, seed)
            d = detente.aggregate(J, build(name), losses=losses(T))
            # each product u_i . d adds up terms of this length, rounded at eps
            assert ((J @ d) / J.norm(dim=1) >= -32 * T * EPS * terms(build(name), J)).all()


@every_method
def test_a_single_task(name):
    J = matrices.random(1)
    method = build(name)
    for _, L in steps(1):
        d = detente.aggregate(J, method, losses=L)
        along = float(d @ J[0] / J[0].norm())
        assert along > 0
        assert torch.allclose(d, along * J[0] / J[0].norm(), rtol=0, atol=1e-12 * along)  # a positive multiple of g_1


@every_gramian_method
@pytest.mark.parametrize("zero", [0, 2])
def test_zero_rows(name, zero):
    J, L = matrices.conflicting(3, 4).clone(), losses(3)
    J[zero] = 0
    others = [t for t in range(3) if t != zero]
    method = build(name)
    context = detente.method.Context(("0", "1", "2"), losses=L)
    assert method.weights(J @ J.T, context)[zero] == 0
    d = detente.aggregate(J, build(name), losses=L)
    # a random order may differ between two and three tasks, so a stochastic method may match any of its outcomes
    seeds = range(10) if CLASSES[name].stochastic else [None]
    outcomes = [
        detente.aggregate(J[others], build(name, **({} if s is None else {"seed": s})), losses=L[others]) for s in seeds
    ]
    assert min(float((d - o).norm()) for o in outcomes) <= 1e-10 * float(J.norm())
    kept = detente.aggregate(J, build(name, zero_rows="keep"), losses=L)
    assert kept.isfinite().all()
    if name in ("mgda", "edm"):
        assert not kept.any()


@every_method
def test_all_gradients_zero(name):
    for options in [{}] + ([{"zero_rows": "keep"}] if name in GRAMIAN else []):
        d = detente.aggregate(torch.zeros(3, 5, dtype=torch.float64), build(name, **options), losses=losses(3))
        assert not d.any()


@every_method
def test_antiparallel_pair(name):
    J = matrices.antiparallel(2)[[0, 0]] * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    d = detente.aggregate(J, build(name), losses=losses(2))
    assert d.isfinite().all()
    if name in ("mgda", "edm", "cagrad", "pcgrad", "cdtt"):
        assert d.norm() <= 1e-12 * J.norm()
    elif name == "wpcgrad":  # the task drawn first stays, the other loses everything
        assert min(float((d - g).norm()) for g in J) <= 1e-12 * float(J.norm())


@every_method
def test_state_loads_into_a_fresh_instance(name):
    history = steps(3)
    for cut in (0, 1, 6, 11):
        method = build(name)
        run(method, history[:cut])
        buffer = io.BytesIO()
        torch.save(method.state_dict(), buffer)
        buffer.seek(0)
        fresh = detente.get_method(name)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert same(fresh.state_dict(), method.state_dict())
        for a, b in zip(run(method, history[cut:], cut), run(fresh, history[cut:], cut), strict=True):
            assert torch.equal(a, b)


@every_method
def test_saved_state_does_not_follow_the_method(name):
    method, history = build(name), steps(3)
    run(method, history[:6])
    saved = method.state_dict()
    expected = run(build_from(name, saved), history[6:], 6)
    run(method, history[6:], 6)
    assert all(map(torch.equal, run(build_from(name, saved), history[6:], 6), expected))


def build_from(name, saved):
    method = detente.get_method(name)
    method.load_state_dict(saved)
    return method


@every_method
def test_a_foreign_state_is_refused(name):
    other = "gd" if name != "gd" else "uw"
    with pytest.raises(ValueError, match="does not belong"):
        detente.get_method(name).load_state_dict(build(other).state_dict())


@every_method
def test_reset_makes_it_new(name):
    method, history = detente.get_method(name), steps(3)
    first = run(method, history)
    method.reset()
    assert same(method.state_dict(), detente.get_method(name).state_dict())
    assert all(map(torch.equal, run(method, history), first))


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if c.stochastic])
def test_seeds(name):
    history = steps(4)
    torch.manual_seed(1)
    a = run(detente.get_method(name, seed=7), history)
    torch.manual_seed(2)  # the global generator has no part in it
    before = torch.get_rng_state()
    b = run(detente.get_method(name, seed=7), history)
    assert torch.equal(torch.get_rng_state(), before)
    c = run(detente.get_method(name, seed=8), history)
    assert all(map(torch.equal, a, b))
    assert not all(map(torch.equal, a, c))


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if not c.stochastic])
def test_not_stochastic_means_repeatable(name):
    assert all(map(torch.equal, run(build(name), steps(3)), run(build(name), steps(3))))


@every_gramian_method
@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_blocks_equal_a_serial_loop(name, T):
    def sample(step, i, j):
        kind = ("random", "conflicting", "low_rank", "duplicated", "antiparallel", "row_scaled")[(3 * i + j + step) % 6]
        J = matrices.SAMPLERS[kind](T, 7 * step + 3 * i + j)
        return J @ J.T

    batched = build(name)
    serial = [[build(name) for _ in range(3)] for _ in range(2)]
    tasks = tuple(map(str, range(T)))
    for step in range(12):
        context = detente.method.Context(tasks, losses=losses(T, step))
        G = torch.stack([torch.stack([sample(step, i, j) for j in range(3)]) for i in range(2)])
        a = batched.weights(G, context)
        assert a.shape == (2, 3, T)
        for i in range(2):
            for j in range(3):
                alone = serial[i][j].weights(G[i, j], context)
                # the same arithmetic up to the order of sums
                assert torch.allclose(a[i, j], alone, rtol=1e-9, atol=1e-12 * float(alone.abs().max()))


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients(name, bad):
    method, history = build(name), steps(3)
    run(method, history[:5])
    saved = method.state_dict()
    J = history[5][0].clone()
    J[1, 2] = bad
    d = detente.aggregate(J, method, losses=history[5][1])
    assert d.isnan().all()
    if name in GRAMIAN:  # loss weightings never see the gradients
        assert same(method.state_dict(), saved)


@pytest.mark.parametrize("name", [n for n, c in CLASSES.items() if "losses" in c.needs])
def test_non_finite_losses(name):
    method, history = build(name), steps(3)
    run(method, history[:5])
    saved = method.state_dict()
    d = detente.aggregate(history[5][0], method, losses=[1.0, float("nan"), 2.0])
    assert d.isnan().all()
    assert same(method.state_dict(), saved)
    with pytest.raises(ValueError, match="losses"):
        detente.aggregate(history[5][0], method)
    assert same(method.state_dict(), saved)


@every_method
def test_float32_rows(name):
    """G is accumulated in float64, so only the rounding of J and of d remains."""
    J, L = matrices.conflicting(3, 1).float(), losses(3)
    d = detente.aggregate(J, build(name), losses=L)
    assert d.dtype == torch.float32
    exact = detente.aggregate(J.double(), build(name), losses=L)
    assert (d.double() - exact).norm() <= 8 * np.finfo(np.float32).eps * terms(build(name), J.double())


@every_method
def test_inputs_are_left_alone(name):
    J, L = matrices.conflicting(3, 1), losses(3)
    copies = J.clone(), L.clone()
    run(build(name), [(J, L)] * 12)
    assert torch.equal(J, copies[0])
    assert torch.equal(L, copies[1])
