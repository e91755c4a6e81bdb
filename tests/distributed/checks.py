"""What has to hold on several processes; started by torchrun, one report by process 0.

``PYTHONPATH=tests torchrun --nproc-per-node 2 tests/distributed/checks.py`` runs all. Each runs on every process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import detente
from distributed.matrix import leave

CHECKS: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def raised(function: Callable[[], object]) -> str:
    """Type and text of the error that it raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def everywhere(value: Any) -> list[Any]:
    """A value of each process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"trunk": nn.Sequential(nn.Linear(4, 6), nn.Tanh()), "a": nn.Linear(6, 1), "b": nn.Linear(6, 1)}
    ).double()


def losses(net: nn.Module, tasks: str = "ab", seed: int | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank() if seed is None else seed)
    x = torch.randn(5, 4, generator=g, dtype=torch.float64)
    h = net["trunk"](x)
    return {t: (net[t](h) * (1 if t == "a" else -2) + 1).square().mean() for t in tasks}


def samples() -> tuple[Tensor]:
    """Of this process, those of `losses`."""
    return (torch.randn(5, 4, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64),)


class Both(nn.Module):
    """The network with both losses behind it, as DistributedDataParallel wants it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        h = self.net["trunk"](x)
        return {t: (self.net[t](h) * (1 if t == "a" else -2) + 1).square().mean() for t in tasks or "ab"}


@check
def traffic() -> list[dict[str, float]]:
    """Bytes on the network per step, of both processes: rows and update beside all rows reduced; and peak memory."""
    found = []
    width = 2000
    length = width * width
    for count in (2, 5, 10):
        trunk = nn.Linear(width, width, bias=False)
        x = torch.randn(4, width)

        def given(trunk: nn.Linear = trunk, x: Tensor = x, count: int = count) -> dict[str, Tensor]:
            trunk.weight.grad = None
            h = trunk(x)
            return {f"t{k}": h[:, k::count].square().mean() for k in range(count)}

        def step(given: Callable[[], dict[str, Tensor]] = given) -> None:
            detente.backward(given(), detente.CAGrad())

        row = torch.zeros(length)

        def rows(row: Tensor = row, count: int = count) -> None:
            for _ in range(count):
                dist.all_reduce(row)

        def plain(given: Callable[[], dict[str, Tensor]] = given) -> None:
            torch.stack(list(given().values())).sum().backward()

        sent = {name: min(sending(what) for _ in range(3)) for name, what in (("ours", step), ("rows", rows))}
        peaks = {}
        for name, what in (("ours", step), ("plain", plain)):
            trunk.weight.grad = None
            peaks[name] = allocated(what)
        found.append(
            {
                "tasks": count,
                "bytes": sent["ours"],
                "ratio": sent["ours"] / sent["rows"],
                "copies": (peaks["ours"] - peaks["plain"]) / (4 * length),
            }
        )
    return found


def sending(what: Callable[[], None]) -> int:
    """Bytes on the loopback device during a call, which all processes make."""

    def transmitted() -> int:
        with open("/proc/net/dev") as lines:
            return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))

    dist.barrier()
    before = transmitted()
    what()
    dist.barrier()
    return transmitted() - before


def allocated(what: Callable[[], None]) -> int:
    """Most bytes of tensors at a time that a call has added."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        what()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


@check
def overflow() -> dict[str, Any]:
    """A gradient of one task is infinite on the last process: the step is skipped, the scale halved, history kept."""
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        net = network().float()
        model = DistributedDataParallel(nn.Sequential(net["trunk"]))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        method = detente.CDTT()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        weights, scales, histories = [], [], []
        for step in range(3):
            g = torch.Generator().manual_seed(10 * step + dist.get_rank())
            x = torch.randn(5, 4, generator=g)
            with torch.autocast("cpu", dtype):
                h = model(x)
                given = {t: net[t](h).float().square().mean() for t in "ab"}
            if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
                given["b"] = given["b"] * float("inf")
            optimizer.zero_grad()
            detente.backward({t: scaler.scale(v) for t, v in given.items()}, method, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            weights.append(torch.cat([p.detach().reshape(-1).clone() for p in net.parameters()]))
            scales.append(scaler.get_scale())
            histories.append(json.dumps(plain_values(method.state_dict())))
        found[str(dtype)] = {
            "scales": scales,
            "moved": [bool((a != b).any()) for a, b in pairwise(weights)],
            "history": [a != b for a, b in pairwise(histories)],
            "alike": all(torch.equal(weights[-1], other) for other in everywhere(weights[-1])),
        }
    return found


def plain_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    return value.tolist() if isinstance(value, Tensor) else value


@check
def different_tasks() -> dict[str, Any]:
    """Without `parameters` an error on all processes that names the tasks; with it, or with step, an update."""
    mine = "ab" if dist.get_rank() == 0 else "b"
    net = network()
    error = raised(lambda: detente.backward(losses(net, mine), detente.PCGrad()))
    written = any(p.grad is not None for p in net.parameters())
    detente.backward(losses(net, mine), detente.PCGrad(), parameters=net.parameters())
    given = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    # one process alone, on the parts' mean
    wanted = network()
    parts = [losses(wanted, "ab" if r == 0 else "b", r) for r in range(dist.get_world_size())]
    mean = {"a": parts[0]["a"], "b": torch.stack([part["b"] for part in parts]).mean()}
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    detente.backward(mean, detente.PCGrad(), group=alone)
    difference = given - torch.cat([p.grad.reshape(-1) for p in wanted.parameters()])
    return {"errors": everywhere(error), "written": everywhere(written), "off": everywhere(float(difference.norm()))}


@check
def no_task_at_all() -> list[float]:
    """A process without any labelled sample takes part all the same."""
    net = network()
    given = losses(net) if dist.get_rank() == 0 else {}
    detente.backward(given, detente.CAGrad(), parameters=net.parameters())
    mine = torch.cat([p.grad.reshape(-1) for p in net.parameters()])
    wanted = network()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    detente.backward(losses(wanted, seed=0), detente.CAGrad(), group=alone)
    return everywhere(float((mine - torch.cat([p.grad.reshape(-1) for p in wanted.parameters()])).norm()))


@check
def one_process_fails() -> list[str]:
    """Bad input on one process ends the step on all of them, at once."""
    net = network()
    given = losses(net)
    if dist.get_rank() == 0:
        given["a"] = given["a"].detach()
    begun = time.monotonic()
    found = everywhere(raised(lambda: detente.backward(given, detente.PCGrad())))
    assert time.monotonic() - begun < 20
    return found


@check
def not_finite() -> list[str]:
    """A loss that is not finite on one process raises on all."""
    net = network()
    given = losses(net)
    if dist.get_rank() == 0:
        given["b"] = given["b"] * float("nan")
    return everywhere(raised(lambda: detente.backward(given, detente.PCGrad())))


@check
def samples_without_a_label() -> list[bool]:
    """The mean over no samples is NaN; with a count of 0 it does not count."""
    net = network()
    given = losses(net)
    if dist.get_rank() == 0:
        given["b"] = given["b"] * float("nan")
    counts = {"a": 5, "b": 0 if dist.get_rank() == 0 else 5}
    detente.backward(given, detente.PCGrad(), counts=counts)
    return everywhere(all(bool(p.grad.isfinite().all()) for p in net.parameters()))


@check
def bad_counts() -> list[str]:
    net = network()
    return [
        raised(lambda: detente.backward(losses(net), detente.PCGrad(), counts={"a": 3})),
        raised(lambda: detente.backward(losses(net), detente.PCGrad(), counts=-1)),
        raised(lambda: detente.backward(losses(net), detente.PCGrad(), counts=torch.ones(()))),
        raised(lambda: detente.backward(losses(net), detente.PCGrad(), counts=3 if dist.get_rank() else None)),
    ]


@check
def different_seeds() -> dict[str, str]:
    """With DETENTE_DEBUG=1, what should be equal on all processes is checked to be."""
    os.environ["DETENTE_DEBUG"] = "1"
    try:
        net = network()
        equal = raised(lambda: detente.backward(losses(net), detente.PCGrad(seed=3)))
        seeds = raised(lambda: detente.backward(losses(net), detente.PCGrad(seed=dist.get_rank())))
        with torch.no_grad():
            net["trunk"][0].weight += 1e-9 * dist.get_rank()
        return {"equal": equal, "seeds": seeds, "weights": raised(lambda: detente.backward(losses(net), detente.GD()))}
    finally:
        del os.environ["DETENTE_DEBUG"]


@check
def refused() -> dict[str, str]:
    """Engines that own the backward pass, and what needs one process's samples."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    found = {}
    net = network()
    whole = nn.Sequential(net["trunk"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated
        wrapped = FullyShardedDataParallel(whole, device_id=torch.device("cpu"))
        h = wrapped(torch.ones(2, 4, dtype=torch.float64))
    given = {t: net[t](h).square().mean() for t in "ab"}
    found["FSDP1"] = raised(lambda: detente.backward(given, detente.PCGrad()))
    for name, mark in {"DeepSpeed": "ds_id", "Megatron": "main_grad"}.items():
        net = network()
        setattr(net["trunk"][0].weight, mark, 1)
        found[name] = raised(lambda net=net: detente.backward(losses(net), detente.PCGrad()))
    for engine in ("lean", "batched"):
        net = network()
        found[engine] = raised(lambda net=net, e=engine: detente.backward(losses(net), detente.PCGrad(), engine=e))
    table = nn.Embedding(5, 6, sparse=True).double()
    h = network()["trunk"](torch.ones(2, 4, dtype=torch.float64))
    mixed = {"a": h.square().mean(), "b": (h * table(torch.tensor([0, 3]))).mean()}
    found["sparse"] = raised(lambda: detente.backward(mixed, detente.PCGrad()))
    sharded = network()
    fully_shard(sharded["trunk"])
    found["half FSDP2"] = raised(lambda: detente.backward(losses(sharded), detente.PCGrad()))
    for part in (sharded["a"], sharded["b"]):
        fully_shard(part)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    found["FSDP2, gradients"] = raised(
        lambda: detente.step(lambda tasks=None: losses(sharded), optimizer, detente.AutoLambda())
    )
    for name, options in {"features": {"source": "features"}, "rows": {}}.items():
        method = detente.PCGrad() if options else detente.GradDrop()
        found[f"FSDP2, {name}"] = raised(lambda o=options, m=method: detente.backward(losses(sharded), m, **o))
    return found


@check
def accumulation() -> dict[str, list[float]]:
    """Two micro-batches on each process, beside one process on the whole batch: rows by columns, and whole rows."""
    found = {}
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = dist.new_group([rank], use_local_synchronization=True)
    x = torch.randn(4 * size * 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def given(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        h = net["trunk"](x)
        return {t: (net[t](h) * (1 if t == "a" else -2) + 1).square().mean() for t in "ab"}

    for name, options in {"columns": {}, "rows": {"granularity": "layer"}}.items():
        net, wanted = network(), network()
        parts = iter(x[4 * (2 * rank) : 4 * (2 * rank + 2)].split(4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        closure = lambda tasks=None, net=net, parts=parts: given(net, next(parts))  # noqa: E731
        detente.step(closure, optimizer, detente.PCGrad(), micro_batches=2, **options)
        other = torch.optim.SGD(wanted.parameters(), lr=0.1)
        detente.step(lambda tasks=None, w=wanted: given(w, x), other, detente.PCGrad(), group=alone, **options)
        off = torch.cat([(p - q).reshape(-1) for p, q in zip(net.parameters(), wanted.parameters(), strict=True)])
        found[name] = everywhere(float(off.detach().norm()))
    return found


@check
def shared_by_name_under_fsdp() -> dict[str, Any]:
    """``shared`` may list what the optimizer knows, before or after the forward pass; a parameter of one task too."""
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    for name, options in {"before": {}, "resharded": {"reshard_after_forward": True}}.items():
        net, wanted = network(), network()
        for part in (net["trunk"], net["a"], net["b"]):
            fully_shard(part, **options)
        sharded = list(net.parameters())  # after the forward pass the model has others
        shared = [*net["trunk"].parameters(), net["a"].weight]
        detente.backward(losses(net, seed=0), detente.CAGrad(), shared=shared)
        named = [*wanted["trunk"].parameters(), wanted["a"].weight]
        detente.backward(losses(wanted, seed=0), detente.CAGrad(), shared=named, group=alone)
        pairs = zip(sharded, wanted.parameters(), strict=True)
        found[name] = everywhere(max(float((p.grad.full_tensor() - q.grad).norm()) for p, q in pairs))
    source = detente.Every(2)
    detente.backward(losses(net, seed=0), detente.CAGrad(), shared=shared, source=source)
    found["Every"] = raised(
        lambda: detente.backward(losses(net, seed=0), detente.CAGrad(), shared=shared, source=source)
    )
    return found


@check
def recorded() -> dict[str, Any]:
    """What a recorder notes of five steps, beside gradients of the whole batch taken directly."""
    from torch.distributed.fsdp import fully_shard

    directory = everywhere(tempfile.mkdtemp() if dist.get_rank() == 0 else None)[0]
    found: dict[str, Any] = {}
    for kind in ("bare", "ddp", "fsdp2"):
        net, wanted = network(), network()
        wrapped = DistributedDataParallel(Both(net)) if kind == "ddp" else Both(net)
        if kind == "fsdp2":
            for part in (net["trunk"], net["a"], net["b"], wrapped):
                fully_shard(part)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        path = f"{directory}/{kind}.jsonl"
        recorder = detente.Recorder(net, path, every=1, realised_every=1, limit_mb=0.001)
        expected, after, everies = [], [], []
        for _ in range(5):
            with torch.no_grad():
                for p, q in zip(wanted.parameters(), net.parameters(), strict=True):
                    p.copy_(q.full_tensor() if kind == "fsdp2" else q)
            before = [losses(wanted, seed=rank) for rank in range(dist.get_world_size())]
            of = {t: torch.stack([one[t] for one in before]).mean() for t in "ab"}
            rows = [
                torch.cat(
                    [
                        g.reshape(-1)
                        for g in torch.autograd.grad(of[t], [*wanted["trunk"].parameters()], retain_graph=True)
                    ]
                )
                for t in "ab"
            ]
            norms = [float(row.norm()) for row in rows]
            expected.append([*norms, float(rows[0] @ rows[1]) / (norms[0] * norms[1])])
            start = {t: float(of[t]) for t in "ab"}
            with recorder:
                detente.step(lambda tasks=None, model=wrapped: model(*samples(), tasks), optimizer, detente.PCGrad())
            with torch.no_grad():
                for p, q in zip(wanted.parameters(), net.parameters(), strict=True):
                    p.copy_(q.full_tensor() if kind == "fsdp2" else q)
            end = [losses(wanted, seed=rank) for rank in range(dist.get_world_size())]
            after.append([float(torch.stack([one[t] for one in end]).mean()) - start[t] for t in "ab"])
            everies.append(recorder.every)
        dist.barrier()
        read = detente.diagnostics.Recording.load(path)
        noted = [
            [*read.norms[r].tolist(), read.cosines[r, 0, 1].item(), *read.realised[r].tolist()]
            for r in range(len(read.steps))
        ]
        found[kind] = {
            "steps": read.steps.tolist(),
            "noted": noted,
            "expected": [expected[k] + after[k] for k in read.steps],
            "every": everywhere(everies),
        }
    return found


@check
def ordinary_backward_afterwards() -> dict[str, list[float]]:
    """DistributedDataParallel's own reduction still works in a later ordinary backward pass."""
    found = {}
    for name, flags in {"plain": {}, "find_unused": {"find_unused_parameters": True}}.items():
        net = network()
        model = DistributedDataParallel(nn.Sequential(net["trunk"], net["a"]), **flags)
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(x)
            detente.backward({"a": out.square().mean(), "c": (out - 3).abs().mean()}, detente.PCGrad())
            model.zero_grad()
            model(x).square().mean().backward()
        mine = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        found[name] = [float((mine - other).norm()) for other in everywhere(mine)]
    return found


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name in names or list(CHECKS):
        try:
            found[name] = CHECKS[name]()
        except Exception:
            found[name] = {"failure": traceback.format_exc()}
        dist.barrier()
    if dist.get_rank() == 0:
        print("CHECKS " + json.dumps(found), flush=True)
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
