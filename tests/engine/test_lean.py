"""Products instead of written gradients: the same step, whichever layers are kept so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import detente

# sums of a few hundred products in another order; the Gramian is summed in float64 either way
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
METHODS = [
    detente.CAGrad(),
    detente.MGDA(),
    detente.UPGrad(),
    detente.NashMTL(),
    detente.AlignedMTL(),
]


class Parts(nn.Module):
    """Any forward over named parts."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mlp(*sizes: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after, bias=bias), nn.Tanh()]
    return nn.Sequential(*layers)


def tied() -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x).tanh(), self.a.weight.T)

    return Parts(forward, a=nn.Linear(6, 6))


def hooked() -> nn.Module:
    model = mlp(6, 8, 6)
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


ATTENTION = {"d_model": 6, "nhead": 2, "dim_feedforward": 9, "dropout": 0.0, "batch_first": True}


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


# trunk, shape of the input, number of weights that can be kept as products (None: float32 has a fused kernel)
TRUNKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int | None]] = {
    "one layer": (lambda: mlp(6, 6), (4, 6), 1),
    "three layers": (lambda: mlp(6, 20, 10, 6), (4, 6), 3),
    "no bias": (lambda: mlp(6, 20, 6, bias=False), (4, 6), 2),
    "one sample": (lambda: mlp(6, 20, 6), (1, 6), 2),
    "many samples": (lambda: mlp(6, 5, 6), (50, 6), 2),
    "sequence": (lambda: mlp(6, 20, 6), (2, 5, 6), 2),
    "sequence without bias": (lambda: mlp(6, 20, 6, bias=False), (2, 5, 6), 2),
    "in place": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 6)), (4, 6), 2),
    "norms": (lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 6), nn.BatchNorm1d(6)), (4, 6), 2),
    "skip": (lambda: Parts(lambda s, x: x + s.b(s.a(x).relu()), a=nn.Linear(6, 9), b=nn.Linear(9, 6)), (4, 6), 2),
    "used twice": (lambda: Parts(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(6, 6)), (4, 6), 0),
    "tied to its transpose": (tied, (4, 6), 0),
    "hook on the weight": (hooked, (4, 6), 1),
    "matmul of the weight": (
        lambda: Parts(lambda s, x: x @ s.a.weight.t() * s.a.bias, a=nn.Linear(6, 6)), (4, 6), 1),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), (4, 6), 0),
    "convolution before": (
        lambda: nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6)), (4, 1, 6), 1),
    "embedding before": (
        lambda: Parts(lambda s, x: s.b(s.a((x > 0).long()).mean(1)), a=nn.Embedding(2, 5), b=nn.Linear(5, 6)),
        (4, 6), 1),
    "checkpoint": (
        lambda: Parts(lambda s, x: checkpoint(s.a, x, use_reentrant=False), a=mlp(6, 9, 6)), (4, 6), 2),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(**ATTENTION), (2, 5, 6), 4),
    "recurrent": (lambda: Parts(lambda s, x: s.a(x)[0], a=nn.GRU(6, 6, batch_first=True)), (2, 3, 6), 1),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(1, 2, 3), nn.Flatten(), nn.Linear(16, 6)), (4, 1, 6), 1),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(24, 6)), (3, 4, 6), 1),
    "depthwise, dilated, two dimensions": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding=1), nn.ReLU(), nn.AvgPool2d(2),
                              nn.Flatten(), nn.Linear(16, 6)), (3, 2, 6, 6), 1),
    "three dimensions": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.MaxPool3d(2), nn.Flatten(), nn.LazyLinear(6)),
        (2, 1, 3, 5, 5), 1),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6)), (4, 6), 2),
    "batch norm in evaluation": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9).eval(), nn.Linear(9, 6)), (4, 6), 2),
    "group norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 6)), (4, 2, 3), 1),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.Tanh(), nn.Flatten(),
                              nn.Linear(12, 6)), (4, 2, 3), 1),
    "rms norm": (lambda: nn.Sequential(nn.Linear(6, 9), nn.RMSNorm(9), nn.Linear(9, 6)), (4, 6), 2),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 9)), nn.Linear(9, 6)).eval(),
        (4, 6), 1),
    "lstm": (lambda: Parts(lambda s, x: s.a(x)[0], a=nn.LSTM(6, 6, batch_first=True)), (2, 3, 6), None),
    "recurrent, both directions": (
        lambda: Parts(lambda s, x: s.b(s.a(x)[1][-1]), a=nn.RNN(6, 5, bidirectional=True, batch_first=True),
                      b=nn.Linear(5, 6)), (2, 3, 6), 3),
    "lstm cell over time": (
        lambda: Parts(lambda s, x: s.a(x[:, 1], s.a(x[:, 0]))[0], a=nn.LSTMCell(6, 6)), (3, 2, 6), 0),
    "attention, SDPA": (
        lambda: Parts(lambda s, x: nn.functional.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x)),
                      q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6)), (2, 5, 6), 3),
    "attention, by hand": (
        lambda: Parts(lambda s, x: (s.q(x) @ s.k(x).mT).softmax(-1) @ s.v(x),
                      q=nn.Linear(6, 6), k=nn.Linear(6, 6), v=nn.Linear(6, 6)), (2, 5, 6), 3),
    "attention module": (
        lambda: Parts(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)), (2, 5, 6), 2),
    "decoder layer": (lambda: Parts(lambda s, x: s.a(x, x), a=nn.TransformerDecoderLayer(**ATTENTION)), (2, 5, 6), 5),
    "embedding tied to the output": (
        lambda: Parts(lambda s, x: s.a((x > 0).long()).mean(1) @ s.a.weight.T @ s.b.weight, a=nn.Embedding(2, 5),
                      b=nn.Linear(6, 2, bias=False)), (4, 6), 0),
    "bag of embeddings": (
        lambda: Parts(lambda s, x: s.b(s.a((x > 0).long())), a=nn.EmbeddingBag(2, 5), b=nn.Linear(5, 6)), (4, 6), 1),
    "weights shared by two layers": (
        lambda: Parts(lambda s, x: nn.functional.linear(s.a(x).tanh(), s.a.weight, s.b.bias), a=nn.Linear(6, 6),
                      b=nn.Linear(1, 6)), (4, 6), 0),
    "bilinear": (lambda: Parts(lambda s, x: s.a(x, x), a=nn.Bilinear(6, 6, 6)), (4, 6), 0),
    "einsum": (
        lambda: Parts(lambda s, x: torch.einsum("ni,oi->no", x, s.a.weight) + s.a.bias, a=nn.Linear(6, 6)), (4, 6), 0),
    "mixture of experts": (
        lambda: Parts(lambda s, x: s.g(x).softmax(-1)[:, :1] * s.a(x) + s.g(x)[:, 1:] * s.b(x), a=mlp(6, 6),
                      b=mlp(6, 6), g=nn.Linear(6, 2)), (4, 6), 2),
    "in place on the features": (
        lambda: Parts(lambda s, x: s.a(x).mul_(2).add_(1).clamp_(-1, 1), a=nn.Linear(6, 6)), (4, 6), 1),
    "custom function": (lambda: Parts(lambda s, x: Cube.apply(s.a(x)), a=nn.Linear(6, 6)), (4, 6), 1),
    "custom function on the weight": (
        lambda: Parts(lambda s, x: nn.functional.linear(x, Cube.apply(s.a.weight), s.a.bias), a=nn.Linear(6, 6)),
        (4, 6), 0),
    "complex in between": (
        lambda: Parts(lambda s, x: s.b(torch.fft.rfft(s.a(x)).abs()), a=nn.Linear(6, 6), b=nn.Linear(4, 6)),
        (4, 6), 2),
    "complex parameter": (
        lambda: Parts(lambda s, x: s.a((torch.view_as_complex(s.w.weight) * x).abs()), a=nn.Linear(6, 6),
                      w=nn.Embedding(6, 2)), (4, 6), 1),
    "frozen weight": (
        lambda: Parts(lambda s, x: s.b(s.a(x)), a=mlp(6, 6).requires_grad_(False), b=mlp(6, 6)), (4, 6), 1),
}  # fmt: skip


def grads(
    trunk: nn.Module, heads: nn.ModuleList, x: Tensor, method: Any, engine: str, **options: Any
) -> tuple[detente.Update, list[Tensor | None]]:
    torch.manual_seed(1)
    parameters = [*trunk.parameters(), *heads.parameters()]
    for p in parameters:
        p.grad = None
    h = trunk(x)
    losses = {str(t): (head(h) - t).square().mean() for t, head in enumerate(heads)}
    update = detente.backward(losses, method, engine=engine, **options)
    return update, [p.grad for p in parameters]


def problem(name: str, dtype: torch.dtype, tasks: int = 3) -> tuple[nn.Module, nn.ModuleList, Tensor, int | None]:
    torch.manual_seed(0)
    build, shape, count = TRUNKS[name]
    trunk = build().to(dtype)
    return trunk, nn.ModuleList(nn.Linear(6, 2) for _ in range(tasks)).to(dtype), torch.randn(shape, dtype=dtype), count


def assert_close(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", TRUNKS)
def test_lean_is_serial(name, dtype):
    trunk, heads, x, count = problem(name, dtype)
    for method in METHODS:
        lean, mine = grads(trunk, heads, x, method, "lean")
        serial, theirs = grads(trunk, heads, x, method, "serial")
        assert count is None or lean.stats["products"] == count
        assert serial.stats["products"] == 0
        tolerance = CLOSE[dtype]
        torch.testing.assert_close(
            lean.gramian, serial.gramian, rtol=tolerance, atol=tolerance * float(serial.gramian.diagonal().max())
        )
        # a solver may enlarge the rounding of the Gramian by its condition
        assert_close(mine, theirs, 100 * tolerance)


@pytest.mark.parametrize("options", [{"granularity": "layer"}, {"source": detente.Sampled(1)}, {"scale": 1024.0}])
def test_with_every_option(options):
    trunk, heads, x, _ = problem("three layers", torch.float64, 4)
    found = []
    for engine in ("lean", "serial"):
        source = options.get("source")
        given = {**options, "source": detente.Sampled(source.n)} if source else options
        found.append(grads(trunk, heads, x, detente.CAGrad(), engine, **given))
    assert found[0][0].stats["products"] == 3
    assert_close(found[0][1], found[1][1], 1e-10)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (detente.CAGrad(), {"granularity": "channel"}),
        (detente.GradDrop(), {}),
        (detente.CAGrad(), {"source": "features"}),
    ],
    ids=["channels", "coordinates", "features"],
)
def test_what_needs_the_gradients_themselves_gets_them(method, options):
    trunk, heads, x, _ = problem("three layers", torch.float64)
    update, _ = grads(trunk, heads, x, method, "lean", **options)
    assert update.stats["products"] == 0


def test_a_task_without_gradient_is_left_out():
    trunk, heads, x, _ = problem("three layers", torch.float64)
    nn.init.zeros_(heads[1].weight)
    lean, mine = grads(trunk, heads, x, detente.CAGrad(), "lean")
    serial, theirs = grads(trunk, heads, x, detente.CAGrad(), "serial")
    assert lean.stats["dropped"] == serial.stats["dropped"] == ["1"]
    assert_close(mine, theirs, 1e-10)


def test_a_gradient_that_is_not_finite_makes_the_update_nan():
    trunk, heads, x, _ = problem("three layers", torch.float64)
    with torch.no_grad():
        heads[0].weight.fill_(1e200)
        heads[0].bias.fill_(-1e160)
    update, found = grads(trunk, heads, x, detente.CAGrad(), "lean", scale=2.0)
    assert update.stats["products"] == 3
    assert all(bool(g.isnan().all()) for g in found[:6])


def test_gradients_accumulate():
    trunk, heads, x, _ = problem("three layers", torch.float64)
    _, once = grads(trunk, heads, x, detente.CAGrad(), "lean")
    kept = [g.clone() for g in once]
    h = trunk(x)
    detente.backward([(head(h) - t).square().mean() for t, head in enumerate(heads)], detente.CAGrad(), engine="lean")
    for p, g in zip([*trunk.parameters(), *heads.parameters()], kept, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("samples", "width", "expected"), [(4, 600, 2), (2000, 600, 0), (4, 8, 0)])
def test_auto_keeps_products_where_the_batch_is_small_beside_the_layer(samples, width, expected):
    heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(2))
    update, _ = grads(mlp(width, width, width), heads, torch.randn(samples, width), detente.CAGrad(), "auto")
    assert update.stats["products"] == expected


def test_an_unknown_engine_is_an_error_before_anything_is_written():
    trunk, heads, x, _ = problem("one layer", torch.float64)
    with pytest.raises(ValueError, match="engine must be"):
        grads(trunk, heads, x, detente.CAGrad(), "fast")
    assert all(p.grad is None for p in trunk.parameters())
