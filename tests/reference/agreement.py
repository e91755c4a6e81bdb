"""When two updates agree in float64, and why not more closely."""

from __future__ import annotations

import numpy as np

from reference.geometry import Array

EPS = float(np.finfo(np.float64).eps)


def conditioning(reference: float, terms: float, T: int) -> float:
    """What a rule that only sees G = J J^T in float64 can know of a vector, given the length of the terms it adds up.

    Entries of G are rounded at eps n_i n_j, so ||d||^2 = a^T G a carries an error of about noise = 16 T eps times
    terms^2. The vector is then known to noise * terms^2 / ||d||, and never worse than to sqrt(noise) * terms, however
    much cancels.
    """
    noise = 16 * T * EPS
    return min(np.sqrt(noise) * terms, noise * terms**2 / max(reference, 1e-300))


def assert_agrees(actual, reference, *, terms: float, T: int) -> None:
    """Within 1e-8 of the longer of both, plus the conditioning where the terms cancel."""
    a, r = np.asarray(actual, dtype=float), np.asarray(reference, dtype=float)
    assert a.shape == r.shape
    assert np.isfinite(a).all()
    longer = max(np.linalg.norm(a), np.linalg.norm(r))
    error = np.linalg.norm(a - r)
    allowed = 1e-8 * longer + conditioning(float(np.linalg.norm(r)), terms, T)
    assert error <= allowed, f"off by {error:.2e} of {longer:.2e} (terms {terms:.2e}); allowed {allowed:.2e}"


def nearest(actual, candidates: Array) -> Array:
    """The candidate closest to a result, for rules whose outcome depends on a random order."""
    return candidates[np.argmin(np.linalg.norm(candidates - np.asarray(actual), axis=1))]
