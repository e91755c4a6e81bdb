"""The same tuning for everyone: single-task baselines, equal weights and every method get equally many trials.

A trial is a training with one seed that the comparison does not use, judged by its best validation score; the test
split is not looked at. Trial 0 has the defaults, so that tuning can only help. The others come from Optuna: five drawn
at random from the declared ranges, then from the tree-structured Parzen estimator. Studies are kept in an SQLite file.
Trial k of all studies run together and each study sees its own trials only, so that neither an interruption nor the
number of workers changes what is tried.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detente.benchmark.files import write_json
from detente.benchmark.job import Job
from detente.benchmark.plan import Chosen, Plan
from detente.benchmark.specs import Spec
from detente.method import Choice, Range, Ranges, method_class

__all__ = ["chosen_of", "spaces", "tune"]

SEED = 1_000_003
"""Seed of every trial."""
AT_RANDOM = 5
OPTION = "option "
"""Prefix of a method's own hyper-parameters, in contrast to settings."""

Run = Callable[[Sequence[Job]], dict[str, str]]
"""Trains jobs; gives the errors of those that failed."""


@dataclass(frozen=True)
class Trial:
    """What was tried, and the best validation score; None where the training failed or diverged."""

    parameters: Mapping[str, Any]
    score: float | None


def spaces(plan: Plan) -> dict[str, Ranges]:
    """For each run name what is tuned: settings of the problem, and options of the method that were not written out."""
    found: dict[str, Ranges] = {}
    for job in plan.subjects():
        space: dict[str, Range | Choice] = dict(plan.problem.space(plan.settings))
        if job.task is None:
            spec = Spec.parse(job.method)
            own = method_class(spec.method).ranges
            space |= {OPTION + key: where for key, where in own.items() if key not in spec.options}
        found[job.name] = space
    return found


def tune(plan: Plan, root: Path, run: Run) -> dict[str, Any]:
    """Run all trials that are left, and write ``tuning.json``.

    Returns:
        Its content: budget, ranges, and of every run name all trials, and the method and settings chosen.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: every trial of a run name failed.
    """
    studies = _Studies(root / "trials")
    space = spaces(plan)
    jobs = {job.name: replace(job, seed=SEED) for job in plan.subjects()}
    tried: dict[str, list[Trial]] = {name: [] for name in jobs}
    for k in range(plan.trials):
        asked = {name: {} if k == 0 else studies.ask(name, k, space[name]) for name in jobs}
        round_ = {name: _trial(jobs[name], parameters, k) for name, parameters in asked.items()}
        errors = run(list(round_.values()))
        for name, job in round_.items():
            score = None if job.title in errors else _score(job, root)
            tried[name].append(Trial(asked[name], score))
            if k:
                studies.tell(name, k, score)
    content = {
        "trials": plan.trials,
        "seed": SEED,
        "sampler": f"defaults, {AT_RANDOM} at random with settings alike for all, then TPE (Optuna {studies.version})",
        "ranges": {name: {key: str(where) for key, where in ranges.items()} for name, ranges in space.items()},
        "runs": {name: _outcome(name, jobs[name], trials) for name, trials in tried.items()},
    }
    write_json(root / "tuning.json", content)
    return content


def chosen_of(content: Mapping[str, Any]) -> dict[str, Chosen]:
    """What ``tuning.json`` says was best for each run name."""
    return {name: Chosen(run["method"], run["settings"]) for name, run in content["runs"].items()}


def _trial(job: Job, parameters: Mapping[str, Any], k: int) -> Job:
    settings = {key: value for key, value in parameters.items() if not key.startswith(OPTION)}
    options = {key.removeprefix(OPTION): value for key, value in parameters.items() if key.startswith(OPTION)}
    method = Spec.parse(job.method).having(options).label if options else job.method
    return replace(job, method=method, settings={**job.settings, **settings}, trial=k)


def _outcome(name: str, job: Job, trials: Sequence[Trial]) -> dict[str, Any]:
    usable = [k for k, trial in enumerate(trials) if trial.score is not None]
    if not usable:
        raise ValueError(f"{name}: all {len(trials)} trials failed or diverged, so there is nothing to choose from.")
    best = max(usable, key=lambda k: (trials[k].score, -k))
    chosen = _trial(job, trials[best].parameters, best)
    changed = {key: value for key, value in chosen.settings.items() if job.settings.get(key) != value}
    return {
        "method": chosen.method,
        "settings": changed,
        "trial": best,
        "trials": [{"parameters": dict(trial.parameters), "score": trial.score} for trial in trials],
    }


def _score(job: Job, root: Path) -> float | None:
    score = json.loads((job.directory(root) / "result.json").read_text())["score"]
    return None if score is None or not math.isfinite(score) else float(score)


def _rounded(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """To four digits, which read better and are as good."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in parameters.items()}


class _Studies:
    """One Optuna study per run name, in one SQLite file."""

    def __init__(self, directory: Path) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(
                "tuning needs Optuna, which is not installed. Run: pip install 'detente[tune]'"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.version = optuna.__version__
        directory.mkdir(parents=True, exist_ok=True)
        self.storage = optuna.storages.RDBStorage(f"sqlite:///{(directory / 'studies.db').resolve()}")

    def ask(self, name: str, k: int, space: Ranges) -> dict[str, Any]:
        """The parameters of trial k: those it was given before an interruption, else new ones."""
        for trial in self._study(name, 0).get_trials(deepcopy=False):
            if trial.user_attrs.get("number") == k:
                return _rounded(trial.params)
        study = self._study(name, k)
        given = study.ask({key: self._distribution(where) for key, where in space.items()})
        given.set_user_attr("number", k)  # last: a trial that was cut off before this is asked for again
        return _rounded(given.params)

    def tell(self, name: str, k: int, score: float | None) -> None:
        state = self.optuna.trial.TrialState
        study = self._study(name, k)
        for trial in study.get_trials(deepcopy=False):
            if trial.user_attrs.get("number") == k and trial.state == state.RUNNING:
                study.tell(trial.number, score, state=state.FAIL if score is None else state.COMPLETE)

    def _study(self, name: str, k: int) -> Any:
        # in the random rounds the settings, which come first, are drawn alike for everyone, so that luck is shared
        drawn = f"{k}" if k <= AT_RANDOM else f"{name} {k}"
        seed = int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:4], "little")
        sampler = self.optuna.samplers.TPESampler(seed=seed, n_startup_trials=AT_RANDOM)
        return self.optuna.create_study(
            storage=self.storage, sampler=sampler, study_name=name, direction="maximize", load_if_exists=True
        )

    def _distribution(self, where: Range | Choice) -> Any:
        distributions = self.optuna.distributions
        if isinstance(where, Choice):
            return distributions.CategoricalDistribution(where.values)
        if where.whole:
            return distributions.IntDistribution(int(where.low), int(where.high), log=where.log)
        return distributions.FloatDistribution(where.low, where.high, log=where.log)
