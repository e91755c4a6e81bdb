"""What methods share: the registry, citations, weights over blocks, state of nested ones, and their parts.

What every single method must do is in ``methods/test_conformance.py``.
"""

from __future__ import annotations

import inspect
import io
import math

import pytest
import torch
from torch import Tensor

import detente
from detente.method import Context, Paper, TaskHistory, TaskScalars, TaskWeights, method_class, normalized
from states import plain

# built without arguments: a method that works on the layers of a model needs the model
METHODS = {n: detente.get_method(n) for n in detente.list_methods() if "model" not in method_class(n).needs}
GRAMIAN = [name for name, m in METHODS.items() if isinstance(m, detente.GramianMethod)]
WEIGHTINGS = [name for name in METHODS if name not in GRAMIAN]
# those that rewrite the rows get Gramians of rewritten rows only, from a step
RULES = [name for name in GRAMIAN if not METHODS[name].transforms]


def having(option: str, among: list[str]) -> list[str]:
    return [name for name in among if option in inspect.signature(method_class(name)).parameters]


def gramian(T: int = 3, seed: int = 0) -> Tensor:
    J = torch.randn(T, T + 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return J @ J.T


def drive(method: detente.Method, steps: int, first: int = 0, tasks: tuple[str, ...] = ("a", "b", "c")) -> list[Tensor]:
    """Coefficients of some steps, with an end of epoch every third."""
    result = []
    for k in range(first, first + steps):
        losses = torch.rand(len(tasks), dtype=torch.float64, generator=torch.Generator().manual_seed(k)) + 0.1
        context = Context(tasks, losses=losses)
        if isinstance(method, detente.GramianMethod):
            result.append(method.weights(gramian(len(tasks), k), context))
        else:
            result.append(method.weights(losses, context))
        if k % 3 == 2:
            method.next_epoch()
    return result


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- registry --------------------------------------------------------------------------------------------------


def test_names_of_the_methods():
    names = detente.list_methods()
    assert names == sorted(set(names))
    for name in (
        "gd", "mgda", "edm", "cagrad", "pcgrad", "wpcgrad", "cdtt", "connection_strength",
        "dwa", "uw", "dtp", "rlw", "gls", "loss_power",
    ):  # fmt: skip
        assert name in names


@pytest.mark.parametrize("name", METHODS)
def test_a_name_builds_the_class_that_detente_exports(name):
    method = detente.get_method(name)
    assert method.name == name
    assert getattr(detente, type(method).__name__) is type(method)
    assert isinstance(method, torch.nn.Module)


@pytest.mark.parametrize("spelling", ["cagrad", "CAGrad", " CAGRAD "])
def test_case_and_space_do_not_matter(spelling):
    assert isinstance(detente.get_method(spelling), detente.CAGrad)


def test_dashes_are_underscores_and_options_are_handed_on():
    assert detente.get_method("loss-power", gamma=3.0).gamma == 3.0
    assert detente.get_method("cagrad", c=0.4, rescale=1).rescale == 1


@pytest.mark.parametrize(
    ("typo", "meant"), [("cagard", "cagrad"), ("pc_grad", "pcgrad"), ("mdga", "mgda"), ("cttd", "cdtt")]
)
def test_a_misspelt_name_gets_a_suggestion_and_the_list(typo, meant):
    with pytest.raises(ValueError, match=f"unknown method '{typo}'. Did you mean '{meant}'.*uw"):
        detente.get_method(typo)


def test_a_name_like_no_other_gets_the_list_alone():
    with pytest.raises(ValueError, match=rf"unknown method 'qqq'\. Known methods: {', '.join(detente.list_methods())}"):
        detente.get_method("qqq")


@pytest.mark.parametrize("name", detente.list_methods())
def test_citations(name):
    text, paper = detente.cite(name), method_class(name).paper
    lines = text.splitlines()
    venue = {"inproceedings": "booktitle", "article": "journal", "misc": "howpublished"}[paper.entry]
    assert lines[0] == f"@{paper.entry}{{{paper.key},"
    assert lines[-1] == "}"
    for field in ("title", "author", venue, "year"):
        assert sum(line.strip().startswith(f"{field} = {{") for line in lines) == 1
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("entry", "venue"), [("inproceedings", "booktitle"), ("article", "journal"), ("misc", "howpublished")]
)
def test_citation_of_an_arxiv_paper(entry, venue):
    paper = Paper("key2024word", "A Title", "Last, First and Other, Name", "Venue", 2024, "2401.00001", entry)
    assert paper.bibtex().splitlines() == [
        f"@{entry}{{key2024word,",
        "  title = {A Title},",
        "  author = {Last, First and Other, Name},",
        f"  {venue} = {{Venue}},",
        "  year = {2024},",
        "  eprint = {2401.00001},",
        "  archivePrefix = {arXiv}",
        "}",
    ]
    assert "eprint" not in Paper("k", "t", "a", "v", 2024).bibtex()


# ---- weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("blocks", [(), (4,), (2, 3), (0,)])
def test_weights_take_any_leading_blocks(name, blocks):
    G = torch.stack([gramian(3, k) for k in range(max(1, math.prod(blocks)))])[: math.prod(blocks)].reshape(
        *blocks, 3, 3
    )
    context = Context(("a", "b", "c"), losses=torch.ones(3, dtype=torch.float64))
    w = detente.get_method(name).weights(G, context)
    assert (w.shape, w.dtype, w.device.type) == ((*blocks, 3), torch.float64, "cpu")
    if blocks == (2, 3) and not detente.get_method(name).stochastic:
        one = detente.get_method(name).weights(G[1, 2], context)
        torch.testing.assert_close(w[1, 2], one, rtol=1e-12, atol=1e-14)  # the same solve on the same numbers


# weights that descend on losses of a virtual step may be negative, and move in a step only
@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if not METHODS[name].requires_step])
def test_loss_weights_are_not_negative(name):
    for w in drive(detente.get_method(name), 12):
        assert (w.shape, w.dtype, w.device.type) == ((3,), torch.float64, "cpu")
        assert bool((w >= 0).all())


@pytest.mark.parametrize("name", having("zero_rows", RULES))
@pytest.mark.parametrize("zero", [[1], [0, 1, 2]], ids=["one", "all"])
def test_zero_rows_that_are_kept_give_finite_weights_and_are_not_reported(name, zero):
    """Left out by default: what that means for each method is in the conformance suite."""
    G = gramian()
    G[zero], G[:, zero] = 0, 0
    losses = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    kept, dropped = Context(("a", "b", "c"), losses=losses), Context(("a", "b", "c"), losses=losses)
    assert bool(detente.get_method(name, zero_rows="keep").weights(torch.stack([G, G]), kept).isfinite().all())
    assert "dropped" not in kept.stats
    assert not detente.get_method(name).weights(torch.stack([G, G]), dropped)[:, zero].any()
    assert dropped.stats["dropped"] == ["abc"[t] for t in zero]


def test_blocks_drop_their_own_zero_rows():
    G = torch.stack([gramian(3, k) for k in range(3)])
    G[0, 1], G[0, :, 1] = 0, 0
    G[2] = 0
    context = Context(("a", "b", "c"))
    w = detente.EDM().weights(G, context)
    torch.testing.assert_close(w[0, [0, 2]], detente.EDM().weights(G[0][[0, 2]][:, [0, 2]]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(w[1], detente.EDM().weights(G[1]), rtol=1e-12, atol=1e-14)
    assert float(w[0, 1]) == 0
    assert w[2].tolist() == [0, 0, 0]
    assert context.stats["dropped"] == []  # only a task that is zero everywhere was dropped


# ---- state -----------------------------------------------------------------------------------------------------

# other instances than the registry's: with a method inside, or with a history that an option brings
BUILDERS = {
    **{
        f"{name}(loss_power)": lambda name=name: detente.get_method(name, preference=detente.LossPower(gamma=2.0))
        for name in having("preference", GRAMIAN)
    },
    "cagrad(dwa)": lambda: detente.CAGrad(preference=detente.DWA()),
    "wpcgrad(loss_power)": lambda: detente.WPCGrad(priority=detente.LossPower(gamma=2.0), seed=3),
    "wpcgrad(uw)": lambda: detente.WPCGrad(priority=detente.UW()),
    "wpcgrad(rlw)": lambda: detente.WPCGrad(priority=detente.RLW(seed=5)),
    **{
        f"{name}(window)": lambda name=name: detente.get_method(name, window=2) for name in having("window", WEIGHTINGS)
    },
    "cdtt(window)": lambda: detente.CDTT(window=2, passes="until_feasible"),
    "nash_mtl(update_every)": lambda: detente.NashMTL(update_every=4),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_state_saved_to_a_file_goes_on_in_a_fresh_instance(name):
    method = BUILDERS[name]()
    drive(method, 7)
    buffer = io.BytesIO()
    torch.save(method.state_dict(), buffer)
    wanted = drive(method, 15, 7)
    buffer.seek(0)
    fresh = BUILDERS[name]()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(drive(fresh, 15, 7), wanted)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_state_is_a_copy(name):
    method = BUILDERS[name]()
    drive(method, 4)
    saved = method.state_dict()
    text = plain(saved)
    drive(method, 4, 4)
    assert plain(saved) == text, "later steps do not reach into it"
    one, two = BUILDERS[name](), BUILDERS[name]()
    one.load_state_dict(saved), two.load_state_dict(saved)
    drive(one, 5, 4)
    assert plain(saved) == text
    assert plain(two.state_dict()) == text, "two methods loaded from one state are apart"


@pytest.mark.parametrize("name", BUILDERS)
def test_reset_is_a_fresh_start(name):
    method = BUILDERS[name]()
    wanted = drive(method, 15)
    method.reset()
    assert plain(method.state_dict()) == plain(BUILDERS[name]().state_dict())
    assert same(drive(method, 15), wanted)


@pytest.mark.parametrize("name", BUILDERS)
def test_methods_with_history_change_with_it(name):
    method = BUILDERS[name]()
    before = plain(method.state_dict())
    drive(method, 2)
    assert plain(method.state_dict()) != before


def test_a_refused_state_of_a_nested_method_changes_nothing_either():
    method, foreign = detente.WPCGrad(priority=detente.UW()), detente.WPCGrad(priority=detente.DWA())
    drive(method, 2), drive(foreign, 5)
    before = plain(method.state_dict())
    with pytest.raises(ValueError, match="does not belong to uw"):
        method.load_state_dict(foreign.state_dict())
    assert plain(method.state_dict()) == before


@pytest.mark.parametrize("name", BUILDERS)
def test_methods_leave_the_global_generators_alone(name):
    before = torch.get_rng_state()
    drive(BUILDERS[name](), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_no_parameters_and_no_mode(name):
    """An optimizer over model and method must not find anything, and eval() must not change what a method does."""
    method, twin = detente.get_method(name), detente.get_method(name)
    assert list(method.parameters()) == []
    method.eval().to(torch.float16)
    assert same(drive(method, 5), drive(twin, 5))


def test_next_epoch_reaches_the_weighting_inside():
    method = detente.WPCGrad(priority=detente.LossPower())
    drive(method, 2)
    history = method.priority.source.history
    assert history.past("a") == []
    method.next_epoch()
    assert len(history.past("a")) == 1


# ---- parts -----------------------------------------------------------------------------------------------------


def context(*tasks: str, losses: list[float] | None = None) -> Context:
    return Context(tasks, losses=None if losses is None else torch.tensor(losses, dtype=torch.float64))


def test_equal_weights():
    assert TaskWeights("priority", None)(context("a", "b")).tolist() == [0.5, 0.5]
    assert TaskWeights("weights", None, distribution=False)(context("a", "b")).tolist() == [1, 1]


@pytest.mark.parametrize("given", [[0.25, 0.75], (0.25, 0.75), torch.tensor([0.25, 0.75])])
def test_a_vector_is_in_the_order_of_the_step(given):
    weights = TaskWeights("priority", given)
    weights.check(context("x", "y"))
    assert weights(context("x", "y")).tolist() == [0.25, 0.75]


def test_a_mapping_follows_the_names_and_is_renormalised_for_partial_steps():
    weights = TaskWeights("priority", {"a": 0.2, "b": 0.3, "c": 0.5})
    assert weights(context("c", "a", "b")).tolist() == pytest.approx([0.5, 0.2, 0.3])
    assert weights(context("b", "a")).tolist() == pytest.approx([0.6, 0.4])
    fixed = TaskWeights("weights", {"a": 2.0, "b": 7.0}, distribution=False)
    assert fixed(context("b")).tolist() == [7]


def test_weights_that_are_all_zero_in_a_step_are_uniform():
    assert TaskWeights("priority", {"a": 0.0, "b": 0.0, "c": 1.0})(context("a", "b")).tolist() == [0.5, 0.5]
    assert normalized(torch.zeros(4)).tolist() == [0.25] * 4


def test_weights_from_a_loss_weighting_are_divided_by_their_sum():
    weights = TaskWeights("priority", detente.GLS())
    assert weights.needs == {"losses"}
    w = weights(context("a", "b", losses=[1.0, 4.0]))
    assert w.tolist() == pytest.approx([0.8, 0.2])  # GLS weights are proportional to 1 / loss


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5, 0.6], r"priority must sum to 1.*sum 1\.1.*Divide"),
        ({"a": 0.1, "b": 0.1}, r"priority must sum to 1.*'a': 0\.1"),
        ([1.5, -0.5], r"priority must be finite and non-negative.*-0\.5"),
        ([math.nan, 1.0], r"priority must be finite"),
        ([math.inf, 0.0], r"priority must be finite"),
        ([], r"priority must sum to 1"),
    ],
)
def test_weights_that_are_no_distribution(given, message):
    with pytest.raises(ValueError, match=message):
        TaskWeights("priority", given)


def test_rounding_does_not_break_a_distribution():
    TaskWeights("priority", [1 / 3, 1 / 3, 1 / 3])
    TaskWeights("priority", torch.softmax(torch.randn(50), 0))  # float32 weights sum to 1 within 1e-6


def test_history_is_kept_by_name_and_no_deeper_than_asked():
    history = TaskHistory(2)
    for epoch in range(3):
        history.add(("a", "b"), torch.tensor([epoch + 1.0, 10.0]))
        history.add(("a",), torch.tensor([epoch + 3.0]))
        history.close()
    history.close()  # an epoch without steps leaves no entry
    assert history.past("a") == [3.0, 4.0]
    assert history.past("b") == [10.0, 10.0]
    assert history.past("never seen") == []


def test_history_closes_itself_after_a_window():
    history = TaskHistory(2, window=2)
    history.add(("a",), torch.tensor([1.0]))
    assert history.past("a") == []
    history.add(("b",), torch.tensor([5.0]))
    assert (history.past("a"), history.past("b")) == ([1.0], [5.0])


def test_scalars_move_one_task_at_a_time_with_an_adam_of_their_own():
    scalars = TaskScalars(0.5, lr=0.1)
    assert scalars.read(("a", "b")).tolist() == [0.5, 0.5]
    scalars.descend(("a",), torch.tensor([2.0], dtype=torch.float64))
    a, b = scalars.read(("a", "b")).tolist()
    assert b == 0.5
    assert a == pytest.approx(0.4, abs=1e-6)  # Adam's first step is lr, whatever the gradient
    other = TaskScalars(9.0, lr=0.1)
    other.load_state_dict(scalars.state_dict())
    for s in (scalars, other):
        s.descend(("a", "b"), torch.tensor([-1.0, 3.0], dtype=torch.float64))
    assert other.read(("a", "b")).tolist() == scalars.read(("a", "b")).tolist()
