"""Every framework's example on one process or on several, in some variants: the parameters after training.

``torchrun --nproc-per-node 2 -m integrations.worker FRAMEWORK FOLDER`` leaves them in ``FOLDER/found.pt``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

import detente

EXAMPLES = Path(__file__).parents[2] / "examples"
State = dict[str, Tensor]


def example(name: str) -> ModuleType:
    """An example, as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def error(found: State, wanted: State) -> float:
    """Distance of the parameters from those wanted, relative to the length of these."""
    assert list(found) == list(wanted)
    far = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted]).norm()
    return float(far / torch.cat([p.flatten() for p in wanted.values()]).norm())


def plain(
    model: nn.Module,
    losses_of: Callable[[Any], dict[str, Tensor]],
    batches: list[list[Any]],
    method: detente.Method,
    optimizer: torch.optim.Optimizer,
    accumulate: int = 1,
) -> list[detente.Update]:
    """The plain loop over the batches of every epoch; with several per step, their updates are averaged."""
    updates = []
    for epoch in batches:
        for k, batch in enumerate(epoch):
            losses = {task: loss / accumulate for task, loss in losses_of(batch).items()}
            updates.append(detente.backward(losses, method, scale=1 / accumulate))
            if (k + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        method.next_epoch()
    return updates


def run_torchrun(size: int, folder: Path) -> dict[str, State]:
    return {"plain": state(example("torchrun_plain").main())}


def run_lightning(size: int, folder: Path) -> dict[str, State]:
    from lightning.pytorch.strategies import DDPStrategy, Strategy

    module = example("lightning_example")

    class Manual(module.Model):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.training_losses(batch, batch_idx))
            optimizer.step()

    def run(strategy: str | Strategy, model: type[nn.Module] = module.Model, **options: Any) -> State:
        torch.manual_seed(0)
        chosen: dict[str, Any] = {"devices": size, "strategy": strategy if size > 1 else "auto"}
        if size == 1:  # the order in which Lightning gives several processes their samples
            chosen["sampler"] = DistributedSampler(module.make_data(), 1, 0)
        made = module.main(64 // size, str(folder), model(), enable_checkpointing=False, **chosen, **options)
        return state(made)

    return {
        "automatic": run("ddp"),
        "accumulating": run("ddp", accumulate_grad_batches=2),
        "find_unused": run("ddp_find_unused_parameters_true"),
        "manual": run("ddp", Manual),
        "manual, static_graph": run(DDPStrategy(static_graph=True), Manual),
    }


def run_accelerate(size: int, folder: Path) -> dict[str, State]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    module = example("accelerate_example")
    found = {}
    for steps in (1, 2):
        AcceleratorState._reset_state(reset_partial_state=True)
        found[f"{steps} steps"] = state(
            module.main(accelerator=Accelerator(cpu=True, gradient_accumulation_steps=steps))
        )
    return found


def run_transformers(size: int, folder: Path) -> dict[str, State]:
    module = example("transformers_example")
    common = {"batch_size": 32 // size, "folder": str(folder), "save_strategy": "no"}
    return {
        "every batch": state(module.main(**common)),
        "accumulating": state(module.main(gradient_accumulation_steps=2, **common)),
    }


RUNS = {
    "torchrun": run_torchrun,
    "lightning": run_lightning,
    "accelerate": run_accelerate,
    "transformers": run_transformers,
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the frameworks' own, on which the tests in one process look
    torch.set_default_dtype(torch.float64)
    found = RUNS[sys.argv[1]](2, Path(sys.argv[2]))
    if dist.get_rank() == 0:
        torch.save(found, Path(sys.argv[2], "found.pt"))
    dist.destroy_process_group()
    sys.stdout.flush()
    # torch 2.13 now and then aborts while the interpreter of a gloo process shuts down, after a plain DDP loop too
    os._exit(0)
