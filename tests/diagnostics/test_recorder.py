"""A recorder changes nothing, and what it writes is what a direct computation gives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import detente
from detente.diagnostics import Recording

TASKS = ("a", "b", "c")
# six digits are written: half a unit of the last one, of a number that may begin with 1
WRITTEN = 5e-6


class Network(nn.Module):
    """A trunk with statistics and, if asked for, random numbers of its own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    def forward(self, x):
        features = self.trunk(x)
        return {task: head(features) for task, head in self.heads.items()}


class Loop:
    """A training with batches that differ from step to step."""

    def __init__(self, dropout=0.0, lr=0.1):
        torch.manual_seed(0)
        self.model = Network(dropout).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.5)
        self.batches = torch.Generator().manual_seed(1)

    def batch(self):
        self.x = torch.randn(16, 3, dtype=torch.float64, generator=self.batches)
        self.y = {t: (k + 1) * self.x[:, k : k + 1].sin() - k for k, t in enumerate(TASKS)}

    def closure(self, tasks=None):
        out = self.model(self.x)
        return {t: (out[t] - self.y[t]).square().mean() for t in tasks or TASKS}

    def plain_step(self, recorder=None, *, again=True):
        self.batch()
        losses = self.closure()
        if recorder is None:
            sum(losses.values()).backward()
            self.optimizer.step()
        else:
            with recorder.observe(losses, again=self.closure if again else None):
                sum(losses.values()).backward()
                self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, method, recorder=None, **options):
        self.batch()
        if recorder is None:
            return detente.step(self.closure, self.optimizer, method, **options)
        with recorder:
            return detente.step(self.closure, self.optimizer, method, **options)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in (*model.parameters(), *model.buffers())])


def directly(loop):
    """The task gradients of the trunk by layer, and of everything, by one backward pass each."""
    model = copy.deepcopy(loop.model)
    out = model(loop.x)
    by_layer, everything = [], []
    for t in TASKS:
        model.zero_grad()
        (out[t] - loop.y[t]).square().mean().backward(retain_graph=True)
        layers = [model.trunk[k] for k in (0, 1, 4)]
        by_layer.append([torch.cat([p.grad.reshape(-1) for p in layer.parameters()]) for layer in layers])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        everything.append(torch.cat([g.reshape(-1) for g in gradients]))
    return by_layer, torch.stack(everything)


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


@pytest.mark.parametrize("way", ["observe", "step", "backward"])
def test_figures_are_those_of_a_direct_computation(way, tmp_path):
    loop, expected = Loop(), []
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1, realised_every=1)
    for _ in range(4):
        loop.batch()
        by_layer, everything = directly(loop)
        at = torch.cat([p.detach().reshape(-1) for p in loop.model.parameters()])
        losses = loop.closure()
        values = torch.stack([losses[t].detach() for t in TASKS])
        if way == "step":
            with recorder:  # a forward pass of its own; that of `losses` changed the statistics, not the output
                detente.step(loop.closure, loop.optimizer, detente.GD())
        elif way == "observe":
            with recorder.observe(losses, again=loop.closure):
                loop.optimizer.zero_grad()
                sum(losses.values()).backward()
                loop.optimizer.step()
        else:
            loop.optimizer.zero_grad()
            with recorder:
                detente.backward(losses, detente.GD())
            loop.optimizer.step()
        moved = torch.cat([p.detach().reshape(-1) for p in loop.model.parameters()]) - at
        with torch.no_grad():
            after = torch.stack(list(copy.deepcopy(loop).closure().values()))
        expected.append((by_layer, values, everything @ moved, after - values, moved.norm()))
    recorder.close()
    found = Recording.load(tmp_path / "run.jsonl")
    assert found.tasks == TASKS
    assert found.layers == ("trunk.0", "trunk.1", "trunk.4")
    for r, (by_layer, values, predicted, realised, length) in enumerate(expected):
        whole = [torch.cat(layers) for layers in by_layer]
        for i in range(3):
            assert found.losses[r, i] == pytest.approx(float(values[i]), rel=WRITTEN)
            assert found.norms[r, i] == pytest.approx(float(whole[i].norm()), rel=WRITTEN)
            assert found.predicted[r, i] == pytest.approx(float(predicted[i]), rel=WRITTEN)
            for j in range(3):
                assert found.cosines[r, i, j] == pytest.approx(cosine(whole[i], whole[j]), rel=WRITTEN)
                for layer in range(3):
                    of = cosine(by_layer[i][layer], by_layer[j][layer])
                    assert found.layer_cosines[r, layer, i, j] == pytest.approx(of, rel=WRITTEN)
            if way != "backward":  # where nothing computes the losses again
                assert found.realised[r, i] == pytest.approx(float(realised[i]), rel=WRITTEN, abs=1e-12)
                curved = 2 * float(realised[i] - predicted[i]) / float(length) ** 2
                assert found.curvature[r, i] == pytest.approx(curved, rel=1e-4)  # a difference of near numbers
        mean = sum(whole) / 3
        toward = [cosine(row, mean) for row in whole]
        assert found.to_mean[r] == pytest.approx(toward, rel=2e-5)
        below = [cosine(whole[i], whole[j]) < 0 for i, j in ((0, 1), (0, 2), (1, 2))]
        assert found.conflict_rate[r] == pytest.approx(sum(below) / 3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("plain", {}), ("pcgrad", {}), ("famo", {}), ("nash_mtl", {}), ("pcgrad", {"micro_batches": 2}), ("moco", {})],
)
def test_training_is_not_changed_by_it(name, options, tmp_path):
    """With dropout and batch statistics, to the bit."""

    def trained(recorder_of):
        loop = Loop(dropout=0.3)
        recorder = recorder_of(loop)
        method = None if name == "plain" else detente.get_method(name)
        for _ in range(6):
            if method is None:
                loop.plain_step(recorder)
            else:
                loop.step(method, recorder, **options)
        return flat(loop.model), torch.rand(3)

    without = trained(lambda loop: None)
    with_it = trained(lambda loop: detente.Recorder(loop.model, tmp_path / "run.jsonl", every=2))
    assert torch.equal(without[0], with_it[0])
    assert torch.equal(without[1], with_it[1])
    assert Recording.load(tmp_path / "run.jsonl").steps.tolist() == [0, 2, 4]


def test_realised_changes_are_of_the_same_dropout_masks(tmp_path):
    """A step of length almost nothing changes the losses by almost nothing, whatever dropout draws."""
    loop = Loop(dropout=0.5, lr=1e-7)
    with detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1, realised_every=1) as recorder:
        for _ in range(3):
            loop.batch()
            detente.step(loop.closure, loop.optimizer, detente.GD())
    assert recorder.steps == 3
    found = Recording.load(tmp_path / "run.jsonl")
    assert abs(found.realised).max() < 1e-4


def test_one_of_several_records_has_realised_changes(tmp_path):
    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=2, realised_every=3)
    for _ in range(14):
        loop.plain_step(recorder)
    found = Recording.load(recorder.path)
    assert torch.from_numpy(found.predicted).isfinite().all()
    assert torch.from_numpy(found.realised).isfinite().all(1).tolist() == [k % 3 == 0 for k in range(7)]


def test_weights_and_method_are_noted(tmp_path):
    loop, method, given = Loop(), detente.CAGrad(), []
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=2)
    for k in range(4):
        update = loop.step(method, recorder)
        if k % 2 == 0:
            given.append([float(update.weights[t]) for t in TASKS])
    found = Recording.load(tmp_path / "run.jsonl")
    assert found.methods == ["cagrad", "cagrad"]
    assert found.weights == pytest.approx(torch.tensor(given).numpy(), rel=WRITTEN)


def test_the_method_inside_of_an_observed_step_is_noted_once(tmp_path):
    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1)
    loop.batch()
    losses = loop.closure()
    with recorder, recorder.observe(losses, again=loop.closure):
        detente.backward(losses, detente.PCGrad())
        loop.optimizer.step()
    found = Recording.load(tmp_path / "run.jsonl")
    assert found.methods == ["pcgrad"]
    assert found.steps.tolist() == [0]
    assert torch.from_numpy(found.realised).isfinite().all()


def test_missing_tasks_leave_gaps(tmp_path):
    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1)
    for tasks in (("a", "b"), ("c", "a"), ("b",)):
        loop.batch()
        losses = loop.closure(tasks)
        recorder.observe(losses)
    found = Recording.load(tmp_path / "run.jsonl")
    assert found.tasks == ("a", "b", "c")
    there = torch.from_numpy(found.losses).isfinite().tolist()
    assert there == [[True, True, False], [True, False, True], [False, True, False]]
    assert torch.from_numpy(found.cosines[0]).isfinite().tolist() == [[True, True, False]] * 2 + [[False] * 3]
    assert not torch.from_numpy(found.norms[2]).isfinite().any()  # a single task shares nothing


def test_phases_and_priorities_of_connection_strength(tmp_path):
    torch.manual_seed(0)
    model = detente.nn.convert_task_norm(Network().double(), list(TASKS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(16, 3, dtype=torch.float64)
    goals = {t: x[:, :1] * (k - 1) for k, t in enumerate(TASKS)}

    def closure(tasks=None):
        losses = {}
        for t in tasks or TASKS:
            with detente.nn.active_task(t):
                losses[t] = (model(x)[t] - goals[t]).square().mean()
        return losses

    def run(recorder):
        torch.manual_seed(3)
        start = copy.deepcopy(model.state_dict())
        for phase in (1, 2):
            method = detente.ConnectionStrength(model, phase=phase)
            for _ in range(2):
                if recorder is None:
                    detente.step(closure, optimizer, method)
                else:
                    with recorder:
                        detente.step(closure, optimizer, method)
        end = flat(model)
        owned = {pair.name: torch.bincount(method.owners(pair), minlength=3).tolist() for pair in method.pairs}
        model.load_state_dict(start)
        return end, owned

    plain, _ = run(None)
    recorded, owned = run(detente.Recorder(model, tmp_path / "run.jsonl", every=1))
    assert torch.equal(plain, recorded)
    found = Recording.load(tmp_path / "run.jsonl")
    assert found.phases.tolist() == [1, 1, 2, 2]
    assert torch.from_numpy(found.cosines).isfinite().all()  # phase 1 never sees the tasks together: the recorder does
    assert {name: list(tasks.values()) for name, tasks in found.priorities[-1].items()}.keys() == owned.keys()
    assert all(sum(tasks.values()) == 8 for tasks in found.priorities[-1].values())


@pytest.mark.parametrize("way", ["step", "observe"])
def test_losses_that_are_derivatives_themselves(way, tmp_path):
    """Those of physics-informed networks cannot be computed again without a graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def closure(tasks=None):
        x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None].requires_grad_()
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        losses = {"equation": (slope - 1).square().mean(), "start": model(x[:1] * 0).square().mean()}
        return {task: losses[task] for task in tasks or losses}

    recorder = detente.Recorder(model, tmp_path / "run.jsonl", every=1, realised_every=1)
    for _ in range(2):
        if way == "step":
            with recorder:
                detente.step(closure, optimizer, detente.FAMO())
        else:
            losses = closure()
            with recorder.observe(losses, again=closure):
                sum(losses.values()).backward()
                optimizer.step()
            optimizer.zero_grad()
    found = Recording.load(recorder.path)
    assert found.realised == pytest.approx(found.predicted, rel=0.2)  # a short step


def test_scaled_losses_are_noted_unscaled(tmp_path):
    found = []
    for scale in (1.0, 1024.0):
        loop = Loop()
        recorder = detente.Recorder(loop.model, tmp_path / f"{scale}.jsonl", every=1)
        loop.batch()
        losses = {t: loss * scale for t, loss in loop.closure().items()}
        recorder.observe(losses, scale=scale)
        found.append(Recording.load(recorder.path))
    assert found[0].norms == pytest.approx(found[1].norms, rel=WRITTEN)
    assert found[0].losses == pytest.approx(found[1].losses, rel=WRITTEN)


def test_a_skipped_step_has_no_changes(tmp_path):
    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1)
    loop.batch()
    with recorder.observe(loop.closure(), again=loop.closure):
        pass
    recorder.close()
    assert not torch.from_numpy(Recording.load(recorder.path).predicted).isfinite().any()


def test_the_file_stays_bounded(tmp_path):
    """Whatever the length of a run: every second record goes, evenly over all of it."""
    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1, limit_mb=0.02)
    for _ in range(400):
        loop.plain_step(recorder)
        assert recorder.path.stat().st_size < 0.02e6 + 2000  # a record is shorter
    found = Recording.load(recorder.path)
    assert recorder.every > 1
    assert found.steps[0] == 0
    assert set(torch.from_numpy(found.steps).diff().tolist()) == {recorder.every}
    assert 400 - found.steps[-1] <= recorder.every


def test_resumed_is_uninterrupted(tmp_path):
    """A run that goes on from a checkpoint before its last records writes them again."""

    def without_times(path):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in entry.items() if k not in ("time", "ms")} for entry in entries]

    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "whole.jsonl", every=2)
    for _ in range(9):
        loop.plain_step(recorder)

    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "resumed.jsonl", every=2)
    for k in range(7):
        if k == 4:
            saved = copy.deepcopy((loop.model.state_dict(), loop.optimizer.state_dict(), recorder.state_dict()))
            drawn = loop.batches.get_state()
        loop.plain_step(recorder)
    with recorder.path.open("a") as file:
        file.write('{"step": 6, "tas')  # killed while it wrote
    loop = Loop()
    loop.model.load_state_dict(saved[0])
    loop.optimizer.load_state_dict(saved[1])
    loop.batches.set_state(drawn)
    recorder = detente.Recorder(loop.model, tmp_path / "resumed.jsonl", every=2)
    recorder.load_state_dict(saved[2])
    for _ in range(5):
        loop.plain_step(recorder)
    assert without_times(tmp_path / "resumed.jsonl") == without_times(tmp_path / "whole.jsonl")


def test_another_run_is_never_written_over(tmp_path):
    loop = Loop()
    loop.plain_step(detente.Recorder(loop.model, tmp_path / "run.jsonl"))
    before = (tmp_path / "run.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="another run"):
        loop.plain_step(detente.Recorder(loop.model, tmp_path / "run.jsonl"))
    assert (tmp_path / "run.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"every": 2.5}, "every must be"),
        ({"realised_every": 0}, "realised_every must be"),
        ({"limit_mb": 0}, "limit_mb must be"),
    ],
)
def test_bad_options_are_told(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        detente.Recorder(nn.Linear(1, 1), tmp_path / "run.jsonl", **options)
    with pytest.raises(TypeError, match="model must be"):
        detente.Recorder([nn.Linear(1, 1)], tmp_path / "run.jsonl")


@pytest.mark.parametrize("content", ["", "hello\n", '{"detente": 99, "layers": []}\n', '{"step": 1}\n'])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no file of"):
        Recording.load(path)
    path.write_text('{"detente": 1, "layers": ["a"]}\n')
    with pytest.raises(ValueError, match="no records"):
        Recording.load(path)


def test_wrapped_models_keep_the_names_of_their_layers(tmp_path):
    loop = Loop()
    recorder = detente.Recorder(torch.compile(loop.model, backend="eager"), tmp_path / "run.jsonl", every=1)
    loop.plain_step(recorder)
    assert Recording.load(recorder.path).layers == ("trunk.0", "trunk.1", "trunk.4")


def test_an_error_inside_leaves_the_recorder_usable(tmp_path):
    loop = Loop()
    recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=1)
    with pytest.raises(RuntimeError, match="mine"), recorder:
        raise RuntimeError("mine")
    loop.plain_step(recorder)
    assert len(Recording.load(recorder.path).steps) == 1


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    loop = Loop()
    with SummaryWriter(str(tmp_path / "board")) as writer:
        recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=2, writers=[writer])
        for _ in range(4):
            loop.step(detente.CAGrad(), recorder)
    events = tensorboard.EventAccumulator(str(tmp_path / "board")).Reload()
    found = Recording.load(tmp_path / "run.jsonl")
    for name, expected in (
        ("conflict/cosine/a-b", found.cosines[:, 0, 1]),
        ("conflict/norms/c", found.norms[:, 2]),
        ("conflict/weights/b", found.weights[:, 1]),
        ("conflict/predicted/a", found.predicted[:, 0]),
        ("conflict/rate", found.conflict_rate),
    ):
        series = events.Scalars(name)
        assert [event.step for event in series] == [0, 2]
        assert [event.value for event in series] == pytest.approx(list(expected), rel=1e-5)  # float32


def test_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loop = Loop()
    with wandb.init(project="detente", dir=str(tmp_path)) as run:
        recorder = detente.Recorder(loop.model, tmp_path / "run.jsonl", every=2, writers=[run])
        for _ in range(4):
            loop.plain_step(recorder)
        run.log({}, step=4)  # the summary is of the steps before the last
        logged = dict(run.summary)
    found = Recording.load(tmp_path / "run.jsonl")
    assert logged["conflict/cosine/a-b"] == pytest.approx(found.cosines[-1, 0, 1], rel=WRITTEN)
