"""The command line: compare, report, methods, problems."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

try:
    import rich.box
    import typer
    import yaml
    from filelock import FileLock, Timeout
    from rich.console import Console, Group
    from rich.live import Live
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table

    from detente.benchmark import tables
    from detente.benchmark.report import write_report
    from detente.benchmark.results import load_comparison, read_config, verdict
except ImportError as error:
    raise SystemExit(
        f"the detente command needs {error.name}, which is not installed. Run: pip install 'detente[compare]'"
    ) from error

from detente.benchmark.launch import check_launcher, run_launched
from detente.benchmark.problem import Problem, list_problems, load_problem
from detente.benchmark.runner import Event, jobs_of, prepare, run_jobs
from detente.benchmark.specs import Spec, parse_methods
from detente.method import describe, list_methods, method_class

app = typer.Typer(
    help="Compare methods for conflicting task gradients, honestly, on your problem or a built-in one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
if not console.is_terminal:
    console.width = 120  # a file or a pipe has no edge to fit

DEFAULT_METHODS = "cagrad,wpcgrad,cdtt,connection_strength,mgda,pcgrad"


class _Monitor:
    """Live view: one bar for the whole comparison, one line per running job."""

    def __init__(self, title: str, total: int) -> None:
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("runs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            speed_estimate_period=600,
        )
        self.total = self.bar.add_task(title, total=total)
        self.running: dict[str, Event] = {}
        self.finished = 0

    def __rich__(self) -> Group:
        table = Table(box=None, show_header=False, padding=(0, 1))
        for name, event in self.running.items():
            table.add_row(name, f"{100 * event.fraction:3.0f}%", event.text)
        return Group(self.bar, table)

    def __call__(self, event: Event) -> None:
        name = f"{event.job} seed {event.seed}"
        if event.fraction >= 1 and (event.text in ("", "failed", "finished before") or event.error):
            self.running.pop(name, None)
            self.finished += 1
            if not console.is_terminal:
                state = "failed" if event.error else event.text or "done"
                total = self.bar.tasks[0].total
                console.print(f"[{self.finished}/{total:.0f}] {name}: {state}", highlight=False, markup=False)
        else:
            self.running[name] = event
        self.bar.update(self.total, completed=self.finished + sum(e.fraction for e in self.running.values()))


def _settings(problem: Problem, given: dict[str, Any]) -> dict[str, Any]:
    settings = dict(problem.settings)
    for key, value in given.items():
        if value is not None:
            if key not in settings:
                raise ValueError(f"problem {problem.name!r} has no setting {key!r}; it has {', '.join(settings)}.")
            if key == "seeds":
                raise ValueError("the number of seeds is not one of the settings; use --seeds.")
            settings[key] = _positive(key, value, whole=isinstance(settings[key], int))
    settings.pop("seeds", None)
    return settings


def _positive(key: str, value: Any, *, whole: bool) -> int | float:
    """A positive number; YAML reads 1e-3 as text, so text that is a number will do."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    kind = "positive whole number" if whole else "positive number"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a {kind}; got {value!r}.")
    if whole and value != int(value):
        raise ValueError(f"{key} must be a {kind}; got {value!r}.")
    return int(value) if whole else float(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    """A comparison written down: problem, methods, seeds, jobs, out, and settings."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" in line {where.line + 1}" if where else ""
        raise ValueError(f"{path} is not valid YAML{place}: {getattr(error, 'problem', error)}.") from error
    known = {"problem", "methods", "seeds", "jobs", "out", "settings"}
    if not isinstance(content, dict) or not set(content) <= known:
        got = sorted(map(str, set(content) - known)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(sorted(known))}; got {got}.")
    if not isinstance(content.get("out", ""), str):
        raise ValueError(f"{path}: out must be the name of a directory; got {content['out']!r}.")
    if not isinstance(content.get("settings", {}), dict):
        raise ValueError(f"{path}: settings must be a mapping such as {{epochs: 10}}.")
    return content


@app.command()
def compare(
    problem: Annotated[str | None, typer.Argument(help="A built-in problem, or the path of your problem file.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated, with options as in 'cagrad(c=0.8)'; or all. Default: {DEFAULT_METHODS}."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions of every run. Default: 3.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Length of the training.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length, for problems that count steps (toy).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the comparison. Default: runs/PROBLEM.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes, one thread each. Default: 2.")] = None,
    launch: Annotated[
        str | None, typer.Option(help="torchrun: every run on several processes, which divide its batches.")
    ] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=2, help="With --launch: how many processes.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with problem, methods, seeds, settings.")] = None,
) -> None:
    """Train single-task baselines and every method, and say whether resolving conflicts helps.

    Equal weights (gd) and the single-task baselines always take part. Interrupted? The same command continues, and may
    do so on another number of processes.
    """
    written = _read_yaml(config) if config else {}
    source = problem or written.get("problem")
    if source is None:
        raise ValueError("which problem? Give a name or the path of a problem file; `detente problems` lists them.")
    loaded = load_problem(str(source))
    given: dict[str, Any] = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr}
    settings = _settings(loaded, {**written.get("settings", {}), **{k: v for k, v in given.items() if v is not None}})
    listed = written.get("methods")
    wanted = methods or (",".join(map(str, listed)) if isinstance(listed, list) else listed)
    specs = parse_methods(str(wanted or getattr(loaded.module, "methods", DEFAULT_METHODS)))
    if loaded.whole and (seeds or "seeds" in written):
        raise ValueError(f"problem {loaded.name!r} runs a fixed set of starts; leave out seeds.")
    count = _positive("seeds", seeds or written.get("seeds", loaded.module.settings.get("seeds", 3)), whole=True)
    processes = _positive("jobs", jobs or written.get("jobs", 2), whole=True)
    divided = _divided(loaded, settings, launch, nproc_per_node, jobs or written.get("jobs"))
    root = out or Path(written.get("out", f"runs/{loaded.name}"))
    command = "detente " + shlex.join(sys.argv[1:])
    started = time.monotonic()
    try:
        failures = _compare(loaded, specs, range(int(count)), settings, root, int(processes), divided, command)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on where this one stopped.")
        sys.stdout.flush()
        os._exit(130)  # without waiting for the workers, which end when they see their parent gone
    for name, message in failures.items():
        console.print(f"[red]failed[/red] {escape(name)}: {escape(message)}", highlight=False, soft_wrap=True)
    if any(root.glob("runs/*/seed-*/result.json")):
        _show(root, loaded.module)
    console.print(f"Took {time.monotonic() - started:.0f} s.")
    if failures:
        console.print(f"{len(failures)} runs failed, see above. The same command runs them again; the others are kept.")
        raise typer.Exit(1)


def _divided(
    problem: Problem, settings: dict[str, Any], launch: str | None, processes: int | None, jobs: int | None
) -> int | None:
    """Processes that take every run together; None where a run has one."""
    if launch is None:
        if processes is not None:
            raise ValueError("--nproc-per-node goes with --launch torchrun; add it, or leave both out.")
        return None
    check_launcher(launch)
    if processes is None:
        raise ValueError("--launch torchrun: on how many processes? Add --nproc-per-node 2, or more.")
    if jobs not in (None, 1):
        raise ValueError(f"with --launch one run follows the other: leave out jobs, which is {jobs}.")
    if problem.whole:
        raise ValueError(f"problem {problem.name!r} has no batches that could be divided; leave out --launch.")
    if processes > settings["batch_size"]:
        raise ValueError(
            f"--nproc-per-node is {processes}, but a batch has {settings['batch_size']} samples, and every process "
            "needs one. Lower it, or raise --batch-size."
        )
    return processes


def _compare(
    problem: Problem,
    specs: list[Spec],
    seeds: range,
    settings: dict[str, Any],
    root: Path,
    jobs: int,
    divided: int | None,
    command: str,
) -> dict[str, str]:
    if hasattr(problem.module, "check"):
        problem.module.check(specs)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another detente process is working in {root}. Wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise OSError(f"cannot write to {root}: {error.strerror}. Choose another --out.") from error
    with lock:
        prepare(root, problem, specs, seeds, settings, command)
        todo = [] if problem.whole else jobs_of(problem, specs, seeds, settings)
        monitor = _Monitor(problem.name, len(todo) or 1)
        with Live(monitor, console=console, refresh_per_second=4, transient=True):
            if problem.whole:
                problem.whole(specs, settings, root, monitor)
                return {}
            if divided:
                return run_launched(todo, root, divided, monitor)
            return run_jobs(todo, root, jobs, monitor)


def _show(root: Path, hooks: Any) -> None:
    """Print the tables and write every form of them, and the report; ``hooks`` is the problem's module, or None."""
    comparison = load_comparison(root)
    hooked = any(hasattr(hooks, name) for name in ("report", "verdict", "summary"))
    results = [json.loads(job.path.read_text()) for job in comparison.jobs] if hooked else []
    if hasattr(hooks, "report"):
        hooks.report(results, root)
    grids = {"results": tables.result_grid(comparison), "cost": tables.cost_grid(comparison)}
    for name, grid in grids.items():
        (root / f"{name}.md").write_text(tables.markdown(grid))
        (root / f"{name}.tex").write_text(tables.latex(grid))
    (root / "results.csv").write_text(tables.results_csv(comparison))
    (root / "cost.csv").write_text(tables.cost_csv(comparison))
    headline = hooks.verdict(results) if hasattr(hooks, "verdict") else verdict(comparison)
    report = write_report(comparison, root, headline)
    shown = [*tables.result_tables(comparison, console.width), tables.cost_table(comparison)]
    for table in [*shown, *(hooks.summary(results) if hasattr(hooks, "summary") else [])]:
        console.print(table)
    for line in [headline, *(f"Note: {note}" for note in comparison.notes)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Tables: {root}/results.csv, .md, .tex; {root}/cost.csv, .md, .tex", soft_wrap=True, markup=False)
    console.print(f"Report: {report.resolve()}", soft_wrap=True, markup=False)


def _hooks(config: Mapping[str, Any]) -> Any:
    """The problem's module; None where a user's file has gone since, for the results can be shown without it."""
    try:
        return load_problem(config.get("source", config["problem"])).module
    except (ValueError, FileNotFoundError):
        return None


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Directory of a comparison.")]) -> None:
    """Build the tables and the HTML report again from the finished runs of a comparison."""
    _show(directory, _hooks(read_config(directory / "comparison.json")))


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method, to read about it; without one, the table of all.")
    ] = None,
) -> None:
    """List the methods with what they need, cost and promise, or explain one of them."""
    if name is not None:
        cls = method_class(name)
        for key, value in describe(cls).items():
            console.print(f"[bold]{key}[/bold]: {escape(value)}", highlight=False, soft_wrap=True)
        console.print()
        console.print(inspect.getdoc(cls), markup=False, highlight=False, soft_wrap=True)
        console.print()
        console.print(cls.paper.bibtex(), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("name", "paper", "kind", "needs", "backward passes", "extra state", "properties")
    for heading in columns:
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for entry in list_methods():
        row = describe(method_class(entry))
        table.add_row(*(escape(row[heading]) for heading in columns))
    console.print(table)
    console.print("detente methods NAME explains one of them.", highlight=False)


@app.command()
def problems() -> None:
    """List the built-in problems. A problem of your own is a Python file of the same form (see the README)."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    table.add_column("problem")
    table.add_column("what it is")
    for name, line in list_problems().items():
        table.add_row(name, line)
    console.print(table)


def main() -> None:
    """Entry point: known errors are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
