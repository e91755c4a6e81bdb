"""A step on a GPU is the step on the CPU; and what only a GPU has: scalers, streams, fused optimizers, transfers."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.method import method_class
from states import plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = torch.device("cuda")
# float64: other kernels sum in another order, and a well-conditioned solve of a few tasks
TIGHT = {"rtol": 1e-9, "atol": 1e-12}
TASKS = ("a", "b", "c", "d")
METHODS = ("cagrad", "pcgrad", "mgda", "nash_mtl", "upgrad", "imtl_g", "aligned_mtl", "graddrop")
# one backward pass per step, and no need to know the model
PLAIN = [n for n in detente.list_methods() if "model" not in (cls := method_class(n)).needs and not cls.requires_step]
# they work on the gradients themselves, on the device, and take the Gramian of what comes of it
REWRITING = ("graddrop", "moco", "db_mtl", "excess_mtl")
SOURCES: dict[str, Callable[[], dict[str, Any]]] = {
    "serial": lambda: {"engine": "serial"},
    "lean": lambda: {"engine": "lean"},
    "batched": lambda: {"engine": "batched"},
    "features": lambda: {"source": "features"},
    "every": lambda: {"source": detente.Every(2)},
    "every, features": lambda: {"source": detente.Every(2, "features")},
    "sampled": lambda: {"source": detente.Sampled(2)},
    "layer": lambda: {"granularity": "layer"},
    "channel": lambda: {"granularity": "channel"},
    "layer, lean": lambda: {"granularity": "layer", "engine": "lean"},
    "channel, features": lambda: {"granularity": "channel", "source": "features"},
    "weighting": lambda: {"weighting": detente.DWA()},
}


class Net(nn.Module):
    """A trunk, a head per task, and their batch; in float64 and the same on every device."""

    def __init__(self, *, conv: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 8), nn.Tanh()]
        self.trunk = nn.Sequential(*layers if conv else (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh()))
        self.heads = nn.ModuleDict({t: nn.Linear(8, 2) for t in TASKS})
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / math.sqrt(p[0].numel() + 1))
        shape = (16, 3, 6, 6) if conv else (16, 5)
        self.register_buffer("x", torch.randn(shape, generator=generator, dtype=torch.float64))
        self.register_buffer("y", torch.randn(len(TASKS), 16, 2, generator=generator, dtype=torch.float64))

    def losses(self, slope: float = 1.0) -> dict[str, Tensor]:
        """``slope``: factor of the gradient, not of the value, of the last task's loss."""
        h = self.trunk(self.x)
        out = [head(h) for head in self.heads.values()]
        if slope != 1:
            out[-1].register_hook(lambda g: g * slope)
        return {t: (o.to(y.dtype) - y).square().mean() for t, o, y in zip(TASKS, out, self.y, strict=True)}


def both(**options: Any) -> tuple[Net, Net]:
    """The same net on the CPU and on the GPU."""
    net = Net(**options)
    return net, copy.deepcopy(net).to(GPU)


def grads(module: nn.Module) -> list[Tensor]:
    """The gradients, removed from the module."""
    found = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(found) == len(list(module.parameters()))
    module.zero_grad(set_to_none=True)
    return found


def assert_same(actual: Sequence[Tensor], wanted: Sequence[Tensor], **tolerance: float) -> None:
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), **(tolerance or TIGHT))


def assert_near(actual: Sequence[Tensor], wanted: Sequence[Tensor], relative: float) -> None:
    """Of the whole update, because rounding is relative to the longest gradient, not to an entry."""
    a, b = (torch.cat([g.cpu().double().reshape(-1) for g in gradients]) for gradients in (actual, wanted))
    assert float((a - b).norm()) <= relative * float(b.norm())


def descend(*nets: nn.Module) -> None:
    with torch.no_grad():
        for net in nets:
            for p in net.parameters():
                p -= 0.05 * p.grad


# ---- the same as on the CPU ------------------------------------------------------------------------------------


def same_run(name: str, options: Callable[[], dict[str, Any]], **of_net: Any) -> None:
    """Over steps in which the parameters move, so that histories and generators are in step too."""
    nets = both(**of_net)
    methods, given = [detente.get_method(name) for _ in nets], [options() for _ in nets]
    for step in range(4):
        host, gpu = (
            detente.backward(net.losses(), method, **chosen)
            for net, method, chosen in zip(nets, methods, given, strict=True)
        )
        assert gpu.stats["backwards"] == host.stats["backwards"]
        assert {w.device.type for w in gpu.weights.values()} == {"cpu"}
        assert_same(list(gpu.weights.values()), list(host.weights.values()))
        descend(*nets)
        assert_same(grads(nets[1]), grads(nets[0]))
        if step == 1:
            for method in methods:
                method.next_epoch()


@pytest.mark.parametrize("name", PLAIN)
def test_every_method(name):
    same_run(name, dict)


def fits(name: str, source: str) -> bool:
    """Whether the method can be used so; tests/test_errors.py has what it says where not."""
    if source == "sampled":
        return name == "cagrad"
    if source.startswith("every"):
        return name != "graddrop"
    return method_class(name).heads == "own" or not source.startswith(("layer", "channel"))


@pytest.mark.parametrize(("name", "source"), [(n, s) for n in METHODS for s in SOURCES if fits(n, s)])
def test_every_source_and_granularity(name, source):
    same_run(name, SOURCES[source])


@pytest.mark.parametrize("source", ["serial", "features", "layer", "channel", "channel, features"])
def test_convolutions(source):
    same_run("cagrad", SOURCES[source], conv=True)


@pytest.mark.parametrize("engine", ["auto", "serial", "lean", "batched"])
@pytest.mark.parametrize("name", METHODS)
def test_float32(name, engine):
    assert torch.get_float32_matmul_precision() == "highest", "TF32 has ten bits"
    host, gpu = (net.float() for net in both())
    detente.backward(host.losses(), detente.get_method(name), engine=engine)
    detente.backward(gpu.losses(), detente.get_method(name), engine=engine)
    # 6e-8 per operation, some tens of operations deep, times a solve that may amplify it by some hundred
    assert_near(grads(gpu), grads(host), 1e-4)


@pytest.mark.parametrize("name", ["cagrad", "pcgrad", "mgda"])
@pytest.mark.parametrize("granularity", ["model", "channel"])
def test_storage_in_bfloat16(name, granularity):
    host, gpu = (net.float() for net in both())
    for net in (host, gpu):
        method = detente.get_method(name, heads="own")
        detente.backward(net.losses(), method, storage=torch.bfloat16, granularity=granularity)
    # gradients that differ in their last bit may round to neighbours, which lie 2^-8 apart; few do
    assert_near(grads(gpu), grads(host), 2e-3)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", [n for n in PLAIN if issubclass(method_class(n), detente.GramianMethod)])
def test_aggregate(name, moved):
    J = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = [1.0, 2.0, 0.5, 1.5]
    wanted = detente.aggregate(J, detente.get_method(name), losses)
    method = detente.get_method(name).to("cuda" if moved else "cpu")
    found = detente.aggregate(J.to(GPU), method, losses)
    assert found.device.type == "cuda"
    # a rule on the device runs a fixed number of iterations, certified to 1e-8
    assert_near([found], [wanted], 1e-6 if moved else 1e-12)


@pytest.mark.parametrize("name", ["famo", "auto_lambda"])
def test_schedules(name):
    nets = both()
    for net in nets:
        method, optimizer = detente.get_method(name), torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(3):
            detente.step(lambda tasks, net=net: net.losses(), optimizer, method)
    assert_same(list(nets[1].parameters()), list(nets[0].parameters()))


@pytest.mark.parametrize("phase", [1, 2])
def test_connection_strength(phase):
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 8), nn.BatchNorm1d(8)).double()
    host = detente.nn.convert_task_norm(net, TASKS)
    gpu, x = copy.deepcopy(host).to(GPU), Net().x
    for trunk in (host, gpu):
        here = x.to(trunk[0].weight.device)

        def losses(tasks: Sequence[str] | None, trunk: nn.Module = trunk, here: Tensor = here) -> dict[str, Tensor]:
            found = {}
            for k, task in enumerate(TASKS):
                if tasks is None or task in tasks:
                    with detente.nn.active_task(task):
                        found[task] = (trunk((here * (k + 1)).sin()) - k).tanh().square().mean()
            return found

        method = detente.ConnectionStrength(trunk, phase=phase)
        optimizer = torch.optim.SGD(trunk.parameters(), lr=0.05)
        for _ in range(3):
            detente.step(losses, optimizer, method)
    assert_same(list(gpu.parameters()), list(host.parameters()))


# ---- mixed precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["cagrad", "pcgrad", "nash_mtl", "cdtt", "db_mtl"])
def test_grad_scaler_and_autocast(name, dtype):
    """Scaled losses give the scaled update; an overflow in one task skips the step and leaves the history alone."""
    net = both()[1].float()
    method, optimizer = detente.get_method(name), torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)

    def step(slope: float) -> detente.Update:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            losses = net.losses(slope)
        scaled = {t: scaler.scale(loss) for t, loss in losses.items()}
        update = detente.backward(scaled, method, scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        return update

    with torch.autocast("cuda", dtype):
        losses = net.losses()
    rows = [torch.autograd.grad(2.0**10 * loss, net.trunk.parameters(), retain_graph=True) for loss in losses.values()]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]) / 2.0**10
    wanted = detente.aggregate(J.cpu(), detente.get_method(name), [float(loss.detach()) for loss in losses.values()])
    step(1.0)
    # after the scaler's unscaling; the same kernels gave the same rows, and a float32 sum of four is all that is left
    assert_near([p.grad for p in net.trunk.parameters()], [wanted], 1e-5)

    state, parameters = plain(method.state_dict()), copy.deepcopy(net.state_dict())
    step(math.inf)
    assert plain(method.state_dict()) == state
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), parameters.values(), strict=True))
    assert scaler.get_scale() == 2.0**9

    step(1.0)
    assert scaler.get_scale() == 2.0**9
    assert not torch.equal(net.trunk[0].weight, parameters["trunk.0.weight"])
    assert all(bool(p.isfinite().all()) for p in net.parameters())


# ---- compiled, laid out otherwise, spread over devices and streams ---------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("source", ["serial", "every", "features"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_trunk(backend, source):
    """Its backward gives its buffers away unless the first pass through it keeps the graph, as ours does."""
    torch._dynamo.reset()
    net, twin = both()[1], both()[1]
    net.trunk.compile(backend=backend)
    given, other = SOURCES[source](), SOURCES[source]()
    for _ in range(2):
        detente.backward(net.losses(), detente.CAGrad(), **given)
        detente.backward(twin.losses(), detente.CAGrad(), **other)
        assert_same(grads(net), grads(twin))


@pytest.mark.parametrize("source", ["serial", "channel", "features", "every"])
def test_channels_last_with_a_fused_optimizer(source):
    """A fused step reads parameter and gradient side by side in memory, so their layouts must agree."""
    net, twin = both(conv=True)[1], both(conv=True)[1].to(memory_format=torch.channels_last)
    twin.x = twin.x.to(memory_format=torch.channels_last)
    for n in (net, twin):
        optimizer, given = torch.optim.AdamW(n.parameters(), lr=0.01, fused=True), SOURCES[source]()
        for _ in range(3):
            optimizer.zero_grad()
            detente.backward(n.losses(), detente.CAGrad(), **given)
            optimizer.step()
    assert twin.trunk[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert_same(list(twin.parameters()), list(net.parameters()))


class Across(nn.Module):
    """Moves its input, so that a trunk can begin on the CPU and end on the GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(GPU)


@pytest.mark.parametrize("source", ["serial", "lean", "every", "sampled", "layer", "channel", "weighting"])
def test_parameters_on_two_devices(source):
    host = Net()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # the middle one is large enough to be kept as the tensor that comes, which only the CPU does
        first, middle, last = (layer.double() for layer in (nn.Linear(5, 200), nn.Linear(200, 200), nn.Linear(200, 8)))
    host.trunk = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last, nn.Tanh())
    split = copy.deepcopy(host)
    split.trunk.insert(4, Across())
    for part in (split.trunk[5], split.heads):
        part.to(GPU)
    split.y = split.y.to(GPU)
    given, other = SOURCES[source](), SOURCES[source]()
    for _ in range(2):
        detente.backward(host.losses(), detente.CAGrad(), **given)
        detente.backward(split.losses(), detente.CAGrad(), **other)
        assert {p.grad.device.type for p in split.trunk.parameters()} == {"cpu", "cuda"}
        assert_same(grads(split), grads(host))


@pytest.mark.parametrize("there", [("a",), ("b", "d"), TASKS])
@pytest.mark.parametrize("method", [detente.CAGrad(), detente.DWA()], ids=lambda m: m.name)
def test_losses_on_the_host(method, there):
    host, gpu = both()
    detente.backward(host.losses(), method)
    detente.backward({t: loss.cpu() if t in there else loss for t, loss in gpu.losses().items()}, method)
    assert_same(grads(gpu), grads(host))


@pytest.mark.parametrize("source", SOURCES)
def test_step_in_a_side_stream(source):
    """Autograd runs the backward pass in the streams of the forward pass; what comes of it is read in another one."""
    host, gpu = both()
    given, other = SOURCES[source](), SOURCES[source]()
    side = torch.cuda.Stream()
    for _ in range(2):
        detente.backward(host.losses(), detente.CAGrad(), **given)
        wanted = grads(host)
        # PyTorch cannot hand a batched tensor from one stream to another
        with torch.cuda.stream(side if source == "batched" else torch.cuda.current_stream()):
            losses = gpu.losses()
        losses["d"].grad_fn.register_hook(lambda *_: torch.cuda._sleep(20_000_000))  # some 10 ms
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            detente.backward(losses, detente.CAGrad(), **other)
            found = [g.clone() for g in grads(gpu)]
        torch.cuda.current_stream().wait_stream(side)
        assert_same(found, wanted)


# ---- waiting for the device ------------------------------------------------------------------------------------


def waits(run: Callable[[], Any]) -> list[str]:
    """Where the host waited for the GPU, which every transfer makes it do."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if str(w.message).startswith("called a sync")]


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_one_transfer_each_way(source, conv):
    if conv and source == "batched":
        pytest.skip("a trunk with convolutions takes one pass per task")
    one_transfer_each_way("cagrad", source, conv=conv)


@pytest.mark.parametrize("name", [n for n in PLAIN if n not in REWRITING])
def test_one_transfer_each_way_for_every_rule(name):
    one_transfer_each_way(name, "serial" if issubclass(method_class(name), detente.GramianMethod) else None)


def one_transfer_each_way(name: str, source: str | None, **of_net: Any) -> None:
    net, method, given = both(**of_net)[1], detente.get_method(name), SOURCES[source]() if source else {}
    for fresh in (True, False, True, False):  # with Every(2) every other step reads the losses alone
        losses = net.losses()
        found = waits(lambda losses=losses: detente.backward(losses, method, **given))
        assert len(found) <= (2 if fresh or not source or not source.startswith("every") else 1), found


ON_DEVICE = ("cagrad", "mgda", "upgrad", "dualproj", "fairgrad", "edm")
# they take eigenvalues or a pseudoinverse, and PyTorch waits for those
SPECTRAL = ("aligned_mtl", "config", "gdod", "imtl_g")


@pytest.mark.parametrize("name", [*ON_DEVICE, *SPECTRAL])
def test_rules_on_the_device(name):
    """A moved method works where the Gramian lies, and waits for nothing that it need not wait for."""
    J = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = detente.aggregate(J, detente.get_method(name))
    method, G = detente.get_method(name).to("cuda"), (J @ J.T).to(GPU)
    method.weights(G)  # constants that are made once
    found: list[Tensor] = []
    places = waits(lambda: found.append(method.weights(G)))
    assert name in SPECTRAL or places == []
    assert found[0].device.type == "cuda"
    # a fixed number of iterations, certified to 1e-8 on well-conditioned gradients
    assert_near([found[0].cpu() @ J], [wanted], 1e-6)


def test_a_comparison_on_the_gpu_is_that_on_the_cpu(tmp_path):
    """One training each; float32 sums in another order, and a handful of steps."""
    from pathlib import Path

    from detente.benchmark.job import Job
    from detente.benchmark.problem import load_problem
    from detente.benchmark.training import train

    path = str(Path(__file__).parent / "benchmark/tiny_problem.py")
    source = tmp_path / "still.py"
    source.write_text(Path(path).read_text().replace("nn.Dropout(0.1)", "nn.Identity()"))  # drawn otherwise there
    settings = load_problem(str(source)).settle({"epochs": 2})
    found = []
    for device in ("cpu", "cuda"):
        job = Job(str(source), "cagrad", "cagrad", None, 0, settings, device=device)
        train(job, tmp_path / device, lambda _: None)
        found.append(json.loads((job.directory(tmp_path / device) / "result.json").read_text()))
    here, there = found
    for one, other in zip(here["history"], there["history"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["val"]["sum"]["mse"] == pytest.approx(one["val"]["sum"]["mse"], rel=1e-3)
    assert there["cost"]["step_ms"] > 0
    assert there["cost"]["peak_mb"] > 0
