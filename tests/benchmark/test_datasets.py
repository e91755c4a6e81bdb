"""Problems that read files say on the command line where the files come from, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.command import run
from detente.benchmark.problem import list_problems, load_problem

PAGES = {
    "celeba": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cityscapes": "https://github.com/lorenmt/mtan",
    "multifashion": "https://github.com/zalandoresearch/fashion-mnist",
    "multimnist": "http://yann.lecun.com/exdb/mnist/",
    "nuscenes": "https://www.nuscenes.org/nuscenes#download",
    "nyud": "https://data.vision.ee.ethz.ch/brdavid/atrc/NYUDv2.tar.gz",
    "nyuv2": "https://github.com/lorenmt/mtan",
    "pascal_context": "https://data.vision.ee.ethz.ch/brdavid/atrc/PASCALContext.tar.gz",
    "qm9": "https://data.pyg.org/datasets/qm9_v3.zip",
}


def test_these_are_the_problems_that_read_files() -> None:
    assert set(PAGES) == {name for name in list_problems() if load_problem(name).download is not None}


@pytest.mark.parametrize("name", PAGES)
def test_the_download_is_described(name: str) -> None:
    outcome = run("compare", name, "--download-help")
    assert outcome.code == 0
    assert outcome.out.rstrip("\n") == str(load_problem(name).download).rstrip("\n")  # as it is, not wrapped
    assert PAGES[name] in outcome.out


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("command", ["compare", "tune"])
def test_missing_files_are_told_before_anything_is_written(tmp_path: Path, command: str, name: str) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    outcome = run(command, name, "--data", data, "--out", out)
    assert outcome.code == 2
    assert str(data) in outcome.err
    assert str(load_problem(name).download).rstrip("\n") in outcome.err
    assert PAGES[name] in outcome.err
    assert not out.exists()


def test_a_problem_that_makes_its_own_data_takes_no_directory(tmp_path: Path) -> None:
    outcome = run("compare", "digits", "--data", tmp_path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "'digits' makes its own data; leave out --data" in outcome.err
    assert not (tmp_path / "out").exists()
    assert run("compare", "digits", "--download-help").out == "digits makes its own data.\n"
