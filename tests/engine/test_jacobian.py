"""Rows of J: written once, read for the Gramian and for the update, against dense float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detente.engine.jacobian import Jacobian
from detente.gramian import Partition

EXACT = {"rtol": 0, "atol": 0}
TIGHT = {"rtol": 1e-12, "atol": 1e-13}  # float64 rounding of sums of a few dozen terms


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# shapes and dtypes of the parameters of a model, mixed as awkwardly as they come
MODELS = {
    "plain": [randn(4, 3), randn(4)],
    "scalar and empty": [randn(), randn(0, 3), randn(2, 5), randn(3, 0)],
    "convolutions": [randn(4, 3, 2, 2), randn(4), randn(2, 4, 3)],
    "channels last": [randn(4, 3, 2, 2).to(memory_format=torch.channels_last), randn(4, 6).T],
    "dtypes": [randn(3, 2), randn(4, dtype=torch.float32), randn(5), randn(2, 2).bfloat16(), randn(3).half()],
    "complex": [randn(4), torch.complex(randn(3, 2), randn(3, 2, seed=1)), randn(2, 2)],
    "complex after an odd number": [randn(3), torch.complex(randn(2), randn(2, seed=1))],
    "complex64": [torch.complex(randn(3), randn(3)).to(torch.complex64), randn(2, dtype=torch.float32)],
}
T = 3


def gradients(parameters: list[Tensor], row: int) -> list[Tensor | None]:
    result: list[Tensor | None] = []
    for k, p in enumerate(parameters):
        real = randn(*p.shape, seed=100 + 10 * row + k)
        if p.is_complex():
            result.append(torch.complex(real, randn(*p.shape, seed=200 + 10 * row + k)).to(p.dtype))
        else:
            result.append(real.to(p.dtype))
    return result


def flat(g: Tensor) -> Tensor:
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).reshape(-1).double()


def filled(parameters: list[Tensor]) -> tuple[Jacobian, list[list[Tensor]]]:
    jacobian = Jacobian(parameters, T)
    rows = [gradients(parameters, t) for t in range(T)]
    for t, row in enumerate(rows):
        jacobian.write(t, row)
    return jacobian, rows


@pytest.mark.parametrize("model", MODELS)
def test_gramian_of_the_model(model):
    jacobian, rows = filled(MODELS[model])
    J = torch.stack([torch.cat([flat(g) for g in row]) for row in rows])
    G = jacobian.gramian(Partition.by_model(MODELS[model]))
    assert (G.shape, G.dtype) == ((1, T, T), torch.float64)
    torch.testing.assert_close(G[0], J @ J.T, **TIGHT)


@pytest.mark.parametrize("model", MODELS)
def test_gramians_of_the_layers_and_channels(model):
    parameters = MODELS[model]
    jacobian, rows = filled(parameters)
    layers = jacobian.gramian(Partition.by_layer(parameters))
    for k in range(len(parameters)):
        J = torch.stack([flat(row[k]) for row in rows])
        torch.testing.assert_close(layers[k], J @ J.T, **TIGHT)
    channels = jacobian.gramian(Partition.by_channel(parameters))
    wanted = []
    for k, p in enumerate(parameters):
        for i in range(len(p)) if p.dim() else [...]:
            J = torch.stack([flat(row[k][i]) for row in rows])
            wanted.append(J @ J.T)
    torch.testing.assert_close(channels, torch.stack(wanted), **TIGHT)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_combine(model, granularity):
    parameters = MODELS[model]
    jacobian, rows = filled(parameters)
    partition = getattr(Partition, f"by_{granularity}")(parameters)
    weights = randn(partition.count, T, seed=7)
    updates = jacobian.combine(weights, partition)
    block = 0
    for k, (p, update) in enumerate(zip(parameters, updates, strict=True)):
        assert (update.shape, update.dtype) == (p.shape, p.dtype)
        if granularity == "channel" and p.dim():
            shape = (len(p), *[1] * (p.dim() - 1))
            w = [weights[block : block + len(p), t].reshape(shape) for t in range(T)]
            block += len(p)
        else:
            w = [weights[block, t] for t in range(T)]
            block += granularity != "model"
        wide = torch.complex128 if p.is_complex() else torch.float64
        wanted = sum(w[t] * rows[t][k].to(wide) for t in range(T))
        eps = torch.finfo(p.dtype).eps
        # coefficients and result are rounded to the parameter's dtype; entries are of order 1 to 10
        torch.testing.assert_close(update.to(wide), wanted, rtol=0, atol=max(40 * eps, 1e-13))


def test_missing_gradients_are_zero_rows_whatever_was_in_the_buffer():
    parameters = [randn(2, 3), randn(4, dtype=torch.float32), randn(2)]
    jacobian, rows = filled(parameters)
    jacobian.write(1, [None, rows[1][1], None])
    jacobian.write(2, [None, None, None])
    updates = jacobian.combine(torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64), Partition.by_model(parameters))
    torch.testing.assert_close(updates[0], torch.zeros(2, 3, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(updates[1], rows[1][1], **EXACT)
    torch.testing.assert_close(updates[2], torch.zeros(2, dtype=torch.float64), **EXACT)


def test_gradients_in_any_layout_are_written_by_their_indices():
    p = randn(2, 3, 4, 5)
    g = randn(2, 3, 4, 5, seed=3)
    for layout in (g, g.to(memory_format=torch.channels_last), g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        jacobian = Jacobian([p], 1)
        jacobian.write(0, [layout])
        (update,) = jacobian.combine(torch.ones(1, 1, dtype=torch.float64), Partition.by_model([p]))
        torch.testing.assert_close(update, g, **EXACT)


def test_lazily_conjugated_and_negated_gradients():
    p = torch.complex(randn(3), randn(3, seed=1))
    g = torch.complex(randn(3, seed=2), randn(3, seed=3))
    jacobian = Jacobian([p, randn(3)], 1)
    jacobian.write(0, [g.conj(), g.conj().imag])  # .imag of a conjugate is lazily negated
    first, second = jacobian.combine(torch.ones(1, 1, dtype=torch.float64), Partition.by_model(jacobian.parameters))
    torch.testing.assert_close(first, g.conj().resolve_conj(), **EXACT)
    torch.testing.assert_close(second, -g.imag, **EXACT)


def test_float32_rows_are_summed_in_float64():
    rows = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(0))
    jacobian = Jacobian([rows[0]], 2)
    for t in range(2):
        jacobian.write(t, [rows[t]])
    wide = rows.double()
    # float64 rounding of 3e5 terms; float32 sums would be off by 1e-5
    torch.testing.assert_close(jacobian.gramian(Partition.by_model([rows[0]]))[0], wide @ wide.T, rtol=1e-11, atol=1e-8)


def test_the_same_block_may_gather_slices_of_several_dimensions():
    """What connection strength asks for: blocks over (in, out) of a transposed convolution, and a parameter outside."""
    weight, bias = randn(4, 3, 2), randn(3)
    index = torch.tensor([[0, 1, 1], [0, 1, 1], [2, 2, 0], [2, 2, 0]])
    partition = Partition(3, (((0, 1), index), ((), torch.tensor(1))))
    jacobian, rows = filled([weight, bias])
    G = jacobian.gramian(partition)
    weights = randn(3, T, seed=5)
    updates = jacobian.combine(weights, partition)
    for b in range(3):
        J = torch.stack([torch.cat([row[0][index == b].reshape(-1), *([row[1]] if b == 1 else [])]) for row in rows])
        torch.testing.assert_close(G[b], J @ J.T, **TIGHT)
        wanted = sum(weights[b, t] * rows[t][0][index == b] for t in range(T))
        torch.testing.assert_close(updates[0][index == b], wanted, **TIGHT)
    torch.testing.assert_close(updates[1], sum(weights[1, t] * rows[t][1] for t in range(T)), **TIGHT)


def test_blocks_along_the_second_dimension():
    weight = randn(3, 4, 2)
    partition = Partition(2, (((1,), torch.tensor([0, 1, 1, 0])),))
    jacobian, rows = filled([weight])
    weights = randn(2, T, seed=5)
    (update,) = jacobian.combine(weights, partition)
    for b, columns in enumerate(([0, 3], [1, 2])):
        wanted = sum(weights[b, t] * rows[t][0][:, columns] for t in range(T))
        torch.testing.assert_close(update[:, columns], wanted, **TIGHT)
