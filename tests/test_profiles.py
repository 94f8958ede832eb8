"""What steps weigh in an average, and how well sums of averages fit another: by brute force."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest

from dist_ema import PowerFunction
from dist_ema.posthoc.profiles import Fit, Profile, fit, weights

NARROW, WIDE = PowerFunction(sigma_rel=0.05), PowerFunction(sigma_rel=0.10)
OTHERS = [PowerFunction(sigma_rel=s) for s in (0.04, 0.07, 0.15, 0.2)]
FP32 = 2.0**-23


def pair(counts: Sequence[int], schedules: Sequence[PowerFunction] = (NARROW, WIDE)):
    return [Profile(schedule.gamma, n) for n in counts for schedule in schedules]


def evenly(total: int, num: int) -> list[int]:
    return [total * (i + 1) // num for i in range(num)]


@pytest.mark.parametrize("gamma", [-0.9, 0.0, 1.3, 6.94, 16.97, 400.0])
@pytest.mark.parametrize("every", [1, 7])
def test_a_profile_is_what_the_updates_make_of_it(gamma: float, every: int):
    schedule = PowerFunction(gamma)
    made = np.zeros(300)
    for k in range(1, 301):
        decay = schedule(k * every, every)
        made *= decay
        made[k - 1] = 1 - decay
        if k in (1, 2, 37, 300):
            found = weights(Profile(gamma, k), np.arange(1, 301.0))
            np.testing.assert_allclose(found, made, rtol=1e-9, atol=1e-15)
            assert abs(found.sum() - 1) < 1e-12


def test_the_profile_is_the_papers_summed_over_unit_intervals():
    """Its inner products near the closed form, as the steps become small beside their number."""
    (a, n), (b, m) = (NARROW.gamma + 1, 60_000), (WIDE.gamma + 1, 45_000)
    counts = np.arange(1, 60_001.0)
    first, second = weights(Profile(a - 1, n), counts), weights(Profile(b - 1, m), counts)
    less = min(n, m)
    continuous = a * b / (a + b - 1) * (less / n) ** a * (less / m) ** b / less
    assert abs(first @ second / continuous - 1) < 1e-5


@pytest.mark.parametrize(
    ("counts", "tolerance"),
    [
        ([5, 9, 30], {"abs": 1e-7}),
        ([40, 41, 400], {"abs": 1e-7}),
        ([400], {"abs": 1e-7}),
        (evenly(400, 8), {"abs": 1e-7}),
        (evenly(100_000, 8), {"rel": 1e-5, "abs": 0}),  # sums are taken by quadrature
        (evenly(300_000, 8), {"rel": 1e-5, "abs": 0}),
    ],
    ids=str,
)
def test_a_fit_is_the_best_one(counts: list[int], tolerance: dict[str, float]):
    """Against one of whole vectors, by a multiplier for the sum and no noise."""
    stored, steps = pair(counts), np.arange(1, counts[-1] + 1.0)
    wanted = [Profile(schedule.gamma, counts[-1]) for schedule in OTHERS]
    columns = np.stack([weights(p, steps) for p in stored], axis=1)
    ones = np.ones((len(stored), 1))
    system = np.block([[columns.T @ columns, ones], [ones.T, np.zeros((1, 1))]])
    for profile, found in zip(wanted, fit(stored, wanted, 1e-9), strict=True):
        target = weights(profile, steps)
        x = np.linalg.solve(system, np.concatenate([columns.T @ target, [1.0]]))[:-1]
        size = np.linalg.norm(target)
        assert abs(sum(found.coefficients) - 1) < 1e-9
        assert np.linalg.norm(columns @ (x - found.coefficients)) / size < 1e-6
        residual = np.linalg.norm(columns @ x - target) / size
        assert found.residual == pytest.approx(residual, **tolerance)


def test_a_stored_profile_is_taken_as_it_is():
    stored = pair(evenly(1000, 10))
    for profile in stored[-2:]:
        (found,) = fit(stored, [profile], FP32)
        assert found == Fit(tuple(float(p == profile) for p in stored), 0.0)


def test_the_residual_falls_with_snapshots():
    for schedule in OTHERS:
        wanted = Profile(schedule.gamma, 6400)
        residuals = [fit(pair(evenly(6400, n)), [wanted], FP32)[0].residual for n in (4, 8, 16, 32)]
        assert all(b < 0.6 * a for a, b in itertools.pairwise(residuals)), residuals
        assert residuals[2] < 0.03


def test_two_hundred_profiles_of_a_million_steps_are_fitted_in_seconds():
    for total in (10**6, 10**15):
        stored = pair(evenly(total, 100))
        begun = time.monotonic()
        found = fit(stored, [Profile(schedule.gamma, total) for schedule in OTHERS], FP32)
        assert time.monotonic() - begun < 10
        assert max(one.residual for one in found) < 1e-3


def test_profiles_close_together_do_not_amplify_rounding():
    near = [PowerFunction(sigma_rel=s) for s in (0.0999999, 0.1, 0.1000001)]
    stored = pair(evenly(1600, 16), near) + pair([1599, 1598, 1597], near)
    (found,) = fit(stored, [Profile(OTHERS[1].gamma, 1600)], 2.0**-7)
    assert np.linalg.norm(found.coefficients) < 4
    (sharp,) = fit(stored, [Profile(OTHERS[1].gamma, 1600)], 1e-15)
    assert np.linalg.norm(sharp.coefficients) > 100  # else there was nothing to be afraid of
    assert sharp.residual < found.residual
