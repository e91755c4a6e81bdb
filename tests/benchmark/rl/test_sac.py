"""Soft actor-critic on real Meta-World tasks: its losses, any method, and runs that are killed."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import detente
from benchmark.command import results, run, started, until
from detente.benchmark import training
from detente.benchmark.job import Event, Job
from detente.benchmark.log import Log
from detente.benchmark.problem import load_problem
from detente.benchmark.rl.sac import SoftActorCritic

pytest.importorskip("metaworld", reason='needs pip install "detente[metaworld]"')

TINY = Path(__file__).with_name("tiny_sac.py")


def job(method: str = "cagrad", task: str | None = None, **given: Any) -> Job:
    settings = load_problem(str(TINY)).settle(given)
    return Job(str(TINY), method if task is None else "single", method, task, 0, settings)


def agent(method: str = "cagrad", **given: Any) -> SoftActorCritic:
    """An agent with 40 transitions of every task in its buffer."""
    made = SoftActorCritic(job(method, **given))
    random = np.random.default_rng(0)
    for _ in range(40):
        seen, following, actions = (random.normal(size=(2, size)) for size in (39, 39, 4))
        made.buffer.add(seen, np.tanh(actions), random.normal(size=2), following)
    return made


def parameters(made: SoftActorCritic) -> list[Tensor]:
    return [p.detach().clone() for p in (*made.actor.parameters(), *made.critics.parameters(), made.temperatures)]


def update(made: SoftActorCritic) -> Log:
    log = Log(made.tasks, made.division)
    torch.manual_seed(5)
    made._update(log, probing=True)
    return log


def test_densities_are_those_of_a_squashed_gaussian():
    made = agent()
    observations, noise = torch.randn(16, 39), torch.randn(16, 4)
    actions, densities = made._act(observations, noise)
    mean, spread = made._policy(observations)
    known = TransformedDistribution(Normal(mean, spread.exp()), TanhTransform(cache_size=1))
    torch.testing.assert_close(actions, known.transforms[0](mean + spread.exp() * noise))
    torch.testing.assert_close(densities, known.log_prob(actions).sum(1), rtol=1e-4, atol=1e-4)  # float32, a logarithm


def test_an_update_with_equal_weights_is_that_of_the_textbook():
    """Written out for each task, with plain autograd and plain Adam."""
    made, plain = agent("gd(reduction='sum')"), agent("gd(reduction='sum')")
    update(made)
    torch.manual_seed(5)
    seen, done, rewards, following = plain.buffer.sample(8)
    noise = torch.randn(2, 16, 4)
    alpha = plain.temperatures.detach().exp().repeat_interleave(8)
    with torch.no_grad():
        ahead, density = plain._act(following, noise[0])
        q = torch.stack([t(torch.cat([following, ahead], 1))[:, 0] for t in plain.targets]).min(0).values
        goal = rewards + 0.99 * (q - alpha * density)
    loss = sum(((c(torch.cat([seen, done], 1))[:, 0] - goal) ** 2).view(2, 8).mean(1).sum() for c in plain.critics)
    plain.optimizers[1].zero_grad()
    loss.backward()
    plain.optimizers[1].step()
    chosen, density = plain._act(seen, noise[1])
    q = torch.stack([c(torch.cat([seen, chosen], 1))[:, 0] for c in plain.critics]).min(0).values
    plain.optimizers[0].zero_grad()
    (alpha * density - q).view(2, 8).mean(1).sum().backward()
    plain.optimizers[0].step()
    plain.warmth.zero_grad()
    (-plain.temperatures.exp() * (density.detach() - 4).view(2, 8).mean(1)).sum().backward()
    plain.warmth.step()
    for mine, theirs in zip(parameters(made), parameters(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)  # Adam's first step divides by the gradient


@pytest.mark.parametrize("gamma", [0.0, 0.95])
def test_the_actors_losses_are_positive(gamma, monkeypatch):
    """Some methods take logarithms of losses; a value is at most the discounted sum of the greatest reward, 10."""
    made = agent(gamma=gamma)
    with torch.no_grad():
        for p in made.critics.parameters():
            p.zero_()
        for critic in made.critics:
            for head in critic.outputs:
                head.bias.fill_(10 / (1 - gamma))
    values: list[float] = []
    original = made._step

    def noted(which: int, losses: Any, *rest: Any) -> None:
        values.extend(float(loss.detach()) for loss in losses(made.tasks).values() if which == 0)
        original(which, losses, *rest)

    monkeypatch.setattr(made, "_step", noted)
    update(made)
    assert len(values) == 2
    assert min(values) > 0


def test_a_discount_of_one_is_refused():
    with pytest.raises(ValueError, match="gamma must be below 1"):
        SoftActorCritic(job(gamma=1.0))


def test_targets_follow_slowly():
    made = agent()
    before, critics = copy.deepcopy(made.targets), made.critics
    update(made)
    for old, new, fast in zip(before.parameters(), made.targets.parameters(), critics.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.005 * (fast.detach() - old))


@pytest.mark.parametrize("heads", [True, False], ids=["heads", "one-hot"])
def test_the_gradients_of_all_tasks_come_from_one_pass(heads, monkeypatch):
    made, plain = agent(heads=heads), agent(heads=heads)
    plain.sources = ["parameters", "parameters"]
    engines: list[Any] = []
    original = detente.step

    def noted(*arguments: Any, **options: Any) -> detente.Update:
        taken = original(*arguments, **options)
        engines.append((taken.stats["engine"], taken.stats["backwards"]))
        return taken

    monkeypatch.setattr(detente, "step", noted)
    for _ in range(2):
        update(made)
    assert engines[2:] == [("disjoint", 1), ("disjoint", 1)]
    for _ in range(2):
        update(plain)
    assert engines[6:] == [("serial", 2), ("serial", 2)]
    for mine, theirs in zip(parameters(made), parameters(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)  # as above, twice


@pytest.mark.parametrize("method", ["pcgrad", "wpcgrad", "cdtt", "famo", "uw", "gradnorm", "imtl", "nash_mtl", "moco"])
def test_any_method_trains_actor_and_critics(method):
    made = agent(method)
    before = parameters(made)
    log = update(made)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(made), strict=True))
    assert all(p.isfinite().all() for p in parameters(made))
    assert len(log.gramians) == 2
    assert made.for_actor is not made.for_critics
    assert all(p.requires_grad for p in made.critics.parameters())


def test_sampled_tasks_are_cagrad_fast():
    made = agent(sampled=1)
    assert all(isinstance(source, detente.Sampled) for source in made.sources)
    before = made.sources[0].state_dict()["generator"]
    assert not math.isnan(update(made).row(1)["loss"]["reach"])
    assert "source 0" in made.saved
    assert before.shape == made.sources[0].state_dict()["generator"].shape


def test_methods_that_need_norms_or_a_second_batch_are_refused(tmp_path):
    for method, why in (("connection_strength", "norms of its own"), ("auto_lambda", "second batch")):
        outcome = run("compare", TINY, "--methods", method, "--out", tmp_path / method)
        assert outcome.code == 2
        assert why in " ".join(outcome.text.split())
        assert not (tmp_path / method).exists()


def test_only_float32_is_trained():
    with pytest.raises(ValueError, match="trains in float32 alone"):
        load_problem(str(TINY)).settle({"precision": "bfloat16"})


def test_weights_are_the_mean_of_actor_and_critics(monkeypatch):
    made = agent("gd(weights={'drawer-close': 0.5, 'reach': 1.5})")
    row = update(made).row(1)
    assert row["weights"] == pytest.approx({"drawer-close": 0.5, "reach": 1.5})
    assert row["steps"] == 1


def test_several_processes_are_refused(tmp_path):
    outcome = run("compare", TINY, "--launch", "torchrun", "--nproc-per-node", "2", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "no batches that could be divided" in " ".join(outcome.text.split())


class _Interrupted(BaseException):
    pass


@pytest.mark.parametrize("given", [{}, {"sampled": 1}, {"capacity": 50}], ids=str)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_curve_bit_for_bit(tmp_path, monkeypatch, given):
    clock = SimpleNamespace(monotonic=itertools.count(0, 10).__next__, process_time=time.process_time)
    monkeypatch.setattr(training, "time", clock)  # a clock that jumps: every epoch is saved
    work = job(**given)
    training.train(work, tmp_path / "whole", lambda _: None)

    def stop(event: Event) -> None:
        if event.fraction > 0.7:
            raise _Interrupted

    with contextlib.suppress(_Interrupted):
        training.train(work, tmp_path / "parts", stop)
    assert not results(tmp_path / "parts")
    torch.manual_seed(99)
    training.train(work, tmp_path / "parts", lambda _: None)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    [result] = results(tmp_path / "whole").values()
    assert [row["steps"] for row in result["history"]] == [60, 60, 60]
    assert set(result["history"][0]["val"]) == {"drawer-close", "reach"}
    assert result["history"][0]["conflict_rate"] is not None


@pytest.mark.slow
def test_the_command_killed_and_repeated_ends_with_the_same_files(tmp_path):
    options = ("--jobs", "1", "--set", "epochs=5")
    whole = run("compare", TINY, *options, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.text
    assert "interquartile mean" in whole.out
    out = tmp_path / "parts"
    with started(TINY, out, *options) as process:
        until(lambda: list(out.glob("runs/*/*/checkpoint.pt")), "a checkpoint is there", process)
        os.killpg(process.pid, signal.SIGKILL)
    again = run("compare", TINY, *options, "--out", out)
    assert again.code == 0, again.text
    assert results(out) == results(tmp_path / "whole")
    for name in ("results.csv", "results.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((out / "figures").glob("Success*.svg"))) == 1
    assert json.loads((out / "comparison.json").read_text())["selection"] == "mean"
