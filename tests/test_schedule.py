"""Decay rules: exact values, composition, the numbers of other libraries, JSON, refusals."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import pickle
import re

import pytest

from dist_ema import schedule as schedules
from dist_ema.schedule import (
    BEMA,
    Constant,
    Cosine,
    EqualWeight,
    HalfLife,
    PowerFunction,
    Warmup,
    as_schedule,
    decay_at,
    from_json,
    to_json,
)

COMPOSING = [
    Constant(0.999),
    HalfLife(steps=700.5),
    PowerFunction(6.94),
    PowerFunction(-0.5),
    PowerFunction(sigma_rel=0.1),
    EqualWeight(),
]
ALL = [
    *COMPOSING,
    HalfLife(fraction=0.05),
    Warmup(0.9999),
    Warmup(0.9999, inv_gamma=1.0),
    Warmup(0.99, inv_gamma=3, power=0.75),
    Cosine(0.996, 1.0, total_steps=1000),
    Cosine(0.0, 0.999, 7),
    BEMA(),
    BEMA(lag=1, ema_power=1, min_ema_multiplier=0.25),
]
each = pytest.mark.parametrize("schedule", ALL, ids=repr)


def close(a, b, tolerance=1e-12):
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def average(schedule, live, start_step):
    """The library's counting in Python floats: the k-th update has t = k - start_step."""
    averaged, seen = 0.0, []
    for k, weight in enumerate(live, start=1):
        decay = decay_at(schedule, k - start_step, 1) if k > start_step else 0.0
        averaged = decay * averaged + (1 - decay) * weight
        seen.append(averaged)
    return seen


def test_formulas_at_values_worked_by_hand():
    assert Constant(0.5)(7, 3) == 0.125
    assert HalfLife(10)(99, 10) == 0.5
    assert Warmup(0.9999)(8, 1) == 0.5
    assert Warmup(0.4)(8, 2) == 0.4**2
    assert Warmup(0.9999, inv_gamma=1, power=1)(3, 1) == 0.75
    assert Warmup(0.9999, inv_gamma=2, power=0.5)(6, 2) == 0.25
    assert PowerFunction(1)(4, 2) == 0.25
    assert EqualWeight()(4, 1) == 0.75
    assert close(Cosine(0.5, 1.0, 10)(5, 1), 0.75)
    assert close(Cosine(0.5, 1.0, 10)(5, 2), 0.75**2)
    assert HalfLife(fraction=0.25)(40, 10) == 0.5
    assert BEMA()(15, 400) == 1 - 0.2 and close(BEMA().alpha(22), 0.5)
    assert BEMA(lag=1, ema_power=1, min_ema_multiplier=0.25)(99, 1) == 0.75


def test_warmup_reaches_the_landmarks_that_its_users_quote():
    # "0.999 at 31.6K steps, 0.9999 at 1M" for 2/3, "0.999 at 10K" for 3/4: rounded step counts.
    for power, t, left in ((2 / 3, 31_600, 1e-3), (2 / 3, 10**6, 1e-4), (0.75, 10**4, 1e-3)):
        assert 1 - Warmup(1.0, 1.0, power)(t, 1) == pytest.approx(left, rel=1e-3)
    # gamma = power = 1 gives t / (t + 1): the copied weights are the first of the t + 1 seen.
    for t in range(1, 50):
        assert close(Warmup(1.0, inv_gamma=1, power=1)(t, 1), EqualWeight()(t + 1, 1))


@each
def test_every_decay_is_a_float_in_0_1(schedule):
    for t in (1, 2, 3, 10, 999, 1000, 1001, 10**9):
        for delta in {1, min(2, t), t // 2 or 1, t}:
            decay = decay_at(schedule, t, delta)
            assert type(decay) is float and 0.0 <= decay <= 1.0


def test_cosine_never_rounds_out_of_its_range_and_is_exactly_end_from_total_steps_on():
    values = (0.0, 5e-324, 1e-17, 0.1, 0.7, 1 - 2**-53, 1.0)
    for start, end in itertools.product(values, values):
        for t in range(1, 102):
            assert 0.0 <= decay_at(Cosine(start, end, 101), t, 1) <= 1.0
        for t in (101, 102, 10**9):
            assert Cosine(start, end, 101)(t, 1) == end


def test_power_function_is_exactly_0_where_the_average_begins():
    for gamma in (math.nextafter(-1, 0), -0.5, 0, 0.3, 16.97, 1e6):
        for t in (1, 3, 10**9, 10**15):
            assert PowerFunction(gamma)(t, t) == 0.0


def test_equal_weight_is_the_power_function_of_exponent_0():
    assert EqualWeight() == PowerFunction(0) and hash(EqualWeight()) == hash(PowerFunction(0))
    live = [3.0, -1.0, 4.0, 1.0, -5.0]
    means = [sum(live[:k]) / k for k in range(1, 6)]
    assert all(map(close, average(EqualWeight(), live, start_step=0), means))


def test_power_function_weighs_step_s_by_its_profile():
    # Weight of step s after t steps: (s/t)^(g+1) - ((s-1)/t)^(g+1), the profile's mass in (s-1, s].
    gamma, t = 6.94, 40
    for s in range(1, t + 1):
        live = [float(k == s) for k in range(1, t + 1)]
        mass = (s / t) ** (gamma + 1) - ((s - 1) / t) ** (gamma + 1)
        assert close(average(PowerFunction(gamma), live, start_step=0)[-1], mass)


def test_small_differences_survive_at_huge_steps():
    t = 10**9
    assert 1 - EqualWeight()(t, 1) == pytest.approx(1e-9, rel=1e-6)
    assert EqualWeight()(t, t - 1) == 1e-9
    assert 1 - HalfLife(1e12)(t, 1) == pytest.approx(math.log(2) / 1e12, rel=1e-3)
    assert HalfLife(5e-324)(t, 1) == 0.0
    assert Constant(0.9)(t, t) == 0.0
    assert Warmup(0.9999, inv_gamma=5e-324)(t, 1) == 0.9999
    assert Cosine(0.5, 0.9, 5e-324)(t, 1) == 0.9


@pytest.mark.parametrize("schedule", COMPOSING, ids=repr)
def test_decay_over_a_span_is_the_product_of_its_steps(schedule):
    for t, delta in [(2, 2), (9, 2), (9, 9), (1000, 2), (1000, 37)]:
        steps = [schedule(s, 1) for s in range(t - delta + 1, t + 1)]
        assert close(schedule(t, delta), math.prod(steps))
        for cut in range(1, delta):
            parts = schedule(t - delta + cut, cut) * schedule(t, delta - cut)
            assert close(schedule(t, delta), parts)


@pytest.mark.parametrize("schedule", [Warmup(0.9999), Warmup(0.9999, 1.0), Cosine(0.9, 1.0, 500)])
def test_rising_schedules_raise_the_decay_at_t_to_delta_which_is_more_than_the_product(schedule):
    for t, delta in [(9, 2), (100, 10), (300, 50)]:
        product = math.prod(schedule(s, 1) for s in range(t - delta + 1, t + 1))
        assert schedule(t, delta) == schedule(t, 1) ** delta > product


def test_sigma_rel_is_solved_in_float64_and_gives_known_exponents():
    for sigma_rel in (1e-9, 1e-3, 0.05, 0.10, 0.15, 0.2, 0.25, 12**-0.5, 0.3):
        power = PowerFunction(sigma_rel=sigma_rel)
        g = power.gamma
        assert math.isclose(math.sqrt((g + 1) / (g + 3)) / (g + 2), sigma_rel, rel_tol=1e-14)
        assert math.isclose(power.sigma_rel, sigma_rel, rel_tol=1e-14)
    assert PowerFunction(sigma_rel=0.05).gamma == pytest.approx(16.97, abs=5e-3)
    assert PowerFunction(sigma_rel=0.10).gamma == pytest.approx(6.94, abs=5e-3)
    assert PowerFunction(sigma_rel=12**-0.5).gamma == pytest.approx(0.0, abs=1e-14)
    assert EqualWeight().sigma_rel == pytest.approx(12**-0.5, rel=1e-15)


def test_the_widest_profile_is_the_limit_and_the_larger_exponent_is_chosen():
    widest = max(PowerFunction(k / 1000 - 1).sigma_rel for k in range(1, 3000))
    assert PowerFunction(sigma_rel=widest).gamma == pytest.approx(-0.382, abs=2e-3)
    narrow = PowerFunction(-0.9)  # left of the maximum: the same width as a larger exponent
    assert PowerFunction(sigma_rel=narrow.sigma_rel).gamma > -0.382
    for sigma_rel in (0.3003, 0.5, 1.0, 0.0, -0.1, math.nan, math.inf, 5e-324):
        with pytest.raises(ValueError, match=r"PowerFunction: (sigma_rel|gamma) must be"):
            PowerFunction(sigma_rel=sigma_rel)


@each
def test_repr_json_pickle_and_copy_rebuild_the_schedule(schedule):
    stored = json.loads(json.dumps(to_json(schedule), allow_nan=False))
    rebuilt = [
        eval(repr(schedule), vars(schedules)),
        from_json(stored),
        pickle.loads(pickle.dumps(schedule)),
        copy.deepcopy(schedule),
    ]
    for other in rebuilt:
        assert type(other) is type(schedule)
        assert other == schedule and hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)


@each
def test_schedules_are_frozen_slotted_and_hold_floats(schedule):
    assert not hasattr(schedule, "__dict__")
    for field in dataclasses.fields(schedule):
        assert type(getattr(schedule, field.name)) in (float, type(None))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, field.name, 0.5)


def test_ints_are_stored_as_floats_and_equal_them():
    assert repr(Constant(1)) == "Constant(decay=1.0)"
    assert repr(HalfLife(700)) == "HalfLife(steps=700.0)"
    assert Cosine(0, 1, 10) == Cosine(0.0, 1.0, 10.0)
    assert repr(Warmup(1, 1, 1)) == "Warmup(decay=1.0, inv_gamma=1.0, power=1.0)"
    assert PowerFunction(7) == PowerFunction(gamma=7.0) != PowerFunction(6)


NOT_A_NUMBER = ["0.9", True, [0.9], 1j]
NOT_IN_0_1 = [-0.1, 1.1, math.nan, math.inf, -math.inf, 10**400, None, *NOT_A_NUMBER]
NOT_ABOVE_0 = [0, -1, math.nan, math.inf, 10**400, *NOT_A_NUMBER]
NOT_ABOVE_MINUS_1 = [-1, -1.000000001, -2, math.nan, math.inf, "1", True]
NEGATIVE = [-0.1, math.nan, math.inf, None, *NOT_A_NUMBER]
# A constructor of one value, which values it refuses, and what it wants.
REFUSED = [
    (Constant, NOT_IN_0_1, "in [0, 1]"),
    (Warmup, NOT_IN_0_1, "in [0, 1]"),
    (lambda v: Cosine(v, 1.0, 10), NOT_IN_0_1, "in [0, 1]"),
    (lambda v: Cosine(0.9, v, 10), NOT_IN_0_1, "in [0, 1]"),
    (lambda v: BEMA(min_ema_multiplier=v), NOT_IN_0_1, "in [0, 1]"),
    (HalfLife, [None, *NOT_ABOVE_0], "finite and above 0"),
    (lambda v: HalfLife(fraction=v), NOT_ABOVE_0, "finite and above 0"),
    (lambda v: Warmup(0.9, inv_gamma=v), NOT_ABOVE_0, "finite and above 0"),
    (lambda v: Warmup(0.9, 1.0, v), [None, *NOT_ABOVE_0], "finite and above 0"),
    (lambda v: Cosine(0.9, 1.0, v), [None, *NOT_ABOVE_0], "finite and above 0"),
    (lambda v: BEMA(multiplier=v), [None, *NOT_ABOVE_0], "finite and above 0"),
    (PowerFunction, NOT_ABOVE_MINUS_1, "finite and above -1"),
    *(
        (lambda v, name=name: BEMA(**{name: v}), NEGATIVE, "finite and at least 0")
        for name in ("ema_power", "bias_power", "lag")
    ),
]


@pytest.mark.parametrize(("make", "values", "wanted"), REFUSED)
def test_values_out_of_range_and_no_numbers_are_refused_by_name(make, values, wanted):
    for bad in values:
        with pytest.raises(
            ValueError, match=rf"^\w+: \w+ must be ({re.escape(wanted)}|a number), not "
        ):
            make(bad)


def test_arguments_that_contradict_each_other_or_have_no_effect_are_refused():
    for arguments in ({}, {"gamma": 1.0, "sigma_rel": 0.1}):
        with pytest.raises(ValueError, match="exactly one of gamma and sigma_rel"):
            PowerFunction(**arguments)
    with pytest.raises(ValueError, match="give steps or fraction, not both"):
        HalfLife(1.0, fraction=0.1)
    with pytest.raises(ValueError, match=r"power=0\.75 has no effect without inv_gamma"):
        Warmup(0.999, power=0.75)


def linear_ramp(t, delta):
    return min(t / 100, 0.999) ** delta


class Ramp:
    def __call__(self, t, delta):
        return 0.5


def test_as_schedule_wraps_numbers_and_passes_schedules_through():
    assert as_schedule(0.999) == Constant(0.999)
    assert as_schedule(1) == Constant(1.0) and as_schedule(0) == Constant(0.0)
    np = pytest.importorskip("numpy")
    assert as_schedule(np.float32(0.5)) == Constant(0.5)
    ramp = Ramp()
    partial = functools.partial(lambda scale, t, delta: scale, 0.5)
    for schedule in [*ALL, linear_ramp, ramp, ramp.__call__, partial]:
        assert as_schedule(schedule) is schedule
    for bad in (True, False, "0.999", "", 1.5, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^Constant: decay must be .*, not "):
            as_schedule(bad)


@pytest.mark.parametrize(
    "bad, found",
    [
        (None, "not None"),
        ([0.9], r"not \[0\.9\]"),
        ({"ema": 0.9}, "not {'ema': 0.9}"),
        (Warmup, r"not Warmup itself: call it, as in Warmup\(\.\.\.\)"),
        (EqualWeight, "not EqualWeight itself"),
        (lambda t: 0.9, r"<lambda>\(t\) does not take \(t, delta\)"),
    ],
    ids=["None", "list", "dict", "class", "EqualWeight", "one argument"],
)
def test_as_schedule_refuses_what_cannot_be_called_with_t_and_delta(bad, found):
    with pytest.raises(TypeError, match=r"a decay is a number in \[0, 1\].*" + found):
        as_schedule(bad)


def test_decay_at_returns_a_float_or_names_the_schedule_the_value_and_the_step():
    np = pytest.importorskip("numpy")

    def always(value):
        def my_decay(t, delta):
            return value

        return my_decay

    for value in (1, 0, np.float32(0.5), np.float64(0.5)):
        assert type(decay_at(always(value), 1, 1)) is float
    for value in (math.nan, math.inf, -1e-9, 1.0000001, None, "0.9", True):
        with pytest.raises(ValueError, match=f"my_decay.*{value!r}.*t=40, delta=4"):
            decay_at(always(value), 40, 4)


def test_json_of_a_schedule_is_its_kind_and_fields_and_of_a_callable_its_name():
    wanted = {"kind": "Warmup", "decay": 0.99, "inv_gamma": 1.0, "power": 2 / 3}
    assert to_json(Warmup(0.99, 1)) == wanted
    assert to_json(EqualWeight()) == {"kind": "PowerFunction", "gamma": 0.0}
    impostor = type("Constant", (Ramp,), {})()
    for schedule, name in (
        (linear_ramp, f"{__name__}.linear_ramp"),
        (Ramp(), f"{__name__}.Ramp"),
        (functools.partial(linear_ramp), "functools.partial"),
        (impostor, f"{__name__}.Constant"),
    ):
        assert to_json(schedule) == {"kind": "callable", "name": name}
    with pytest.raises(ValueError, match=r"linear_ramp'.*pass the callable again"):
        from_json(to_json(linear_ramp))


@pytest.mark.parametrize(
    "bad, message",
    [
        (None, "a mapping with a 'kind'"),
        ("Constant", "a mapping with a 'kind'"),
        ({}, "a mapping with a 'kind'"),
        ({"kind": ["Constant"]}, "a mapping with a 'kind'"),
        ({"kind": "Unheard"}, "unknown schedule 'Unheard'"),
        ({"kind": "__class__"}, "unknown schedule"),
        ({"kind": "Constant"}, r"fields \[\], wanted \['decay'\]"),
        ({"kind": "Constant", "decay": 0.9, "x": 1}, r"fields \['decay', 'x'\]"),
        ({"kind": "Warmup", "decay": 0.9}, "wanted"),
        ({"kind": "PowerFunction", "sigma_rel": 0.1}, "wanted"),
        ({"kind": "PowerFunction", "gamma": None}, "exactly one of"),
        ({"kind": "Constant", "decay": "0.9"}, "must be a number"),
        ({"kind": "Constant", "decay": None}, "must be a number"),
        ({"kind": "Constant", "decay": 2}, r"must be in \[0, 1\]"),
        ({"kind": "HalfLife", "steps": True}, "must be a number"),
        ({"kind": "Warmup", "decay": 0.9, "inv_gamma": "1", "power": 1}, "must be a number"),
        ({"kind": "Constant", 1: 0.9}, "wanted"),
    ],
    ids=str,
)
def test_from_json_refuses_anything_to_json_did_not_write(bad, message):
    with pytest.raises(ValueError, match=message):
        from_json(bad)
