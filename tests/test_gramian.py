"""Gramians, cosines, and how parameters split into blocks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from detente.gramian import Partition, cosines, gramian


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("columns", [0, 1, 5, 43_689, 43_690, 43_691, 150_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gramian_is_accumulated_in_float64(columns, dtype):
    rows = randn(3, columns).to(dtype)
    G = gramian(rows)
    assert (G.dtype, G.shape) == (torch.float64, (3, 3))
    wide = rows.double()
    # float64 rounding of up to 1e5 terms of order 1
    torch.testing.assert_close(G, wide @ wide.T, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 12, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gramian_of_separate_rows_and_of_two_matrices(count, dtype):
    rows, others = randn(count, 40_000).to(dtype), randn(count, 40_000, seed=1).to(dtype)
    # one rounding in float64 per term
    torch.testing.assert_close(gramian(rows), rows.double() @ rows.double().T, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(gramian(list(rows)), rows.double() @ rows.double().T, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(gramian(rows, others), rows.double() @ others.double().T, rtol=1e-11, atol=1e-9)
    assert torch.equal(gramian(list(rows)), gramian(list(rows)).T)


def test_gramian_does_not_lose_a_small_task():
    rows = torch.tensor([[1e18, 1e18], [1e-18, -1e-18]], dtype=torch.float32)
    G = gramian(rows)
    assert float(G[1, 1]) == pytest.approx(2e-36)
    assert float(G[0, 0]) == pytest.approx(2e36)
    # the products cancel to the rounding of 1e18 and 1e-18 in float32
    assert abs(float(G[0, 1])) < 1e-7


def test_gramian_does_not_overflow_where_float32_would():
    assert float(gramian(torch.full((1, 4), 1e30))[0, 0]) == pytest.approx(4e60)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gramian_shows_entries_that_are_not_finite(value):
    rows = randn(2, 5).float()
    rows[1, 3] = value
    G = gramian(rows)
    assert not bool(G[1, 1].isfinite())
    assert bool(G[0, 0].isfinite())


def test_gramian_of_a_strided_view():
    rows = randn(8, 6)[::2, ::3].float()
    torch.testing.assert_close(gramian(rows), rows.double() @ rows.double().T, rtol=1e-12, atol=1e-12)


def test_cosines():
    J = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.0, 0.0], [1e-8, 1e-8]], dtype=torch.float64)
    C = cosines(J @ J.T)
    half = 0.5**0.5
    wanted = [[1, 0, -1, 0, half], [0, 1, 0, 0, half], [-1, 0, 1, 0, -half], [0, 0, 0, 0, 0], [half, half, -half, 0, 1]]
    torch.testing.assert_close(C, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-15)


def test_cosines_of_blocks_stay_within_one():
    J = randn(50, 4, 3) * torch.logspace(-8, 8, 4, dtype=torch.float64)[:, None]
    C = cosines(J @ J.transpose(1, 2))
    assert C.shape == (50, 4, 4)
    assert float(C.abs().max()) <= 1
    torch.testing.assert_close(C.diagonal(dim1=1, dim2=2), torch.ones(50, 4, dtype=torch.float64), rtol=0, atol=1e-14)


PARAMETERS = [torch.zeros(3, 2), torch.zeros(()), torch.zeros(4), torch.zeros(0, 5), torch.zeros(2, 3, 1, 1)]


def blocks(partition: Partition) -> list[list[int]]:
    """Block of every slice, per parameter."""
    return [index.reshape(-1).tolist() for _, index in partition.members]


def test_partitions():
    assert (Partition.by_model(PARAMETERS).count, blocks(Partition.by_model(PARAMETERS))) == (1, [[0]] * 5)
    assert (Partition.by_layer(PARAMETERS).count, blocks(Partition.by_layer(PARAMETERS))) == (
        5,
        [[0], [1], [2], [3], [4]],
    )
    channel = Partition.by_channel(PARAMETERS)
    assert (channel.count, blocks(channel)) == (10, [[0, 1, 2], [3], [4, 5, 6, 7], [], [8, 9]])
    assert [dims for dims, _ in channel.members] == [(0,), (), (0,), (0,), (0,)]
    assert all(index.dtype == torch.int64 for _, index in channel.members)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 11, 23])
@pytest.mark.parametrize("columns", [0, 1, 16_383, 16_384, 40_000])
def test_compiled_products_of_float32(count, columns):
    pytest.importorskip("numba")
    rows = randn(count, columns).float()
    wanted = rows.double() @ rows.double().T
    for form in (rows, list(rows), rows.T.contiguous().T):  # the last one is not laid out for the compiled loops
        # rounding in float64 of sums of up to 2e4 terms
        torch.testing.assert_close(gramian(form), wanted, rtol=1e-11, atol=1e-9)


def test_without_numba_the_result_is_the_same():
    rows = randn(6, 30_000).float()
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, detente\n"
        "rows = torch.randn((6, 30_000), generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()\n"
        "print('detente.compiled' in sys.modules, detente.gramian.gramian(rows).sum().item())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert output[0] == "False"
    assert float(output[1]) == pytest.approx(float(gramian(rows).sum()), rel=1e-12)
