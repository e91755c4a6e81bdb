"""What every method of the registry must do, through the line that users write.

Each check runs for each method. Declared properties pick what is expected, in both directions: a method that declares a
property must have it on every sample, and one that declares its absence must show a counterexample, so that no check is
avoided by declaring too little. What cannot apply is named, with its reason, in the class's ``exempt``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import detente
import matrices
from detente.backward import Options
from detente.backward import run as take
from detente.method import GramianMethod, Method, method_class
from reference import geometry
from reference.agreement import EPS, assert_agrees, conditioning

METHODS = detente.list_methods()
NAMES = tuple("abcdefghijklmnopqrstuvwxyz")
CHECKS: dict[str, Callable[[str], None]] = {}


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    CHECKS[function.__name__] = function
    return function


class Given(torch.autograd.Function):
    """A loss with a given value and a given gradient, finite or not."""

    @staticmethod
    def forward(ctx, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, slope: Tensor):
        return slope * ctx.saved_tensors[0], None, None


def build(name: str, **options) -> Method:
    """A method past the point where it needs figures."""
    method = detente.get_method(name, **options)
    if "metrics" in method.needs:
        method.observe_metrics({task: 0.1 + 0.8 * k / 26 for k, task in enumerate(NAMES)})
    return method


def backward(given: dict[str, Tensor], method: Method, **options) -> detente.Update:
    """As ``detente.backward``, for methods in whatever phase."""
    return take(given, method, Options(**options))


def losses(T: int, step: int = 0) -> Tensor:
    return 10 ** matrices.normal(1, T, 100 + step)[0]


def update(method: Method, J: Tensor, L: Tensor, names: Sequence[str] = NAMES) -> Tensor:
    """One step of the method on tasks with these gradients and losses."""
    x = torch.nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype))
    given = {task: Given.apply(x, g, value) for task, g, value in zip(names, J, L, strict=False)}
    backward(given, method, shared=[x])
    if "losses after the step" in method.needs:
        method.after_step({task: 0.7 * float(v) + 0.01 * ord(task) for task, v in zip(names, L, strict=False)})
    return x.grad


def steps(T: int, count: int = 13) -> list[tuple[Tensor, Tensor]]:
    """More steps than any default window is long."""
    return [(matrices.conflicting(T, s), losses(T, s)) for s in range(count)]


def then_steps(J: Tensor, count: int = 13) -> list[tuple[Tensor, Tensor]]:
    """A run that begins with J, all on as many parameters (zeros are added)."""
    T = len(J)
    history = [(J, losses(T)), *steps(T, count)[1:]]
    width = max(K.shape[1] for K, _ in history)
    return [(torch.nn.functional.pad(K, (0, width - K.shape[1])), L) for K, L in history]


def run(method: Method, history, first: int = 0, names: Sequence[str] = NAMES) -> list[Tensor]:
    """Updates of a run; an epoch is two steps long."""
    updates = []
    for k, (J, L) in enumerate(history, first + 1):
        updates.append(update(method, J, L, names))
        if k % 2 == 0:
            method.next_epoch()
    return updates


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def terms(name: str, J: Tensor) -> float:
    """Length of what is added up: coefficients times row norms, of the first step."""
    x = torch.nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype))
    given = {task: Given.apply(x, g, v) for task, g, v in zip(NAMES, J, losses(len(J)), strict=False)}
    weights = backward(given, build(name), shared=[x]).weights
    n = geometry.norms(J.double().numpy())
    return float(sum(abs(float(w)) * size for w, size in zip(weights.values(), n, strict=True)))


def samples(sizes=(2, 3, 10), seeds=1):
    return [(matrices.SAMPLERS[s](T, seed), T) for s in matrices.SAMPLERS for T in sizes for seed in range(seeds)]


# ---------------------------------------------------------------------------------------------------------------------
# Symmetries


@check
def permutation(name: str) -> None:
    """The order in which the tasks are named does not matter (in distribution, for methods that draw)."""
    cls = method_class(name)
    if cls.stochastic:
        J, L = matrices.conflicting(3, 2), losses(3)
        order = [2, 0, 1]
        one = torch.stack([update(build(name, seed=s), J, L) for s in range(300)])
        names = [NAMES[k] for k in order]
        other = torch.stack([update(build(name, seed=s), J[order], L[order], names) for s in range(300, 600)])
        spread = (one.var(0) / 300 + other.var(0) / 300).sqrt()
        # means of 300 seeded draws: 5 standard errors
        assert ((one.mean(0) - other.mean(0)).abs() <= 5 * spread + 1e-12 * J.norm()).all()
        return
    broken = False
    for J, T in samples():
        history = then_steps(J, 13 if T <= 3 else 2)
        order = torch.randperm(T, generator=matrices.generator(T)) if T > 2 else torch.tensor([1, 0])
        plain = run(build(name), history)
        turned = run(build(name), [(K[order], L[order]) for K, L in history], names=[NAMES[k] for k in order])
        assert_agrees(turned[0], plain[0], terms=terms(name, J), T=T)
        # later steps amplify the rounding of earlier ones
        broken |= any(
            float((a - b).norm()) > 1e-6 * float(b.norm()) for a, b in zip(turned[1:], plain[1:], strict=True)
        )
    assert broken != cls.permutation_equivariant, "declared permutation_equivariant and found otherwise"


@check
def common_scale(name: str) -> None:
    """Scaling all gradients scales the update by a declared power."""
    declared = build(name).homogeneity
    found = set()
    for s in (2.0**-20, 2.0**20):  # exact in floating point
        for J, T in samples((1, 2, 3, 10)):
            if declared is not None:
                d, scaled = update(build(name), J, losses(T)), update(build(name), s * J, losses(T))
                assert_agrees(scaled / s**declared, d, terms=terms(name, J), T=T)
        for a, b in zip(run(build(name), steps(3)), run(build(name), [(s * J, L) for J, L in steps(3)]), strict=True):
            turned = float((a / a.norm() - b / b.norm()).norm())
            power = float((b.norm() / a.norm()).log2()) / np.log2(s)
            found.add(round(power, 6) + 0.0 if turned <= 1e-7 else "none")
    assert found == {round(declared, 6) + 0.0} if declared is not None else len(found) > 1 or found == {"none"}, (
        f"declared homogeneity {declared}, found {sorted(map(str, found))}"
    )


@check
def row_scale(name: str) -> None:
    """What scaling single gradients does, as declared; nothing at all explodes or freezes."""
    method = build(name)
    found = {"invariant", "direction", "linear"}
    kinds = ("random", "conflicting", "duplicated")
    for J, T in [(matrices.SAMPLERS[s](T, seed), T) for s in kinds for T in (2, 4) for seed in range(1)]:
        s = torch.tensor([2.0 ** (7 * (-1) ** i * (i + 1)) for i in range(T)], dtype=torch.float64)[:, None]
        history = then_steps(J)
        plain, scaled = run(build(name), history), run(build(name), [(s * K, L) for K, L in history])
        for a, b in zip(plain, scaled, strict=True):
            assert b.isfinite().all()
            # a direction counts up to its sign; those of sums that nearly cancel are known to fewer digits
            if float((a - b).norm()) > 1e-8 * float(a.norm()):
                found -= {"invariant"}
            if min(float((a / a.norm() - sign * b / b.norm()).norm()) for sign in (1, -1)) > 1e-6:
                found -= {"direction"}
        half, whole, twice = (
            run(build(name), [(torch.cat([K[:1] * f, K[1:]]), L) for K, L in history]) for f in (0.5, 1.0, 2.0)
        )
        for a, b, c in zip(half, whole, twice, strict=True):  # the step from 1 to 2 is twice that from 0.5 to 1
            if float((c - b - 2 * (b - a)).norm()) > 1e-7 * float(b.norm()):
                found -= {"linear"}
    found -= {"direction", "linear"} if "invariant" in found else set()
    assert found == set(method.row_scale), f"declared row_scale {method.row_scale!r}, found {sorted(found)}"


@check
def nonconflicting(name: str) -> None:
    """Every task gains, if declared; else some task loses somewhere."""
    declared = build(name).nonconflicting
    conflicts = 0
    for J, T in samples((1, 2, 3, 10), seeds=3):
        method = build(name)
        history = then_steps(J, 14 if T == 3 else 1)
        for (K, _), d in zip(history, run(method, history), strict=True):
            # each product u_i . d adds up terms of about this length, rounded at eps
            noise = 64 * T * EPS * (terms(name, K) + float(d.norm()))
            conflicts += bool(((K @ d) / K.norm(dim=1) < -noise).any())
    assert (conflicts == 0) == declared, f"declared nonconflicting={declared}, {conflicts} updates conflict"


# ---------------------------------------------------------------------------------------------------------------------
# Awkward gradients


@check
def single_task(name: str) -> None:
    J = matrices.random(1)
    method = build(name)
    for _, L in steps(1):
        d = update(method, J, L)
        along = float(d @ J[0] / J[0].norm())
        assert along > 0
        assert torch.allclose(d, along * J[0] / J[0].norm(), rtol=0, atol=1e-12 * along)  # a positive multiple of g_1


@check
def span(name: str) -> None:
    """The first update is a combination of the task gradients, if declared; else it leaves their span."""
    declared = method_class(name).spans
    outside = 0.0
    for J, T in samples((2, 3)):
        # the basis of badly scaled rows is known to eps times their ratio, so only even ones are looked at
        if J.shape[1] > T and J.norm(dim=1).max() < 1e3 * J.norm(dim=1).min():
            d = update(build(name), J, losses(T))
            size = float(J.norm()) + terms(name, J)
            basis = torch.linalg.svd(J.T, full_matrices=False)[0][:, : int(torch.linalg.matrix_rank(J))]
            outside = max(outside, float((d - basis @ (basis.T @ d)).norm()) / size)
    assert (outside <= 1e-9) == declared, f"declared spans={declared}, {outside:.1e} lies outside"


@check
def zero_rows(name: str) -> None:
    """A task with a zero gradient gets coefficient 0 (loss weightings do not look); all zero gives zero."""
    for zero in (0, 2):
        J, L = matrices.conflicting(3, 4).clone(), losses(3)
        J[zero] = 0
        x = torch.nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype))
        given = {task: Given.apply(x, g, v) for task, g, v in zip(NAMES, J, L, strict=False)}
        weights = backward(given, build(name), shared=[x]).weights
        assert x.grad.isfinite().all()
        if issubclass(method_class(name), GramianMethod):
            assert float(weights[NAMES[zero]]) == 0
        else:
            combined = sum(w * g for w, g in zip(weights.values(), J, strict=True))
            assert torch.allclose(x.grad, combined, rtol=0, atol=1e-12 * float(combined.norm()))  # a plain weighted sum
    for empty in (torch.zeros(3, 5, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)):
        assert not update(build(name), empty, losses(len(empty))).any()


@check
def zero_rows_do_not_count(name: str) -> None:
    """The others get what they would get without it; a loss weighting has no way to know."""
    for zero in (0, 2):
        J, L = matrices.conflicting(3, 4).clone(), losses(3)
        J[zero] = 0
        d = update(build(name), J, L)
        others = [t for t in range(3) if t != zero]
        names = [NAMES[t] for t in others]
        if not issubclass(method_class(name), GramianMethod):
            assert torch.equal(d, update(build(name), J, L))
            continue
        # the draws of two and of three tasks differ, so a method that draws may match any of its outcomes
        seeds = [{"seed": s} for s in range(40)] if method_class(name).stochastic else [{}]
        outcomes = [update(build(name, **s), J[others], L[others], names) for s in seeds]
        assert min(float((d - o).norm()) for o in outcomes) <= 1e-10 * float(J.norm())


@check
def absent_tasks(name: str) -> None:
    """Steps with some of the tasks, in any order and from any step on; a method without history does not notice."""
    method = build(name)
    for k, names in enumerate(("abc", "ca", "b", "cb", "abc", "bdca", "ad", "dcab")):
        rows, values = matrices.conflicting(4, 50 + k), losses(4, k)
        order = ["abcd".index(task) for task in names]
        d = update(method, rows[order], values[order], names)
        method.next_epoch()
        assert d.isfinite().all()
        assert d.any()
        if not (method.state or "losses" in method.needs):
            alone = update(build(name), rows[order], values[order], names)
            assert torch.allclose(d, alone, rtol=0, atol=1e-12 * float(rows.norm()))


@check
def awkward_gradients(name: str) -> None:
    """Duplicates, opposites, rank deficiency, scales of 1e-8 to 1e8: finite and of the right kind."""
    for J, T in samples((2, 3, 10), seeds=2):
        d = update(build(name), J, losses(T))
        assert d.shape == J[0].shape
        assert d.dtype == J.dtype
        assert d.isfinite().all()


@check
def duplicates(name: str) -> None:
    """Two copies of one task pull in its direction only; the update stays in the span of the distinct gradients."""
    g = matrices.normal(1, 8, 5)
    for J in (torch.cat([g, g]), torch.cat([g, g, g])):
        d = update(build(name), J, losses(len(J)))
        along = float(d @ g[0]) / float(g.norm())
        assert along > 0
        assert float((d - along * g[0] / g.norm()).norm()) <= 1e-9 * along


@check
def antiparallel(name: str) -> None:
    g = matrices.normal(1, 8, 6)
    J = torch.cat([g, -g])
    d = update(build(name), J, losses(2))
    across = d - (d @ g[0]) / (g[0] @ g[0]) * g[0]
    method = build(name)
    if method.spans:
        assert float(across.norm()) <= conditioning(0, terms(name, J), 2)
    assert float(d.norm()) <= 2 * terms(name, J)
    if isinstance(method, GramianMethod) and method.nonconflicting:  # nothing helps both
        assert float(d.norm()) <= conditioning(0, terms(name, J), 2)


@check
def rank_deficiency(name: str) -> None:
    """More tasks than parameters: the update is finite, repeatable and no longer than its terms."""
    for T, P in ((3, 1), (4, 2), (10, 4)):
        J = matrices.normal(T, P, 7)
        d = update(build(name), J, losses(T))
        assert d.isfinite().all()
        assert torch.equal(d, update(build(name), J, losses(T)))
        assert float(d.norm()) <= terms(name, J) * (1 + 1e-9)


@check
def non_finite_rows(name: str) -> None:
    """NaN out, no exception, and the history as if the step had not been."""
    for bad in (float("nan"), float("inf")):
        method, history = build(name), steps(3)
        run(method, history[:5])
        saved = method.state_dict()
        J = history[5][0].clone()
        J[1, 2] = bad
        d = update_without_after(method, J, history[5][1])
        assert d.isnan().any() or d.isinf().any()
        if isinstance(method, GramianMethod):  # loss weightings never see the gradients
            assert d.isnan().all()
            assert same(method.state_dict(), saved)


def update_without_after(method: Method, J: Tensor, L: Tensor) -> Tensor:
    x = torch.nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype))
    backward({t: Given.apply(x, g, v) for t, g, v in zip(NAMES, J, L, strict=False)}, method, shared=[x])
    return x.grad


@check
def non_finite_losses(name: str) -> None:
    """Under a gradient scaler: NaN out and the history untouched, for methods that read losses; else no influence."""
    method, history = build(name), steps(3)
    run(method, history[:5])
    saved = method.state_dict()
    x = torch.nn.Parameter(torch.zeros(history[5][0].shape[1], dtype=torch.float64))
    L = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    given = {t: Given.apply(x, g, v) for t, g, v in zip(NAMES, history[5][0], L, strict=False)}
    backward(given, method, shared=[x], scale=2.0)
    if "losses" in method.needs:
        assert x.grad.isnan().all()
        assert same(method.state_dict(), saved)


@check
def number_types(name: str) -> None:
    """Rows of any floating type: G is accumulated in float64, so only the rounding of J and of d remains."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for uneven in (False, True):
            scales = torch.tensor([[2.0**-6], [1.0], [2.0**6]]) if uneven else torch.ones(3, 1)
            J = (scales * matrices.conflicting(3, 1)).to(dtype)
            L = losses(3).to(dtype).double()
            d = update(build(name), J, L)
            assert d.dtype == dtype
            exact = update(build(name), J.double(), L)
            eps = torch.finfo(dtype).eps
            size = float(terms(name, J.double()))
            if name in ("moco", "db_mtl", "graddrop", "excess_mtl"):
                size *= 8  # these rewrite the rows in their own type before they combine them
            assert float((d.double() - exact).norm()) <= 8 * eps * size + 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# State


@check
def state_round_trip(name: str) -> None:
    """Saved to a file and loaded into a fresh instance, a run goes on as if nothing had happened, to the bit."""
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


@check
def saved_state_is_a_copy(name: str) -> None:
    method, history = build(name), steps(3)
    run(method, history[:6])
    saved = method.state_dict()
    expected = run(loaded(name, saved), history[6:], 6)
    run(method, history[6:], 6)
    assert all(map(torch.equal, run(loaded(name, saved), history[6:], 6), expected))


def loaded(name: str, saved) -> Method:
    method = detente.get_method(name)
    method.load_state_dict(saved)
    return method


@check
def foreign_state(name: str) -> None:
    other = "gd" if name != "gd" else "uw"
    with pytest.raises((ValueError, RuntimeError), match=r"does not belong|Unexpected key|Missing key"):
        detente.get_method(name).load_state_dict(build(other).state_dict())


@check
def declared_state(name: str) -> None:
    """What changes from step to step is declared in ``state``, and what is declared changes."""
    method = build(name)
    before = method.state_dict()
    run(method, steps(3))
    changes = not same(before, method.state_dict())
    if name == "dtp":
        changes |= method.figures != {}
    declared = any(m.state for m in method.modules() if isinstance(m, Method))
    assert changes == declared


@check
def reset(name: str) -> None:
    method, history = detente.get_method(name), steps(3)
    first = run(method, history)
    method.reset()
    assert same(method.state_dict(), detente.get_method(name).state_dict())
    assert all(map(torch.equal, run(method, history), first))


@check
def seeds(name: str) -> None:
    """Random choices come from the method's own seeded generator; without any, runs repeat to the bit."""
    history = steps(4)
    torch.manual_seed(1)
    stochastic = method_class(name).stochastic
    a = run(build(name, **({"seed": 7} if stochastic else {})), history)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = run(build(name, **({"seed": 7} if stochastic else {})), history)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, a, b))
    if stochastic:
        assert not all(map(torch.equal, a, run(build(name, seed=8), history)))


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


@check
def blocks(name: str) -> None:
    """Two layers with coefficients of their own are two methods, one per layer, history included."""
    method = build(name)
    if not isinstance(method, GramianMethod):
        x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        with pytest.raises(ValueError, match="granularity"):
            backward({"a": x.sum(), "b": x.sum()}, method, granularity="layer")
        return
    options = {"heads": "own"} if method.heads == "weighted" else {}
    together, apart = build(name, **options), [build(name, **options) for _ in range(2)]
    kinds = ("random", "conflicting", "row_scaled")
    for step in range(12):
        L = losses(3, step)
        parts = [matrices.SAMPLERS[kinds[(step + b) % 3]](3, 7 * step + b) for b in range(2)]
        parts = [torch.nn.functional.pad(J, (0, 12 - J.shape[1])) for J in parts]
        layers = [torch.nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype)) for J in parts]
        given = {
            task: sum(Given.apply(x, J[t], L[t] / 2) for x, J in zip(layers, parts, strict=True))
            for t, task in enumerate("abc")
        }
        if method_class(name).stochastic:
            for alone in apart:
                alone.generator.set_state(together.generator.get_state())  # both blocks see one draw
        backward(given, together, granularity="layer")
        for x, J, alone in zip(layers, parts, apart, strict=True):
            expected = update(alone, J, L)
            n = torch.from_numpy(geometry.norms(J.numpy()))
            assert_agrees(x.grad, expected, terms=float(n.sum()) + float(expected.norm()), T=3)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", CHECKS)
def test_conforms(name: str, what: str) -> None:
    exempt = method_class(name).exempt
    reason = exempt.get("all", exempt.get(what))
    if reason is not None:
        pytest.skip(f"exempt: {reason}")
    CHECKS[what](name)


@pytest.mark.parametrize("name", METHODS)
def test_declarations(name: str) -> None:
    cls = method_class(name)
    assert cls.name == name
    assert cls.paper.title
    assert cls.paper.year >= 1997
    assert detente.cite(name).startswith("@")
    assert cls.kind in {"gramian", "jacobian", "losses", "schedule"}
    assert cls.heads in {"own", "weighted"}
    assert cls.needs <= {"gramian", "losses", "losses after the step", "metrics", "epochs", "model"}
    assert issubclass(cls, GramianMethod) == ("gramian" in cls.needs)
    assert set(cls.exempt) <= {*CHECKS, "all"}, "exempt names no known check"
    assert all(len(reason) > 10 for reason in cls.exempt.values())
    assert cls.memory
    doc = cls.__doc__ or ""
    assert "Example:" in doc
    assert str(cls.paper.year) in doc or name in ("gd", "imtl_l"), "the docstring names the paper"
    assert np.isscalar(cls.paper.year)
