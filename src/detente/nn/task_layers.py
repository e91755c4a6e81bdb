"""Chosen layers of a shared trunk made task-specific: the second half of Recon.

Recon (Shi et al., ICLR 2023, arXiv 2302.11289) finds the layers where the tasks' gradients conflict most, with
:class:`detente.diagnostics.ConflictScores`, and gives each of them one copy per task:

    model = detente.nn.convert_task_layers(make_model(), ("segmentation", "depth"), scores.top(10))
    with detente.nn.active_task("depth"):
        loss = criterion(model(images), depths)

Task layers follow :func:`detente.nn.active_task` exactly as task norms do, with the same remarks on threads,
activation checkpointing and ``torch.compile``; see :mod:`detente.nn.task_norm`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import permutations

from torch import nn

from detente.nn.task_norm import Module, TaskModule, convert, task_names

_RESETS = ("reset_parameters", "_reset_parameters")  # the second is nn.MultiheadAttention's


class TaskLayer(TaskModule[Module]):
    """One module per task; the forward uses the one of the task set by :func:`active_task`.

    ``layer.tasks`` are the names, ``layer["depth"]`` is that task's module, ``len`` and iteration go over the names;
    attributes that a task layer lacks, such as ``weight``, are read from the active task's module. Arguments and
    result are those of the module held. The state dict is keyed by task name.

    Args:
        layers: the module of each task. The names are non-empty strings, dots included.

    Raises:
        ValueError: no task, or a name that is not a non-empty string.
        RuntimeError: forward without an active task (a layer with a single task needs none).
        KeyError: a task, looked up or active, that this layer does not know.
    """

    noun = "layer"

    def __init__(self, layers: Mapping[str, Module]) -> None:
        super().__init__(layers)


def convert_task_layers(
    model: nn.Module, tasks: Iterable[str], names: Iterable[str], *, reset: bool = False
) -> nn.Module:
    """Give each named submodule one copy per task (Shi et al., ICLR 2023, arXiv 2302.11289).

    Each task starts from a full copy: parameters, buffers, device, dtype, mode, ``requires_grad``, hooks. A submodule
    used at several places stays shared between them; a parameter tied to a submodule that is not named is tied no
    longer. Without names the model is left as it is. Call it before making the optimizer, which must know the copies.

    Args:
        model: changed in place; if ``names`` is ``[""]``, it is left alone and its task layer returned.
        tasks: distinct task names.
        names: of submodules, as in ``model.named_modules()``; none may lie inside another.
        reset: initialise every copy anew instead, each for itself.

    Returns:
        ``model``, or the task layer that replaces it.

    Raises:
        TypeError: ``names`` is a single string.
        ValueError: a name that the model lacks, that lies inside another one, or that is task-specific already; no
            task or a duplicate; ``reset`` of a module that has no ``reset_parameters``. Nothing has been changed.

    Example:
        >>> import torch, detente
        >>> trunk = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
        >>> trunk = detente.nn.convert_task_layers(trunk, ["a", "b"], ["2"])
        >>> type(trunk[2]).__name__, trunk[2]["a"].weight.shape
        ('TaskLayer', torch.Size([4, 4]))
        >>> with detente.nn.active_task("a"):
        ...     trunk(torch.ones(5, 3)).shape
        torch.Size([5, 4])
    """
    tasks = task_names(tasks)
    chosen = submodules(model, names)
    inside = {part for outer in model.modules() if isinstance(outer, TaskModule) for part in outer.modules()}
    for name, module in chosen.items():
        if module in inside:
            raise ValueError(
                f"{name!r} is task-specific already. Convert a fresh model, naming all layers in one call."
            )
        if reset:
            require_reset(module, name)
    wanted = set(chosen.values())
    return convert(
        model,
        tasks,
        lambda part: TaskLayer if part in wanted else None,
        reset_parameters if reset else lambda copied: None,
    )


def submodules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The submodules with these names, none of them inside another."""
    if isinstance(names, str):
        raise TypeError(f"names must be several names; got the string {names!r}. Did you mean [{names!r}]?")
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3) or [n for n in known if n][:5]
            raise ValueError(
                f"the model has no submodule {name!r}; similar or first ones are {close}. Names are those of "
                "model.named_modules(), without '.weight' at the end."
            )
        found[name] = known[name]
    for (outer_name, outer), (name, module) in permutations(found.items(), 2):
        if module is not outer and any(part is module for part in outer.modules()):
            raise ValueError(f"{name!r} lies inside {outer_name!r}; name only one of the two.")
    return found


def require_reset(module: nn.Module, name: str) -> None:
    """Raise where a part of ``module`` has parameters that :func:`reset_parameters` could not initialise."""
    for part_name, part in module.named_modules():
        if any(True for _ in part.parameters(recurse=False)) and not any(hasattr(part, r) for r in _RESETS):
            where = ".".join(filter(None, (name, part_name)))
            raise ValueError(
                f"reset=True needs a method reset_parameters() on every module with parameters; {where!r}, a "
                f"{type(part).__name__}, has none. Give it one, or keep reset=False and initialise the copies yourself."
            )


def reset_parameters(module: nn.Module) -> None:
    """Initialise all parameters and running statistics of ``module`` anew."""
    for part in module.modules():
        for name in _RESETS:
            if hasattr(part, name):
                getattr(part, name)()
                break
