"""What a method is: the base classes, the result of a step, and the registry.

A method turns what is known of a step (the Gramian of the task gradients, the losses, the history of both) into
one coefficient per task. It knows nothing of autograd, devices or processes. Files in ``methods/`` hold one
published method each; the registry is found from them.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pkgutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from detente.gramian import Partition
from detente.solvers import Array, floor, like, normalised, real, total

__all__ = [
    "Centred",
    "Choice",
    "Context",
    "EpochWeighting",
    "GramianMethod",
    "LossWeighting",
    "Method",
    "Paper",
    "Range",
    "Ranges",
    "Seeded",
    "Session",
    "TaskHistory",
    "TaskRows",
    "TaskScalars",
    "TaskWeights",
    "Update",
    "cite",
    "get_method",
    "list_methods",
]


@dataclass(frozen=True)
class Paper:
    """Where a method was published.

    Attributes:
        key, title, authors, venue, year: of the BibTeX entry.
        arxiv: number of the preprint.
        entry: type of the BibTeX entry: ``inproceedings``, ``article`` or ``misc`` (a preprint).
    """

    key: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str | None = None
    entry: Literal["inproceedings", "article", "misc"] = "inproceedings"

    def short(self) -> str:
        """Authors and year, as in a text: ``Liu et al. 2021``."""
        names = [name.split(",")[0].strip() for name in self.authors.split(" and ")]
        who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
        return f"{who} {self.year}"

    def bibtex(self) -> str:
        """The BibTeX entry."""
        venue = {"inproceedings": "booktitle", "article": "journal", "misc": "howpublished"}[self.entry]
        lines = [
            f"title = {{{self.title}}}",
            f"author = {{{self.authors}}}",
            f"{venue} = {{{self.venue}}}",
            f"year = {{{self.year}}}",
        ]
        if self.arxiv:
            lines += [f"eprint = {{{self.arxiv}}}", "archivePrefix = {arXiv}"]
        return f"@{self.entry}{{{self.key},\n  " + ",\n  ".join(lines) + "\n}"


@dataclass
class Context:
    """What a step knows besides the Gramian.

    Attributes:
        tasks: names of the T tasks of this step, in the order of the rows.
        losses: ``[T]`` float64 CPU tensor of unscaled loss values, or None when they were not given.
        shares: ``[T]`` weights of the rows in the mean gradient when rows stand for groups of tasks
            (:class:`detente.Sampled`), else None.
        partition: the blocks of a block-wise step, else None.
        alive: ``[B, T]`` bool array, the tasks that take part in each block: those with a gradient, or all where
            ``zero_rows="keep"``. Set for :meth:`GramianMethod.rule`.
        sizes: columns of the buffers of task gradients, one per dtype and device; None where there are none.
        cross: ``[B, T, T]`` products ``J1 J2'`` of the gradients of two independent batches, where the method asked
            for several batches, else None.
        stats: what the method wants to report in :attr:`Update.stats`.
    """

    tasks: tuple[str, ...]
    losses: Tensor | None = None
    shares: Tensor | None = None
    partition: Partition | None = None
    alive: Array = None
    sizes: tuple[int, ...] | None = None
    cross: Tensor | None = None
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What :func:`detente.backward` and :func:`detente.step` did.

    Attributes:
        weights: ``{task: coefficient}``; a 0-d float64 tensor, or ``[B]`` where the method works on B blocks.
        gramian: ``[T, T]`` float64 CPU tensor of the task gradients of the shared parameters as the method saw them
            (without ``scale``, with ``weighting``, summed over blocks), in the order of ``weights``; of the sampled
            tasks and the rest under :class:`detente.Sampled`; None for methods that never form the task gradients.
        stats: counts and figures of the step, such as ``conflicts`` (pairs with a negative product), ``dropped``
            (tasks with a zero gradient), ``backwards`` (backward passes), and what the method itself reports.
    """

    weights: dict[str, Tensor]
    gramian: Tensor | None
    stats: dict[str, Any]


class Session(Protocol):
    """What :func:`detente.step` lays before a method's schedule."""

    tasks: tuple[str, ...]
    """Tasks of the last forward pass."""
    parameters: list[Tensor]
    """All parameters of the optimizer."""
    descents: int
    """Optimizer steps taken so far."""

    def losses(self, tasks: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """A forward pass: the losses of the named tasks, or of all (with several processes, this one's part)."""

    def join(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses that were computed elsewhere, as :meth:`losses` gives them."""

    def values(self) -> dict[str, float]:
        """Loss values on the same batch with the parameters as they are now; draws the same random numbers."""

    def resolve(self) -> Update:
        """Zero the gradients, forward, and the method's update into ``.grad``."""

    def descend(self) -> None:
        """The optimizer's step."""

    def one_by_one(self, tasks: Sequence[str]) -> Update:
        """For each task in order: forward, its loss's own gradient, the optimizer's step."""

    def gradients(self, losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[Tensor | None]:
        """Gradient of the weighted sum of losses, one tensor per entry of ``parameters``."""

    def virtual_step(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What gradient descent would add to each parameter, with the optimizer's rates, momentum and weight decay."""

    def rates(self) -> list[float]:
        """The learning rate of each parameter."""

    def moved(self, directions: Sequence[Tensor | None], length: float = 1.0) -> AbstractContextManager[None]:
        """The parameters moved along the directions, inside a ``with`` block."""


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high`` among which a hyper-parameter is tuned; ``log``: evenly in the logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Whole numbers only."""

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (logarithmic)' if self.log else ''}"


@dataclass(frozen=True)
class Choice:
    """Values among which a hyper-parameter is tuned."""

    values: tuple[float | str | None, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


Ranges: TypeAlias = Mapping[str, Range | Choice]


class Method(nn.Module, ABC):
    """Base of all methods: identity, declared properties, and state that saves, loads and resets.

    Subclasses name in :attr:`state` the attributes that hold their history; these may be tensors, numbers,
    strings, nested dicts and lists of them, a :class:`torch.Generator` or a :class:`TaskScalars`.
    """

    name: ClassVar[str]
    """Name in the registry and on the command line."""
    paper: ClassVar[Paper]
    kind: ClassVar[str]
    """``gramian``, ``jacobian`` (sees the gradients themselves), ``losses`` or ``schedule``."""
    heads: str = "own"
    """Gradient of task-specific parameters: of the task's ``own`` loss, or of the ``weighted`` loss."""
    needs: frozenset[str] = frozenset()
    """What must be at hand: ``gramian``, ``losses``, ``losses after the step``, ``metrics``, ``epochs``, ``model``."""
    backwards: ClassVar[str] = "T"
    """Backward passes per step."""
    memory: ClassVar[str] = "-"
    """What the history holds, for T tasks, P shared parameters and B blocks."""
    state: tuple[str, ...] = ()
    native_granularity: ClassVar[str] = "model"

    ranges: ClassVar[Ranges] = {}
    """Where `detente tune` looks for each hyper-parameter; those that are not named keep their default."""

    # Declared properties: each picks a check of the conformance suite.
    stochastic: ClassVar[bool] = False
    nonconflicting: bool = False
    """The update has a non-negative product with every task gradient."""
    permutation_equivariant: ClassVar[bool] = True
    """Permuting the tasks leaves the update as it was."""
    homogeneity: float | None = 1.0
    """k such that scaling all gradients by s (but not the losses) scales the update by s**k; None: there is none."""
    spans: ClassVar[bool] = True
    """A first update lies in the span of the task gradients."""
    row_scale: tuple[Literal["invariant", "direction", "linear"], ...] = ()
    """What scaling one task's gradient does to the update: nothing; nothing to its direction; it is affine in the
    scale. Empty: none of these."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Checks of the conformance suite that cannot apply, each with the reason."""

    per_parameter: ClassVar[bool] = False
    """It looks at single parameters, or keeps something for each: gradients of features will not do."""
    requires_step: bool = False
    """True where one backward pass cannot do what the method needs: use :func:`detente.step`."""
    without_step: ClassVar[str] = ""
    """What would do without :func:`detente.step`, for the error message."""
    batches: int = 1
    """Independent batches per step; with more than one :func:`detente.step` calls the closure that often."""

    def start(self) -> None:
        """Set the attributes in :attr:`state` to their first values."""

    def next_epoch(self) -> None:
        """Tell the method, and every method inside it, that an epoch of training ended."""
        for child in self.children():
            if isinstance(child, Method | TaskWeights):
                child.next_epoch()

    def why_step(self) -> str:
        """Why :attr:`requires_step`, for the error message."""
        return f"it compares {self.batches} batches." if self.batches > 1 else "its schedule is part of the method."

    def take_step(self, session: Session) -> Update:
        """One whole training step, from the forward pass to the optimizer: what :func:`detente.step` runs."""
        update = session.resolve()
        session.descend()
        return update

    def reset(self) -> None:
        """Forget the history: the method is as new (random generators restart from their seed)."""
        self.start()
        for child in self.children():
            if isinstance(child, Method | TaskWeights):
                child.reset()

    def partition(self, parameters: Sequence[Tensor], tasks: tuple[str, ...], granularity: str) -> Partition:
        """Blocks of the shared parameters at a granularity: ``model``, ``layer`` or ``channel``."""
        splits = {"model": Partition.by_model, "layer": Partition.by_layer, "channel": Partition.by_channel}
        one_of("granularity", granularity, tuple(splits))
        return splits[granularity](parameters)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; a state that does not fit leaves this one as it was."""
        before = copy.deepcopy(self.state_dict())
        try:
            return super().load_state_dict(*args, **kwargs)
        except Exception:
            super().load_state_dict(before)
            raise

    def get_extra_state(self) -> dict[str, Any]:
        """The history, as plain containers and tensors (loads with ``weights_only=True``)."""
        return {"method": self.name, **{key: _pack(getattr(self, key)) for key in self.state}}

    def set_extra_state(self, state: Any) -> None:
        """Take over a history saved by the same method."""
        expected = {"method", *self.state}
        if not isinstance(state, Mapping) or set(state) != expected or state["method"] != self.name:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"this state does not belong to {self.name}: expected the entries {sorted(expected)}, got {got}. "
                "Likely the checkpoint was written by another method or version; build the method it was saved from."
            )
        for key in self.state:
            setattr(self, key, _unpack(getattr(self, key), state[key]))


def _pack(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, TaskScalars | TaskHistory | TaskRows):
        return value.state_dict()
    return copy.deepcopy(value)


def _unpack(current: Any, saved: Any) -> Any:
    if isinstance(current, torch.Generator):
        current.set_state(saved)
        return current
    if isinstance(current, TaskScalars | TaskHistory | TaskRows):
        current.load_state_dict(saved)
        return current
    return copy.deepcopy(saved)


class Seeded(Method):
    """A method that draws random numbers, from a generator of its own that is part of its state."""

    stochastic: ClassVar[bool] = True
    state: tuple[str, ...] = ("generator",)
    memory: ClassVar[str] = "generator"
    seed: int = 0

    def start(self) -> None:
        super().start()
        self.generator = torch.Generator().manual_seed(self.seed)


class GramianMethod(Method):
    """A rule from the Gramian of the task gradients to one coefficient per task.

    Args:
        zero_rows: ``"drop"`` leaves tasks with a zero gradient out of the solve and gives them coefficient 0;
            ``"keep"`` applies the textbook rule to them.
        heads: override of the class's convention for task-specific parameters.

    Subclasses implement :meth:`rule`, which sees finite float64 Gramians only. Those that work on the gradients
    themselves also implement :meth:`transform`, which rewrites the rows of J before their Gramian is taken.

    The rule runs on the host, on NumPy arrays, whatever the device of the gradients: one small transfer each way. A
    method without history that was moved, as in ``method.to("cuda")``, runs on Gramians that lie on a device where they
    are, without a decision that waits for the host.
    """

    kind: ClassVar[str] = "gramian"
    needs: frozenset[str] = frozenset({"gramian"})
    own_weighting: LossWeighting | None
    """A loss weighting that belongs to the method: it sees weighted losses and gradients."""

    def __init__(self, *, zero_rows: Literal["drop", "keep"] = "drop", heads: str | None = None) -> None:
        super().__init__()
        self.zero_rows = one_of("zero_rows", zero_rows, ("drop", "keep"))
        if heads is not None:
            self.heads = one_of("heads", heads, ("own", "weighted"))
        self.own_weighting = None
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def on_device(self) -> bool:
        """Whether the rule runs on the device that the method was moved to."""
        return not self.state and self._place.device.type != "cpu"

    @abstractmethod
    def rule(self, gramian: Array, context: Context) -> Array:
        """Coefficients ``[B, T]`` from finite float64 Gramians ``[B, T, T]``, NumPy arrays or tensors on a device."""

    def transform(self, rows: Sequence[Tensor], context: Context) -> None:
        """Rewrite the task gradients in place: ``[T, P_k]`` for each buffer k, finite, unscaled."""

    @property
    def transforms(self) -> bool:
        """Whether the method rewrites the task gradients."""
        return type(self).transform is not GramianMethod.transform

    def observe(self, gramian: Tensor, context: Context) -> None:
        """Take the step into the history; sees all tasks, also those with a zero gradient."""

    def prepare(self, context: Context) -> Context:
        """Add what the rule needs of the losses, such as the weights of a centre."""
        return context

    def check(self, context: Context) -> None:
        """Raise on input the method cannot use, before anything is computed or written."""

    def weights(self, gramian: Tensor, context: Context | None = None) -> Tensor:
        """Coefficients of the task gradients in the update.

        Args:
            gramian: ``[*blocks, T, T]`` inner products of the task gradients.
            context: names, losses and blocks of the step; made up from positions when left out.

        Returns:
            ``[*blocks, T]`` float64, on the CPU (where the method was moved to a device: on that of ``gramian``). NaN,
            with the history untouched, where the Gramian or a needed loss is not finite.

        Raises:
            ValueError: the Gramian is not square, or the method needs losses and got none.
        """
        if gramian.dim() < 2 or gramian.shape[-1] != gramian.shape[-2]:
            raise ValueError(f"gramian must have shape [*blocks, T, T]; got {tuple(gramian.shape)}.")
        count = gramian.shape[-1]
        context = context or Context(tuple(str(i) for i in range(count)))
        if len(context.tasks) != count:
            raise ValueError(f"gramian is for {count} tasks but {len(context.tasks)} were named: {context.tasks}.")
        if self.on_device:
            return self._weights_there(gramian, context)
        self.check(context)
        need_losses(self, context)
        flat = gramian.detach().to("cpu", torch.float64).reshape(-1, count, count)
        values = flat.numpy()
        finite = np.isfinite(values).all() and (context.losses is None or np.isfinite(context.losses.numpy()).all())
        if not finite:
            return torch.full(gramian.shape[:-1], math.nan, dtype=torch.float64)
        if gramian.numel() == 0:
            return flat.new_zeros(gramian.shape[:-1])
        self.observe(flat, context)
        context = self.prepare(context)
        nonzero = values.diagonal(0, -2, -1) > 0
        dropping = self.zero_rows == "drop" and not nonzero.all()
        context.alive = nonzero if dropping else np.ones_like(nonzero)
        result = torch.from_numpy(self.rule(values, context))
        if dropping:
            result = result.masked_fill(torch.from_numpy(~nonzero), 0.0)
            some: list[bool] = np.any(nonzero, axis=0).tolist()
            context.stats["dropped"] = [t for t, k in zip(context.tasks, some, strict=True) if not k]
        return result.reshape(gramian.shape[:-1])

    def _weights_there(self, gramian: Tensor, context: Context) -> Tensor:
        """The same on the device of the Gramian, without waiting for anything."""
        need_losses(self, context)
        count = gramian.shape[-1]
        flat = gramian.detach().double().reshape(-1, count, count)
        finite = flat.isfinite().all()
        if context.losses is not None:
            finite = finite & context.losses.to(flat.device).isfinite().all()
        flat = torch.where(finite, flat, torch.eye(count, dtype=torch.float64, device=flat.device))
        context = self.prepare(context)
        nonzero = flat.diagonal(0, -2, -1) > 0
        context.alive = nonzero if self.zero_rows == "drop" else torch.ones_like(nonzero)
        result = torch.where(context.alive, self.rule(flat, context), 0.0)
        return torch.where(finite, result, math.nan).reshape(gramian.shape[:-1])

    def solved(self, found: tuple[Array, Array], context: Context) -> Array:
        """The answer of a solver; blocks that it could not certify are counted, and warned about once."""
        answer, exact = found
        if isinstance(exact, Tensor):
            context.stats["unsolved"] = (~exact).sum()  # read by whoever may wait for the device
        elif not exact.all():
            count = int((~exact).sum())
            context.stats["unsolved"] = context.stats.get("unsolved", 0) + count
            warnings.warn(
                f"{self.name}: the solver stopped short of its tolerance on {count} block(s); "
                "the best feasible point is used. See update.stats['unsolved'].",
                RuntimeWarning,
                stacklevel=3,
            )
        return answer

    def sampling_shares(self, context: Context) -> Tensor:
        """Weights ``[T]`` of the tasks in the mean gradient, for :class:`detente.Sampled`."""
        raise ValueError(
            f"source=detente.Sampled(...) works with methods defined by a mean gradient (cagrad); got {self.name}."
        )


class LossWeighting(Method):
    """A rule from the losses (and their history) to one weight per task; costs one backward pass."""

    kind: ClassVar[str] = "losses"
    heads: str = "weighted"
    needs: frozenset[str] = frozenset({"losses"})
    row_scale: tuple[Literal["invariant", "direction", "linear"], ...] = ("linear",)
    backwards: ClassVar[str] = "1"
    positive_losses: ClassVar[bool] = False

    @abstractmethod
    def rule(self, losses: Tensor, context: Context) -> Tensor:
        """Weights ``[T]`` from finite float64 CPU losses ``[T]``; also takes the step into the history."""

    def check(self, context: Context) -> None:
        """Raise on input the method cannot use, before anything is computed or written."""
        if self.positive_losses and context.losses is not None:
            for task, loss in zip(context.tasks, context.losses.tolist(), strict=True):
                if loss <= 0:
                    raise ValueError(
                        f"{self.name} needs positive losses; losses[{task!r}] is {loss:g}. "
                        "Add a constant to the loss, or choose a method that does not take logarithms of losses."
                    )

    def weights(self, losses: Tensor, context: Context | None = None) -> Tensor:
        """Weights of the task losses.

        Args:
            losses: ``[T]`` unscaled loss values.
            context: names of the tasks; made up from positions when left out.

        Returns:
            ``[T]`` float64 on the CPU. NaN, with the history untouched, where a loss is not finite.

        Raises:
            ValueError: the shape is wrong, or a loss is not positive where the method needs it to be.
        """
        if losses.dim() != 1:
            raise ValueError(f"losses must have shape [T]; got {tuple(losses.shape)}.")
        values = losses.detach().to("cpu", torch.float64)
        context = replace(context or Context(tuple(str(i) for i in range(len(values)))), losses=values)
        if len(context.tasks) != len(values):
            raise ValueError(f"got {len(values)} losses for {len(context.tasks)} tasks: {context.tasks}.")
        if not bool(values.isfinite().all()):
            return torch.full_like(values, math.nan)
        self.check(context)
        return self.rule(values, context)


class EpochWeighting(LossWeighting):
    """Weights from each task's mean losses of past epochs.

    Args:
        window: steps that count as an epoch, for loops without epochs; None: :meth:`next_epoch` ends it.
    """

    needs: frozenset[str] = frozenset({"losses", "epochs"})
    memory: ClassVar[str] = "T epoch means"
    state: tuple[str, ...] = ("history",)
    depth: ClassVar[int] = 1
    """How many finished epochs are remembered."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = None if window is None else int(at_least("window", window, 1))
        self.start()

    def start(self) -> None:
        super().start()
        self.history = TaskHistory(self.depth, self.window)

    def next_epoch(self) -> None:
        self.history.close()
        super().next_epoch()


Weights: TypeAlias = "Sequence[float] | Tensor | Mapping[str, float] | LossWeighting | None"


class TaskWeights(nn.Module):
    """One weight per task: equal, given, or computed by a loss weighting.

    Args:
        what: the argument's name, for error messages.
        weights: None (equal), a vector in task order, a mapping by task name, or a :class:`LossWeighting`.
        distribution: whether the weights are probabilities: given ones must sum to 1 over all tasks, and those of a
            step are divided by their sum.

    Raises:
        ValueError: weights that are negative, not finite, or do not sum to 1.
    """

    def __init__(self, what: str, weights: Weights, *, distribution: bool = True) -> None:
        super().__init__()
        self.what = what
        self.distribution = distribution
        self.source = weights if isinstance(weights, LossWeighting) else None
        self.fixed: dict[str, float] | list[float] | None = None
        if isinstance(weights, Mapping):
            self.fixed = {str(k): float(v) for k, v in weights.items()}
        elif isinstance(weights, Iterable) and not isinstance(weights, str | nn.Module):
            self.fixed = [float(v) for v in weights]
        elif weights is not None and not isinstance(weights, LossWeighting):
            raise TypeError(
                f"{what} must be a vector, a mapping by task name or a loss weighting such as detente.DWA(); got "
                f"{weights!r}."
            )
        if self.fixed is not None:
            values = list(self.fixed.values()) if isinstance(self.fixed, dict) else self.fixed
            total = math.fsum(values)
            if not all(0 <= v < math.inf for v in values):
                raise ValueError(f"{what} must be finite and non-negative; got {self.fixed}.")
            if distribution and not abs(total - 1) <= 1e-6:
                raise ValueError(
                    f"{what} must sum to 1; got {self.fixed} (sum {total:g}). Divide the weights by their sum."
                )

    @property
    def equal(self) -> bool:
        """Whether all tasks weigh the same in every step."""
        return self.source is None and self.fixed is None

    @property
    def needs(self) -> frozenset[str]:
        """What the weights are computed from."""
        return self.source.needs if self.source else frozenset()

    def check(self, context: Context) -> None:
        """Raise where the weights do not fit the tasks of the step."""
        if isinstance(self.fixed, dict):
            unknown = [t for t in context.tasks if t not in self.fixed]
            if unknown:
                raise ValueError(
                    f"{self.what} has no entry for task {unknown[0]!r}; it names {sorted(self.fixed)}. "
                    "Add the task to it."
                )
        elif self.fixed is not None and len(self.fixed) != len(context.tasks):
            raise ValueError(
                f"{self.what} has {len(self.fixed)} entries but the step has {len(context.tasks)} tasks "
                f"{list(context.tasks)}. Give a mapping by task name to train on some of the tasks."
            )
        if self.source is not None:
            need_losses(self.source, context)
            self.source.check(context)

    def forward(self, context: Context) -> Tensor:
        """``[T]`` float64 weights of the tasks of this step."""
        if self.source is not None:
            assert context.losses is not None
            raw = self.source.weights(context.losses, context)
        elif self.fixed is not None:
            values = self.fixed if isinstance(self.fixed, list) else [self.fixed[t] for t in context.tasks]
            raw = torch.tensor(values, dtype=torch.float64)
        else:
            return _uniform(len(context.tasks), 1 / len(context.tasks) if self.distribution else 1.0)
        return normalized(raw) if self.distribution else raw

    def next_epoch(self) -> None:
        """Pass the end of an epoch on to the loss weighting."""
        if self.source is not None:
            self.source.next_epoch()

    def reset(self) -> None:
        """Forget the history of the loss weighting."""
        if self.source is not None:
            self.source.reset()


class Centred(GramianMethod):
    """A rule around a mean of the gradients, in which the user may prefer some tasks.

    Args:
        preference: weights of the tasks in the mean: None for equal, a vector or mapping that sums to 1, or a loss
            weighting such as :class:`DWA`.
        zero_rows, heads: as in :class:`GramianMethod`.
    """

    def __init__(
        self, preference: Weights = None, *, zero_rows: Literal["drop", "keep"] = "drop", heads: str | None = None
    ) -> None:
        super().__init__(zero_rows=zero_rows, heads=heads)
        self.preference = TaskWeights("preference", preference)
        self.needs = self.needs | self.preference.needs

    def check(self, context: Context) -> None:
        if context.shares is None:
            self.preference.check(context)

    def prepare(self, context: Context) -> Context:
        if context.shares is not None or self.preference.equal:
            return context
        return replace(context, shares=self.preference(context))

    def centre(self, gramian: Array, context: Context) -> Array:
        """``[B, T]`` weights of the mean, over the tasks that take part."""
        if context.shares is None:
            counted = real(context.alive)
            return counted / floor(total(counted), 1.0)
        return normalised(like(gramian, context.shares), context.alive)


@cache
def _uniform(count: int, value: float) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def normalized(weights: Tensor) -> Tensor:
    """Divided by their sum; uniform where all are zero."""
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))


class TaskHistory:
    """Mean loss of each task over past epochs, kept by task name.

    Args:
        depth: how many finished epochs to remember.
        window: steps after which an epoch ends by itself, or None.
    """

    def __init__(self, depth: int, window: int | None = None) -> None:
        self.depth = depth
        self.window = window
        self.steps = 0
        self.open: dict[str, list[float]] = {}
        self.closed: dict[str, list[float]] = {}

    def add(self, tasks: Sequence[str], losses: Tensor) -> None:
        """Count one step's losses into the running epoch."""
        for task, loss in zip(tasks, losses.tolist(), strict=True):
            total = self.open.setdefault(task, [0.0, 0.0])
            total[0] += loss
            total[1] += 1
        self.steps += 1
        if self.window is not None and self.steps >= self.window:
            self.close()

    def close(self) -> None:
        """End the running epoch: its mean becomes the newest entry of every task seen in it."""
        for task, (summed, count) in self.open.items():
            self.closed[task] = [*self.closed.get(task, []), summed / count][-self.depth :]
        self.open, self.steps = {}, 0

    def past(self, task: str) -> list[float]:
        """Means of the finished epochs of a task, oldest first."""
        return self.closed.get(task, [])

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"open": self.open, "closed": self.closed, "steps": self.steps})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = copy.deepcopy(dict(state))
        self.open, self.closed, self.steps = saved["open"], saved["closed"], saved["steps"]


class TaskRows:
    """A vector of the shared parameters per task, kept by task name: the history of methods that track gradients.

    Attributes:
        rows: ``{task: [one flat tensor per buffer of J]}``.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def check(self, context: Context, name: str) -> None:
        """Raise where a task of the step has a vector of another length than its gradient."""
        for task in context.tasks:
            kept = self.rows.get(task)
            if kept is not None and context.sizes is not None and tuple(map(len, kept)) != context.sizes:
                raise ValueError(
                    f"{name} keeps a vector of {sum(map(len, kept))} shared parameters for task {task!r}, and the step "
                    f"has {sum(context.sizes)}. Keep the set of shared parameters (pass shared=...), or call "
                    "method.reset()."
                )

    def read(self, task: str, like: Sequence[Tensor]) -> list[Tensor]:
        """The task's vector, zeros at first, on the devices of ``like`` (this step's gradient of the task)."""
        kept = self.rows.get(task)
        if kept is None:
            return [torch.zeros_like(part) for part in like]
        return [part.to(new.device, new.dtype) for part, new in zip(kept, like, strict=True)]

    def write(self, task: str, parts: Sequence[Tensor]) -> None:
        """Replace the task's vector by copies of ``parts``."""
        self.rows[task] = [part.clone() for part in parts]

    def state_dict(self) -> dict[str, Any]:
        return {task: [part.clone() for part in parts] for task, parts in self.rows.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows = {task: [part.clone() for part in parts] for task, parts in state.items()}


class TaskScalars:
    """One learned number per task, kept by task name and moved by Adam.

    Args:
        init: starting value.
        lr: learning rate of Adam.
        weight_decay: of Adam.
    """

    def __init__(self, init: float, lr: float, weight_decay: float = 0.0) -> None:
        self.init = init
        self.lr = lr
        self.weight_decay = weight_decay
        self.values: dict[str, Tensor] = {}
        self.optimizers: dict[str, torch.optim.Adam] = {}

    def _add(self, task: str, value: float) -> None:
        self.values[task] = torch.tensor(value, dtype=torch.float64)
        self.optimizers[task] = torch.optim.Adam([self.values[task]], lr=self.lr, weight_decay=self.weight_decay)

    def read(self, tasks: Sequence[str]) -> Tensor:
        """Current values ``[T]``, float64; a task seen for the first time starts at ``init``."""
        for task in tasks:
            if task not in self.values:
                self._add(task, self.init)
        return torch.stack([self.values[t] for t in tasks])

    def descend(self, tasks: Sequence[str], gradient: Tensor) -> None:
        """One Adam step on the values of ``tasks`` with ``gradient`` ``[T]``."""
        for task, g in zip(tasks, gradient, strict=True):
            self.values[task].grad = g.clone()
            self.optimizers[task].step()

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(
            {t: {"value": float(v), "adam": self.optimizers[t].state_dict()} for t, v in self.values.items()}
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values, self.optimizers = {}, {}
        for task, saved in state.items():
            self._add(task, saved["value"])
            self.optimizers[task].load_state_dict(copy.deepcopy(saved["adam"]))


def fit_blocks(name: str, kept: Mapping[str, Tensor], tasks: Sequence[str], blocks: int | None) -> None:
    """Raise where weights ``[B]`` kept per task are for another number of blocks than the step has."""
    for task in tasks:
        if blocks is not None and task in kept and len(kept[task]) != blocks:
            raise ValueError(
                f"{name} keeps weights of task {task!r} for {len(kept[task])} blocks and now gets {blocks}. "
                "Keep granularity and shared parameters, or call method.reset()."
            )


def need_losses(method: Method, context: Context) -> None:
    """Raise where a method needs loss values and the step has none."""
    if "losses" in method.needs and context.losses is None:
        raise ValueError(f"{method.name} needs the losses of the step; pass losses=[...] beside the gradients.")


def one_of(what: str, value: str, choices: Sequence[str]) -> Any:
    """``value``, or a ValueError that lists the choices."""
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value


def at_least(what: str, value: float, low: float, *, strict: bool = False) -> float:
    """``value``, or an error that names the argument and its bound."""
    if not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number; got {value!r}.")
    if not (math.isfinite(value) and (value > low if strict else value >= low)):
        raise ValueError(f"{what} must be a finite number {'>' if strict else '>='} {low:g}; got {value!r}.")
    return value


@cache
def registry() -> dict[str, type[Method]]:
    """All methods by name, found from the files in ``detente/methods``."""
    package = importlib.import_module("detente.methods")
    found: dict[str, type[Method]] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        for _, cls in inspect.getmembers(importlib.import_module(f"detente.methods.{module}"), inspect.isclass):
            if issubclass(cls, Method) and cls.__module__ == f"detente.methods.{module}":
                if cls.name in found:
                    raise ValueError(
                        f"two methods are called {cls.name!r}: {found[cls.name].__module__} and {cls.__module__}. "
                        "Rename one."
                    )
                found[cls.name] = cls
    return found


def require_method(method: object) -> None:
    """Raise where ``method`` is not a method that has been built."""
    if not isinstance(method, GramianMethod | LossWeighting):
        hint = " Did you forget to build it, as in detente.CAGrad()?" if isinstance(method, type | str) else ""
        raise TypeError(f"method must be a method of detente; got {method!r}.{hint}")


def method_class(name: str) -> type[Method]:
    """The class of a method by its registered name; dashes and case do not matter."""
    if not isinstance(name, str):
        raise TypeError(f"the method's name must be a string such as 'cagrad'; got {name!r}.")
    key = name.strip().lower().replace("-", "_")
    if key not in registry():
        import difflib

        close = difflib.get_close_matches(key, registry(), n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown method {name!r}.{hint} Known methods: {', '.join(list_methods())}.")
    return registry()[key]


def get_method(name: str, **options: Any) -> Method:
    """Build a method by name.

    Args:
        name: as listed by :func:`list_methods`; dashes and case do not matter.
        **options: arguments of the method's class.

    Raises:
        ValueError: the name is unknown, or an option has an impossible value.
        TypeError: the method has no such option.

    Example:
        >>> import detente
        >>> detente.get_method("cagrad", c=0.4).c
        0.4
    """
    cls = method_class(name)
    check_options(cls, options)
    return cls(**options)


def check_options(cls: type[Method], options: Iterable[str]) -> None:
    """Raise where a method has no such option."""
    known = inspect.signature(cls).parameters
    for option in options:
        if option not in known:
            raise TypeError(f"{cls.name} has no option {option!r}; it takes {', '.join(known) or 'none'}.")


def list_methods() -> list[str]:
    """Names of all methods.

    Example:
        >>> import detente
        >>> "cagrad" in detente.list_methods()
        True
    """
    return sorted(registry())


def describe(cls: type[Method]) -> dict[str, str]:
    """What a method is, what it needs and costs, and which properties it declares: a row of the tables of methods."""
    power = cls.homogeneity
    properties = [
        ("never conflicts", cls.nonconflicting),
        ("loss scales irrelevant", "invariant" in cls.row_scale),
        ("direction free of loss scales", "direction" in cls.row_scale),
        ("length fixed", power == 0),
        (f"gradients x s: update x s^{0.0 if power is None else power:.2g}", power not in (None, 0, 1)),
        ("depends on the gradients' unit", power is None),
        ("depends on the tasks' order", not cls.permutation_equivariant),
        ("random", cls.stochastic),
        ("parameters only", cls.per_parameter),
    ]
    return {
        "name": cls.name,
        "class": cls.__name__,
        "what it is": (cls.__doc__ or "").strip().partition("\n")[0].rstrip("."),
        "paper": cls.paper.short(),
        "kind": cls.kind,
        "needs": ", ".join(sorted(cls.needs)) or "-",
        "backward passes": cls.backwards,
        "extra state": cls.memory,
        "heads": cls.heads,
        "tuned": "; ".join(f"{option} {where}" for option, where in cls.ranges.items()) or "-",
        "properties": ", ".join(text for text, holds in properties if holds) or "-",
    }


def cite(name: str) -> str:
    """BibTeX of the paper behind a method.

    Example:
        >>> import detente
        >>> print(detente.cite("cagrad").splitlines()[0])
        @inproceedings{liu2021cagrad,
    """
    return method_class(name).paper.bibtex()
