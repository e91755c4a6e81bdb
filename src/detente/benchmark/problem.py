"""What a problem is, and how one is found: built in by name, or a user's Python file by path.

A problem is a module with these names::

    \"\"\"One line that `detente problems` shows.\"\"\"

    tasks = {"left": {"accuracy": "max"}, "depth": {"error": "min"}}   # task -> metric -> better direction
    settings = {"epochs": 20, "batch_size": 64, "lr": 1e-3}             # defaults; the command line overrides them

    def make_data():                       # {"train": Dataset, "val": Dataset, "test": Dataset}, always the same split
    def make_model(tasks):                 # an nn.Module for these tasks; one task is the single-task baseline
    def losses(model, batch, tasks):       # {task: scalar loss} for the named tasks, from one forward pass
    def metrics(model, data, tasks):       # {task: {metric: number}}; called in eval mode, without gradients;
                                           # figures are compared by ratio: let them be positive

Further parameters of make_data and make_model are filled with the settings of the same name. Two of them are known to
the tools: ``make_model(tasks, dropout, width)`` lets `detente tune` choose the dropout, and ``--wider`` train a model
with more channels. Optional names::

    def make_optimizer(model, settings):   # default: Adam with the settings lr and weight_decay
    def make_scheduler(optimizer, settings):   # a torch scheduler, stepped after every epoch; ReduceLROnPlateau gets
                                           # the validation score, of which more is better
    def collate(samples):                  # a batch of samples, for DataLoader
    def counts(batch, tasks):              # samples behind each loss, {task: number}, where not all samples are
                                           # labelled for all tasks; `losses` is not asked for a task that has none
    presets = {"author2021": {"epochs": 200, "protocol": "last-10-test"}}   # settings of papers, for --preset
    ranges = {"lr": Range(1e-4, 1e-2, log=True)}   # where `detente tune` looks, by setting (detente.method.Range)
    download = "Where the files come from and where they go."   # then make_data(directory, ...) reads files
    target = {"left": {"accuracy": 0.9}}   # training ends once every figure has been reached on the validation split;
                                           # a task may declare a metric "epochs": how many that took
    def summary(results):                  # rich tables to print below the others; results: the runs' result.json
    def verdict(results):                  # the sentence that sums up; default: each method against equal weights
    def check(specs):                      # raise where a method does not apply
    selection = "mean"                     # of the figures the best epoch is chosen by; default "log", of logarithms
    def report(results, directory):        # draw figures into directory/figures, which the report shows

A problem that is not trained on a data set defines ``training``, a `detente.benchmark.training.Training`, instead of
make_data, make_model, losses and metrics.

Settings that every problem has: epochs, batch_size, lr, weight_decay, clip_norm (of the whole gradient, 0 for none),
precision (float32; bfloat16 for autocast; float64 for the model and its batches), patience (epochs without a better
validation score after which training ends, 0 for never), protocol (see `detente.benchmark.protocol`), probe_every
(steps between two looks at the gradients).

Draw random numbers from the global generators of torch, numpy or random: they are seeded for every run, and saved.
With --launch every process computes the losses of its part of a batch. They are put together as means over samples, so
`losses` must return such means; `counts` weights them. BatchNorm1d, 2d and 3d take their statistics from the whole
batch (torch.nn.functional.batch_norm does not). What is drawn in `losses`, in the model (dropout) or in a dataset is
drawn by each process for its own samples, so that these draws depend on the number of processes.
Trunks with BatchNorm or LayerNorm can be trained by connection strength, which gives every task its own norms.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import detente.benchmark.problems as builtin
from detente.benchmark.protocol import PROTOCOLS, SELECTIONS, score
from detente.losses import named_losses
from detente.method import Choice, Range, one_of

if TYPE_CHECKING:
    from detente.benchmark.job import Job
    from detente.benchmark.training import Training

__all__ = ["Problem", "list_problems", "load_problem"]

REQUIRED = ("tasks", "settings", "make_data", "make_model", "losses", "metrics")
ALONE = ("compare", "training")  # names with which a problem needs none of the functions among them
DEFAULTS: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "precision": "float32",
    "patience": 0,
    "protocol": "val-selected",
    "probe_every": 10,
}
ONE_OF = {"precision": ("float32", "bfloat16", "float64"), "protocol": tuple(PROTOCOLS)}
POSITIVE = {"seeds", "jobs", "epochs", "steps", "batch_size", "lr", "probe_every", "width"}
"""Settings that must be above zero; other numbers may also be zero."""


@dataclass(frozen=True)
class Problem:
    """A problem, loaded and checked.

    Attributes:
        name: built-in name, or the stem of the user's file.
        source: what :func:`load_problem` was given; loads the same problem in another process.
        description: first line of the module's docstring.
        digest: hash of the user's file and what it imports from beside it; of a built-in problem's module and of what
            it is made of, see :func:`parts`.
        tasks: ``{task: {metric: "max" or "min"}}``, in order.
        settings: defaults for every setting.
        module: the module itself.
    """

    name: str
    source: str
    description: str
    digest: str
    tasks: dict[str, dict[str, str]]
    settings: dict[str, Any]
    module: ModuleType

    @property
    def target(self) -> Mapping[str, Mapping[str, float]] | None:
        """Validation figures that end the training, or None."""
        return getattr(self.module, "target", None)

    @property
    def whole(self) -> Callable[..., Any] | None:
        """``compare(specs, settings, directory, progress)`` of problems that train all methods at once."""
        return getattr(self.module, "compare", None)

    @property
    def download(self) -> str | None:
        """Where the official files come from and go, for a problem that reads files."""
        return getattr(self.module, "download", None)

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings of papers, by name."""
        return getattr(self.module, "presets", {})

    @property
    def supervised(self) -> bool:
        """Whether it is trained on batches of a data set."""
        return not any(hasattr(self.module, name) for name in ALONE)

    @property
    def training(self) -> Callable[[Job], Training]:
        """What trains a job."""
        if hasattr(self.module, "training"):
            own: Callable[[Job], Training] = self.module.training
            return own
        from detente.benchmark.supervised import Supervised  # which itself loads problems

        return Supervised

    @property
    def selection(self) -> str:
        """How the score is taken, see `detente.benchmark.protocol`."""
        chosen: str = one_of("selection", getattr(self.module, "selection", "log"), SELECTIONS)
        return chosen

    def score(self, figures: Mapping[str, Mapping[str, float]]) -> float:
        """What the best epoch is chosen by; more is better."""
        return score(self.tasks, figures, self.selection)

    def settle(self, given: Mapping[str, Any], preset: str | None = None) -> dict[str, Any]:
        """All settings: the defaults, over them those of a preset, over them those given; checked.

        Raises:
            ValueError: no such preset or setting, or an impossible value.
        """
        if preset is not None and preset not in self.presets:
            known = ", ".join(self.presets) or "none"
            raise ValueError(f"problem {self.name!r} has no preset {preset!r}; it has: {known}.")
        settings = {**self.settings, **self.presets.get(preset or "", {})}
        for key, value in given.items():
            if key == "seeds":
                raise ValueError("the number of seeds is not one of the settings; use --seeds.")
            if key not in settings:
                raise ValueError(f"problem {self.name!r} has no setting {key!r}; it has {', '.join(settings)}.")
            settings[key] = setting(key, value, like=settings[key])
        settings.pop("seeds", None)
        if settings.get("precision", "float32") != "float32" and not self.supervised:
            raise ValueError(f"problem {self.name!r} trains in float32 alone; leave out precision.")
        protocol = settings.get("protocol")
        if protocol != "val-selected" and protocol is not None:
            if self.target:
                raise ValueError(f"problem {self.name!r} ends at its target: only protocol val-selected applies.")
            if settings["patience"]:
                raise ValueError(f"protocol {protocol} trains to the end: leave out patience, or take val-selected.")
        return settings

    def space(self, settings: Mapping[str, Any]) -> dict[str, Range | Choice]:
        """Where settings are tuned: the learning rate around its default, weight decay, and dropout if there is any."""
        space: dict[str, Range | Choice] = {"lr": Range(settings["lr"] / 10, settings["lr"] * 10, log=True)}
        if not hasattr(self.module, "make_optimizer"):
            space["weight_decay"] = Range(1e-6, 1e-2, log=True)
        if self.supervised and "dropout" in inspect.signature(self.module.make_model).parameters:
            space["dropout"] = Range(0.0, 0.5)
        return space | getattr(self.module, "ranges", {})

    def data_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings on which the data depends."""
        return _filled(self.module.make_data, settings, 0 if self.download is None else 1)

    def make_data(self, settings: Mapping[str, Any], directory: Path | None = None) -> dict[str, Dataset[Any]]:
        where = () if self.download is None else (directory,)
        data = self.module.make_data(*where, **self.data_settings(settings))
        missing = [k for k in ("train", "val", "test") if k not in data]
        if missing:
            raise ValueError(
                f"problem {self.name!r}: make_data() must return the splits train, val and test; {missing[0]!r} is "
                "missing. Select on a validation split, and report on one that was never looked at."
            )
        return dict(data)

    def make_model(self, tasks: tuple[str, ...], settings: Mapping[str, Any]) -> nn.Module:
        model = self.module.make_model(tasks, **_filled(self.module.make_model, settings, 1))
        if not isinstance(model, nn.Module):
            raise TypeError(f"problem {self.name!r}: make_model must return an nn.Module; got {type(model).__name__}.")
        return model

    def make_optimizer(self, model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
        make = getattr(self.module, "make_optimizer", None)
        if make is None:
            return torch.optim.Adam(model.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"])
        optimizer: torch.optim.Optimizer = make(model, settings)
        return optimizer

    def make_scheduler(self, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        """The learning rate's schedule, or None."""
        make = getattr(self.module, "make_scheduler", None)
        return None if make is None else make(optimizer, settings)

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        return getattr(self.module, "collate", None)

    def losses(self, model: nn.Module, batch: Any, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        losses = dict(self.module.losses(model, batch, tasks))
        if torch.is_grad_enabled():
            named_losses(losses, any_number=True)
        more = [task for task in losses if task not in tasks]
        if more:
            raise ValueError(
                f"problem {self.name!r}: losses() was asked for {list(tasks)} and also gave {more[0]!r}. Return the "
                "losses of the named tasks alone."
            )
        return losses

    @property
    def counts_declared(self) -> bool:
        """Whether batches may lack samples of some tasks."""
        return hasattr(self.module, "counts")

    def counts(self, batch: Any, tasks: tuple[str, ...], samples: int) -> dict[str, float]:
        """Samples behind the loss of each task; ``samples``, where the problem does not say."""
        declared = getattr(self.module, "counts", None)
        if declared is None:
            return dict.fromkeys(tasks, samples)
        found = declared(batch, tasks)
        missing = [task for task in tasks if task not in found]
        if missing:
            raise ValueError(
                f"problem {self.name!r}: counts() says nothing about task {missing[0]!r}; it returned {dict(found)}."
            )
        return {task: float(found[task]) for task in tasks}

    def metrics(self, model: nn.Module, data: Dataset[Any], tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """Figures of the tasks; every declared metric, checked."""
        figures = self.module.metrics(model, data, tasks)
        result: dict[str, dict[str, float]] = {}
        for task in tasks:
            declared = [m for m in self.tasks[task] if not (m == "epochs" and self.target)]
            missing = [m for m in declared if m not in figures.get(task, {})]
            if missing:
                raise ValueError(
                    f"problem {self.name!r}: metrics() did not return {missing[0]!r} for task {task!r}, which `tasks` "
                    f"declares; it returned {dict(figures).get(task)}."
                )
            result[task] = {m: float(figures[task][m]) for m in declared}
        return result


def setting(key: str, value: Any, like: Any) -> Any:
    """A setting's value of the kind that its default has; YAML and the command line give text for numbers.

    Raises:
        ValueError: it is of another kind, or impossible.
    """
    if key in ONE_OF and value not in ONE_OF[key]:
        raise ValueError(f"{key} must be one of {', '.join(ONE_OF[key])}; got {value!r}.")
    if isinstance(like, bool):
        found = {"true": True, "false": False}.get(str(value).lower())
        if found is None:
            raise ValueError(f"{key} must be true or false; got {value!r}.")
        return found
    if isinstance(like, str):
        return str(value)
    whole = isinstance(like, int)
    bound = "positive" if key in POSITIVE else "non-negative"
    kind = f"{bound} whole number" if whole else f"{bound} number"
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
    good = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
    if not good or (number == 0 and key in POSITIVE) or (whole and number != int(number)):
        raise ValueError(f"{key} must be a {kind}; got {value!r}.")
    return int(number) if whole else float(number)


def _filled(function: Callable[..., Any], settings: Mapping[str, Any], given: int) -> dict[str, Any]:
    """The settings that a function has parameters for, beyond the first ``given``."""
    return {name: settings[name] for name in list(inspect.signature(function).parameters)[given:] if name in settings}


def list_problems() -> dict[str, str]:
    """Built-in problems with their one-line descriptions."""
    return {m.name: _description(m.name) for m in pkgutil.iter_modules(builtin.__path__)}


def _description(name: str) -> str:
    return _first_line(importlib.import_module(f"{builtin.__name__}.{name}"))


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().partition("\n")[0]


PARTS = ("datasets", "dense", "metrics", "models", "problems", "rl")
"""What built-in problems are made of, in ``detente.benchmark``."""


def parts(module: Path) -> set[Path]:
    """The file of a built-in problem's module, and those among `PARTS` that it imports, directly or indirectly."""
    package = module.parents[1]

    def imported(node: ast.AST) -> Iterator[Path]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("detente.benchmark"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for place in (str(name).split(".")[2:] for name in names):
                if place and place[0] in PARTS:
                    yield package.joinpath(*place).with_suffix(".py")

    return _reached(module, imported)


def beside(module: Path) -> set[Path]:
    """A user's problem file and the files beside it that it imports, directly or indirectly."""

    def imported(node: ast.AST) -> Iterator[Path]:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for base in (module.parent.joinpath(*name.split(".")) for name in names if name):
            yield from (base.with_suffix(".py"), base / "__init__.py")

    return _reached(module, imported)


def _reached(module: Path, imported: Callable[[ast.AST], Iterator[Path]]) -> set[Path]:
    """A file and all that its imports lead to; ``imported`` says which files one statement may mean."""
    found, pending = set[Path](), [module]
    while pending:
        path = pending.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            pending += [file for file in imported(node) if file.is_file() and file not in found]
    return found


def digest(files: Iterable[Path]) -> str:
    """Hash of the files' contents."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:16]


def load_problem(source: str) -> Problem:
    """Load a built-in problem by name or a user's by the path of its file.

    Raises:
        ValueError: no such problem, or the module lacks one of the required names.
        FileNotFoundError: the path does not exist.
    """
    if source.endswith(".py") or "/" in source:
        path = Path(source).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"there is no problem file {source!r}. Give the path of a Python file.")
        name = path.stem
        spec = importlib.util.spec_from_file_location(f"detente_problem_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        if str(path.parent) not in sys.path:  # for modules that lie beside it, behind everything that is installed
            sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"problem file {source!r} cannot be run: {type(error).__name__}: {error}") from error
        source, files = str(path), beside(path)
    else:
        known = list_problems()
        source = source.replace("-", "_")
        if source not in known:
            raise ValueError(
                f"unknown problem {source!r}. Built in: {', '.join(known)}. Or give the path of a Python file, as in "
                f"./{source}.py."
            )
        name = source
        module = importlib.import_module(f"{builtin.__name__}.{name}")
        files = parts(Path(str(module.__file__)))
    missing = [n for n in REQUIRED if not hasattr(module, n)]
    if missing and not any(hasattr(module, name) for name in ALONE):
        raise ValueError(
            f"problem file {source!r} does not define {', '.join(missing)}. A problem needs {', '.join(REQUIRED)}; "
            "see examples/own_problem.py or help('detente.benchmark.problem')."
        )
    if not isinstance(module.tasks, Mapping) or not all(isinstance(m, Mapping) for m in module.tasks.values()):
        raise ValueError(
            f"problem {name!r}: tasks must say which way every figure is better, as in "
            f'{{"depth": {{"error": "min"}}}}; got {module.tasks!r}.'
        )
    tasks = {task: dict(metrics) for task, metrics in module.tasks.items()}
    for task, metrics in tasks.items():
        for metric, direction in metrics.items():
            if direction not in ("max", "min"):
                raise ValueError(
                    f"problem {name!r}: tasks[{task!r}][{metric!r}] must be 'max' or 'min'; got {direction!r}."
                )
    settings = dict(module.settings) if hasattr(module, "compare") else {**DEFAULTS, **module.settings}
    return Problem(name, source, _first_line(module), digest(files), tasks, settings, module)
