"""The same budget for everyone: what is tried, what is chosen, and that interruptions change neither."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmark.command import run, started, until
from detente.benchmark.plan import Plan
from detente.benchmark.problem import load_problem
from detente.benchmark.specs import Spec, parse_methods
from detente.benchmark.tune import AT_RANDOM, SEED, spaces
from detente.method import Choice, Range, list_methods, method_class, registry

TINY = Path(__file__).with_name("tiny_problem.py")
QUICK = ("--epochs", "2", "--set", "probe_every=100")
METHODS = ("--methods", "cagrad")
NAMES = ["single-sum", "single-sign", "gd", "cagrad"]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    outcome = run("compare", TINY, *METHODS, "--seeds", "2", "--tune", "7", *QUICK, "--out", out)
    assert outcome.code == 0, outcome.text
    return out


def tuning(out: Path) -> dict[str, Any]:
    return json.loads((out / "tuning.json").read_text())


def result(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / name / "result.json").read_text())


def test_every_method_and_baseline_has_the_same_budget_and_it_is_kept_with_the_result(original):
    content = tuning(original)
    assert content["trials"] == 7
    assert {name: len(found["trials"]) for name, found in content["runs"].items()} == dict.fromkeys(NAMES, 7)
    config = json.loads((original / "comparison.json").read_text())
    assert config["trials"] == 7
    assert config["tuning"] == content


def test_trials_at_random_have_the_same_settings_for_everyone(original):
    """So that no method is better for a learning rate that the others never tried."""
    runs = tuning(original)["runs"].values()
    tried = [[(t["parameters"]["lr"], t["parameters"]["weight_decay"]) for t in run["trials"][1:]] for run in runs]
    shared, last = [run[:AT_RANDOM] for run in tried], [run[AT_RANDOM:] for run in tried]
    assert all(draws == shared[0] for draws in shared)
    assert len(set(shared[0])) == AT_RANDOM
    assert len({tuple(draws) for draws in last}) == len(last)  # each goes on from what it found


def test_the_first_trial_has_the_defaults_and_the_best_validation_score_is_chosen(original):
    for found in tuning(original)["runs"].values():
        trials = found["trials"]
        assert trials[0]["parameters"] == {}
        scores = [trial["score"] for trial in trials]
        assert scores[found["trial"]] == max(scores)


def test_what_is_chosen_is_what_is_compared(original):
    for name, found in tuning(original)["runs"].items():
        for seed in (0, 1):
            compared = result(original, f"runs/{name}/seed-{seed}")
            assert compared["options"] == Spec.parse(found["method"]).label
            assert found["settings"].items() <= compared["settings"].items()


def test_a_trial_never_looks_at_the_test_split_and_uses_no_seed_of_the_comparison(original):
    trials = list(original.glob("trials/*/trial-*/result.json"))
    assert len(trials) == 7 * len(NAMES)
    for path in trials:
        trial = json.loads(path.read_text())
        assert trial["seed"] == SEED
        assert trial["metrics"] == {}
        assert all("test" not in row for row in trial["history"])
        assert trial["score"] is not None


def test_tuned_are_settings_and_the_options_that_were_not_written_out():
    plan = Plan(load_problem("digits"), parse_methods("cagrad,cagrad(c=0.4)"), [0], load_problem("digits").settle({}))
    found = spaces(plan)
    assert set(found["single-left"]) == set(found["gd"]) == {"lr", "weight_decay", "dropout"}
    assert set(found["cagrad"]) == {"lr", "weight_decay", "dropout", "option c"}
    assert set(found["cagrad(c=0.4)"]) == {"lr", "weight_decay", "dropout"}
    assert found["gd"]["lr"] == Range(5e-4, 5e-2, log=True)


def test_a_problem_may_say_where_to_look(tmp_path):
    problem = tmp_path / "own.py"
    more = "\nfrom detente.method import Range\nranges = {'lr': Range(0.5, 2.0)}\n"
    problem.write_text(TINY.read_text() + more)
    own = load_problem(str(problem))
    assert own.space(own.settle({}))["lr"] == Range(0.5, 2.0)


@pytest.mark.parametrize("name", list_methods())
def test_declared_ranges_are_options_that_the_method_takes(name):
    cls = registry()[name]
    ends: dict[str, list[Any]] = {
        key: list(where.values) if isinstance(where, Choice) else [where.low, where.high]
        for key, where in cls.ranges.items()
    }
    whole = {key for key, where in cls.ranges.items() if isinstance(where, Range) and where.whole}
    for key, values in ends.items():
        for value in values:
            spec = Spec.parse(name).having({key: int(value) if key in whole else value})
            assert spec.method == name
            if "model" not in method_class(name).needs:
                spec.build()


def test_the_same_command_tries_the_same_again(original, tmp_path):
    again = tmp_path / "again"
    outcome = run("tune", TINY, *METHODS, "--trials", "7", *QUICK, "--jobs", "1", "--out", again)
    assert outcome.code == 0, outcome.text
    assert tuning(again) == tuning(original)
    assert all(name in outcome.out for name in NAMES)
    assert not list(again.glob("runs"))


def test_after_an_interruption_nothing_else_is_tried(original, tmp_path):
    """Results of some trials are gone, as after a kill; one trial was asked for and not yet told."""
    out = shutil.copytree(original, tmp_path / "out")
    shutil.rmtree(out / "runs")
    (out / "tuning.json").unlink()
    for path in {*out.glob("trials/cagrad/trial-[3456]"), *out.glob("trials/*/trial-6")}:
        shutil.rmtree(path)
    outcome = run("compare", TINY, *METHODS, "--seeds", "2", "--tune", "7", *QUICK, "--out", out)
    assert outcome.code == 0, outcome.text
    assert tuning(out) == tuning(original)
    assert (out / "results.csv").read_bytes() == (original / "results.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_killed_while_tuning_it_ends_with_the_same_choice(original, tmp_path):
    out = tmp_path / "out"
    options = (*METHODS, "--seeds", "2", "--tune", "7", *QUICK)
    for trials in (3, 16):
        with started(TINY, out, *options) as process:
            until(lambda: len(list(out.glob("trials/*/*/result.json"))) >= trials, "trials end", process)  # noqa: B023
            process.kill()
            process.wait()
    outcome = run("compare", TINY, *options, "--out", out)
    assert outcome.code == 0, outcome.text
    assert tuning(out) == tuning(original)
    assert (out / "results.csv").read_bytes() == (original / "results.csv").read_bytes()


def test_what_was_tuned_elsewhere_can_be_compared(original, tmp_path):
    out = tmp_path / "out"
    tuned = ("--tuned", original / "tuning.json")
    outcome = run("compare", TINY, *METHODS, "--seeds", "2", *tuned, *QUICK, "--out", out)
    assert outcome.code == 0, outcome.text
    assert (out / "results.csv").read_bytes() == (original / "results.csv").read_bytes()


def test_tuned_and_untuned_runs_are_never_mixed(original, tmp_path):
    out = shutil.copytree(original, tmp_path / "out")
    for tuned in ((), ("--tune", "3")):
        outcome = run("compare", TINY, *METHODS, "--seeds", "2", *tuned, *QUICK, "--out", out)
        assert outcome.code == 2
        assert "holds another comparison: trials was 7" in outcome.text
    other = json.loads((original / "tuning.json").read_text())
    other["runs"]["cagrad"]["settings"]["lr"] = 0.5
    (tmp_path / "other.json").write_text(json.dumps(other))
    outcome = run("compare", TINY, *METHODS, "--tuned", tmp_path / "other.json", *QUICK, "--out", out)
    assert outcome.code == 2
    assert "cagrad was tuned otherwise" in outcome.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "mgda", "--tuned", "{original}/tuning.json"), "has no trials of mgda"),
        (("--tuned", "{original}/comparison.json"), "is not what `detente tune` writes"),
        (("--tuned", "nowhere.json"), "cannot read nowhere.json"),
        (("--tune", "0"), "--tune"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(original, tmp_path, options, message):
    given = [text.format(original=original) for text in options]
    outcome = run("compare", TINY, *given, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in " ".join(outcome.text.split())
    assert not (tmp_path / "out").exists()


def test_problems_that_train_all_at_once_have_nothing_to_tune(tmp_path):
    outcome = run("tune", "toy", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "nothing to tune" in outcome.text


def test_trials_that_fail_are_told_and_not_chosen(tmp_path):
    """The learning rates of this range overflow but for the default."""
    problem = tmp_path / "steep.py"
    more = "\nfrom detente.method import Range\nranges = {'lr': Range(1e18, 1e19)}\n"
    more += "def make_optimizer(model, settings):\n    return torch.optim.SGD(model.parameters(), lr=settings['lr'])\n"
    problem.write_text(TINY.read_text() + more)
    out = tmp_path / "out"
    outcome = run("tune", problem, "--methods", "gd", "--trials", "3", *QUICK, "--lr", "0.001", "--out", out)
    assert outcome.code == 0, outcome.text
    for found in tuning(out)["runs"].values():
        assert found["trial"] == 0
        assert [trial["score"] is None for trial in found["trials"]] == [False, True, True]
