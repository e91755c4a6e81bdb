"""One normalisation layer per task inside a shared trunk.

Connection strength (Jeong & Yoon, CVPR 2024, arXiv 2406.02996, Eq. 5) reads a task's priority from the affine
scale and the statistics of that task's own norm. A trunk shares its convolutions and keeps a norm per task:

    model = detente.nn.convert_task_norm(model, ("segmentation", "depth"))
    with detente.nn.active_task("depth"):
        loss = criterion(model(images), depths)

The active task is a context variable: it follows an ``asyncio`` task, but a thread started inside the block
begins with none and opens a block of its own. Activation checkpointing runs the forward again during
``backward``, when the block is over or another task is active; pass the task along to
``checkpoint(..., use_reentrant=False, context_fn=lambda: (nullcontext(), active_task("depth")))``.
``torch.compile`` cuts its graph at every task norm.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

_active: ContextVar[str | None] = ContextVar("detente_active_task", default=None)


@contextmanager
def active_task(name: str) -> Iterator[None]:
    """Make every task norm and task layer use the one of task ``name`` inside the block; blocks nest.

    Leaving the block, by an exception too, brings the former task back. A name that a norm does not know is
    reported by that norm's forward, because only the norm knows its tasks.
    """
    token = _active.set(name)
    try:
        yield
    finally:
        _active.reset(token)


class TaskModule(nn.Module, Generic[Module]):
    """One module per task; the forward uses the one of the task set by :func:`active_task`.

    What :class:`TaskNorm` and :class:`TaskLayer` have in common; they document the use.
    """

    noun: ClassVar[str] = "module"
    """What error messages call the modules held."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        super().__init__()
        tasks = task_names(modules)
        for task, module in modules.items():
            self.add_module(module_key(task), module)
        self.tasks = tasks  # last: from here on __getattr__ looks into the modules

    def __getitem__(self, task: str) -> Module:
        if task not in self.tasks:
            raise KeyError(f"{type(self).__name__} has no {self.noun} for task {task!r}; it knows {list(self.tasks)}")
        return cast(Module, self._modules[module_key(task)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getattr__(self, name: str) -> Any:
        # torch.nn.TransformerEncoderLayer reads eps and weight for its fused kernel, not calling the norm
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "tasks" not in self.__dict__ or self._current() not in self.tasks:
                raise
        return getattr(self[cast(str, self._current())], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active task's module returns for these arguments."""
        task = self._current()
        if task is None:
            raise RuntimeError(
                f"{type(self).__name__} expected an active task, one of {list(self.tasks)}; none is set in "
                f"this thread. Run the forward inside `with detente.nn.active_task({self.tasks[0]!r}): ...`"
            )
        return self[task](*args, **kwargs)

    def _current(self) -> str | None:
        task = _active.get()
        return self.tasks[0] if task is None and len(self.tasks) == 1 else task


class TaskNorm(TaskModule[Module]):
    """One norm per task; the forward uses the norm of the task set by :func:`active_task`.

    ``norm.tasks`` are the names, ``norm["depth"]`` is that task's norm, ``len`` and iteration go over the
    names; attributes that a task norm lacks, such as ``eps``, are read from the active task's norm. The state
    dict is keyed by task name, so it loads whatever the order of the tasks, and a missing task is an error.

    Args:
        norms: the norm of each task. The names are non-empty strings, dots included.

    Raises:
        ValueError: no task, or a name that is not a non-empty string.
        RuntimeError: forward without an active task (a norm with a single task needs none).
        KeyError: a task, looked up or active, that this norm does not know.
    """

    noun = "norm"

    def __init__(self, norms: Mapping[str, Module]) -> None:
        super().__init__(norms)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` with the active task's norm; shape and dtype rules are that norm's own."""
        return cast(Tensor, super().forward(input))


class TaskBatchNorm1d(TaskNorm[nn.BatchNorm1d]):
    """A ``torch.nn.BatchNorm1d(num_features, **kwargs)`` per task, each with its own running statistics."""

    def __init__(self, num_features: int, tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__({task: nn.BatchNorm1d(num_features, **kwargs) for task in task_names(tasks)})


class TaskBatchNorm2d(TaskNorm[nn.BatchNorm2d]):
    """A ``torch.nn.BatchNorm2d(num_features, **kwargs)`` per task, each with its own running statistics."""

    def __init__(self, num_features: int, tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__({task: nn.BatchNorm2d(num_features, **kwargs) for task in task_names(tasks)})


class TaskLayerNorm(TaskNorm[nn.LayerNorm]):
    """A ``torch.nn.LayerNorm(normalized_shape, **kwargs)`` per task."""

    def __init__(self, normalized_shape: int | list[int], tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__({task: nn.LayerNorm(normalized_shape, **kwargs) for task in task_names(tasks)})


class TaskRMSNorm(TaskNorm[nn.RMSNorm]):
    """A ``torch.nn.RMSNorm(normalized_shape, **kwargs)`` per task."""

    def __init__(self, normalized_shape: int | list[int], tasks: Iterable[str], **kwargs: Any) -> None:
        super().__init__({task: nn.RMSNorm(normalized_shape, **kwargs) for task in task_names(tasks)})


_TASK_NORMS: dict[type[nn.Module], type[TaskNorm[Any]]] = {
    nn.BatchNorm1d: TaskBatchNorm1d,
    nn.BatchNorm2d: TaskBatchNorm2d,
    nn.LayerNorm: TaskLayerNorm,
    nn.RMSNorm: TaskRMSNorm,
}


def convert_task_norm(module: nn.Module, tasks: Iterable[str]) -> nn.Module:
    """Give every BatchNorm1d, BatchNorm2d, LayerNorm and RMSNorm in ``module`` one copy per task.

    Each task starts from a full copy: parameters, running statistics, device, dtype, mode, ``requires_grad``,
    hooks. A norm used at several places stays shared between them. Norms already converted are left as they
    are, other kinds of norms too. Call it before ``SyncBatchNorm.convert_sync_batchnorm`` and before making
    the optimizer, which must know the copies.

    Args:
        module: changed in place; if it is a norm itself, it is left alone and its task norm returned.
        tasks: distinct task names.

    Returns:
        ``module``, or the task norm that replaces it.

    Raises:
        ValueError: no task, a duplicate, or a name that is not a non-empty string.
    """
    return convert(
        module,
        task_names(tasks),
        lambda part: next((new for old, new in _TASK_NORMS.items() if isinstance(part, old)), None),
    )


def convert(
    module: nn.Module,
    tasks: tuple[str, ...],
    kind_of: Callable[[nn.Module], type[TaskModule[Any]] | None],
    prepare: Callable[[nn.Module], object] = lambda copied: None,
) -> nn.Module:
    """Replace, in place, every submodule for which ``kind_of`` names a class by one full copy per task.

    ``prepare`` is called on every copy. Modules that are task-specific already are not looked into.
    """
    memos: dict[str, dict[int, Any]] = {task: {} for task in tasks}  # of deepcopy: tied parameters stay tied
    converted: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in converted:
            converted[module] = module
            kind = kind_of(module)
            if kind is not None:
                copies = {task: copy.deepcopy(module, memos[task]) for task in tasks}
                for copied in copies.values():
                    prepare(copied)
                task_module = kind.__new__(kind)
                TaskModule.__init__(task_module, copies)
                task_module.training = module.training
                converted[module] = task_module
            elif not isinstance(module, TaskModule):
                # not named_children(), which hides a child's second name
                for name, child in list(module._modules.items()):
                    if child is not None:
                        module.add_module(name, visit(child))
        return converted[module]

    return visit(module)


def task_names(tasks: Iterable[str]) -> tuple[str, ...]:
    """``tasks`` as a tuple of distinct, non-empty names."""
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be several names; got the string {tasks!r}. Did you mean ({tasks!r},)?")
    names = tuple(tasks)
    if not names:
        raise ValueError("tasks must name at least one task; got none")
    if wrong := [name for name in names if not isinstance(name, str) or not name]:
        raise ValueError(f"task names must be non-empty strings; got {wrong[0]!r}")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"task names must be distinct; {repeated} appear more than once in {list(names)}")
    return names


def module_key(task: str) -> str:
    """The submodule's name: torch forbids dots (escaped here) and names of attributes (hence the prefix)."""
    return "task_" + task.replace("%", "%25").replace(".", "%2E")
