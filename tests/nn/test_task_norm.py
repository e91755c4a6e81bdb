"""Task norms: every task sees exactly its own norm, and nothing else of the model changes."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import shutil
import threading
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detente.nn import (
    TaskBatchNorm1d,
    TaskBatchNorm2d,
    TaskLayerNorm,
    TaskNorm,
    TaskRMSNorm,
    active_task,
    convert_task_norm,
)

TASKS = ("seg.mask", "depth", "%")

# plain norm, its task version built by hand, an input
KINDS = {
    "batch1d": (lambda: nn.BatchNorm1d(6, eps=1e-3), lambda: TaskBatchNorm1d(6, TASKS, eps=1e-3), (5, 6)),
    "batch2d": (
        lambda: nn.BatchNorm2d(6, momentum=0.3),
        lambda: TaskBatchNorm2d(6, TASKS, momentum=0.3),
        (5, 6, 3, 3),
    ),
    "layer": (lambda: nn.LayerNorm(6, eps=1e-3), lambda: TaskLayerNorm(6, TASKS, eps=1e-3), (5, 6)),
    "rms": (lambda: nn.RMSNorm(6, eps=1e-3), lambda: TaskRMSNorm(6, TASKS, eps=1e-3), (5, 6)),
}


def scrambled(module: nn.Module, seed: int = 0) -> Any:
    """Parameters and running statistics unlike any default, so that a copy left at its default is noticed."""
    generator = torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return module


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 6),
        nn.BatchNorm1d(6),
        nn.LayerNorm(6),
    )


def equal(first: torch.Tensor, second: torch.Tensor) -> None:
    # the same kernel on the same numbers: not one bit may differ
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_each_task_computes_what_the_plain_norm_computes(kind: str, training: bool) -> None:
    plain, task_norm, shape = KINDS[kind][0](), KINDS[kind][1](), KINDS[kind][2]
    references = {task: scrambled(copy.deepcopy(plain), seed) for seed, task in enumerate(TASKS)}
    for task, reference in references.items():
        task_norm[task].load_state_dict(reference.train(training).state_dict())
    task_norm.train(training)
    x = torch.randn(shape)
    for task, reference in references.items():
        with active_task(task):
            equal(task_norm(x), reference(x))
        for name, value in reference.state_dict().items():
            equal(task_norm[task].state_dict()[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_by_itself_is_converted_and_returned(kind: str) -> None:
    plain, by_hand, shape = scrambled(KINDS[kind][0]()), KINDS[kind][1](), KINDS[kind][2]
    task_norm = convert_task_norm(plain, TASKS)
    assert type(task_norm) is type(by_hand)
    assert list(task_norm) == list(TASKS) == list(task_norm.tasks)
    assert len(task_norm) == 3
    for task in TASKS:
        assert type(task_norm[task]) is type(plain)
        assert repr(task_norm[task]) == repr(by_hand[task]) == repr(plain)
    x = torch.randn(shape)
    expected = copy.deepcopy(plain)(x)
    for task in TASKS:
        with active_task(task):
            equal(task_norm(x), expected)


def test_conversion_of_a_tree_changes_no_output_and_touches_only_norms() -> None:
    plain = scrambled(network())
    reference = copy.deepcopy(plain)
    before = list(plain)
    model = convert_task_norm(plain, TASKS)
    assert model is plain
    converted = [type(module) for module in model if isinstance(module, TaskNorm)]
    assert converted == [TaskBatchNorm2d, TaskBatchNorm1d, TaskLayerNorm]
    assert all(new is old for new, old in zip(model, before, strict=True) if not isinstance(new, TaskNorm))
    x = torch.randn(8, 2, 5, 5)
    expected = reference(x)
    for task in TASKS:
        with active_task(task):
            equal(model(x), expected)


def test_conversion_keeps_every_setting() -> None:
    plain = nn.BatchNorm2d(4, eps=0.1, momentum=None, dtype=torch.float64)
    plain.weight.requires_grad_(False)
    bare = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    meta = nn.LayerNorm(4, bias=False, device="meta")
    tree = convert_task_norm(nn.ModuleList([plain.eval(), bare, meta]), TASKS)
    assert not tree[0].training
    assert tree[1].training
    for task in TASKS:
        norm = tree[0][task]
        assert (norm.eps, norm.momentum, norm.training) == (0.1, None, False)
        assert norm.weight.dtype == norm.running_var.dtype == torch.float64
        assert not norm.weight.requires_grad
        assert norm.bias.requires_grad
        assert tree[1][task].weight is None
        assert tree[1][task].running_mean is None
        assert tree[2][task].weight.is_meta
        assert tree[2][task].bias is None
    tree.train()
    assert all(tree[0][task].training for task in TASKS)


def test_sharing_survives_conversion() -> None:
    shared = nn.LayerNorm(4)
    tied = nn.LayerNorm(4)
    tied.weight = shared.weight
    inner = nn.Sequential(nn.Linear(4, 4), shared)
    block = nn.ModuleDict({"a": shared, "b": shared, "c": inner, "d": tied, "e": None})
    convert_task_norm(block, TASKS)
    assert isinstance(block["a"], TaskNorm)
    assert block["a"] is block["b"] is block["c"][1] is not block["d"]
    for task in TASKS:
        assert block["a"][task].weight is block["d"][task].weight
    assert len({id(block["a"][task].weight) for task in TASKS}) == 3


def test_converted_modules_are_left_alone() -> None:
    model = convert_task_norm(network(), TASKS)
    modules = list(model.modules())
    assert convert_task_norm(model, ("other",)) is model
    assert all(new is old for new, old in zip(model.modules(), modules, strict=True))
    assert convert_task_norm(model[1], ("other",)) is model[1]


def test_only_the_active_task_learns_and_keeps_statistics() -> None:
    model = convert_task_norm(network(), TASKS)
    before = copy.deepcopy(model)
    with active_task("depth"):
        loss = model(torch.randn(8, 2, 5, 5)).square().sum()
    loss.backward()
    for norm, old in zip(model, before, strict=True):
        if not isinstance(norm, TaskNorm):
            continue
        for task in TASKS:
            assert all((p.grad is not None) == (task == "depth") for p in norm[task].parameters())
            for name, buffer in norm[task].named_buffers():
                changed = not torch.equal(buffer, old[task].get_buffer(name))
                assert changed == (task == "depth"), (name, task)
    assert model[0].weight.grad is not None


def test_gradients_equal_those_of_the_plain_network() -> None:
    reference = scrambled(network())
    model = convert_task_norm(copy.deepcopy(reference), TASKS)
    x = torch.randn(8, 2, 5, 5)
    reference(x).square().sum().backward()
    with active_task("%"):
        model(x).square().sum().backward()
    equal(model[0].weight.grad, reference[0].weight.grad)
    equal(model[1]["%"].weight.grad, reference[1].weight.grad)


def test_blocks_nest_and_exceptions_restore() -> None:
    norm = TaskLayerNorm(4, ("a", "b"))
    nn.init.constant_(norm["b"].weight, 3.0)
    x = torch.randn(2, 4)

    def chosen() -> str:
        return "b" if torch.equal(norm(x), norm["b"](x)) else "a"

    with active_task("a"):
        with active_task("b"):
            assert chosen() == "b"
        assert chosen() == "a"
        with pytest.raises(ZeroDivisionError), active_task("b"):
            raise ZeroDivisionError
        assert chosen() == "a"
    with pytest.raises(RuntimeError, match="active task"):
        norm(x)


def test_threads_do_not_see_each_others_task() -> None:
    norm = TaskLayerNorm(4, ("a", "b"))
    nn.init.constant_(norm["b"].weight, 3.0)
    x, both_inside, right = torch.randn(2, 4), threading.Barrier(2, timeout=30), {}

    def work(task: str) -> None:
        with active_task(task):
            both_inside.wait()
            right[task] = torch.equal(norm(x), norm[task](x))
            both_inside.wait()

    threads = [threading.Thread(target=work, args=(task,)) for task in norm]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == {"a": True, "b": True}


def test_coroutines_do_not_see_each_others_task() -> None:
    norm = TaskLayerNorm(4, ("a", "b"))
    nn.init.constant_(norm["b"].weight, 3.0)
    x = torch.randn(2, 4)

    async def work(task: str) -> bool:
        with active_task(task):
            await asyncio.sleep(0)  # lets the other coroutine enter its own block
            return torch.equal(norm(x), norm[task](x))

    async def both() -> list[bool]:
        return await asyncio.gather(work("a"), work("b"))

    assert asyncio.run(both()) == [True, True]


def test_a_single_task_needs_no_block() -> None:
    norm = TaskBatchNorm1d(4, ("only",))
    x = torch.randn(5, 4)
    equal(norm(x), nn.BatchNorm1d(4)(x))
    with active_task("another"), pytest.raises(KeyError, match="another"):
        norm(x)


def test_errors_name_the_tasks_and_the_fix() -> None:
    norm = TaskBatchNorm1d(4, ("left", "right"))
    x = torch.randn(5, 4)
    with pytest.raises(RuntimeError, match=r"one of \['left', 'right'\].*detente\.nn\.active_task\('left'\)"):
        norm(x)
    with active_task("middle"), pytest.raises(KeyError, match=r"'middle'.*\['left', 'right'\]"):
        norm(x)
    with pytest.raises(KeyError, match="middle"):
        norm["middle"]
    equal(norm["left"].running_mean, torch.zeros(4))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [((), "none"), (("a", "b", "a"), "distinct"), (("a", ""), "non-empty"), ("ab", "string 'ab'")],
)
def test_bad_task_names_raise_before_anything_changes(tasks: tuple[str, ...], message: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=message):
        convert_task_norm(model, tasks)
    assert not any(isinstance(module, TaskNorm) for module in model.modules())
    with pytest.raises(ValueError, match=message):
        TaskBatchNorm2d(4, tasks)


def test_copies_pickles_and_state_dicts_round_trip() -> None:
    model = scrambled(convert_task_norm(network(), TASKS)).eval()
    x = torch.randn(3, 2, 5, 5)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    loaded = convert_task_norm(network(), reversed(TASKS)).eval()  # matched by name, not by position
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        for task in TASKS:
            with active_task(task):
                equal(other(x), model(x))
    with pytest.raises(RuntimeError, match="task_other"):
        convert_task_norm(network(), ("depth", "%", "other")).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["a.b", "a%2Eb", "weight", "forward", "training", "two words", "ü"])
def test_any_name_is_a_task(name: str) -> None:
    norm = TaskLayerNorm(4, (name, "a.b.c"))
    assert norm[name] is not norm["a.b.c"]
    with active_task(name):
        assert norm(torch.randn(2, 4)).shape == (2, 4)


def test_modules_that_read_a_norms_attributes_use_the_active_task() -> None:
    # in eval mode without gradients this layer hands norm1.weight and norm1.eps to a fused kernel
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    layer = convert_task_norm(copy.deepcopy(plain), ("a", "b"))
    for target in (layer.norm1["b"], plain.norm1):
        nn.init.constant_(target.weight, 3.0)
    x = torch.randn(2, 3, 8)
    with torch.no_grad(), active_task("b"):
        equal(layer(x), plain(x))
    assert not hasattr(layer.norm1, "eps")
    with active_task("a"):
        assert not hasattr(layer.norm1, "no_such_attribute")


def test_checkpointed_forward_recomputes_with_its_own_task() -> None:
    model = scrambled(convert_task_norm(network(), TASKS)).eval()
    for task, gain in zip(TASKS, (1.0, 2.0, 3.0), strict=True):
        nn.init.constant_(model[1][task].weight, gain)
    x = torch.randn(4, 2, 5, 5)

    def gradient(task: str, recompute: bool) -> torch.Tensor:
        def contexts() -> tuple[Any, Any]:
            return nullcontext(), active_task(task)

        with active_task(task):
            out = checkpoint(model, x, use_reentrant=False, context_fn=contexts) if recompute else model(x)
        with active_task("depth"):
            return torch.autograd.grad(out.square().sum(), model[0].weight)[0]

    for task in TASKS:
        equal(gradient(task, recompute=True), gradient(task, recompute=False))


class Residual(nn.Module):
    """Norms amid other operations: the compiler must cut its graph around each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 2, 3, padding=1) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(2) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norms[0](self.convs[0](x).relu()).sigmoid()
        return x + self.norms[1](self.convs[1](x).relu()).sigmoid()


# torch's own warnings: its compiler imports deprecated parts of torch and looks at .grad of activations
compiler = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")


@compiler
def test_compiled_model_never_uses_another_tasks_norm() -> None:
    model = scrambled(convert_task_norm(Residual(), TASKS)).eval()
    x = torch.randn(3, 2, 5, 5)
    graphs = []

    def eager_backend(graph, example_inputs):  # needs no C++ compiler
        graphs.append(graph)
        return graph.forward

    def inside(x: torch.Tensor) -> torch.Tensor:
        with active_task("depth"):
            first = model(x)
        with active_task("%"):
            return first - 2 * model(x)

    compiled = torch.compile(model, backend=eager_backend)
    for task in TASKS * 2:
        with active_task(task):
            equal(compiled(x), model(x))
    assert graphs
    with pytest.raises(RuntimeError, match="active task"):
        compiled(x)
    equal(torch.compile(inside, backend=eager_backend)(x), inside(x))


@compiler
@pytest.mark.slow  # compiles C++, about 20 s
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_never_uses_another_tasks_norm() -> None:
    model = scrambled(convert_task_norm(Residual(), TASKS))
    eager = copy.deepcopy(model)
    compiled = torch.compile(model)
    x = torch.randn(8, 2, 5, 5)
    seen: list[torch.Tensor] = []
    for task in TASKS * 2:
        with active_task(task):
            fast, slow = compiled(x), eager(x)
        fast.square().mean().backward()
        slow.square().mean().backward()
        # float32 statistics of 200 numbers summed in another order: about 1e-6; the tasks differ by over 1e-2
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
        seen.append(slow.detach())
    assert all((first - second).abs().max() > 1e-2 for first, second in pairwise(seen))
    for fast, slow in zip(model.parameters(), eager.parameters(), strict=True):
        # six accumulated gradients below 1, each a float32 sum of 400 terms: about 1e-6
        torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-4, atol=1e-4)
