"""Products of large task gradients, compiled by numba: ``pip install 'detente[fast]'``.

NumPy and PyTorch take them through a copy in float64, or with routines made for square matrices. These loops read the
gradients once, at the speed of memory for a few tasks, and convert them in registers. They are compiled on first use
and kept on disk for later processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import float64, njit
from numpy.typing import NDArray

__all__ = ["gramian"]

Array = NDArray[Any]

Function = TypeVar("Function", bound=Callable[..., Any])


def _compile(function: Function) -> Function:
    # sums may be taken in any order, but what is not finite stays so
    fast = {"reassoc", "contract", "nsz"}
    compiled = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath=fast)(function)
    return cast("Function", compiled)


@_compile
def gramian(rows: Any) -> Array:
    """Inner products ``[T, T]`` of rows, summed in float64.

    Args:
        rows: ``[T, P]``, or a tuple of T arrays ``[P]``.
    """
    count, length = len(rows), len(rows[0])
    size = 3 if count <= 3 else 5
    total = np.zeros((count, count))
    found = np.empty((size, size))
    for start in range(0, length, _COLUMNS):
        stop = min(start + _COLUMNS, length)
        for i in range(0, count, size):
            for j in range(0, i + 1, size):
                if size == 3:
                    _three(rows, i, j, start, stop, found)
                else:
                    _five(rows, i, j, start, stop, found)
                high, wide = min(size, count - i), min(size, count - j)
                total[i : i + high, j : j + wide] += found[:high, :wide]
    for i in range(count):
        for j in range(i):
            total[j, i] = total[i, j]
    return total


_COLUMNS = 16384  # at a time, which the cache holds


@_compile
def _three(rows: Any, i: int, j: int, start: int, stop: int, found: Array) -> None:
    """The products of three rows, from i on, with three, from j on; the last row stands in for those beyond it."""
    last = len(rows) - 1
    a = rows[i][start:stop]
    b = rows[min(i + 1, last)][start:stop]
    c = rows[min(i + 2, last)][start:stop]
    v = rows[j][start:stop]
    w = rows[min(j + 1, last)][start:stop]
    x = rows[min(j + 2, last)][start:stop]
    av = aw = ax = 0.0
    bv = bw = bx = 0.0
    cv = cw = cx = 0.0
    for k in range(stop - start):
        ak, bk, ck = float64(a[k]), float64(b[k]), float64(c[k])
        vk, wk, xk = float64(v[k]), float64(w[k]), float64(x[k])
        av += ak * vk
        aw += ak * wk
        ax += ak * xk
        bv += bk * vk
        bw += bk * wk
        bx += bk * xk
        cv += ck * vk
        cw += ck * wk
        cx += ck * xk
    found[0, 0], found[0, 1], found[0, 2] = av, aw, ax
    found[1, 0], found[1, 1], found[1, 2] = bv, bw, bx
    found[2, 0], found[2, 1], found[2, 2] = cv, cw, cx


@_compile
def _five(rows: Any, i: int, j: int, start: int, stop: int, found: Array) -> None:
    """The products of five rows, from i on, with five, from j on; the last row stands in for those beyond it."""
    last = len(rows) - 1
    a = rows[i][start:stop]
    b = rows[min(i + 1, last)][start:stop]
    c = rows[min(i + 2, last)][start:stop]
    d = rows[min(i + 3, last)][start:stop]
    e = rows[min(i + 4, last)][start:stop]
    v = rows[j][start:stop]
    w = rows[min(j + 1, last)][start:stop]
    x = rows[min(j + 2, last)][start:stop]
    y = rows[min(j + 3, last)][start:stop]
    z = rows[min(j + 4, last)][start:stop]
    av = aw = ax = ay = az = 0.0
    bv = bw = bx = by = bz = 0.0
    cv = cw = cx = cy = cz = 0.0
    dv = dw = dx = dy = dz = 0.0
    ev = ew = ex = ey = ez = 0.0
    for k in range(stop - start):
        ak, bk, ck, dk, ek = float64(a[k]), float64(b[k]), float64(c[k]), float64(d[k]), float64(e[k])
        vk, wk, xk, yk, zk = float64(v[k]), float64(w[k]), float64(x[k]), float64(y[k]), float64(z[k])
        av += ak * vk
        aw += ak * wk
        ax += ak * xk
        ay += ak * yk
        az += ak * zk
        bv += bk * vk
        bw += bk * wk
        bx += bk * xk
        by += bk * yk
        bz += bk * zk
        cv += ck * vk
        cw += ck * wk
        cx += ck * xk
        cy += ck * yk
        cz += ck * zk
        dv += dk * vk
        dw += dk * wk
        dx += dk * xk
        dy += dk * yk
        dz += dk * zk
        ev += ek * vk
        ew += ek * wk
        ex += ek * xk
        ey += ek * yk
        ez += ek * zk
    found[0, 0], found[0, 1], found[0, 2], found[0, 3], found[0, 4] = av, aw, ax, ay, az
    found[1, 0], found[1, 1], found[1, 2], found[1, 3], found[1, 4] = bv, bw, bx, by, bz
    found[2, 0], found[2, 1], found[2, 2], found[2, 3], found[2, 4] = cv, cw, cx, cy, cz
    found[3, 0], found[3, 1], found[3, 2], found[3, 3], found[3, 4] = dv, dw, dx, dy, dz
    found[4, 0], found[4, 1], found[4, 2], found[4, 3], found[4, 4] = ev, ew, ex, ey, ez
