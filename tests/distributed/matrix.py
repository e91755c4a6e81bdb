"""The same update on one process and on many: every set-up, every method, every way to divide a batch.

``python tests/distributed/matrix.py`` computes what one process gives on the whole batch, lets torchrun start 2 and
then 4 processes that each see a part of it, and prints the error of the parameters after 20 optimizer steps, relative
to their length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn

import detente

TASKS = ("a", "b", "c")
SAMPLES, STEPS = 24, 20
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Model(nn.Module):
    """A small trunk with a norm, and a head per task."""

    def __init__(self, *, task_norms: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in TASKS})
        if task_norms:
            self.trunk = detente.nn.convert_task_norm(self.trunk, TASKS)

    def forward(self, x: Tensor, tasks: Iterable[str] = TASKS) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {t: self.heads[t](h).squeeze(1) for t in tasks}


def build(dtype: torch.dtype, *, task_norms: bool, device: str = "cpu") -> Model:
    torch.manual_seed(0)
    return Model(task_norms=task_norms).to(device, dtype)


def data(dtype: torch.dtype, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole batch of a step, and the targets by task."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 6, generator=g, dtype=torch.float64)
    y = {t: torch.randn(SAMPLES, generator=g, dtype=torch.float64) * (1 + 3 * k) for k, t in enumerate(TASKS)}
    return x.to(dtype), {t: v.to(dtype) for t, v in y.items()}


def division(kind: str, rank: int, size: int) -> tuple[range, dict[str, range]]:
    """Which samples a process sees, and which of them have a label for each task."""
    if kind == "even":
        cuts = [SAMPLES * r // size for r in range(size + 1)]
    else:
        cuts = {1: [0, 24], 2: [0, 15, 24], 4: [0, 10, 17, 22, 24]}[size]
    mine = range(cuts[rank], cuts[rank + 1])
    labelled = dict.fromkeys(TASKS, mine)
    if kind == "missing":  # b is labelled at the front only, c at the back only
        labelled["b"] = range(mine.start, max(mine.start, min(mine.stop, 9)))
        labelled["c"] = range(min(mine.stop, max(mine.start, 16)), mine.stop)
    return mine, labelled


Build = Callable[[Model], tuple[detente.Method, dict[str, Any]]]


def plain(name: str, method: dict[str, Any] | None = None, **options: Any) -> Build:
    def made(model: Model) -> tuple[detente.Method, dict[str, Any]]:
        built = {k: v() if isinstance(v, partial) else v for k, v in options.items()}
        return detente.get_method(name, **(method or {})), built

    return made


def strength(phase: int) -> Build:
    return lambda model: (detente.ConnectionStrength(model, phase=phase), {})


METHODS: dict[str, Build] = {
    "gd": plain("gd"),
    "cagrad": plain("cagrad"),
    "pcgrad": plain("pcgrad"),
    "wpcgrad": plain("wpcgrad", {"priority": detente.DWA()}),
    "cdtt": plain("cdtt"),
    "strength 1": strength(1),
    "strength 2": strength(2),
    "nash_mtl": plain("nash_mtl"),
    "famo": plain("famo"),
    "gradnorm": plain("gradnorm"),
    "uw": plain("uw"),
    "graddrop": plain("graddrop"),
    "moco": plain("moco"),
    "auto_lambda": plain("auto_lambda"),
    "sdmgrad": plain("sdmgrad"),
    "cagrad, layers": plain("cagrad", granularity="layer"),
    "pcgrad, channels": plain("pcgrad", granularity="channel"),
    "cagrad + dwa": plain("cagrad", weighting=partial(detente.DWA)),
    "cagrad, Sampled(1)": plain("cagrad", source=partial(detente.Sampled, 1)),
    "cagrad, Every(3)": plain("cagrad", source=partial(detente.Every, 3)),
    "cagrad, features": plain("cagrad", source="features"),
}
"""By name: a method and the options of the step."""

MIXED = {"amp, float16": torch.float16, "amp, bfloat16": torch.bfloat16}
REPLICATED = ("bare", "ddp", "ddp, find_unused", "ddp, static_graph", "ddp, bucket_view", "ddp, compiled", *MIXED)
SHARDED = ("fsdp2", "fsdp2, resharding", "hsdp", "tp", "fsdp2 x tp")
KINDS = ("even", "uneven", "missing")


def refused(setup: str, method: str, kind: str, size: int) -> str | None:
    """Why there is no such cell."""
    if setup in ("hsdp", "fsdp2 x tp") and size != 4:
        return "needs four processes"
    if setup in MIXED and method in ("famo", "strength 1", "auto_lambda", "sdmgrad"):
        return "more than one backward pass, which detente.step takes"
    if setup in MIXED and size > 1 and method in ("graddrop", "pcgrad, channels"):
        return "decides by the signs of few coordinates, which rounding to half precision turns"
    if setup == "ddp, compiled" and method.startswith("strength"):
        return "a forward pass per task"
    if setup == "ddp, compiled" and method in ("cagrad, features", "cagrad, Every(3)"):
        return "refused with an error"
    if setup == "ddp, compiled" and method == "graddrop":
        return "its random masks follow the order in which the graph uses the parameters"
    if setup in SHARDED and method in ("graddrop", "moco", "auto_lambda", "cagrad, features"):
        return "refused with an error"
    if method == "cagrad, features" and kind == "missing":
        return "refused with an error"
    if setup == "tp" and kind != "even":
        return "all processes see the same samples"
    return None


def train(
    model: nn.Module,
    inner: Model,
    method: str,
    kind: str,
    rank: int,
    size: int,
    dtype: torch.dtype,
    *,
    everywhere: bool = False,
    mixed: torch.dtype | None = None,
    compiled: bool = False,
    group: Any = None,
) -> None:
    """Twenty steps on this process's part of every batch.

    Args:
        model: as it is called, wrapped or not.
        inner: the model inside.
        everywhere: whether a task without samples must have a loss all the same.
        mixed: of a forward pass under autocast, with a gradient scaler.
        compiled: as a whole, so that the graph does not show which parameters are shared.
        group: process group.
    """
    rule, options = METHODS[method](inner)
    if compiled:
        options["shared"] = list(inner.trunk.parameters())
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01, momentum=0.9, foreach=False)
    device = next(iter(inner.parameters())).device
    mine, labelled = division(kind, rank, size)
    counts: dict[str, float] = {}
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    by_task = method.startswith("strength")
    for step in range(STEPS):
        x, y = data(dtype, step)
        x, y = x[mine.start : mine.stop].to(device), {t: v.to(device) for t, v in y.items()}

        def closure(tasks: tuple[str, ...] | None = None, x: Tensor = x, y: dict[str, Tensor] = y) -> dict[str, Tensor]:
            wanted = TASKS if tasks is None else tasks
            losses = {}
            together = {} if by_task else model(x, wanted)
            for t in wanted:
                if by_task:
                    with detente.nn.active_task(t):
                        together[t] = model(x, (t,))[t]
                where = labelled[t]
                counts[t] = len(where)
                predicted = together[t][where.start - mine.start : where.stop - mine.start]
                if where:
                    losses[t] = (predicted - y[t][where.start : where.stop]).square().mean()
                elif everywhere:
                    losses[t] = predicted.sum() * 0.0
            return losses

        if mixed is None:
            detente.step(closure, optimizer, rule, counts=counts, group=group, **options)
            continue
        with torch.autocast(device.type, mixed):
            losses = {t: scaler.scale(loss) for t, loss in closure().items()}
        optimizer.zero_grad()
        scale = scaler.get_scale()
        everything = inner.parameters()
        detente.backward(losses, rule, counts=counts, scale=scale, parameters=everything, group=group, **options)
        scaler.step(optimizer)
        scaler.update()


def wrapped(setup: str, model: Model, size: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    device = next(model.parameters()).device.type
    if setup == "bare":
        return model
    if setup in MIXED:
        return nn.parallel.DistributedDataParallel(model)
    if setup.startswith("ddp"):
        flags = {
            "find_unused": {"find_unused_parameters": True},
            "static_graph": {"static_graph": True},
            "bucket_view": {"gradient_as_bucket_view": True},
        }
        replicated = nn.parallel.DistributedDataParallel(model, **flags.get(setup[5:], {}))
        # the tests have no compiler for the CPU; graphs are captured and split alike
        how = "inductor" if device == "cuda" else "aot_eager"
        return torch.compile(replicated, backend=how) if "compiled" in setup else replicated
    if setup.startswith("fsdp2,") or setup == "fsdp2":
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("data",))
    elif setup == "tp":
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("model",))
    else:
        names = ("data", "model") if "tp" in setup else ("replicate", "shard")
        mesh = init_device_mesh(device, (2, size // 2), mesh_dim_names=names)
    if "tp" in setup:
        plan = {"trunk.3": ColwiseParallel(), **{f"heads.{t}": RowwiseParallel() for t in TASKS}}
        parallelize_module(model, mesh["model"], plan)
    if setup == "tp":
        return model
    data_mesh = mesh["data"] if "tp" in setup else mesh
    again = setup == "fsdp2, resharding"
    for part in (model.trunk[0], model.trunk[3], *model.heads.values()):
        fully_shard(part, mesh=data_mesh, reshard_after_forward=again)
    fully_shard(model, mesh=data_mesh, reshard_after_forward=again)
    return model


def whole(model: Model) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone().cpu()
        for name, p in model.named_parameters()
    }


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Distance of the parameters from those wanted, relative to the length of these."""

    def flat(given: dict[str, Tensor]) -> Tensor:
        return torch.cat([given[name].double().reshape(-1) for name in wanted])

    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


def worker(
    references: Path, setups: list[str], methods: list[str], kinds: list[str], dtypes: list[str], device: str
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a graph that was compiled for a single pass cannot be passed again, and the models share their compiled code
    torch._functorch.config.donated_buffer = False
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    expected = torch.load(references, weights_only=True)
    rows = []
    for setup in setups:
        for method in methods:
            for kind in kinds:
                for label in dtypes:
                    dtype = DTYPES[label]
                    why = refused(setup, method, kind, size)
                    if why is not None or (setup in MIXED and label != "float32"):
                        continue
                    cell = f"{setup if setup in MIXED else ''}/{method}/{kind}/{label}"
                    inner = build(dtype, task_norms=method.startswith("strength"), device=device)
                    model = wrapped(setup, inner, size)
                    row: dict[str, Any] = {"setup": setup, "method": method, "kind": kind, "dtype": label, "size": size}
                    mine = {"tp": (0, 1), "fsdp2 x tp": (rank // 2, 2)}.get(setup, (rank, size))
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("error", FutureWarning)
                            train(
                                model,
                                inner,
                                method,
                                kind,
                                *mine,
                                dtype,
                                everywhere=setup in SHARDED,
                                mixed=MIXED.get(setup),
                                compiled=setup == "ddp, compiled",
                                group=dist.group.WORLD,
                            )
                        row["error"] = error(whole(inner), expected[cell])
                    except Exception as failure:
                        row["failure"] = f"{type(failure).__name__}: {failure}"
                        traceback.print_exc()
                    rows.append(row)
                    del model  # the last to let go of a process group may wait for it forever, if that is DDP's reducer
    if rank == 0:
        print("MATRIX " + json.dumps(rows), flush=True)
    dist.destroy_process_group()
    leave()


def references(
    setups: Iterable[str], methods: Iterable[str], kinds: Iterable[str], dtypes: Iterable[str], device: str
) -> dict[str, dict[str, Tensor]]:
    """Parameters after the run in this process alone, by cell, and before it."""
    found = {}
    variants = dict.fromkeys(setup if setup in MIXED else "" for setup in setups)
    for variant, method, kind, label in product(variants, methods, kinds, dtypes):
        dtype = DTYPES[label]
        if refused(variant or "bare", method, kind, 1) or (variant and dtype != torch.float32):
            continue
        # rounding to half precision is the device's own
        model = build(dtype, task_norms=method.startswith("strength"), device=device if variant else "cpu")
        train(model, model, method, kind, 0, 1, dtype, mixed=MIXED.get(variant))
        found[f"{variant}/{method}/{kind}/{label}"] = whole(model)
    return found


def leave() -> None:
    """End this process at once: at a normal end gloo's threads abort some runs, also those without detente."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(size: int, script: str | Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """A script on several processes of this machine, as torchrun starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    folders = [Path(detente.__file__).parents[1], Path(__file__).parents[1]]
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*command, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def matrix(
    size: int,
    setups: Iterable[str] = REPLICATED + SHARDED,
    methods: Iterable[str] = tuple(METHODS),
    kinds: Iterable[str] = KINDS,
    dtypes: Iterable[str] = tuple(DTYPES),
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """The cells of the matrix on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "references.pt")
        torch.save(references(setups, methods, kinds, dtypes, device), path)
        listed = [";".join(given) for given in (setups, methods, kinds, dtypes)]
        done = launch(size, __file__, "--worker", str(path), *listed, device)
    line = next((line for line in done.stdout.splitlines() if line.startswith("MATRIX ")), None)
    if done.returncode or line is None:
        raise RuntimeError(f"torchrun ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return json.loads(line.removeprefix("MATRIX "))


def shown(rows: list[dict[str, Any]]) -> str:
    """A table: set-ups and methods, by how the batch is divided and the dtype."""
    columns = [(kind, label) for kind in KINDS for label in DTYPES]
    lines = [f"{'':34}" + "".join(f"{kind + ' ' + label:>17}" for kind, label in columns)]
    cells = {(r["setup"], r["method"], r["kind"], r["dtype"]): r for r in rows}
    for setup, method in dict.fromkeys((r["setup"], r["method"]) for r in rows):
        texts = []
        for kind, label in columns:
            row = cells.get((setup, method, kind, label))
            texts.append("-" if row is None else "FAILED" if "failure" in row else f"{row['error']:.0e}")
        lines.append(f"{setup:>17} | {method:<20}"[:39].ljust(34) + "".join(f"{text:>17}" for text in texts))
    return "\n".join(lines)


def missed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells that are not what one process gives."""
    # what a process rounds to half precision are the sums over its own samples: 8 bits of each gradient
    allowed = dict.fromkeys(MIXED, 1e-2 if rows[0]["size"] > 1 else 1e-6)
    return [r for r in rows if not r.get("error", 1.0) <= allowed.get(r["setup"], PRECISION[DTYPES[r["dtype"]]])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--setups", nargs="+", default=list(REPLICATED + SHARDED))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for size in given.sizes:
        rows = []
        for setup in given.setups:
            if any(not refused(setup, m, k, size) for m in given.methods for k in given.kinds):
                rows += matrix(size, [setup], given.methods, given.kinds, given.dtypes, given.device)
        bad = missed(rows)
        print(f"\n{size} processes, {len(rows)} cells, {len(bad)} not what one process gives\n\n{shown(rows)}")
        for row in bad:
            print(row)
        failed += len(bad)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        path, *lists, device = sys.argv[2:]
        worker(Path(path), *(given.split(";") for given in lists), device)
    else:
        sys.exit(main())
