"""A run with a checkpoint after every step, started by torchrun; it goes on from the newest one.

``resume.py FOLDER SETUP STEPS``. Process 0 appends the losses of the whole batch to ``FOLDER/losses.jsonl``. With
``DETENTE_TEST_KILL=STEP`` the last process kills itself in the middle of that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import detente
from distributed.matrix import TASKS, Model, build, data, division, leave, wrapped


def main(folder: Path, setup: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    inner: Model = build(torch.float32, task_norms=False)
    model = wrapped(setup, inner, size)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01, momentum=0.9)
    method = detente.WPCGrad(priority=detente.DWA())
    source = detente.Every(2)
    done = load(folder, setup, inner, optimizer, method, source)
    kill = int(os.environ.get("DETENTE_TEST_KILL", -1))
    mine, _ = division("uneven", rank, size)
    for step in range(done, steps):
        x, y = data(torch.float32, step)
        predicted = model(x[mine.start : mine.stop])
        losses = {t: (predicted[t] - y[t][mine.start : mine.stop]).square().mean() for t in TASKS}
        if step == kill and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        update = detente.backward(losses, method, source=source, counts=len(mine))
        optimizer.step()
        whole = torch.stack([losses[t].detach().double() * len(mine) / len(x) for t in TASKS])
        dist.all_reduce(whole)
        if rank == 0:
            weights = {t: float(w) for t, w in update.weights.items()}
            with (folder / "losses.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": step, "losses": whole.tolist(), "weights": weights}) + "\n")
        save(folder, setup, step + 1, inner, optimizer, method, source)
    del model  # the last one to let go of a process group may wait for its threads forever, if that is a DDP reducer
    dist.destroy_process_group()
    leave()


def save(
    folder: Path,
    setup: str,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: detente.Method,
    source: detente.Every,
) -> None:
    history = detente.History(method, source)
    if setup.startswith("fsdp2"):
        parameters, momenta = get_state_dict(model, optimizer)
        state = {"model": parameters, "optimizer": momenta, "history": history}
        dcp.save(state, checkpoint_id=folder / f"step-{step}")
    elif dist.get_rank() == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history.state_dict()}
        torch.save(state, folder / "unfinished")
        os.replace(folder / "unfinished", folder / f"step-{step}")
    dist.barrier()


def load(
    folder: Path,
    setup: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: detente.Method,
    source: detente.Every,
) -> int:
    """Take over the newest whole checkpoint, and say after how many steps it was written."""
    pattern = "step-*/.metadata" if setup.startswith("fsdp2") else "step-*"
    found = [path.parent if path.name == ".metadata" else path for path in folder.glob(pattern)]
    if not found:
        return 0
    history = detente.History(method, source)
    newest = max(found, key=lambda path: int(path.name.partition("-")[2]))
    if setup.startswith("fsdp2"):
        parameters, momenta = get_state_dict(model, optimizer)
        state = {"model": parameters, "optimizer": momenta, "history": history}
        dcp.load(state, checkpoint_id=newest)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    else:
        state = torch.load(newest, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history.load_state_dict(state["history"])
    return int(newest.name.partition("-")[2])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
