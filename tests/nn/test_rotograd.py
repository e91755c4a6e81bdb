"""RotoGrad: gradients of one length, rotations that stay rotations, and a training loop that stays as it was."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import detente
from detente.diagnostics import task_gramian
from detente.nn import RotoGrad

TASKS = ("seg.mask", "depth", "%")


def close(first: Tensor, second: Tensor, tolerance: float = 1e-12) -> None:
    # float64 sums of at most a hundred terms of size 1 unless said otherwise: about 1e-14
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def vectors(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(shape, generator=generator, dtype=torch.float64) for task in TASKS}


def turned(module: RotoGrad, seed: int = 0) -> RotoGrad:
    """Rotations far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.rotation_parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def pull(module: RotoGrad, losses: dict[str, Tensor], *shape: int, scale: float = 1.0) -> Tensor:
    """Gradient of z when the tasks' gradients in their rotated spaces are the given ones."""
    z = torch.zeros(shape, dtype=next(iter(losses.values())).dtype, requires_grad=True)
    features = module(z)
    sum(scale * (features[task] * gradient).sum() for task, gradient in losses.items()).backward()
    return z.grad


def formula(gradients: list[Tensor], references: list[Tensor]) -> Tensor:
    norms = [g.square().sum().sqrt() for g in gradients]
    ratios = [n / r for n, r in zip(norms, references, strict=True)]
    common = sum(r / sum(ratios) * n for r, n in zip(ratios, norms, strict=True))
    return sum(common * g / n for g, n in zip(gradients, norms, strict=True))


def test_starts_as_the_identity() -> None:
    module, z = RotoGrad(TASKS, 5), torch.randn(2, 3, 5)
    features = module(z)
    assert list(features) == list(TASKS)
    for task in TASKS:
        torch.testing.assert_close(features[task], z, rtol=0, atol=0)
        torch.testing.assert_close(module.rotation(task), torch.eye(5), rtol=0, atol=0)


@pytest.mark.parametrize("rotate", [None, 3])
def test_features_are_rotated(rotate: int | None) -> None:
    module = turned(RotoGrad(TASKS, 5, rotate=rotate).double())
    z = torch.randn(2, 3, 5, dtype=torch.float64)
    features, size = module(z), rotate or 5
    for task in TASKS:
        matrix = torch.eye(5, dtype=torch.float64)
        matrix[:size, :size] = module.rotation(task).detach()
        assert (matrix - torch.eye(5)).abs().max() > 0.1
        close(features[task], torch.einsum("ij,abj->abi", matrix, z))


@pytest.mark.parametrize("burn_in", [0, 1, 3])
def test_gradient_of_the_features_is_the_formula(burn_in: int) -> None:
    module = turned(RotoGrad(TASKS, 5, burn_in).double())
    references: list[Tensor] = []
    for step in range(6):
        given = {task: g * 3.0**k for k, (task, g) in enumerate(vectors(4, 5, seed=step).items())}
        shared = [given[task] @ module.rotation(task).detach() for task in TASKS]
        if step < max(burn_in, 1):
            references = [g.square().sum().sqrt() for g in shared]
        close(pull(module, given, 4, 5), formula(shared, references))
    assert int(module.steps) == 6


def test_tasks_reach_the_features_with_one_length() -> None:
    module = RotoGrad(TASKS, 3).double()
    axes = torch.eye(3, dtype=torch.float64)
    gradient = pull(module, {task: axes[k] * 10.0**k for k, task in enumerate(TASKS)}, 3)
    # during burn-in all ratios are 1: C is the mean length
    close(gradient, torch.full((3,), 37.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_any_scale_of_the_losses(dtype: torch.dtype, scale: float) -> None:
    # the squares of float32 gradients of this size are not float32 numbers
    plain, scaled = RotoGrad(TASKS, 5).to(dtype), RotoGrad(TASKS, 5).to(dtype)
    given = {task: g.to(dtype) for task, g in vectors(4, 5).items()}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12  # rounding of either
    torch.testing.assert_close(
        pull(scaled, given, 4, 5, scale=scale) / scale, pull(plain, given, 4, 5), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(scaled.rotation_loss(), plain.rotation_loss(), rtol=tolerance, atol=tolerance)


def test_the_tasks_train_trunk_and_heads_but_no_rotation() -> None:
    torch.manual_seed(0)
    module = turned(RotoGrad(TASKS, 4))
    trunk, heads = nn.Linear(3, 4), {task: nn.Linear(4, 1) for task in TASKS}
    features = module(trunk(torch.randn(6, 3)))
    losses = {task: 10.0**k * heads[task](features[task]).square().mean() for k, task in enumerate(TASKS)}
    plain = {
        task: torch.autograd.grad(loss, heads[task].parameters(), retain_graph=True) for task, loss in losses.items()
    }
    sum(losses.values()).backward()
    assert all(p.grad is None for p in module.parameters())
    assert trunk.weight.grad.any()
    for task in TASKS:
        for p, g in zip(heads[task].parameters(), plain[task], strict=True):
            # the same kernels on the same numbers
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_one_task_is_left_as_it_is() -> None:
    for module, given in ((RotoGrad(["depth"], 5), {"depth"}), (RotoGrad(TASKS, 5), {"depth"})):
        gradient = {task: g for task, g in vectors(4, 5).items() if task in given}
        torch.testing.assert_close(pull(module.double(), gradient, 4, 5), gradient["depth"], rtol=0, atol=0)
        loss = module.rotation_loss()
        loss.backward()
        # R v - R g with v = g: rounding only
        close(loss, torch.zeros_like(loss))
        assert all(p.grad is None or p.grad.abs().max() < 1e-12 for p in module.rotation_parameters())


def test_zero_gradients_stay_zero_and_take_no_part() -> None:
    module, alone = RotoGrad(TASKS, 5, 0).double(), RotoGrad(TASKS[:2], 5, 0).double()
    for step in range(3):
        given = vectors(4, 5, seed=step)
        given["%"] = torch.zeros_like(given["%"])
        two = {task: given[task] for task in TASKS[:2]}
        close(pull(module, given, 4, 5), pull(alone, two, 4, 5))
        close(module.rotation_loss(), alone.rotation_loss())
    # its first gradient becomes its reference: ratio 1, where the others' references are from step 0
    first = vectors(4, 5, seed=0)
    given = vectors(4, 5, seed=9)
    references = [first[task].norm() for task in TASKS[:2]] + [given["%"].norm()]
    close(pull(module, given, 4, 5), formula(list(given.values()), references))
    nothing = pull(module, {task: torch.zeros_like(g) for task, g in given.items()}, 4, 5)
    assert not nothing.any()
    loss = module.rotation_loss()
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in module.rotation_parameters())


def test_tasks_without_a_loss_are_left_out_of_the_step() -> None:
    module = RotoGrad(TASKS, 5, 2).double()
    steps = [vectors(4, 5, seed=s) for s in range(4)]
    present = [("seg.mask", "depth"), ("depth",), ("seg.mask", "%"), TASKS]
    reference: dict[str, Tensor] = {}
    for s, names in enumerate(present):
        for task in names:
            if s < 2 or task not in reference:
                reference[task] = steps[s][task].norm()
        expected = formula([steps[s][task] for task in names], [reference[task] for task in names])
        close(pull(module, {task: steps[s][task] for task in names}, 4, 5), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_gradients_pass_through_and_leave_the_state(bad: float) -> None:
    module = turned(RotoGrad(TASKS, 5, 1).double())
    pull(module, vectors(4, 5), 4, 5)
    before = copy.deepcopy(module.state_dict())
    broken = vectors(4, 5, seed=1)
    broken["depth"][0, 0] = bad
    gradient = pull(module, broken, 4, 5)
    assert not gradient[0].isfinite().any()  # row 0 went through the rotation
    finite = sum(broken[task][1:] @ module.rotation(task).detach() for task in TASKS)
    close(gradient[1:], finite)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    loss = module.rotation_loss()
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in module.rotation_parameters())


def test_one_non_finite_pass_of_several_leaves_the_rotations() -> None:
    module = RotoGrad(TASKS, 5).double()
    z = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    features = module(z)
    for task, factor in zip(TASKS, (1.0, math.inf, 2.0), strict=True):  # as a gradient method does
        (factor * features[task]).sum().backward(retain_graph=True)
    loss = module.rotation_loss()
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in module.rotation_parameters())


def test_evaluation_scales_and_remembers_nothing() -> None:
    module = RotoGrad(TASKS, 5).double().eval()
    given = vectors(4, 5)
    close(pull(module, given, 4, 5), sum(given.values()))
    with torch.no_grad():
        module.train()(torch.zeros(4, 5, dtype=torch.float64))
    assert int(module.steps) == 0
    with pytest.raises(RuntimeError, match="no backward pass"):
        module.rotation_loss()


@pytest.mark.parametrize("rotate", [None, 3])
def test_rotation_loss_is_the_formula(rotate: int | None) -> None:
    module = turned(RotoGrad(TASKS, 5, 1, rotate=rotate).double())
    size = rotate or 5
    references: list[Tensor] = []
    for step in range(3):
        given = vectors(2, 4, 5, seed=step)
        shared = []
        for task in TASKS:
            matrix = torch.eye(5, dtype=torch.float64)
            matrix[:size, :size] = module.rotation(task).detach()
            shared.append((given[task] @ matrix).reshape(8, 5))
        references = references or [g.norm() for g in shared]
        pull(module, given, 2, 4, 5)
        norms = [g.norm() for g in shared]
        ratios = [n / r for n, r in zip(norms, references, strict=True)]
        common = sum(r / sum(ratios) * n for r, n in zip(ratios, norms, strict=True))
        mean = sum(common * g / n for g, n in zip(shared, norms, strict=True)) / 3
        old = {task: module.rotation(task).detach() for task in TASKS}
        turned(module, seed=step + 5)  # the gradients stay those of the pass, the rotations are today's
        total = torch.zeros((), dtype=torch.float64)
        for task, g, n in zip(TASKS, shared, norms, strict=True):
            for sample in range(8):
                target = old[task] @ (common * g / n)[sample, :size]
                total += (module.rotation(task) @ mean[sample, :size] - target).square().sum() / 8 / 3
        close(module.rotation_loss(normalized=False), total.detach(), 1e-10)
        close(module.rotation_loss(), total.detach() * 8 / common**2, 1e-10)


def test_rotations_align_the_gradients_and_stay_rotations() -> None:
    module = RotoGrad(TASKS, 5).double()
    optimizer = torch.optim.Adam(module.rotation_parameters(), lr=0.05)
    given = vectors(5)
    losses = []
    for _ in range(100):
        pull(module, given, 5)
        optimizer.zero_grad()
        loss = module.rotation_loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    shared = torch.stack([given[task] @ module.rotation(task).detach() for task in TASKS])
    cosines = torch.nn.functional.cosine_similarity(shared.unsqueeze(0), shared.unsqueeze(1), dim=-1)
    # one vector per task can be turned onto any other: from a loss of about 1 down to none
    assert losses[0] > 0.3
    assert losses[-1] < 0.01
    assert cosines.min() > 0.95
    for task in TASKS:
        matrix = module.rotation(task).detach()
        # float64 exponential of a 5 x 5 matrix with entries below 10
        close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64), 1e-10)
        close(torch.linalg.det(matrix), torch.ones((), dtype=torch.float64), 1e-10)
        assert (matrix - torch.eye(5)).abs().max() > 0.1


def test_state_dict_is_matched_by_name_and_resumes() -> None:
    module = turned(RotoGrad(TASKS, 5, 2).double())
    for step in range(3):
        pull(module, vectors(4, 5, seed=step), 4, 5)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    loaded = RotoGrad(TASKS[::-1], 5, 2).double()
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    for other in (loaded, copy.deepcopy(module)):
        assert int(other.steps) == 3
        given = vectors(4, 5, seed=7)
        given["depth"] = given["depth"] * 100
        close(pull(other, given, 4, 5), pull(copy.deepcopy(module), given, 4, 5))


def test_gradient_methods_take_over_the_lengths() -> None:
    torch.manual_seed(0)
    trunk, module = nn.Linear(3, 4).double(), turned(RotoGrad(TASKS, 4, 1).double())
    x = torch.randn(6, 3, dtype=torch.float64)
    targets = vectors(6, 4)

    def losses(rotograd: RotoGrad) -> dict[str, Tensor]:
        features = rotograd(trunk(x))
        return {task: 10.0**k * (features[task] - targets[task]).square().mean() for k, task in enumerate(TASKS)}

    plain = copy.deepcopy(module).eval()  # rotates only
    expected = task_gramian(losses(plain))
    update = detente.backward(losses(module), detente.CAGrad())
    close(update.gramian.cpu(), expected, 1e-10)
    assert int(module.steps) == 1  # one step, for all its passes
    assert all(p.grad is None for p in module.parameters())
    together = copy.deepcopy(plain).train()
    sum(losses(together).values()).backward()
    close(module.rotation_loss(), together.rotation_loss(), 1e-10)
    for name, value in module.state_dict().items():
        close(value.double(), together.state_dict()[name].double(), 1e-10)


def test_loss_weightings_keep_the_scaling() -> None:
    module = RotoGrad(TASKS, 3).double()
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    features = module(z)
    losses = {task: 10.0**k * features[task][k] for k, task in enumerate(TASKS)}
    detente.backward(losses, detente.RLW(seed=0))
    # each task on an axis of its own: one length means equal entries
    close(z.grad / z.grad[0], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: RotoGrad("ab", 4), ValueError, "string 'ab'"),
        (lambda: RotoGrad(["a"], 0), ValueError, "features must be"),
        (lambda: RotoGrad(["a"], 4, -1), ValueError, "burn_in must be"),
        (lambda: RotoGrad(["a"], 4, rotate=5), ValueError, "from 1 to features, 4; got 5"),
        (lambda: RotoGrad(["a"], 4)(torch.ones(2, 4, 3)), ValueError, r"4 features.*got \(2, 4, 3\)"),
        (lambda: RotoGrad(["a"], 4)(torch.ones(2, 4, dtype=torch.int64)), ValueError, "floating"),
        (lambda: RotoGrad(["a"], 4).rotation("b"), KeyError, "'b'"),
        (lambda: RotoGrad(["a"], 4).rotation_loss(), RuntimeError, r"Call sum\(losses\)\.backward\(\) first"),
    ],
)
def test_bad_arguments(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
