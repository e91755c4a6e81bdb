"""Problem files: what a user gets wrong is said in one message that names it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

import detente.benchmark
from detente.benchmark.problem import digest, list_problems, load_problem, parts

TINY = Path(__file__).with_name("tiny_problem.py")


def variant(directory: Path, *replacements: tuple[str, str], more: str = "") -> str:
    """The tiny problem with something changed, as a file."""
    text = TINY.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = directory / "mine.py"
    path.write_text(text + more)
    return str(path)


def test_a_problem_file_is_loaded_with_its_tasks_settings_and_description():
    problem = load_problem(str(TINY))
    assert problem.name == "tiny_problem"
    assert problem.description.startswith("Two regressions on one small network")
    assert list(problem.tasks) == ["sum", "sign"]
    assert {"epochs": 30, "batch_size": 16, "lr": 1e-2, "probe_every": 2}.items() <= problem.settings.items()
    assert load_problem(problem.source).digest == problem.digest


def test_settings_that_the_file_leaves_out_have_defaults(tmp_path):
    source = variant(tmp_path, ('"epochs": 30, "batch_size": 16, "lr": 1e-2, "probe_every": 2', '"lr": 0.5'))
    settings = load_problem(source).settings
    assert settings["lr"] == 0.5
    assert {"epochs", "batch_size"} <= set(settings)


@pytest.mark.parametrize("name", ["losses", "metrics", "make_data", "make_model", "tasks", "settings"])
def test_a_missing_name_is_named(tmp_path, name):
    old = f"def {name}(" if f"def {name}(" in TINY.read_text() else f"\n{name} = "
    source = variant(tmp_path, (old, old.replace(name, f"no_{name}")))
    with pytest.raises(ValueError, match=rf"does not define {name}\.") as caught:
        load_problem(source)
    assert source in str(caught.value)


def test_a_bad_direction_is_named(tmp_path):
    source = variant(tmp_path, ('"accuracy": "max"', '"accuracy": "up"'))
    with pytest.raises(ValueError, match=r"\['sign'\]\['accuracy'\] must be 'max' or 'min'; got 'up'"):
        load_problem(source)


def test_an_unknown_problem_lists_the_built_in_ones():
    with pytest.raises(ValueError, match="unknown problem 'digit'") as caught:
        load_problem("digit")
    assert all(name in str(caught.value) for name in ("digits", "logic", "scenes", "toy"))


def test_a_missing_path_is_named(tmp_path):
    path = str(tmp_path / "nowhere.py")
    with pytest.raises(FileNotFoundError, match="no problem file") as caught:
        load_problem(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_split_is_named(tmp_path, split):
    problem = load_problem(variant(tmp_path, (f'"{split}": slice', '"other": slice')))
    with pytest.raises(ValueError, match=f"'{split}' is missing"):
        problem.make_data({})


def test_a_missing_metric_is_named_with_its_task(tmp_path):
    problem = load_problem(variant(tmp_path, ('["sign"]["accuracy"] =', '["sign"]["acc"] =')))
    model, data = problem.make_model(("sum", "sign"), {}), problem.make_data({})
    with torch.no_grad():
        assert set(problem.metrics(model, data["val"], ("sum",))) == {"sum"}
    with torch.no_grad(), pytest.raises(ValueError, match="did not return 'accuracy' for task 'sign'"):
        problem.metrics(model, data["val"], ("sum", "sign"))


def test_a_missing_task_in_the_metrics_is_named(tmp_path):
    more = "\n\ndef metrics(model, data, tasks):\n    return {}\n"
    problem = load_problem(variant(tmp_path, more=more))
    with pytest.raises(ValueError, match="did not return 'mse' for task 'sum'"):
        problem.metrics(problem.make_model(("sum",), {}), problem.make_data({})["val"], ("sum",))


def test_a_model_that_is_no_module_is_named(tmp_path):
    problem = load_problem(variant(tmp_path, ("return Net(tasks)", "return Net")))
    with pytest.raises(TypeError, match=r"make_model must return an nn\.Module; got type"):
        problem.make_model(("sum",), {})


def test_adam_is_the_default_optimizer_and_the_file_may_choose_another(tmp_path):
    problem = load_problem(str(TINY))
    settings = {"lr": 0.25, "weight_decay": 0.0}
    default = problem.make_optimizer(problem.make_model(("sum",), {}), settings)
    assert isinstance(default, torch.optim.Adam)
    assert default.param_groups[0]["lr"] == 0.25
    more = '\n\ndef make_optimizer(model, settings):\n    return torch.optim.SGD(model.parameters(), settings["lr"])\n'
    own = load_problem(variant(tmp_path, more=more))
    assert isinstance(own.make_optimizer(own.make_model(("sum",), {}), settings), torch.optim.SGD)


def test_an_edited_file_has_another_digest(tmp_path):
    before = load_problem(variant(tmp_path)).digest
    assert load_problem(variant(tmp_path, more="# changed\n")).digest != before


def test_modules_beside_the_file_are_found_and_count_in_its_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    beside = tmp_path / "networks_beside_mine.py"
    beside.write_text("WIDTH = 7\n")
    source = variant(tmp_path, more="\nfrom networks_beside_mine import WIDTH\n")
    before = load_problem(source)
    assert before.module.WIDTH == 7
    beside.write_text("WIDTH = 8\n")
    assert load_problem(source).digest != before.digest


def test_an_edited_part_of_a_built_in_problem_changes_its_digest(tmp_path):
    package = Path(shutil.copytree(Path(detente.benchmark.__file__).parent, tmp_path / "benchmark"))
    module = package / "problems/multifashion.py"
    assert {str(path.relative_to(package)) for path in parts(module)} == {
        "datasets/digits_overlay.py",
        "datasets/source.py",
        "models/layers.py",
        "models/lenet.py",
        "problems/multifashion.py",
        "problems/multimnist.py",
    }
    before = digest(parts(module))
    assert before == load_problem("multifashion").digest
    for name in ("datasets/source.py", "models/lenet.py", "problems/multimnist.py"):
        with (package / name).open("a") as file:
            file.write("# edited\n")
        assert digest(parts(module)) != before
        before = digest(parts(module))
    (package / "models/unet.py").write_text("")
    assert digest(parts(module)) == before


def test_every_built_in_problem_loads_and_is_described():
    listed = list_problems()
    assert {"digits", "logic", "scenes", "toy", "nyuv2", "celeba"} <= set(listed)
    for name, line in listed.items():
        assert line
        assert load_problem(name).description == line
