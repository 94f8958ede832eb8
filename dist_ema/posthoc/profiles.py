"""How much each step weighs in a power-function average, and which sum of averages fits another.

[Note: profiles]
Count the updates of an average k = 1, 2, ..., n, and let a = gamma + 1. The decay ((k - 1) / k)^a
(arXiv 2312.02696, eq. 127, with `update_every` steps to a count) keeps, of what update k brought,

    w_n(k) = (1 - ((k - 1) / k)^a) * product over j = k+1..n of ((j - 1) / j)^a
           = (k^a - (k - 1)^a) / n^a

since the product telescopes: the weights up to k add up to (k / n)^a, and all of them to 1. This is
exactly the integral of the paper's continuous profile, a * tau^gamma / n^a (eq. 2), over each unit
interval. Weights between two updates, and those before the first, have no part in the average.
So a profile is exact for any `start_step` and `update_every`, with
n = (step - start_step) // update_every.

[Note: the fit]
Find coefficients x_i of the stored profiles p_i so that sum x_i p_i is as close as possible to a
profile q that was not stored (section 3.2 of the paper). The paper solves the normal equations.
Their matrix has a closed form in the continuous case: with m = min(n_i, n_j),

    <p_i, p_j> = a_i a_j / (a_i + a_j - 1) * (m / n_i)^a_i * (m / n_j)^a_j / m

Here the same least squares is solved from the weights themselves, which is exact for few steps too
and does not square the condition number. It is cheap, because between two stored counts every
profile is a multiple of one of few functions of k, one for each gamma: a QR of these makes as many
rows of an interval as there are gammas. Beyond 2^16 steps an interval's sum is taken by Gauss
quadrature; that weighs errors a little differently (by 1e-8) and rounds no profile.

Two things are added to the paper's problem.

    sum x_i = 1         Each profile sums to 1 and so must the result, else a part of the weights
                        themselves is missing, which are larger than their changes: on random walks
                        it makes the error 4 to 40 times smaller, and the residual hardly larger.
    + (noise |x|)^2     Stored averages are rounded, and near-collinear profiles (widths or steps
                        close together) fit with large numbers of both signs, which amplify that.
                        `noise` is what rounding does to a stored number, relative to its size.

A profile that is stored is taken as it is, so that a stored width comes back in the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_EXACT = 1 << 16  # counts that are summed one by one
_NODES = 64  # of a quadrature; intervals with fewer counts are summed one by one
_SHARPEST = 1e4  # exponent to which quadrature is sharp


@dataclass(frozen=True, slots=True)
class Profile:
    """A power-function average after its updates."""

    gamma: float  # above -1
    count: int  # updates, at least 1


@dataclass(frozen=True, slots=True)
class Fit:
    """A sum of stored profiles that is near to a wanted one."""

    coefficients: tuple[float, ...]  # one for each stored profile; they add up to 1
    residual: float  # norm of what is left of the wanted profile, relative to the profile's


def weights(profile: Profile, counts: Array) -> Array:
    """What the updates of these numbers weigh in an average, by [Note: profiles]."""
    exponent, n = profile.gamma + 1, profile.count
    with np.errstate(divide="ignore"):  # the first update: log 0, which is right
        lost = -np.expm1(exponent * np.log1p(-1 / counts))
    risen = np.exp(exponent * np.log(np.minimum(counts / n, 1.0)))
    result: Array = np.where(counts <= n, risen * lost, 0.0)
    return result


def fit(stored: Sequence[Profile], wanted: Sequence[Profile], noise: float) -> list[Fit]:
    """Fit each wanted profile by a sum of the stored ones.

    Takes 0.1 s for 200 stored profiles over a million steps, and little more for any number.

    Args:
        wanted: profiles whose count is not above the largest that is stored.
        noise: relative error of the stored numbers, above 0: the epsilon of their dtype.
    """
    rows = np.concatenate(list(_rows([*stored, *wanted])))
    columns, targets = rows[:, : len(stored)], rows[:, len(stored) :]
    # What is left to choose when the numbers add up to 1, in an orthonormal basis. Even numbers are
    # orthogonal to it, so that the noise of x is theirs and that of the choice, apart.
    even = np.full(len(stored), 1 / len(stored))
    basis = np.asarray(np.linalg.qr(even[:, None], mode="complete")[0])[:, 1:]
    left, scale, right = np.linalg.svd(columns @ basis, full_matrices=False)
    fits = []
    for profile, target in zip(wanted, targets.T, strict=True):
        if profile in stored:
            taken = stored.index(profile)
            fits.append(Fit(tuple(float(i == taken) for i in range(len(stored))), 0.0))
            continue
        size = np.linalg.norm(target)
        part = scale / (scale**2 + (noise * size) ** 2) * (left.T @ (target - columns @ even))
        x = even + basis @ (right.T @ part)
        residual = float(np.linalg.norm(columns @ x - target) / size)
        fits.append(Fit(tuple(map(float, x)), residual))
    return fits


def _rows(profiles: Sequence[Profile]) -> Iterator[Array]:
    """A matrix with a column for each profile, whose inner products are those of the profiles."""
    gammas = sorted({profile.gamma for profile in profiles})
    start = 0
    for stop in sorted({profile.count for profile in profiles}):
        counts, shares = _nodes(start, stop, gammas[-1] + 1)
        every = [weights(Profile(gamma, stop), counts) * np.sqrt(shares) for gamma in gammas]
        reduced: Array = np.asarray(np.linalg.qr(np.stack(every, axis=1), mode="r"))
        block = np.zeros((len(reduced), len(profiles)))
        for i, profile in enumerate(profiles):
            if profile.count >= stop:
                later = (stop / profile.count) ** (profile.gamma + 1)
                block[:, i] = reduced[:, gammas.index(profile.gamma)] * later
        yield block
        start = stop


def _nodes(start: int, stop: int, exponent: float) -> tuple[Array, Array]:
    """Numbers of updates in (start, stop], and how many updates each stands for."""
    counts, shares = [], []
    if start < _EXACT:
        middle = min(stop, _EXACT)
        counts.append(np.arange(start + 1, middle + 1, dtype=np.float64))
        shares.append(np.ones(middle - start))
        start = middle
    nodes, parts = _gauss()
    while start < stop:  # in steps within which no profile changes by more than exp(16) or so
        step = max(_NODES, int(start * min(1.0, 16 / min(exponent, _SHARPEST))))
        end = min(stop, start + step)
        if end - start <= _NODES:
            counts.append(np.arange(start + 1, end + 1, dtype=np.float64))
            shares.append(np.ones(end - start))
        else:
            counts.append(start + 0.5 + (end - start) * (nodes + 1) / 2)
            shares.append(parts * (end - start) / 2)
        start = end
    return np.concatenate(counts), np.concatenate(shares)


@functools.cache
def _gauss() -> tuple[Array, Array]:
    return np.polynomial.legendre.leggauss(_NODES)
