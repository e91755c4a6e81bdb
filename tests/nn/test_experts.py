"""Mixtures of experts: gates and sums are the papers', and a task's experts are seen by it alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.nn import CGC, MMoE

TASKS = ("seg.mask", "depth")


def close(first: Tensor, second: Tensor) -> None:
    # float64 sums of at most five products of size 1: about 1e-15
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def expert(inputs: int = 3, outputs: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh())


def softmaxed(weight: Tensor, row: Tensor) -> list[Tensor]:
    scores = [(w * row).sum() for w in weight]
    total = sum(s.exp() for s in scores)
    return [s.exp() / total for s in scores]


def mixed(weight: Tensor, gate_rows: Tensor, experts: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
    """One sample and one expert at a time."""
    rows = []
    for n, gate_row in enumerate(gate_rows):
        parts = [e(x[n : n + 1])[0] for e, x in zip(experts, inputs, strict=True)]
        rows.append(sum(w * part for w, part in zip(softmaxed(weight, gate_row), parts, strict=True)))
    return torch.stack(rows)


def gate(model: nn.Module, task: str) -> Tensor:
    return model.state_dict()[f"gates.task_{task.replace('.', '%2E')}.linear.weight"]


def test_mmoe_is_the_formula() -> None:
    torch.manual_seed(0)
    experts = [expert() for _ in range(5)]
    model = MMoE(experts, TASKS, 3).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    for task in TASKS:
        close(model(x)[task], mixed(gate(model, task), x, experts, [x] * 5))
        weights = model.gate_weights(x)[task]
        close(weights.sum(1), torch.ones(6, dtype=torch.float64))
        close(weights[2], torch.stack(softmaxed(gate(model, task), x[2])))
    assert not torch.equal(model(x)["depth"], model(x)["seg.mask"])


@pytest.mark.parametrize("inputs", [3, 3 * 5 * 5, 2])
def test_gates_pool_flatten_or_read_what_they_are_given(inputs: int) -> None:
    torch.manual_seed(0)
    experts = [nn.Conv2d(3, 4, 3) for _ in range(2)]
    read = (lambda x: x[:, :2, 0, 0]) if inputs == 2 else None
    model = MMoE(experts, TASKS, inputs, gate_input=read).double()
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    rows = {3: x.mean((2, 3)), 75: x.flatten(1), 2: x[:, :2, 0, 0]}[inputs]
    features = model(x)["depth"]
    assert features.shape == (6, 4, 3, 3)
    close(features, mixed(gate(model, "depth"), rows, experts, [x, x]))


def test_functions_make_experts() -> None:
    model = MMoE(expert, TASKS, 3, 4)
    assert len({id(e[0].weight) for e in model.experts}) == 4
    cgc = CGC(expert, expert, TASKS, 3, shared_count=2, task_count=3)
    assert len(list(cgc.shared_experts)) == 2
    assert sum(1 for m in cgc.task_experts.modules() if isinstance(m, nn.Linear)) == 6
    assert len(MMoE(nn.ModuleList([expert(), expert()]), TASKS, 3).experts) == 2
    assert MMoE(expert, TASKS, 3, 2)(torch.empty(0, 3))["depth"].shape == (0, 4)


def test_cgc_and_its_stack_are_the_formula() -> None:
    torch.manual_seed(0)
    parts = []
    for inputs in (3, 4):
        own = {"seg.mask": [expert(inputs)], "depth": [expert(inputs), expert(inputs)]}
        shared = [expert(inputs), expert(inputs)]
        parts.append((shared, own, CGC(shared, own, TASKS, inputs, keep_shared=inputs == 3).double()))
    x = torch.randn(6, 3, dtype=torch.float64)
    ple = nn.Sequential(parts[0][2], parts[1][2])
    streams = dict.fromkeys([*TASKS, "shared"], x)
    for shared, own, level in parts:
        out = {}
        for task in TASKS:
            inputs = [streams[task]] * len(own[task]) + [streams["shared"]] * 2
            out[task] = mixed(gate(level, task), streams[task], [*own[task], *shared], inputs)
        if level.keep_shared:
            everyone = [*shared, *own["seg.mask"], *own["depth"]]
            inputs = [streams[name] for name in ("shared", "shared", "seg.mask", "depth", "depth")]
            weight = level.state_dict()["shared_gate.linear.weight"]
            out["shared"] = mixed(weight, streams["shared"], everyone, inputs)
        found = level(streams)
        assert list(found) == list(out)
        for name, expected in out.items():
            close(found[name], expected)
        assert {name: w.shape[1] for name, w in level.gate_weights(streams).items()} == (
            {"seg.mask": 3, "depth": 4} | ({"shared": 5} if level.keep_shared else {})
        )
        streams = out
    for task in TASKS:
        close(ple(x)[task], streams[task])


def test_a_tasks_experts_are_its_own() -> None:
    torch.manual_seed(0)
    model = CGC(expert, expert, TASKS, 3, shared_count=2, task_count=2)
    model(torch.randn(6, 3))["depth"].square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("task_seg" not in name), name
        assert p.grad is None or p.grad.any()


@pytest.mark.parametrize("kind", ["mmoe", "ple"])
def test_conflicts_are_resolved_on_shared_experts(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "mmoe":
        model = MMoE(expert, TASKS, 3, 3)
        shared = list(model.experts.parameters())
    else:
        lower = CGC(expert, expert, TASKS, 3, shared_count=1, task_count=1, keep_shared=True)
        upper = CGC(lambda: expert(4), lambda: expert(4), TASKS, 4, shared_count=1, task_count=1)
        model = nn.Sequential(lower, upper)
        # a level that keeps its shared stream shows every task's experts to all, through that stream
        shared = [*lower.shared_experts.parameters(), *lower.task_experts.parameters()]
        shared += [*lower.shared_gate.parameters(), *upper.shared_experts.parameters()]
    model.double()
    x = torch.randn(6, 3, dtype=torch.float64)

    def losses() -> dict[str, Tensor]:
        features = model(x)
        return {"seg.mask": features["seg.mask"].sum(), "depth": -features["depth"].square().sum()}

    parameters = list(model.parameters())
    separate = [losses()[task] for task in TASKS]  # a graph each
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in separate]
    update = detente.backward(losses(), detente.CAGrad())
    weights = [float(w) for w in update.weights.values()]
    for p, *found in zip(parameters, *gradients, strict=True):
        if any(p is other for other in shared):
            # float64 sums of a few dozen products: far below 1e-10
            torch.testing.assert_close(
                p.grad, sum(w * g for w, g in zip(weights, found, strict=True)), rtol=1e-10, atol=1e-10
            )
        else:
            assert sum(g is not None for g in found) == 1
            assert torch.equal(p.grad, next(g for g in found if g is not None))


def test_state_dict_is_matched_by_name() -> None:
    torch.manual_seed(0)
    for make in (
        lambda tasks: MMoE(expert, tasks, 3, 3),
        lambda tasks: CGC(expert, expert, tasks, 3, shared_count=1, task_count=2, keep_shared=True),
    ):
        model, other = make(TASKS), make(TASKS)
        stream = io.BytesIO()
        torch.save(model.state_dict(), stream)
        stream.seek(0)
        other.load_state_dict(torch.load(stream, weights_only=True))
        x = torch.randn(6, 3)
        for name, features in model(x).items():
            assert torch.equal(other(x)[name], features)
    turned = MMoE(expert, TASKS[::-1], 3, 3)
    source = MMoE(expert, TASKS, 3, 3)
    turned.load_state_dict(source.state_dict())
    assert torch.equal(turned(x)["depth"], source(x)["depth"])


ONE = expert()


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: MMoE(expert(), TASKS, 3), TypeError, "single Sequential"),
        (lambda: MMoE([], TASKS, 3), ValueError, "experts is empty"),
        (lambda: MMoE([ONE] * 2, TASKS, 3), ValueError, "more than once"),
        (lambda: MMoE(lambda: ONE, TASKS, 3, 2), ValueError, "more than once"),
        (lambda: MMoE(expert, TASKS, 3), ValueError, r"count=\.\.\.; got None"),
        (lambda: MMoE([expert()], TASKS, 3, 2), ValueError, "has 1 experts, but count is 2"),
        (lambda: MMoE(["x"], TASKS, 3), TypeError, "got str"),
        (lambda: MMoE(expert, TASKS, 0, 2), ValueError, "inputs must be"),
        (lambda: MMoE(expert, (), 3, 2), ValueError, "at least one task"),
        (lambda: MMoE(expert, TASKS, 4, 2)(torch.ones(5, 3)), ValueError, r"expected \[N, 4\].*got \(5, 3\)"),
        (
            lambda: MMoE(expert, TASKS, 4, 2, gate_input=lambda x: x)(torch.ones(5, 3)),
            ValueError,
            r"gate_input must return \[N, 4\]; got \(5, 3\)",
        ),
        (lambda: MMoE([expert(), expert(3, 5)], TASKS, 3)(torch.ones(5, 3)), ValueError, "one shape"),
        (lambda: CGC(expert, expert, ["a", "shared"], 3), ValueError, "another name"),
        (lambda: CGC([expert()], {"a": [expert()]}, ["a", "b"], 3), ValueError, r"\['a', 'b'\].*\['a'\]"),
        (lambda: CGC([ONE], {"a": [ONE]}, ["a"], 3), ValueError, "shared_experts and task_experts: one module"),
        (lambda: CGC([expert()], expert, ["a"], 3), ValueError, r"task_count=\.\.\."),
        (
            lambda: CGC([expert()], {"a": [expert()]}, ["a"], 3)({"a": torch.ones(2, 3)}),
            ValueError,
            r"\['shared'\] are missing.*keep_shared=True",
        ),
    ],
)
def test_bad_arguments(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
