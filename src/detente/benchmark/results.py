"""From the finished jobs of a comparison to its statistics.

A comparison is a directory written by ``detente compare``: ``comparison.json`` says what was asked for and
``runs/<label>/seed-<k>/result.json`` holds one finished job each. Everything in `Row` follows from the metrics alone
and is bit-for-bit reproducible; everything that was timed stands apart in `Cost`.

Conventions: delta-m is in percent and LOWER is better; its baseline is the mean over seeds of the single-task runs of
this very comparison. Intervals (see `detente.benchmark.statistics`) hold the baseline fixed, so they speak of the seeds
of the method, not of those of the baseline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from detente.benchmark.metrics import delta_m, mean_rank
from detente.benchmark.protocol import best_epoch
from detente.benchmark.statistics import Estimate, holm, paired

SINGLE = "single"
"""Label of the single-task baselines."""
EQUAL = "gd"
"""Label of equal weights, the method every other one is laid beside."""

NAMED = 3
"""Methods that the verdict names of a longer list."""

Directions = Mapping[str, Mapping[str, str]]
"""Task -> metric -> "max" or "min"; the order of the tasks is the order everywhere."""


class ResultError(ValueError):
    """A directory or file that cannot be read as results; the message names the file and the fix."""


@dataclass(frozen=True)
class Job:
    """One finished run, as in its ``result.json``. A single-task baseline has a `task` and reports that task only."""

    path: Path
    method: str
    label: str
    seed: int
    task: str | None
    metrics: Mapping[tuple[str, str], float]
    selected_epoch: int
    steps: int
    history: Sequence[Mapping[str, Any]]
    conflict_rate: float | None
    step_ms: float
    peak_mb: float
    parameters: int
    score: float = math.nan
    """Best validation score."""
    diverged: str | None = None
    """Where and why the run stopped, if a loss was no longer finite."""


@dataclass(frozen=True)
class Row:
    """The results of one label; delta-m is None without a full baseline.

    `metrics` has every (task, metric), in the single-task row only those of the tasks that have a baseline.

    `delta_m` averages over all metrics alike, `delta_m_by_task` within each task first. `mean_rank` is taken on the
    seed means among the multi-task methods, so the single-task row has none; nor has it a conflict rate.
    """

    label: str
    method: str
    seeds: tuple[int, ...]
    metrics: Mapping[tuple[str, str], Estimate]
    delta_m: Estimate | None
    delta_m_by_task: Estimate | None
    mean_rank: float | None
    conflict_rate: Estimate | None
    control: str | None = None
    """``sweep``, ``extracted`` or ``wider`` for a control; None for a method and the baseline."""


@dataclass(frozen=True)
class Cost:
    """What one label cost, means over seeds. `ratio` is the step time relative to equal weights, None without them.

    The single-task row stands for all its networks together: times and parameters are summed, the peak memory is that
    of the largest, because they train one after another.
    """

    label: str
    step_ms: float
    ratio: float | None
    peak_mb: float
    parameters: int


@dataclass(frozen=True)
class Difference:
    """One row against another (equal weights, or the best fixed ones), seed by seed, in points of flat delta-m.

    Positive: the row is better. `p`: two-sided paired t-test. `p_holm`: the same, corrected by Holm for the number of
    methods in the comparison.
    """

    label: str
    points: Estimate
    p: float
    p_holm: float


@dataclass(frozen=True)
class Comparison:
    """A whole comparison; rows are the single-task baseline, then the methods from the best delta-m to the worst."""

    directory: Path
    problem: str
    command: str
    config: Mapping[str, Any]
    tasks: Directions
    jobs: tuple[Job, ...]
    rows: tuple[Row, ...]
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]
    """What a reader has to know before the figures: unfinished runs, diverged runs, metrics left out of delta-m."""
    sweep: tuple[Row, ...] = ()
    """Fixed weightings, in the order of the first task's weight; of them `rows` has the one that validation chose."""

    @property
    def protocol(self) -> str:
        return str(self.config.get("settings", {}).get("protocol", "val-selected"))

    @property
    def methods(self) -> tuple[Row, ...]:
        """The rows that are methods: neither the baseline nor controls."""
        return tuple(row for row in self.rows if row.label != SINGLE and row.control is None)

    @property
    def best_fixed(self) -> Row | None:
        """The fixed weighting that the validation split chose."""
        return next((row for row in self.rows if row.control == "sweep"), None)

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """Every (task, metric), in order."""
        return _columns(self.tasks)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({job.seed for job in self.jobs}))

    def row(self, label: str) -> Row | None:
        return next((row for row in self.rows if row.label == label), None)


def load_comparison(directory: str | Path) -> Comparison:
    """Read every finished job under `directory` and compute the statistics.

    Raises ResultError where `directory` is no comparison, has no finished run, or a file is corrupt or incomplete.
    """
    directory = Path(directory)
    config = read_config(directory / "comparison.json")
    tasks: Directions = config["tasks"]
    fix = f"Delete it and run the same command again:\n  {config['command']}"
    jobs = [_read_job(path, tasks, fix) for path in sorted(directory.glob("runs/*/seed-*/result.json"))]
    if not jobs:
        raise ResultError(f"{directory} has no finished run yet. Run the same command again:\n  {config['command']}")
    seen: dict[tuple[str, str | None, int], Job] = {}
    for job in jobs:
        twin = seen.setdefault((job.label, job.task, job.seed), job)
        if twin is not job:
            raise ResultError(
                f"{twin.path} and {job.path} are the same run ({job.label}, seed {job.seed}). Delete one."
            )
    return compare(jobs, config, directory)


def compare(jobs: Iterable[Job], config: Mapping[str, Any], directory: Path) -> Comparison:
    """The statistics of finished jobs. `config`: the content of ``comparison.json``, tasks included."""
    tasks: Directions = config["tasks"]
    controls: Mapping[str, str] = config.get("controls", {})
    listed = [*(label for label in config["methods"] if label != SINGLE), *controls]
    jobs = tuple(sorted(jobs, key=lambda job: (job.label, job.task or "", job.seed)))
    if config.get("settings", {}).get("protocol") == "max-over-training":
        jobs = _maxima(jobs, tasks, config.get("selection", "log"))
    single = [job for job in jobs if job.label == SINGLE]
    by_label: dict[str, list[Job]] = {}
    for job in jobs:
        if job.label != SINGLE:
            by_label.setdefault(job.label, []).append(job)

    notes = _unfinished(jobs, listed, config["seeds"], tasks if SINGLE in config["methods"] or single else ())
    single_metrics = {
        column: Estimate({job.seed: job.metrics[column] for job in single if job.task == column[0]})
        for column in _columns(tasks)
        if any(job.task == column[0] for job in single)
    }
    baseline = {column: estimate.mean for column, estimate in single_metrics.items()}
    unusable = [column for column, value in baseline.items() if value == 0 or not math.isfinite(value)]
    if set(baseline) != set(_columns(tasks)):
        baseline = {}
        if SINGLE in config["methods"]:
            notes.append("There is no single-task baseline for every task, so delta-m is absent.")
    elif unusable:
        names = ", ".join(" ".join(column) for column in unusable)
        notes.append(f"The single-task baseline is 0 or not finite, so delta-m leaves out: {names}.")
        baseline = {column: value for column, value in baseline.items() if column not in unusable}

    fixed = [label for label in by_label if controls.get(label) == "sweep"]
    chosen = max(fixed, key=lambda label: _validated(by_label[label])) if fixed else None
    shown = {label: group for label, group in by_label.items() if label not in fixed or label == chosen}
    ranks = _ranks(shown, tasks)
    rows = []
    for label, group in by_label.items():
        conflicts = {job.seed: job.conflict_rate for job in group if job.conflict_rate is not None}
        flat, by_task = _deltas({job.seed: job.metrics for job in group}, baseline, tasks)
        rows.append(
            Row(
                label=label,
                method=group[0].method,
                seeds=tuple(job.seed for job in group),
                metrics={c: _estimate(group, c) for c in _columns(tasks)},
                delta_m=flat,
                delta_m_by_task=by_task,
                mean_rank=ranks.get(label),
                conflict_rate=Estimate(conflicts) if conflicts else None,
                control=controls.get(label),
            )
        )
        if not all(estimate.finite for estimate in rows[-1].metrics.values()):
            told = [f"seed {job.seed} {job.diverged}" for job in group if job.diverged]
            notes.append(
                f"{label} diverged: {'; '.join(told)}."
                if told
                else f"{label} has a metric that is not finite: at least one of its runs diverged."
            )

    def position(row: Row) -> tuple[float, int, str]:
        value = row.delta_m.mean if row.delta_m else 0.0
        order = listed.index(row.label) if row.label in listed else len(listed)
        return (math.inf if math.isnan(value) else value, order, row.label)

    swept = tuple(sorted((row for row in rows if row.label in fixed), key=lambda row: listed.index(row.label)))
    rows = sorted((row for row in rows if row.label in shown), key=position)
    rows[:0] = _single_row(single, single_metrics, baseline, tasks)
    notes += _disagreement(rows)
    notes += _unsolved(by_label)
    return Comparison(
        directory=directory,
        problem=config["problem"],
        command=config["command"],
        config=config,
        tasks=tasks,
        jobs=jobs,
        rows=tuple(rows),
        costs=tuple(_costs(rows, single, by_label)),
        notes=tuple(notes),
        sweep=swept,
    )


def _validated(group: Sequence[Job]) -> float:
    """Mean of the best validation scores: what chooses among fixed weightings, without looking at the test split."""
    scores = [job.score if math.isfinite(job.score) else -math.inf for job in group]
    return sum(scores) / len(scores)


def _maxima(jobs: Sequence[Job], tasks: Directions, selection: str) -> tuple[Job, ...]:
    """Jobs with the test figures of the epoch that is best in the mean over seeds, for each label and baseline."""
    groups: dict[tuple[str, str | None], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.label, job.task), []).append(job)
    found = []
    for group in groups.values():
        usable = [job for job in group if not job.diverged]
        epoch = best_epoch(tasks, [job.history for job in usable], selection) if usable else 0
        for job in group:
            if not job.diverged:
                figures = job.history[epoch - 1]["test"]
                metrics = {c: _value(figures[c[0]][c[1]]) for c in job.metrics}
                job = replace(job, metrics=metrics, selected_epoch=epoch)
            found.append(job)
    return tuple(found)


def _unsolved(by_label: Mapping[str, Sequence[Job]]) -> list[str]:
    counts = {
        label: sum(int(row.get("unsolved", 0)) for job in group for row in job.history)
        for label, group in by_label.items()
    }
    return [
        f"{label}: its solver stopped short of its tolerance {count} times; the best feasible point was used."
        for label, count in counts.items()
        if count
    ]


def differences(comparison: Comparison, reference: str = EQUAL) -> tuple[Difference, ...]:
    """Every method against one row (equal weights) over the seeds they share, best first; controls are not methods.

    Empty without that row or delta-m; a method with fewer than two shared seeds, or a diverged one, is left out.
    """
    other = comparison.row(reference)
    if other is None or other.delta_m is None:
        return ()
    found = []
    for row in comparison.methods:
        if row.label in (EQUAL, reference) or row.delta_m is None:
            continue
        own = row.delta_m.by_seed
        points = Estimate({seed: value - own[seed] for seed, value in other.delta_m.by_seed.items() if seed in own})
        if len(points.values) >= 2 and points.finite:
            found.append((row.label, points, paired(points)))
    corrected = holm([p for *_, p in found])
    items = [Difference(label, points, p, least) for (label, points, p), least in zip(found, corrected, strict=True)]
    return tuple(sorted(items, key=lambda item: (-item.points.mean, item.label)))


PRICE = 0.05
"""Relative loss in a figure from which a method that is better as a whole is said to pay for it."""


def verdict(comparison: Comparison) -> str:
    """A few plain sentences: is any method better or worse than equal weights, and than the best fixed ones; how sure?

    A method counts where its Holm-corrected p is below 0.05. The interval beside it is Student's 95% one of the paired
    difference, which fits the test, and is not corrected for the number of methods.
    """
    n = len(comparison.seeds)
    equal = comparison.row(EQUAL)
    if equal is None:
        return f"There is no run with equal weights ({EQUAL}), so there is nothing to lay the methods beside."
    if equal.delta_m is None:
        return "There is no single-task baseline, so delta-m is absent and no method can be judged by it."
    if all(row.label == EQUAL for row in comparison.methods):
        return "Equal weights is the only method here, so there is nothing to lay beside it."
    if n < 3:  # a t-test on two differences that happen to be alike is sure of anything
        few = "One seed" if n == 1 else "Two seeds"
        return f"{few} cannot tell a method from equal weights: run the comparison again with three seeds or more."
    equals = f"{'tuned ' if comparison.config.get('tuning') else ''}equal weights"
    found = differences(comparison)
    lost = [row.label for row in comparison.methods if row.delta_m is not None and not row.delta_m.finite]
    gone = f" {_listed(lost)} diverged and cannot be judged." if lost and found else ""
    if not found:
        return "No method shares two or more usable seeds with equal weights, so none can be judged."
    beside = _against_fixed(comparison) + _against_wider(comparison)
    sure = [item for item in found if item.p_holm < 0.05]
    methods = f"{len(found)} method{'s' * (len(found) != 1)}"
    test = f"Paired t-tests, Holm-corrected for {methods}; the intervals are not corrected."
    if comparison.protocol != "val-selected":
        test += (
            f" Protocol {comparison.protocol}: chosen with the test split in view, so not an estimate for unseen data."
        )
    if not sure:
        claim = _claim(found[:1], equals)
        return f"No method is distinguishable from {equals} at {n} seeds. By its mean, {claim}.{beside}{gone} {test}"
    better = [item for item in sure if item.points.mean > 0]
    worse = [item for item in reversed(sure) if item.points.mean < 0]
    text = ". ".join(_claim(group, equals) for group in (better, worse) if group)
    none = "" if better else f"No method beats {equals} here. "
    unsure = [item.label for item in found if item not in sure]
    names = _listed(unsure) if 0 < len(unsure) <= 6 else f"The other {len(unsure)} methods"
    rest = f" {names} cannot be told from {equals}." if unsure else ""
    paid = "".join(_price(comparison, equal, item.label) for item in better[:NAMED])
    return f"{none}On {comparison.problem} over {n} seeds, {text}.{paid}{rest}{beside}{gone} {test}"


def _price(comparison: Comparison, equal: Row, label: str) -> str:
    """The sentence on the figure that a better method makes worst, where it is worse by a lot; else empty."""
    row = comparison.row(label)
    assert row is not None
    worst, what = 0.0, ("", "")
    for (task, metric), estimate in row.metrics.items():
        before, sign = equal.metrics[task, metric].mean, 1 if comparison.tasks[task][metric] == "max" else -1
        loss = sign * (before - estimate.mean) / abs(before) if before else 0.0
        if loss > worst:
            worst, what = loss, (task, metric)
    if worst < PRICE:
        return ""
    task, metric = what
    figures = f"{row.metrics[what].mean:.3g} instead of {equal.metrics[what].mean:.3g}"
    return f" But {label} pays with {task}, whose {metric} is {figures}."


def _against_fixed(comparison: Comparison) -> str:
    """The sentence on the best fixed weights; empty without a sweep."""
    best = comparison.best_fixed
    if best is None:
        return ""
    found = differences(comparison, best.label)
    beaten = [item.label for item in found if item.p_holm < 0.05 and item.points.mean > 0]
    if not beaten:
        return f" No method beats the best fixed weights here, {best.label}."
    return f" Better than the best fixed weights, {best.label}, too: {_listed(beaten)}."


def _against_wider(comparison: Comparison) -> str:
    """The sentence on equal weights on a wider network; empty without one."""
    row = next((row for row in comparison.rows if row.control == "wider"), None)
    found = [] if row is None else differences(comparison, row.label)
    if row is None or not found:
        return ""
    sure = [item for item in found if item.p_holm < 0.05]
    worse = [item.label for item in sure if item.points.mean < 0]
    better = [item.label for item in sure if item.points.mean > 0]
    network = f"equal weights on a network that is wider for the same compute, {row.label},"
    if better:
        return f" Better than {network} too: {_listed(better)}."
    if not worse:
        return f" No method can be told from {network[:-1]}."
    many = "every method" if len(worse) == len(found) else f"{len(worse)} of {len(found)} methods"
    return f" For comparison: {network} beat {many}."


def _claim(items: Sequence[Difference], equals: str) -> str:
    """ "a is better than equal weights by 3.9 points of delta-m (95% interval ... 3.6 to 4.2) and b by 2.4 (...)"."""
    sign = 1 if items[0].points.mean >= 0 else -1
    parts = []
    for index, item in enumerate(items if len(items) <= NAMED + 1 else items[:NAMED]):
        mean = sign * item.points.mean
        low, high = sorted(sign * end for end in item.points.student())
        comparative = f" is {'better' if sign > 0 else 'worse'} than {equals}" if index == 0 else ""
        unit = " points of delta-m" if index == 0 else ""
        head = "95% interval of the paired difference " if index == 0 else ""
        interval = f"({head}{_number(low)} to {_number(high)})"
        parts.append(f"{item.label}{comparative} by {_number(mean)}{unit} {interval}")
    if len(items) > len(parts):
        parts.append(f"{len(items) - len(parts)} more by less")
    return _listed(parts)


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _number(value: float) -> str:
    """At least one decimal and two significant digits, so that a small interval does not read '0.0 to 0.0'."""
    digits = 1 if value == 0 else min(4, max(1, 1 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"


def _columns(tasks: Directions) -> tuple[tuple[str, str], ...]:
    return tuple((task, metric) for task, metrics in tasks.items() for metric in metrics)


def _estimate(jobs: Iterable[Job], column: tuple[str, str]) -> Estimate:
    return Estimate({job.seed: job.metrics[column] for job in jobs})


def _higher(tasks: Directions, columns: Iterable[tuple[str, str]]) -> list[bool]:
    return [tasks[task][metric] == "max" for task, metric in columns]


def _deltas(
    metrics: Mapping[int, Mapping[tuple[str, str], float]],
    baseline: Mapping[tuple[str, str], float],
    tasks: Directions,
) -> tuple[Estimate | None, Estimate | None]:
    """delta-m of every seed, flat and averaged per task."""
    if not baseline:
        return None, None
    columns = list(baseline)
    base, higher = list(baseline.values()), _higher(tasks, columns)
    groups = [task for task, _ in columns]
    values = {seed: [found[c] for c in columns] for seed, found in metrics.items()}
    return (
        Estimate({seed: delta_m(row, base, higher) for seed, row in values.items()}),
        Estimate({seed: delta_m(row, base, higher, groups=groups) for seed, row in values.items()}),
    )


def _ranks(by_label: Mapping[str, Sequence[Job]], tasks: Directions) -> dict[str, float]:
    if not by_label:
        return {}
    columns = _columns(tasks)
    means = [[_estimate(group, c).mean for c in columns] for group in by_label.values()]
    return dict(zip(by_label, mean_rank(means, _higher(tasks, columns)), strict=True))


def _single_row(
    single: Sequence[Job],
    metrics: Mapping[tuple[str, str], Estimate],
    baseline: Mapping[tuple[str, str], float],
    tasks: Directions,
) -> list[Row]:
    """The baseline as a row: delta-m of its own seeds against their mean shows how noisy the baseline itself is."""
    if not single:
        return []
    runs = {(job.task, job.seed): job for job in single}
    everywhere = [seed for seed in sorted({job.seed for job in single}) if all((task, seed) in runs for task in tasks)]
    joined = {seed: {c: runs[c[0], seed].metrics[c] for c in _columns(tasks)} for seed in everywhere}
    flat, by_task = _deltas(joined, baseline, tasks) if joined else (None, None)
    return [Row(SINGLE, SINGLE, tuple(everywhere), dict(metrics), flat, by_task, mean_rank=None, conflict_rate=None)]


def _costs(rows: Sequence[Row], single: Sequence[Job], by_label: Mapping[str, Sequence[Job]]) -> list[Cost]:
    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    def cost(label: str, networks: Sequence[Sequence[Job]]) -> Cost:
        step = math.fsum(mean([job.step_ms for job in jobs]) for jobs in networks)
        return Cost(
            label,
            step,
            step / equal if equal else None,
            max(mean([job.peak_mb for job in jobs]) for jobs in networks),
            sum(jobs[0].parameters for jobs in networks),
        )

    equal = mean([job.step_ms for job in by_label[EQUAL]]) if EQUAL in by_label else None
    by_task: dict[str | None, list[Job]] = {}
    for job in single:
        by_task.setdefault(job.task, []).append(job)
    return [cost(row.label, list(by_task.values()) if row.label == SINGLE else [by_label[row.label]]) for row in rows]


def _unfinished(
    jobs: Sequence[Job], listed: Sequence[str], seeds: Sequence[int], single_tasks: Iterable[str]
) -> list[str]:
    done = {(job.label, job.task, job.seed) for job in jobs}
    asked: list[tuple[str, str | None, int]] = [(SINGLE, task, seed) for task in single_tasks for seed in seeds]
    asked += [(label, None, seed) for label in listed for seed in seeds]
    left = [" ".join([run[0], run[1] or "", f"seed {run[2]}"]).replace("  ", " ") for run in asked if run not in done]
    if not left:
        return []
    names = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return [f"{len(left)} of {len(asked)} runs are not finished ({names}). Ask for them again and it goes on."]


def _disagreement(rows: Sequence[Row]) -> list[str]:
    pairs = [(row, row.delta_m, row.delta_m_by_task) for row in rows if row.label != SINGLE]
    usable = [(row.label, flat.mean, task.mean) for row, flat, task in pairs if flat and task and flat.finite]
    if not usable:
        return []
    flat_best, task_best = (min(usable, key=lambda item: item[index])[0] for index in (1, 2))
    if flat_best == task_best:
        return []
    return [f"The two averages name different winners: {flat_best} over all metrics alike, {task_best} per task first."]


def read_config(path: Path) -> dict[str, Any]:
    """``comparison.json``, with every key the statistics need."""
    if not path.is_file():
        raise ResultError(f"{path} does not exist. Is {path.parent} a directory that `detente compare` wrote?")
    config = _read_json(path, "It is written at the start of `detente compare`: delete it and run that command again.")
    missing = [key for key in ("problem", "tasks", "methods", "seeds", "command") if key not in config]
    if missing:
        raise ResultError(f"{path} lacks {', '.join(missing)}. Delete it and run `detente compare` again.")
    return config


def _read_job(path: Path, tasks: Directions, fix: str) -> Job:
    content = _read_json(path, fix)
    try:
        task = content["task"]
        cost = content["cost"]
        return Job(
            path=path,
            method=str(content["method"]),
            label=str(content["label"]),
            seed=int(content["seed"]),
            task=task,
            metrics={c: _value(content["metrics"][c[0]][c[1]]) for c in _columns(tasks) if task in (None, c[0])},
            selected_epoch=int(content["selected_epoch"]),
            steps=int(content["steps"]),
            history=list(content["history"]),
            conflict_rate=None if content["conflict_rate"] is None else float(content["conflict_rate"]),
            step_ms=float(cost["step_ms"]),
            peak_mb=float(cost["peak_mb"]),
            parameters=int(cost["parameters"]),
            score=_value(content.get("score")),
            diverged=_divergence(content.get("diverged")),
        )
    except KeyError as error:
        raise ResultError(f"{path} is incomplete: {error.args[0]!r} is missing. {fix}") from error
    except (TypeError, ValueError) as error:
        raise ResultError(f"{path} is corrupt: {error}. {fix}") from error


def _divergence(found: Mapping[str, Any] | None) -> str | None:
    return None if found is None else f"in epoch {found['epoch']} ({found['reason']})"


def _value(value: float | None) -> float:
    """JSON has no NaN, so null stands for a metric that was not finite."""
    return math.nan if value is None else float(value)


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # cut-off JSON and broken UTF-8 alike
        raise ResultError(f"{path} is not readable as JSON ({error}). {fix}") from error
    if not isinstance(content, dict):
        raise ResultError(f"{path} must hold one JSON object; it holds a {type(content).__name__}. {fix}")
    return content
