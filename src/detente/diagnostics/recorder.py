"""What the tasks do to each other while a network trains: noted every k steps, in one file of bounded size."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detente.diagnostics.conflicts import Gradients, seen, take_gradients
from detente.diagnostics.recording import FORMAT, pairs, records
from detente.diagnostics.writers import Writer, scalars, write
from detente.engine.distributed import Counts
from detente.engine.jacobian import Jacobian, real
from detente.gramian import Partition, cosines
from detente.losses import Losses, without_graph
from detente.method import Method, Update
from detente.methods import ConnectionStrength
from detente.watch import Seen, watching

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Observation", "Recorder"]

Again = Callable[[], Mapping[str, Any]]
_KEPT = ("engine", "conflicts", "phase", "protected", "sequential", "unsolved", "reused", "sampled")
_REST = "(other)"


class Recorder:
    """Note every k steps what the tasks' gradients do to each other, with or without a method.

    Attach it to whatever loop there is. Around :func:`detente.backward` or :func:`detente.step`::

        recorder = detente.Recorder(model, "run.jsonl", every=100)
        for batch in loader:
            with recorder:
                detente.step(closure, optimizer, method)

    or beside a plain ``loss.backward()``, before it::

        losses = compute(batch)
        with recorder.observe(losses, again=lambda: compute(batch)):
            sum(losses.values()).backward()
            optimizer.step()
        optimizer.zero_grad()

    Then ``detente diagnose run.jsonl`` says in words what was seen, and :class:`detente.diagnostics.Recording` reads
    the file. Noted are, of the shared parameters as a whole and of every layer, the norms of the task gradients and
    their cosines; the losses; what the optimizer's step should have done to each loss by its gradient
    (``predicted``), what it did on the same samples (``realised``), and the curvature of each loss along the step,
    ``2 (realised - predicted) / ||step||^2``; weights and figures of the method; phases and channel priorities of
    connection strength.

    A recorded step costs one backward pass per task, and sometimes a forward pass, so that with ``every=100`` training
    takes 1 to 2% longer (three tasks). It holds one gradient per task and a copy of the parameters until the
    optimizer has stepped. Training is not changed by it: not the gradients, not the statistics of norms, not the
    random numbers.

    Args:
        model: the network, whose modules name the layers. Anything that wraps it is fine.
        path: a file to write, one JSON object per line. Nothing is kept in memory.
        every: steps from one record to the next.
        realised_every: of so many records one has ``realised`` and ``curvature``, which take a forward pass.
        limit_mb: size in MB at which every second record is dropped and ``every`` doubles. An existing file is
            continued only after :meth:`load_state_dict`.
        writers: where to send the main figures as well: TensorBoard's ``SummaryWriter``, a run of Weights & Biases, or
            anything with one of their two methods, ``add_scalar(name, value, step)`` and ``log(values, step=)``.
        group: processes that train together, as in :func:`detente.backward`. All need a recorder; the first writes.

    Raises:
        ValueError: an option is out of range.
        FileExistsError: at the first record, where the file is there and :meth:`load_state_dict` was not called.

    Example:
        >>> import detente, torch, tempfile
        >>> model = torch.nn.ModuleDict({k: torch.nn.Linear(3, 3) for k in ("trunk", "a", "b")})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> def closure(tasks=None):
        ...     h = model["trunk"](torch.ones(2, 3)).tanh()
        ...     return {t: model[t](h).square().mean() for t in tasks or "ab"}
        >>> path = tempfile.mkdtemp() + "/run.jsonl"
        >>> with detente.Recorder(model, path, every=1) as recorder:
        ...     for _ in range(3):
        ...         update = detente.step(closure, optimizer, detente.PCGrad())
        >>> found = detente.diagnostics.Recording.load(path)
        >>> found.tasks, found.layers, found.cosines.shape
        (('a', 'b'), ('trunk',), (3, 2, 2))
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | os.PathLike[str],
        every: int = 100,
        *,
        realised_every: int = 4,
        limit_mb: float = 50.0,
        writers: Iterable[Writer] = (),
        group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the network whose modules name the layers; got {type(model).__name__}.")
        for name, number in (("every", every), ("realised_every", realised_every)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number, at least 1; got {number!r}.")
        if not isinstance(limit_mb, int | float) or not limit_mb > 0:
            raise ValueError(f"limit_mb must be a size above 0; got {limit_mb!r}.")
        self.model = model
        self.path = Path(path)
        self.every = every
        self.realised_every = realised_every
        self.limit = limit_mb * 1e6
        self.writers = list(writers)
        self.group = group
        self.steps = 0
        self.layers: list[str] = []
        self._layer_of: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no id is used again
        for name, parameter in model.named_parameters():
            self._place(parameter, _layer(name))
        self.layers.append(_REST)
        self._log: _Log | None = None
        self._resumed = False
        self._open: _Open | None = None
        self._inside: list[ExitStack] = []
        self._observing = False
        self._clock = _Clock()

    # -- ways in

    def observe(
        self,
        losses: Losses,
        again: Again | None = None,
        *,
        shared: Iterable[Tensor] | None = None,
        counts: Counts | None = None,
        parameters: Iterable[Tensor] | None = None,
        scale: float = 1.0,
    ) -> Observation:
        """Note this step, if it is its turn; call it before ``loss.backward()``, which it leaves to you.

        Args:
            losses: ``{task: scalar loss}``, or a sequence, as in :func:`detente.backward`; some tasks are enough.
            again: computes the losses once more on the same samples; called when the ``with`` block ends, which must
                hold the optimizer's step. What dropout draws is drawn anew.
            shared, counts, parameters, scale: as in :func:`detente.backward`.

        Returns:
            A context for the rest of the step, which may also be left unused: what a step changed is then noted when
            the next one begins.

        Raises:
            TypeError, ValueError: the losses do not fit.
        """
        if self._turn():
            chosen = None if parameters is None else list(parameters)
            with self._recording():
                step = seen(losses, shared, counts=counts, parameters=chosen, group=self.group, scale=scale)
                self._begin(step)
        return Observation(self, again)

    def __enter__(self) -> Recorder:
        stack = ExitStack()
        stack.enter_context(watching(_Everything(self)))
        self._inside.append(stack)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.pop().close()
        if kind is None:
            self._end(None, wait=True)
        else:
            self._open = None

    def close(self) -> None:
        """Complete the last record, where a loop ends without a further step."""
        self._end(None)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, and how many lie between two records."""
        return {"steps": self.steps, "every": self.every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: records after it are dropped from the file, because their steps come again."""
        self.steps, self.every = int(state["steps"]), int(state["every"])
        self._resumed = True

    # -- a record

    def _turn(self) -> bool:
        """Count a step; whether it is to be recorded. An open record ends here."""
        self._end(None)
        self._clock.step()
        self.steps += 1
        return (self.steps - 1) % self.every == 0

    @contextmanager
    def _recording(self) -> Iterator[None]:
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        with self._clock.paused(), torch.autocast(device, enabled=False):
            yield

    def _begin(self, step: Seen) -> None:
        found, among = step.found, step.among
        entry: dict[str, Any] = {"step": self.steps - 1, "time": round(time.time()), "tasks": list(step.named)}
        if self._log is None:
            with nullcontext() if among is None else among.failing_together():
                self._log = _Log(self, writing=among is None or dist.get_rank(among.group) == 0)
        values = torch.stack([loss.detach().double().cpu() for loss in step.named.values()])
        values = values if among is None else among.whole(values)
        entry["losses"] = (values / step.scale).tolist()
        entry["ms"] = {"step": self._clock.typical()}
        self._open = opened = _Open(entry)
        if found.shared and len(step.named) > 0:
            start = time.perf_counter()
            # of parameters that PyTorch spreads no process has whole rows, so that changes are not noted
            whole = among is None or among.layout is None
            gradients = take_gradients(step, self._blocks, whole=whole, heads=whole)
            entry["ms"]["gradients"] = 1000 * (time.perf_counter() - start)
            entry |= _described(gradients.gramians, self.layers)
            if whole:
                opened.gradients, opened.scale = gradients, step.scale
                everything = [*found.shared, *{id(p): p for p, _, _ in gradients.heads}.values()]
                opened.before = [(p, p.detach().clone()) for p in everything]
        self._log.append(entry)
        self.every = self._log.thin(self.every)
        if among is not None:  # only the first process knows the size of the file
            mine = self.every if self._log.writing else 0
            self.every = round(float(among.total(torch.tensor([mine], dtype=torch.float64))))

    def _blocks(self, parameters: Sequence[Tensor]) -> Partition:
        for p in parameters:
            if id(p) not in self._layer_of:
                self._place(p, _REST)
        members = tuple(((), torch.tensor(self._layer_of[id(p)])) for p in parameters)
        return Partition(len(self.layers), members)

    def _place(self, parameter: Tensor, layer: str) -> None:
        if layer not in self.layers:
            self.layers.append(layer)
        self._layer_of.setdefault(id(parameter), self.layers.index(layer))
        self._kept.append(parameter)

    def _method(self, method: Method, update: Update) -> None:
        """Note what a method answered in the open record."""
        if self._open is None:
            return
        assert self._log is not None
        more: dict[str, Any] = {}
        more["method"] = getattr(method, "name", type(method).__name__)
        more["weights"] = {task: float(weight.double().mean()) for task, weight in update.weights.items()}
        more["stats"] = {key: update.stats[key] for key in _KEPT if key in update.stats}
        if isinstance(method, ConnectionStrength):
            more["phase"] = 1 if update.stats.get("sequential") else 2
            count = len(method.tasks)
            owned = {pair.name: torch.bincount(method.owners(pair), minlength=count) for pair in method.pairs}
            more["priorities"] = {
                name: dict(zip(method.tasks, channels.tolist(), strict=True)) for name, channels in owned.items()
            }
        self._log.append({"of": self._open.entry["step"]} | more)
        self._open.entry |= more

    def _end(self, again: Again | None, *, wait: bool = False) -> None:
        """Complete the open record by what the step changed; with ``wait`` only if the optimizer has stepped."""
        opened = self._open
        if opened is None:
            return
        with self._clock.paused():
            changes = self._changes(opened, again)
            if wait and not changes:
                return
            self._open = None
            if changes:
                assert self._log is not None
                self._log.append({"of": opened.entry["step"]} | changes)
        if self._log is not None and self._log.writing:
            for writer in self.writers:
                write(writer, scalars(opened.entry | changes), opened.entry["step"])

    def _changes(self, opened: _Open, again: Again | None) -> dict[str, Any]:
        if opened.gradients is None:
            return {}
        rows, heads = opened.gradients.rows, opened.gradients.heads
        assert isinstance(rows, Jacobian)
        count = rows.count
        moved = {id(p): real(p.detach() - before).double() for p, before in opened.before}
        length = math.sqrt(sum(float(change.square().sum()) for change in moved.values()))
        if not length > 0:  # there was no optimizer step yet, or a gradient scaler skipped it
            return {}
        predicted = torch.zeros(count, dtype=torch.float64)
        for p, part in zip(rows.parameters, rows.slices, strict=True):
            predicted += (part.reshape(count, -1).double() @ moved[id(p)].reshape(-1)).cpu()
        for p, task, gradient in heads:
            predicted[task] += float((real(gradient).double() * moved[id(p)]).sum())
        predicted /= opened.scale
        found: dict[str, Any] = {"predicted": predicted.tolist(), "length": length}
        if again is not None and opened.entry["step"] // self.every % self.realised_every == 0:
            with self._undisturbed():
                values = without_graph(again)
            if all(task in values for task in opened.entry["tasks"]):
                after = [torch.as_tensor(values[task]).detach().double().cpu() for task in opened.entry["tasks"]]
                realised = torch.stack(after) / opened.scale - torch.tensor(opened.entry["losses"], dtype=torch.float64)
                found["realised"] = realised.tolist()
                found["curvature"] = (2 * (realised - predicted) / length**2).tolist()
        return found

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Statistics of norms and random numbers as if nothing had been computed inside."""
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        device = [p.device for p in self.model.parameters() if p.device.type == "cuda"]
        with torch.random.fork_rng(devices={d.index for d in device}):
            try:
                yield
            finally:
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)


class Observation:
    """The rest of a step that was observed: what is written and changed inside belongs to it."""

    def __init__(self, recorder: Recorder, again: Again | None) -> None:
        self._recorder = recorder
        self._again = again
        self._stack = ExitStack()

    def __enter__(self) -> Observation:
        self._recorder._observing = True
        self._stack.enter_context(watching(_Method(self._recorder)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._recorder._observing = False
        if kind is None:
            self._recorder._end(self._again, wait=True)
        else:
            self._recorder._open = None


class _Method:
    """Sees what methods answer."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def losses(self, seen: Seen) -> None:
        pass

    def sequence(self, seen: Callable[[], Seen]) -> None:
        pass

    def updated(self, method: Method, update: Update) -> None:
        self.recorder._method(method, update)

    def stepped(self, again: Again | None) -> None:
        pass


class _Everything(_Method):
    """Sees all of every step."""

    def losses(self, seen: Seen) -> None:
        recorder = self.recorder
        if not recorder._observing and recorder._turn():
            with recorder._recording():
                recorder._begin(seen)

    def sequence(self, seen: Callable[[], Seen]) -> None:
        recorder = self.recorder
        if not recorder._observing and recorder._turn():
            # statistics are given back only when no gradient needs them any more
            with recorder._undisturbed():
                with recorder._clock.paused():
                    step = seen()
                with recorder._recording():
                    recorder._begin(step)

    def stepped(self, again: Again | None) -> None:
        if not self.recorder._observing:
            self.recorder._end(again)


@dataclass
class _Open:
    """A record whose step is not over."""

    entry: dict[str, Any]
    gradients: Gradients | None = None
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    scale: float = 1.0


class _Log:
    """The file: a line that names the layers, one per record, and what became of it in lines of its own."""

    def __init__(self, recorder: Recorder, *, writing: bool) -> None:
        self.path = recorder.path
        self.limit = recorder.limit
        self.writing = writing
        self.head = {"detente": FORMAT, "layers": recorder.layers}
        if not writing:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite(())
        elif recorder._resumed:
            steps = recorder.steps - 1  # the one about to be recorded comes again, too
            self._rewrite(line for step, line, _ in records(self.path) if step < steps)
        else:
            raise FileExistsError(
                f"{self.path} holds the records of another run. Choose another path or delete it; to go on with it, "
                "save recorder.state_dict() with your checkpoint and load it before the first step."
            )

    def append(self, entry: Mapping[str, Any]) -> None:
        if self.writing:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(entry))

    def thin(self, every: int) -> int:
        """Drop every second record where the file is too large; the distance of records from then on."""
        if not self.writing or self.path.stat().st_size <= self.limit:
            return every
        self._rewrite(line for step, line, _ in records(self.path) if step % (2 * every) == 0)
        return 2 * every

    def _rewrite(self, lines: Iterable[str]) -> None:
        beside = self.path.with_name(self.path.name + ".tmp")
        with beside.open("w", encoding="utf-8") as file:
            file.write(_line(self.head))
            file.writelines(lines)
        os.replace(beside, self.path)


class _Clock:
    """Times from one step to the next, without what recording takes."""

    def __init__(self) -> None:
        self.times: deque[float] = deque(maxlen=100)
        self.last: float | None = None

    def step(self) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(1000 * (now - self.last))
        self.last = now

    def typical(self) -> float | None:
        """Median of the last 100, in milliseconds."""
        return statistics.median(self.times) if self.times else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.last is not None:
                self.last += time.perf_counter() - start


def _layer(name: str) -> str:
    """The module that holds a parameter, without what wraps the model."""
    for wrapper in ("_orig_mod.", "module."):
        while name.startswith(wrapper):
            name = name[len(wrapper) :]
    return name.rpartition(".")[0] or "(model)"


def _described(gramians: Tensor, layers: Sequence[str]) -> dict[str, Any]:
    """Norms and cosines, of all shared parameters together and of each layer that has some."""

    def one(gramian: Tensor) -> dict[str, Any]:
        upper = cosines(gramian)[tuple(zip(*pairs(len(gramian)), strict=True))] if len(gramian) > 1 else gramian[:0, 0]
        return {"norms": gramian.diagonal().clamp_min(0).sqrt().tolist(), "cosines": upper.tolist()}

    there = gramians.diagonal(dim1=1, dim2=2).amax(1).ne(0)
    assert len(layers) == len(gramians)
    return one(gramians.sum(0)) | {
        "layers": [one(gramian) if some else None for gramian, some in zip(gramians, there.tolist(), strict=True)]
    }


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(_plain(entry), allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: Any) -> Any:
    """What JSON can hold, with six digits; null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
