"""In which form the task gradients wait: as they come, as rows, in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import detente

T = 3


class Net(nn.Module):
    """A trunk with a large convolution, a large linear layer and small tensors, in any dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(64, 256, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 140), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(140, 1) for _ in range(T))
        self.to(dtype)
        self.inputs = torch.randn(6, 64, 4, 4).to(dtype)

    def losses(self) -> list[torch.Tensor]:
        h = self.trunk(self.inputs)
        return [((-1) ** k * head(h) - k).square().mean() for k, head in enumerate(self.heads)]

    def rows(self) -> torch.Tensor:
        """The task gradients ``[T, P]``, in float64."""
        found = [torch.autograd.grad(loss, list(self.trunk.parameters()), retain_graph=True) for loss in self.losses()]
        return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in found]).double()

    def update(self) -> torch.Tensor:
        return torch.cat([p.grad.reshape(-1) for p in self.trunk.parameters() if p.grad is not None]).double()


@pytest.mark.parametrize("granularity", ["model", "layer"])
def test_gradients_kept_as_they_come_give_what_rows_give(granularity):
    net = Net(torch.float64)
    update = detente.backward(net.losses(), detente.CAGrad(), granularity=granularity, engine="serial")
    J = net.rows()
    torch.testing.assert_close(update.gramian, J @ J.T, rtol=1e-12, atol=1e-12)
    sizes = [J.shape[1]] if granularity == "model" else [p.numel() for p in net.trunk.parameters()]
    wanted = torch.cat([detente.aggregate(block, detente.CAGrad()) for block in torch.split(J, sizes, dim=1)])
    # the solver's tolerance
    torch.testing.assert_close(net.update(), wanted, rtol=1e-7, atol=1e-9)


def test_the_update_shares_no_memory_with_anything_that_stays():
    """The update is written over a task's gradient, but not where an operation hands on what others hold."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(400, 400))

    class Handed(torch.autograd.Function):
        workspace = torch.empty(400, 400)

        @staticmethod
        def forward(ctx, x, k):
            ctx.k = k
            return x.sum() * k

        @staticmethod
        def backward(ctx, gradient):
            Handed.workspace.fill_(float(gradient) * ctx.k)  # the same memory for every task
            return Handed.workspace, None

    losses = [Handed.apply(w, 1.0), Handed.apply(w, -3.0)]
    update = detente.backward(losses, detente.CAGrad(c=0))
    assert update.gramian is not None
    torch.testing.assert_close(update.gramian, 1.6e5 * torch.tensor([[1.0, -3.0], [-3.0, 9.0]], dtype=torch.float64))
    torch.testing.assert_close(w.grad, torch.full_like(w, -1.0))  # the mean of 1 and -3


def test_a_parameter_handed_on_through_other_operations_is_copied():
    """``W + 0`` passes the gradient on unchanged, to two parameters at once; their updates must not be one tensor."""
    torch.manual_seed(0)
    v, w, x = nn.Parameter(torch.randn(400, 400)), nn.Parameter(torch.randn(400, 400)), torch.randn(5, 400)
    both = v + w
    losses = [(x @ both).square().mean(), (x @ both - 1).abs().mean()]
    rows = [torch.autograd.grad(loss, v, retain_graph=True)[0] for loss in losses]
    update = detente.backward(losses, detente.CAGrad(), engine="serial")
    a, b = (float(weight) for weight in update.weights.values())
    for p in (v, w):
        # float32 rounding of a sum of two terms
        torch.testing.assert_close(p.grad, a * rows[0] + b * rows[1], rtol=1e-5, atol=1e-7)
    assert v.grad is not None
    assert w.grad is not None
    assert v.grad.data_ptr() != w.grad.data_ptr()


def test_a_gradient_that_a_hook_keeps_stays_as_it_was():
    net, kept = Net(), []
    net.trunk[0].weight.register_hook(lambda g: kept.append((g, g.clone())))
    detente.backward(net.losses(), detente.CAGrad())
    assert len(kept) == T
    for gradient, copy in kept:
        assert torch.equal(gradient, copy)


def test_a_task_that_does_not_reach_a_large_parameter():
    torch.manual_seed(0)
    low, high, x = nn.Linear(400, 400), nn.Linear(400, 400), torch.randn(4, 400)
    h = low(x).relu()
    losses = [h.mean(), high(h).square().mean(), high(h).mean()]
    J = [torch.autograd.grad(loss, [low.weight, high.weight], retain_graph=True, allow_unused=True) for loss in losses]
    update = detente.backward(losses, detente.CAGrad(), engine="serial")
    weights = [float(weight) for weight in update.weights.values()]
    for k, p in enumerate([low.weight, high.weight]):
        wanted = sum(a * row[k] for a, row in zip(weights, J, strict=True) if row[k] is not None)
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)  # float32 rounding
    assert J[0][1] is None


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_in_half_precision(dtype, granularity):
    """Their rounding (2**-9 of an entry) is all that changes; products and sums are taken in more."""
    net = Net(dtype)
    J = net.rows().to(torch.bfloat16).double()
    update = detente.backward(
        net.losses(), detente.CAGrad(c=0), granularity=granularity, engine="serial", storage=torch.bfloat16
    )
    # J from a second pass: the last bit of a float32 gradient may round to the other neighbour in bfloat16
    torch.testing.assert_close(update.gramian, J @ J.T, rtol=1e-3, atol=1e-3)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    torch.testing.assert_close(net.update(), J.mean(0), rtol=rounding, atol=1e-3 * float(J.abs().max()))
    assert all(p.grad is not None and p.grad.dtype == dtype for p in net.trunk.parameters())


def test_features_in_half_precision():
    """Their gradients are rounded to 2**-9, and so are their lengths, here to less than twice that in the square."""
    net = Net()
    exact = detente.backward(net.losses(), detente.CAGrad(), source="features")
    rounded = detente.backward(net.losses(), detente.CAGrad(), source="features", storage=torch.bfloat16)
    assert not torch.equal(exact.gramian, rounded.gramian)
    torch.testing.assert_close(rounded.gramian.diagonal(), exact.gramian.diagonal(), rtol=2.0**-8, atol=0)


def test_storage_is_refused_where_it_cannot_apply():
    net = Net()
    for method, storage, words in (
        (detente.CAGrad(), torch.int8, "storage must be a real floating dtype"),
        (detente.GradDrop(), torch.bfloat16, "storage"),
        (detente.UW(), torch.bfloat16, "storage"),
    ):
        with pytest.raises(ValueError, match=words):
            detente.backward(net.losses(), method, storage=storage)
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "engine", "words"),
    [
        ({"engine": "serial"}, "serial", "asked for"),
        ({"engine": "lean"}, "lean", "1 of 4 shared parameters can be products"),
        ({"source": "features"}, "features", "source"),
    ],
)
def test_stats_say_what_ran_and_why(options, engine, words):
    update = detente.backward(Net().losses(), detente.CAGrad(), **options)
    assert update.stats["engine"] == engine
    assert words in update.stats["why"]
    why = "graddrop needs every gradient written out; a pass for each task, because the trunk has an operation "
    assert detente.backward(Net().losses(), detente.GradDrop()).stats["why"] == f"{why}ConvolutionBackward0"
