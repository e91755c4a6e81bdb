"""The command line: compare, tune, diagnose, report, methods, problems."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
    from detente.benchmark.report import write_diagnosis, write_report
    from detente.benchmark.results import Comparison, load_comparison, read_config, verdict
except ImportError as error:
    raise SystemExit(
        f"the detente command needs {error.name}, which is not installed. Run: pip install 'detente[compare]'"
    ) from error

from detente.benchmark.controls import Control, extracted, sweep, wider
from detente.benchmark.device import check_device
from detente.benchmark.diagnosing import record
from detente.benchmark.engines import local, ray, torchrun
from detente.benchmark.job import Event
from detente.benchmark.plan import Plan, prepare
from detente.benchmark.problem import Problem, list_problems, load_problem, setting
from detente.benchmark.protocol import PROTOCOLS
from detente.benchmark.specs import Spec, parse_methods
from detente.benchmark.tune import chosen_of, tune
from detente.diagnostics import Recording, diagnose
from detente.method import describe, list_methods, method_class
from detente.nn import convert_task_norm

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
        if event.ended:
            self.running.pop(event.title, None)
            self.finished += 1
            if not console.is_terminal:
                total = self.bar.tasks[0].total
                console.print(
                    f"[{self.finished}/{total:.0f}] {event.title}: {event.text}", highlight=False, markup=False
                )
        else:
            self.running[event.title] = event
            if event.retried:
                console.print(f"{event.title}: {event.text}", highlight=False, markup=False)
        self.bar.update(self.total, completed=self.finished + sum(e.fraction for e in self.running.values()))


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
    known = {*ASKED, "settings"}
    if not isinstance(content, dict) or not set(content) <= known:
        got = sorted(map(str, set(content) - known)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(sorted(known))}; got {got}.")
    if not isinstance(content.get("out", ""), str):
        raise ValueError(f"{path}: out must be the name of a directory; got {content['out']!r}.")
    if not isinstance(content.get("settings", {}), dict):
        raise ValueError(f"{path}: settings must be a mapping such as {{epochs: 10}}.")
    return content


ASKED = ("problem", "methods", "seeds", "jobs", "out", "data", "preset", "tune", "tuned", "sweep", "extract", "wider")
"""What a YAML file may say besides settings, and the command line too."""

# options that compare and tune have in common
ProblemName = Annotated[str | None, typer.Argument(help="A built-in problem, or the path of your problem file.")]
Methods = Annotated[
    str | None,
    typer.Option(help=f"Comma-separated, with options as in 'cagrad(c=0.8)'; or all. Default: {DEFAULT_METHODS}."),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Length of the training.")]
BatchSize = Annotated[int | None, typer.Option(min=1)]
Lr = Annotated[float | None, typer.Option(help="Learning rate.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as in --set weight_decay=1e-4.")]
Preset = Annotated[str | None, typer.Option(help="Settings of a paper; `detente problems` lists them.")]
Data = Annotated[Path | None, typer.Option(help="Directory of the official files. Default: data/PROBLEM.")]
Out = Annotated[Path | None, typer.Option(help="Directory of the comparison. Default: runs/PROBLEM.")]
Config = Annotated[Path | None, typer.Option(help="YAML file with problem, methods, seeds, settings.")]
DownloadHelp = Annotated[bool, typer.Option("--download-help", help="Where the problem's files come from and go.")]
WHERE = "Where it runs"
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes, one thread each. Default: 2.", rich_help_panel=WHERE)]
EngineName = Annotated[str, typer.Option(help="local, or ray.", rich_help_panel=WHERE)]
Address = Annotated[str | None, typer.Option(help="With --engine ray: a running cluster.", rich_help_panel=WHERE)]
Launch = Annotated[
    str | None,
    typer.Option(help="torchrun: every run on several processes, which divide its batches.", rich_help_panel=WHERE),
]
Device = Annotated[str, typer.Option(help="Where every job trains: cpu, or cuda.", rich_help_panel=WHERE)]
NprocPerNode = Annotated[
    int | None, typer.Option(min=2, help="With --launch: how many processes.", rich_help_panel=WHERE)
]
CONTROLS = "Controls"


@app.command()
def compare(
    problem: ProblemName = None,
    methods: Methods = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions of every run. Default: 3.")] = None,
    epochs: Epochs = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length, for problems that count steps (toy).")] = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    set_: Set = None,
    preset: Preset = None,
    protocol: Annotated[str | None, typer.Option(help=f"Which figures count: {', '.join(PROTOCOLS)}.")] = None,
    tune_: Annotated[
        int | None, typer.Option("--tune", min=1, help="Tune everything first, with so many trials for each.")
    ] = None,
    tuned: Annotated[Path | None, typer.Option(help="Compare what this tuning.json chose.")] = None,
    sweep: Annotated[
        int | None, typer.Option(min=1, help="So many fixed weightings of the losses.", rich_help_panel=CONTROLS)
    ] = None,
    extract: Annotated[
        str | None,
        typer.Option(help="Methods whose mean weights are trained with as fixed ones.", rich_help_panel=CONTROLS),
    ] = None,
    wider: Annotated[
        bool | None,
        typer.Option("--wider", help="Equal weights on a wider model, for the same compute.", rich_help_panel=CONTROLS),
    ] = None,
    data: Data = None,
    out: Out = None,
    config: Config = None,
    download_help: DownloadHelp = False,
    device: Device = "cpu",
    jobs: Jobs = None,
    engine: EngineName = "local",
    address: Address = None,
    launch: Launch = None,
    nproc_per_node: NprocPerNode = None,
) -> None:
    """Train single-task baselines and every method, and say whether resolving conflicts helps.

    Equal weights (gd) and the single-task baselines always take part. Interrupted? The same command continues, and may
    do so on another number of processes.
    """
    options = {"epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr, "protocol": protocol}
    written = _read_yaml(config) if config else {}
    asked, loaded = _asked(
        {
            "problem": problem, "methods": methods, "seeds": seeds, "jobs": jobs, "out": out, "data": data,
            "preset": preset, "tune": tune_, "tuned": tuned, "sweep": sweep, "extract": extract, "wider": wider,
        },
        written,
        download_help,
    )  # fmt: skip
    plan = replace(_plan(loaded, asked, _given(written, options, set_)), device=check_device(device))
    run = _engine(loaded, plan.settings, asked["jobs"], engine, address, launch, nproc_per_node)
    root = Path(asked["out"] or f"runs/{loaded.name}")
    started = time.monotonic()
    with _interruptible(), run:
        failures = _compare(plan, root, run, asked["tuned"])
    if any(root.glob("runs/*/seed-*/result.json")):
        _show(root, loaded.module)
    console.print(f"Took {time.monotonic() - started:.0f} s.")
    if failures:
        _reported(failures)
        raise typer.Exit(1)


@app.command("tune")
def tune_command(
    problem: ProblemName = None,
    methods: Methods = None,
    trials: Annotated[int, typer.Option(min=1, help="Trainings for each method and each baseline.")] = 20,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    set_: Set = None,
    preset: Preset = None,
    data: Data = None,
    out: Out = None,
    config: Config = None,
    download_help: DownloadHelp = False,
    device: Device = "cpu",
    jobs: Jobs = None,
    engine: EngineName = "local",
    address: Address = None,
    launch: Launch = None,
    nproc_per_node: NprocPerNode = None,
) -> None:
    """Give every method, equal weights and the single-task baselines included, the same budget of trials.

    Tuned are the learning rate, weight decay and dropout, and the options that a method declares; judged by the
    validation split alone. `detente compare PROBLEM --tuned OUT/tuning.json` compares what was found, and
    `detente compare PROBLEM --tune N` does both. Interrupted? The same command continues.
    """
    given: dict[str, Any] = {"problem": problem, "methods": methods, "jobs": jobs, "out": out, "data": data}
    written = _read_yaml(config) if config else {}
    asked, loaded = _asked({**given, "preset": preset, "tune": trials}, written, download_help)
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    plan = replace(_plan(loaded, asked, _given(written, options, set_)), device=check_device(device))
    run = _engine(loaded, plan.settings, asked["jobs"], engine, address, launch, nproc_per_node)
    root = Path(asked["out"] or f"runs/{loaded.name}")
    with _interruptible(), _locked(root), run:
        content = _tuned(plan, root, run)
    console.print(tables.tuning_table(content))
    console.print(f"Chosen: {root / 'tuning.json'}", soft_wrap=True, markup=False)


def _asked(
    options: Mapping[str, Any], written: Mapping[str, Any], download_help: bool
) -> tuple[dict[str, Any], Problem]:
    """What the command line asks for, over what the YAML file says; and the problem."""
    asked = {key: written.get(key) if options.get(key) is None else options[key] for key in ASKED}
    if asked["problem"] is None:
        raise ValueError("which problem? Give a name or the path of a problem file; `detente problems` lists them.")
    problem = load_problem(str(asked["problem"]))
    if download_help:
        console.print(problem.download or f"{problem.name} makes its own data.", markup=False, highlight=False)
        raise typer.Exit
    return asked, problem


def _given(written: Mapping[str, Any], options: Mapping[str, Any], assignments: Sequence[str] | None) -> dict[str, Any]:
    """Settings: those of the YAML file, over them the options, over them ``--set``."""
    given = dict(written.get("settings", {}))
    given |= {key: value for key, value in options.items() if value is not None}
    for assignment in assignments or ():
        key, sign, value = assignment.partition("=")
        if not sign:
            raise ValueError(f"--set wants name=value, as in --set weight_decay=1e-4; got {assignment!r}.")
        given[key.strip()] = value.strip()
    return given


def _plan(problem: Problem, asked: Mapping[str, Any], given: Mapping[str, Any]) -> Plan:
    settings = problem.settle(given, asked["preset"])
    wanted = _listed(asked["methods"] or getattr(problem.module, "methods", DEFAULT_METHODS))
    specs = parse_methods(wanted)
    if not asked["methods"] or wanted == "all":
        specs = _applicable(problem, specs, settings)
    if problem.whole and asked["seeds"]:
        raise ValueError(f"problem {problem.name!r} runs a fixed set of starts; leave out seeds.")
    if problem.whole and any(asked[key] for key in ("tune", "tuned", "sweep", "extract", "wider")):
        raise ValueError(f"problem {problem.name!r} trains all methods at once: there is nothing to tune or control.")
    count = setting("seeds", _given_or(asked["seeds"], problem.module.settings.get("seeds", 3)), like=1)
    data = None
    if problem.download is not None:
        data = Path(asked["data"] or f"data/{problem.name}").resolve()
        problem.make_data(settings, data)  # here, so that missing or damaged files are told before anything is written
    elif asked["data"] is not None:
        raise ValueError(f"problem {problem.name!r} makes its own data; leave out --data.")
    controls: list[Control] = []
    if asked["sweep"]:
        controls += sweep(tuple(problem.tasks), setting("sweep", asked["sweep"], like=1))
    if asked["extract"]:
        labels = [spec.label for spec in specs]
        for spec in parse_methods(_listed(asked["extract"]))[1:]:
            if spec.label not in labels:
                raise ValueError(f"--extract {spec.label}: it is not among the methods: {', '.join(labels)}.")
            controls.append(extracted(spec))
    if asked["wider"]:
        controls.append(wider(problem, settings, data))
    trials = setting("tune", _given_or(asked["tune"], 0), like=1)
    return Plan(problem, specs, range(count), settings, data, controls, trials)


def _applicable(problem: Problem, specs: Sequence[Spec], settings: Mapping[str, Any]) -> list[Spec]:
    """The methods without those, asked for by nobody, that need what the model lacks."""
    if not problem.supervised or not any("model" in method_class(spec.method).needs for spec in specs):
        return list(specs)
    tasks = tuple(problem.tasks)
    model = convert_task_norm(problem.make_model(tasks, settings), tasks)
    kept = []
    for spec in specs:
        if "model" in method_class(spec.method).needs:
            try:
                spec.build(model, settings["epochs"], 0)
            except ValueError as error:
                reason = str(error).partition(". ")[0]
                console.print(f"{spec.label} is left out: {reason}.", highlight=False, markup=False, soft_wrap=True)
                continue
        kept.append(spec)
    return kept


def _reported(failures: Mapping[str, str]) -> None:
    """Every error once, with the runs that ended by it."""
    runs: dict[str, list[str]] = {}
    for name, message in failures.items():
        runs.setdefault(message, []).append(name)
    for message, names in runs.items():
        which = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        console.print(f"[red]failed[/red] {escape(which)}: {escape(message)}", highlight=False, soft_wrap=True)
    runs_failed = "1 run" if len(failures) == 1 else f"{len(failures)} runs"
    console.print(f"{runs_failed} failed, see above. The same command runs them again; the others are kept.")


def _given_or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _listed(methods: Any) -> str:
    return ",".join(map(str, methods)) if isinstance(methods, list) else str(methods)


Engine = local.Local | ray.Ray | torchrun.Torchrun


def _engine(
    problem: Problem,
    settings: dict[str, Any],
    jobs: Any,
    engine: str,
    address: str | None,
    launch: str | None,
    nproc_per_node: int | None,
) -> Engine:
    """What runs jobs."""
    processes = setting("jobs", _given_or(jobs, 2), like=1)
    divided = _divided(problem, settings, launch, nproc_per_node, jobs)
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray; got {engine!r}.")
    if address is not None and engine != "ray":
        raise ValueError("--address goes with --engine ray; add it, or leave out --address.")
    if divided and engine == "ray":
        raise ValueError("--launch torchrun and --engine ray do not go together; leave out one of them.")
    if divided:
        return torchrun.Torchrun(divided)
    if engine == "ray":
        return ray.Ray(processes, address)
    return local.Local(processes)


def _divided(
    problem: Problem, settings: dict[str, Any], launch: str | None, processes: int | None, jobs: int | None
) -> int | None:
    """Processes that take every run together; None where a run has one."""
    if launch is None:
        if processes is not None:
            raise ValueError("--nproc-per-node goes with --launch torchrun; add it, or leave both out.")
        return None
    torchrun.check_launcher(launch)
    if processes is None:
        raise ValueError("--launch torchrun: on how many processes? Add --nproc-per-node 2, or more.")
    if jobs not in (None, 1):
        raise ValueError(f"with --launch one run follows the other: leave out jobs, which is {jobs}.")
    if not problem.supervised:
        raise ValueError(f"problem {problem.name!r} has no batches that could be divided; leave out --launch.")
    if processes > settings["batch_size"]:
        raise ValueError(
            f"--nproc-per-node is {processes}, but a batch has {settings['batch_size']} samples, and every process "
            "needs one. Lower it, or raise --batch-size."
        )
    return processes


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on where this one stopped.")
        sys.stdout.flush()
        os._exit(130)  # without waiting for the workers, which end when they see their parent gone


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """The directory of a comparison, for this process alone."""
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
        yield


def _compare(plan: Plan, root: Path, run: Engine, tuned: str | None) -> dict[str, str]:
    problem = plan.problem
    command = "detente " + shlex.join(sys.argv[1:])
    if hasattr(problem.module, "check"):
        problem.module.check(plan.specs)
    tuning = None if tuned is None else _read_tuning(Path(tuned), plan)
    with _locked(root):
        prepare(root, plan, command, tuning)
        if problem.whole:
            with _live(problem.name, 1) as monitor:
                problem.whole(plan.specs, plan.settings, root, monitor)
            return {}
        if plan.trials:
            tuning = _tuned(plan, root, run)
        if tuning is not None:
            plan = replace(plan, chosen=chosen_of(tuning))
            prepare(root, plan, command, tuning)
        waves = plan.jobs()
        errors: dict[str, str] = {}
        with _live(problem.name, sum(map(len, waves))) as monitor:
            for wave in waves:
                errors |= run(wave, root, monitor)
        return errors


def _tuned(plan: Plan, root: Path, run: Engine) -> dict[str, Any]:
    total = plan.trials * len(list(plan.subjects()))
    with _live(f"{plan.problem.name}: tuning", total) as monitor:
        return tune(plan, root, lambda todo: run(list(todo), root, monitor))


def _read_tuning(path: Path, plan: Plan) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        names = set(content["runs"])
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}. `detente tune` writes it.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what `detente tune` writes ({error!r}).") from error
    missing = [job.name for job in plan.subjects() if job.name not in names]
    if missing:
        raise ValueError(
            f"{path} has no trials of {', '.join(missing)}; tune them too, so that all had the same budget."
        )
    return content


@contextmanager
def _live(title: str, total: int) -> Iterator[_Monitor]:
    monitor = _Monitor(title, total)
    with Live(monitor, console=console, refresh_per_second=4, transient=True):
        yield monitor


def _show(root: Path, hooks: Any, other: Comparison | None = None) -> None:
    """Print the tables and write every form of them, and the report; ``hooks`` is the problem's module, or None."""
    comparison = load_comparison(root)
    if other is not None and other.tasks != comparison.tasks:
        raise ValueError(
            f"{other.directory} has other tasks or metrics than {root}, so they cannot be laid side by side."
        )
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
    report = write_report(comparison, root, headline, other)
    shown = [*tables.result_tables(comparison, console.width), tables.cost_table(comparison)]
    if comparison.config.get("tuning"):
        shown.append(tables.tuning_table(comparison.config["tuning"]))
    for table in [*shown, *(hooks.summary(results) if hasattr(hooks, "summary") else [])]:
        console.print(table)
    protocol = f"Protocol {comparison.protocol}: {PROTOCOLS[comparison.protocol]}."
    for line in [headline, protocol, *(f"Note: {note}" for note in comparison.notes)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"Tables: {root}/results.csv, .md, .tex; {root}/cost.csv, .md, .tex", soft_wrap=True, markup=False)
    console.print(f"Report: {report.resolve()}", soft_wrap=True, markup=False)


def _hooks(config: Mapping[str, Any]) -> Any:
    """The problem's module; None where a user's file has gone since, for the results can be shown without it."""
    try:
        return load_problem(config.get("source", config["problem"])).module
    except (ValueError, FileNotFoundError):
        return None


@app.command("diagnose")
def diagnose_command(
    source: Annotated[str, typer.Argument(help="A problem, as for compare; or a file that detente.Recorder wrote.")],
    method: Annotated[str, typer.Option(help="What to train with while looking on.")] = "gd",
    every: Annotated[int, typer.Option(min=1, help="Steps from one look at the gradients to the next.")] = 10,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    set_: Set = None,
    preset: Preset = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the page. Default: runs/PROBLEM-diagnosis.")] = None,
    device: Device = "cpu",
) -> None:
    """Say in plain words whether the tasks conflict, where, since when, and what may help at what price.

    A problem is trained once, on the sum of its losses, while a recorder looks on. Stop it with Ctrl-C: what was seen
    until then is told.
    """
    if source.endswith(".jsonl"):
        _show_recording(Path(source))
        return
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    asked, loaded = _asked({"problem": source, "methods": method, "data": data, "preset": preset}, {}, False)
    plan = _plan(loaded, asked, _given({}, options, set_))
    if loaded.whole or len(loaded.tasks) < 2:
        raise ValueError(f"problem {loaded.name!r} has no several losses on batches whose gradients could be compared.")
    root = out or Path(f"runs/{loaded.name}-diagnosis")
    with _locked(root), _live(f"{loaded.name}: diagnosis", 1) as monitor:
        early = record(
            loaded, plan.specs[-1], plan.settings, root / "recording.jsonl", monitor,
            every=every, data=plan.data, seed=seed, device=check_device(device),
        )  # fmt: skip
    if early is not None:
        console.print(f"{early.rstrip('.')}. This is what was seen until then.", highlight=False, markup=False)
    _show_recording(root / "recording.jsonl", source, root / "diagnosis.html", loaded.name)


def _show_recording(path: Path, problem: str | None = None, page: Path | None = None, title: str | None = None) -> None:
    """Print what a recording means, and write its page: beside the file, if not told otherwise."""
    recording = Recording.load(path)
    found = diagnose(recording, problem)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    written = write_diagnosis(recording, found, page or path.with_suffix(".html"), title or path.stem)
    console.print(f"\nPage: {written.resolve()}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a comparison, or a file of detente.Recorder.")],
    other: Annotated[Path | None, typer.Argument(help="Another one, of the same tasks, to lay beside it.")] = None,
) -> None:
    """Build the tables and the HTML report again from the finished runs of a comparison; or compare two comparisons."""
    if directory.suffix == ".jsonl":
        if other is not None:
            raise ValueError("recordings are shown one at a time; leave out the second.")
        _show_recording(directory)
        return
    beside = None if other is None else load_comparison(other)
    _show(directory, _hooks(read_config(directory / "comparison.json")), beside)


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
    for heading in ("problem", "what it is", "data", "presets"):
        table.add_column(heading, no_wrap=heading == "problem", overflow="fold")
    for name, line in list_problems().items():
        problem = load_problem(name)
        table.add_row(name, line, "official files" if problem.download else "made", ", ".join(problem.presets))
    console.print(table)
    console.print("detente compare NAME --download-help says where the official files come from.", highlight=False)


def main() -> None:
    """Entry point: known errors are one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
