"""Task layers: the named layers become one per task, everything else stays as it was."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.nn import TaskLayer, TaskNorm, active_task, convert_task_layers, convert_task_norm

TASKS = ("seg.mask", "depth")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


def equal(first: Tensor, second: Tensor) -> None:
    # the same kernels on the same numbers: not one bit may differ
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_no_names_leave_the_model_as_it_is() -> None:
    model = network()
    modules = list(model.modules())
    assert convert_task_layers(model, TASKS, []) is model
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))


@pytest.mark.parametrize("names", [["0.0", "4"], ["0"], ("2",)])
def test_named_layers_become_task_specific_and_outputs_stay(names) -> None:
    model = network().eval()
    reference = copy.deepcopy(model)
    assert convert_task_layers(model, TASKS, names) is model
    found = {name for name, module in model.named_modules() if isinstance(module, TaskLayer)}
    assert found == set(names)
    x = torch.randn(5, 2, 5, 5)
    for task in TASKS:
        with active_task(task):
            equal(model(x), reference(x))
    for name in names:
        layer = model.get_submodule(name)
        assert list(layer) == list(TASKS)
        assert not layer["depth"].training
        assert not {id(p) for p in layer["depth"].parameters()} & {id(p) for p in layer["seg.mask"].parameters()}


def test_only_the_active_task_learns() -> None:
    model = convert_task_layers(network(), TASKS, ["0", "4"])
    with active_task("depth"):
        model(torch.randn(5, 2, 5, 5)).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == ("task_seg" in name), name


def test_a_module_by_itself_and_one_used_twice() -> None:
    linear = nn.Linear(3, 3)
    converted = convert_task_layers(linear, TASKS, [""])
    assert isinstance(converted, TaskLayer)
    equal(converted["depth"].weight, linear.weight)
    twice = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear), "c": nn.Linear(3, 3)})
    convert_task_layers(twice, TASKS, ["a"])
    assert isinstance(twice["a"], TaskLayer)
    assert twice["a"] is twice["b"][0]
    assert isinstance(twice["c"], nn.Linear)


def test_copies_may_be_initialised_anew() -> None:
    model = network()
    old = copy.deepcopy(model)
    with torch.no_grad():
        model[0][1].running_mean.fill_(3.0)
    attention = nn.MultiheadAttention(4, 2)
    model.append(attention)
    convert_task_layers(model, TASKS, ["0", "2", "5"], reset=True)
    for layer, before in ((model[0], old[0][0].weight), (model[2], old[2].weight)):
        weights = [next(layer[task].parameters()) for task in TASKS]
        assert not torch.equal(weights[0], weights[1])
        assert all(w.shape == before.shape and not torch.equal(w, before) for w in weights)
    for task in TASKS:
        assert not model[0][task][1].running_mean.any()
        assert not torch.equal(model[5][task].in_proj_weight, attention.in_proj_weight)
    equal(model[4].weight, old[4].weight)


def test_any_signature_and_attributes_of_the_active_copy() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    layer = convert_task_layers(attention, TASKS, [""])
    x = torch.randn(2, 3, 4)
    with active_task("depth"):
        found, weights = layer(x, x, value=x, need_weights=True)
        assert layer.batch_first
        assert layer.in_proj_weight is layer["depth"].in_proj_weight
    expected, expected_weights = attention(x, x, x)
    equal(found, expected)
    equal(weights, expected_weights)


def test_norms_inside_task_layers_are_left_alone() -> None:
    model = convert_task_norm(convert_task_layers(network(), TASKS, ["0"]), TASKS)
    assert not any(isinstance(module, TaskNorm) for module in model.modules())
    model = convert_task_layers(convert_task_norm(network(), TASKS), TASKS, ["0.0"])
    assert isinstance(model[0][0], TaskLayer)
    assert isinstance(model[0][1], TaskNorm)
    with active_task("depth"):
        assert model(torch.randn(5, 2, 5, 5)).shape == (5, 3)


def test_conflicts_are_resolved_on_what_is_still_shared() -> None:
    model = convert_task_layers(network().double().eval(), TASKS, ["2"])
    x = torch.randn(5, 2, 5, 5, dtype=torch.float64)

    def loss(task: str) -> Tensor:
        with active_task(task):
            return model(x).square().mean() if task == "depth" else -model(x).mean()

    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss(task), parameters, allow_unused=True) for task in TASKS]
    update = detente.backward({task: loss(task) for task in TASKS}, detente.CAGrad())
    weights = [float(w) for w in update.weights.values()]
    for (name, p), *found in zip(model.named_parameters(), *gradients, strict=True):
        if name.startswith("2."):
            equal(p.grad, next(g for g in found if g is not None))
        else:
            expected = sum(w * g for w, g in zip(weights, found, strict=True))
            # float64 sums of two terms, weights rounded once
            torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-12)


def test_state_dict_is_matched_by_name() -> None:
    model = convert_task_layers(network(), TASKS, ["2"], reset=True).eval()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded = convert_task_layers(network(), TASKS[::-1], ["2"]).eval()
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    x = torch.randn(2, 2, 5, 5)
    for task in TASKS:
        with active_task(task):
            equal(loaded(x), model(x))


def test_errors_name_the_tasks() -> None:
    layer = TaskLayer({"left": nn.Linear(2, 2), "right": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match=r"TaskLayer expected an active task, one of \['left', 'right'\]"):
        layer(torch.ones(1, 2))
    with pytest.raises(KeyError, match="no layer for task 'up'"):
        layer["up"]


class Scale(nn.Module):
    """A parameter that nobody knows how to initialise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        (["0.0", "2.weight"], {}, ValueError, "no submodule '2.weight'.*without '.weight'"),
        ("2", {}, TypeError, r"string '2'.*\['2'\]"),
        (["2", "0.0", "0"], {}, ValueError, "'0.0' lies inside '0'"),
        (["2", "5"], {"reset": True}, ValueError, "'5', a Scale, has none"),
        (["2", "6.task_a"], {}, ValueError, "'6.task_a' is task-specific already"),
        (["2", "6"], {}, ValueError, "'6' is task-specific already"),
        (["2"], {"tasks": ("a", "a")}, ValueError, "distinct"),
    ],
)
def test_bad_arguments_change_nothing(names, options, error: type[Exception], message: str) -> None:
    model = network().append(Scale()).append(TaskLayer({"a": nn.Linear(2, 2)}))
    modules = list(model.modules())
    with pytest.raises(error, match=message):
        convert_task_layers(model, options.pop("tasks", TASKS), names, **options)
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
