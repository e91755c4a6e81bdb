"""What has to hold on several processes; see checks.py, which torchrun starts once for all tests of this file."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from distributed.matrix import launch

pytestmark = pytest.mark.slow


@functools.cache
def results(size: int, *names: str) -> dict[str, Any]:
    done = launch(size, Path(__file__).with_name("checks.py"), *names, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("CHECKS ")]
    assert done.returncode == 0, done.stderr[-4000:]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("CHECKS "))


def result(name: str) -> Any:
    found = results(2)[name]
    assert not (isinstance(found, dict) and "failure" in found), found["failure"]
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_moves_little_and_keeps_little(size):
    for row in result("traffic") if size == 2 else results(4, "traffic")["traffic"]:
        count = row["tasks"]
        assert row["ratio"] <= (count + 1) / (2 * count) + 0.02, row
        # one hundredth for what does not grow with the parameters: the Gramian's scratch, the losses' graphs
        assert row["copies"] <= count / size + 1 + 0.01, row


@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16"])
def test_an_overflow_on_one_process_skips_the_step_on_all(dtype):
    found = result("overflow")[dtype]
    assert found["scales"] == [256.0, 128.0, 128.0]
    assert found["moved"] == [False, True]
    assert found["history"] == [False, True]
    assert found["alike"]


def test_different_tasks_need_to_know_the_parameters():
    found = result("different_tasks")
    for error in found["errors"]:
        assert error.startswith("RuntimeError")
        assert 'process 0: ["a", "b"]; process 1: ["b"]' in error
        assert "parameters=model.parameters()" in error
    assert not any(found["written"])
    assert max(found["off"]) < 1e-14  # of gradients of about 1, in float64


def test_a_process_without_any_task():
    assert max(result("no_task_at_all")) < 1e-14


def test_a_failure_on_one_process_ends_the_step_on_all():
    here, there = result("one_process_fails")
    assert "losses['a'] has no autograd graph" in here
    assert "process 0 of 2 could not take part" in there


def test_a_loss_that_is_not_finite_on_one_process_raises_on_all():
    assert all("losses['b'] is nan" in error for error in result("not_finite"))


def test_a_mean_over_no_samples_does_not_count():
    assert all(result("samples_without_a_label"))


def test_bad_counts():
    absent, negative, tensor, mixed = result("bad_counts")
    assert "says nothing about the task 'b'" in absent
    assert "it is -1" in negative
    assert "plain number" in tensor
    assert "on all of them, or on none" in mixed


def test_debug_mode_finds_what_differs():
    found = result("different_seeds")
    assert found["equal"] == "nothing"
    assert "the history of the method is not the same on process 0 and on process 1" in found["seeds"]
    assert "the value of the shared parameters is not the same" in found["weights"]


def test_what_is_refused():
    found = result("refused")
    for engine in ("FSDP1", "DeepSpeed", "Megatron"):
        assert engine in found[engine]
        assert "Use DistributedDataParallel" in found[engine]
    for engine in ("lean", "batched"):
        assert "Use engine='auto'" in found[engine]
    assert "sparse=False" in found["sparse"]
    assert "outside of fully_shard" in found["half FSDP2"]
    assert "Use source='parameters'" in found["FSDP2, features"]
    assert "rewrites the task gradients as a whole" in found["FSDP2, rows"]
    assert "auto_lambda takes gradients between the optimizer's steps" in found["FSDP2, gradients"]


def test_an_ordinary_backward_pass_afterwards_is_still_reduced():
    for differences in result("ordinary_backward_afterwards").values():
        assert max(differences) == 0


def test_micro_batches_on_several_processes():
    for off in result("accumulation").values():
        assert max(off) < 1e-14  # of parameters of about 1, in float64


def test_shared_parameters_may_be_named_under_fsdp():
    found = result("shared_by_name_under_fsdp")
    assert max(found["before"]) < 1e-14  # of gradients of about 1, in float64
    assert max(found["resharded"]) < 1e-14
    assert "cannot tell where its gradient enters" in found["Every"]


@pytest.mark.parametrize("kind", ["bare", "ddp", "fsdp2"])
def test_a_recorder_notes_the_whole_batch(kind):
    found = result("recorded")[kind]
    assert found["noted"]
    for noted, expected in zip(found["noted"], found["expected"], strict=True):
        known = 3 if kind == "fsdp2" else 5  # of parameters that PyTorch spreads, no changes are noted
        assert noted[:known] == pytest.approx(expected[:known], rel=5e-6)  # six digits are written
    # the first process sees the file grow; all of them look at the same steps
    assert found["every"][0] == found["every"][1]
    assert found["every"][0][-1] > 1
