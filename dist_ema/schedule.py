"""Decay schedules: which share of the average an update keeps. Python floats, no torch.

[Note: t and delta]
A schedule is a callable `(t, delta) -> decay` with 1 <= delta <= t: the decay that carries the
average from step t - delta to step t. Steps are counted from the end of the initial copies: with
`start_step=s` the k-th call of `update` has t = k - s, and calls 1..s copy. To get the numbers
of other libraries at their k-th update, each with `update_every=1`:

    start_step=0 (t = k)          torch-ema, TensorFlow, torch's SWA, EDM2
    start_step=1 (t = k - 1)      diffusers, ema-pytorch, timm; a float: torch, torchvision
    start_step=u+1 (t = k-u-1)    diffusers, ema-pytorch, timm with `update_after_step=u`

[Note: composition]
`Constant`, `HalfLife(steps)`, `PowerFunction` and `EqualWeight` compose: the decay over a + b steps
is the product of the decays over the first a and the last b steps, so `update_every` only changes
which weights are averaged. `Warmup` and `Cosine` use the decay at t to the power delta, and
`HalfLife(fraction=...)` the half-life at t: both are slightly more than the product while they
rise. `BEMA` uses the decay at t whatever delta is, as TRL does.
"""

import functools
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

Schedule: TypeAlias = Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Constant:
    """The same decay at every step.

        decay ** delta

    With `start_step=1`: torch's `get_ema_avg_fn` and torchvision's `ExponentialMovingAverage`.
    """

    decay: float  # in [0, 1], per step

    def __post_init__(self) -> None:
        _store(self, "in [0, 1]", "decay")

    def __call__(self, t: int, delta: int) -> float:
        return float(self.decay**delta)


@dataclass(frozen=True, slots=True)
class HalfLife:
    """A decay given as the number of steps after which a weight counts half.

        2 ** (-delta / steps)
        2 ** (-delta / (fraction * t))     a share of the steps so far

    The first is the `0.5 ** (batch / halflife)` of EDM's training loop (arXiv 2206.00364), in
    steps; the second is torchtitan's `half_life_fraction`.
    """

    steps: float | None = None  # above 0, need not be whole
    fraction: float | None = field(default=None, kw_only=True)  # above 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.fraction is not None:
            raise ValueError("HalfLife: give steps or fraction, not both")
        _store(self, "finite and above 0", "steps" if self.fraction is None else "fraction")

    def __repr__(self) -> str:
        ((name, value),) = _given(self).items()
        return f"HalfLife({name}={value!r})"

    def __call__(self, t: int, delta: int) -> float:
        steps = self.steps if self.fraction is None else self.fraction * t
        return float(2.0 ** (-delta / steps))  # type: ignore[operator]


@dataclass(frozen=True, slots=True)
class Warmup:
    """A decay that rises towards `decay`, so that the first weights are forgotten quickly.

        min(decay, (1 + t) / (10 + t)) ** delta                     without `inv_gamma`
        min(decay, 1 - (1 + t / inv_gamma) ** -power) ** delta      with it

    The first is TensorFlow's `ExponentialMovingAverage(num_updates)`, torch-ema's, and diffusers'
    default; the second is diffusers' `use_ema_warmup`, ema-pytorch's `EMA` and
    timm's `ModelEmaV3(use_warmup)`, all with their lower bound on the decay left at 0.
    """

    decay: float  # in [0, 1], the upper bound
    inv_gamma: float | None = None  # above 0, in steps
    power: float = 2 / 3  # above 0, used with inv_gamma only

    def __post_init__(self) -> None:
        _store(self, "in [0, 1]", "decay")
        _store(self, "finite and above 0", "power")
        if self.inv_gamma is not None:
            _store(self, "finite and above 0", "inv_gamma")
        elif self.power != 2 / 3:
            raise ValueError(
                f"Warmup: power={self.power!r} has no effect without inv_gamma; "
                "give inv_gamma (1.0 is the usual value) or leave power out"
            )

    def __call__(self, t: int, delta: int) -> float:
        if self.inv_gamma is None:
            rising = (1 + t) / (10 + t)
        else:
            rising = 1 - (1 + t / self.inv_gamma) ** -self.power
        return float(min(self.decay, rising) ** delta)


@dataclass(frozen=True, slots=True, init=False)
class PowerFunction:
    """An average whose width grows with training: step s weighs about s ** gamma.

        (1 - delta / t) ** (gamma + 1)

    arXiv 2312.02696 (EDM2), section 3.1 and eq. 127. Given by `gamma` or by `sigma_rel`, the
    standard deviation of the profile as a fraction of the training so far (eq. 123):

        sigma_rel = (gamma + 1) ** 0.5 * (gamma + 2) ** -1 * (gamma + 3) ** -0.5

    `sigma_rel` is at most 0.3002 (`EqualWeight` has 0.2887); if two exponents have the same
    value, the larger is used, as in the paper's algorithm 2. The first decay, at t = delta, is 0:
    the initial weights do not count, and `start_step` is best left at 0.
    """

    gamma: float  # above -1; 0 weighs all steps alike

    def __init__(self, gamma: float | None = None, *, sigma_rel: float | None = None) -> None:
        if (gamma is None) == (sigma_rel is None):
            raise ValueError(
                "PowerFunction: give exactly one of gamma and sigma_rel, "
                f"not gamma={gamma!r} and sigma_rel={sigma_rel!r}"
            )
        object.__setattr__(self, "gamma", _solve_gamma(sigma_rel) if gamma is None else gamma)
        _store(self, "finite and above -1", "gamma")

    @property
    def sigma_rel(self) -> float:
        """The standard deviation of the averaging profile, relative to t."""
        return _relative_width(self.gamma + 1)

    def __call__(self, t: int, delta: int) -> float:
        # (t - delta) / t rounds once; 1 - delta / t would lose digits where delta is close to t.
        return float(((t - delta) / t) ** (self.gamma + 1))


def EqualWeight() -> PowerFunction:
    """The plain mean of the weights seen, `PowerFunction(0)`.

        1 - delta / t

    torch's `get_swa_avg_fn` (arXiv 1803.05407), with `start_step=0`.
    """
    return PowerFunction(0.0)


@dataclass(frozen=True, slots=True)
class Cosine:
    """A cosine ramp from `start` at t = 0 to `end` at t = total_steps, and `end` from there on.

        (end - (end - start) * (1 + cos(pi * t / total_steps)) / 2) ** delta

    The teachers of BYOL (arXiv 2006.07733) and DINO (arXiv 2104.14294), which rise to 1. Code
    that counts iterations from 0 reaches each value one update later.
    """

    start: float  # in [0, 1]
    end: float  # in [0, 1]
    total_steps: float  # above 0

    def __post_init__(self) -> None:
        _store(self, "in [0, 1]", "start", "end")
        _store(self, "finite and above 0", "total_steps")

    def __call__(self, t: int, delta: int) -> float:
        left = (1 + math.cos(math.pi * min(t / self.total_steps, 1.0))) / 2  # 1 down to 0
        return float((self.end - (self.end - self.start) * left) ** delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class BEMA:
    """A bias-corrected average, that of arXiv 2508.00180 in the form of TRL's `BEMACallback`.

        average <- (1 - beta) * average + beta * live
        shown    = average + alpha * (live - initial)
        beta     = max((lag + multiplier * t) ** -ema_power, min_ema_multiplier)
        alpha    = (lag + multiplier * t) ** -bias_power

    t is `ShardedEMA.step`, initial copies included, and does not depend on `update_every`. TRL's
    `update_freq` (400 by default) is `update_every`, and its `update_after` is `start_step`. The
    initial weights are those of the last initial copy, and are kept in shards as a second average.
    `average_parameters`, `gather_*`, `export`, `copy_to` and `save` use the shown values, with
    alpha at the last update and the live weights of that moment. Averaged buffers are not
    corrected: the variance of a batch norm could become negative.
    """

    ema_power: float = 0.5  # at least 0
    bias_power: float = 0.2  # at least 0; 0 corrects the most
    lag: float = 10.0  # at least 0, in steps
    multiplier: float = 1.0  # above 0, per step
    min_ema_multiplier: float = 0.0  # in [0, 1]

    def __post_init__(self) -> None:
        _store(self, "finite and at least 0", "ema_power", "bias_power", "lag")
        _store(self, "finite and above 0", "multiplier")
        _store(self, "in [0, 1]", "min_ema_multiplier")

    def __call__(self, t: int, delta: int) -> float:
        time = self.lag + self.multiplier * t
        return float(1.0 - max(time**-self.ema_power, self.min_ema_multiplier))

    def alpha(self, t: int) -> float:
        """The weight of the correction after an update at step t."""
        return float((self.lag + self.multiplier * t) ** -self.bias_power)


def uncorrected(name: str) -> tuple[str, str]:
    """Names under which a checkpoint has the average of a `BEMA`, and the initial weights."""
    return f"{name}.uncorrected", f"{name}.initial"


def averages_of(values: Iterable[str]) -> list[str]:
    """The names of averages among those of the values in a checkpoint."""
    names = list(values)
    kept = {value for name in names for value in uncorrected(name)}
    return [name for name in names if name not in kept]


def as_schedule(value: object) -> Schedule:
    """The schedule of a `decay` argument: a number is a `Constant`."""
    if isinstance(value, Real | str):  # a bool is a Real; Constant refuses it, and the str, by name
        return Constant(value)  # type: ignore[arg-type]
    wanted = "a decay is a number in [0, 1], a schedule, or a callable (t, delta) -> float"
    if isinstance(value, type) or value is EqualWeight:
        name = getattr(value, "__name__", repr(value))
        raise TypeError(f"{wanted}, not {name} itself: call it, as in {name}(...)")
    if not callable(value):
        raise TypeError(f"{wanted}, not {value!r}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some builtins have none; `decay_at` checks what they return
        return value
    try:
        signature.bind(1, 1)
    except TypeError as error:
        raise TypeError(f"{wanted}; {_name(value)}{signature} does not take (t, delta)") from error
    return value


def decay_at(schedule: Schedule, t: int, delta: int) -> float:
    """The decay of a schedule; ValueError unless it is a number in [0, 1]."""
    decay: object = schedule(t, delta)
    if type(decay) is float and 0 <= decay <= 1:
        return decay  # before `Real`, whose check is slow
    if isinstance(decay, bool) or not isinstance(decay, Real) or not 0 <= float(decay) <= 1:
        name = repr(schedule) if type(schedule) in _KINDS else _name(schedule)
        raise ValueError(
            f"schedule {name} gave {decay!r} at t={t}, delta={delta}; "
            "a decay is a Python number in [0, 1]"
        )
    return float(decay)


def to_json(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON. A custom callable is described by its name, and not stored."""
    if not isinstance(schedule, _KINDS) or type(schedule) not in _KINDS:
        return {"kind": "callable", "name": _name(schedule)}
    return {"kind": type(schedule).__name__} | _given(schedule)


def _given(schedule: Any) -> dict[str, Any]:
    """The fields of a schedule, of a `HalfLife` the one that is not None."""
    is_half_life = isinstance(schedule, HalfLife)
    return {k: v for k, v in asdict(schedule).items() if not (is_half_life and v is None)}


def same_rule(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether two schedules in JSON are the same, as far as is known.

    For callables, the `code_hash` under "code" is compared if both are of one version of Python.
    """
    codes = [str(rule.get("code") or "") for rule in (saved, own)]
    versions = [code.partition(":")[0] for code in codes]
    if versions[0] == versions[1] and codes[0] != codes[1]:
        return False
    return {**saved, "code": None} == {**own, "code": None}


def is_constant(schedule: Schedule) -> bool:
    """Whether the decay is the same at every step."""
    is_half_life = isinstance(schedule, HalfLife) and schedule.fraction is None
    return isinstance(schedule, Constant) or is_half_life


def highest(schedule: Schedule, delta: int) -> float | None:
    """The largest decay of a schedule that ends constant; None for others."""
    if is_constant(schedule):
        return schedule(delta, delta)
    if isinstance(schedule, Warmup):
        return float(schedule.decay**delta)
    return None


def from_json(value: object) -> Schedule:
    """The schedule that `to_json` described; ValueError for anything else."""
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str):
        raise ValueError(f"a saved schedule is a mapping with a 'kind', not {value!r}")
    if kind == "callable":
        raise ValueError(
            f"a custom schedule ({value.get('name')!r}) is not stored in a checkpoint; "
            "pass the callable again"
        )
    kinds: dict[str, Any] = {cls.__name__: cls for cls in _KINDS}
    if kind not in kinds:
        raise ValueError(f"unknown schedule {kind!r}; this version knows {', '.join(kinds)}")
    given = {str(key): item for key, item in value.items() if key != "kind"}
    wanted = [item.name for item in fields(kinds[kind])]
    if kind == "HalfLife":  # saved without the one that is None
        wanted = [name for name in wanted if name in given] or ["steps"]
    if sorted(given) != sorted(wanted):
        raise ValueError(f"saved {kind} has the fields {sorted(given)}, wanted {sorted(wanted)}")
    schedule: Schedule = kinds[kind](**given)
    return schedule


_KINDS = (Constant, HalfLife, Warmup, PowerFunction, Cosine, BEMA)


def _name(value: object) -> str:
    """The qualified name of a function, or of the class of any other callable."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def code_hash(value: object) -> str:
    """A hash of a callable's code and the plain values in its closure and arguments."""
    described = repr(_describe(value, 0)).encode()
    return f"{sys.implementation.cache_tag}:{hashlib.sha256(described).hexdigest()[:16]}"


def _describe(value: object, depth: int) -> object:
    """What is hashed of a callable: values whose `repr` is the same in every process."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    parts: Iterable[object]
    if isinstance(value, tuple | list):
        parts = value
    elif isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, CodeType):
        parts = value.co_code.hex(), value.co_names, value.co_consts
    elif isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]
        closed = [cell.cell_contents for cell in cells]
        parts = value.__code__, value.__defaults__, value.__kwdefaults__, closed
    elif isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
    elif isinstance(value, MethodType):
        parts = (value.__func__,)
    else:
        call = vars(type(value)).get("__call__")
        parts = (type(value).__qualname__, *([call] if isinstance(call, FunctionType) else []))
    # Nested containers may contain themselves.
    return [
        type(value).__qualname__,
        *([_describe(part, depth + 1) for part in parts if depth < 8]),
    ]


def _number(label: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{label} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:  # an int too large for a float; range checks refuse inf
        return math.inf


_RANGES: dict[str, Callable[[float], bool]] = {
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "finite and above 0": lambda number: 0 < number < math.inf,
    "finite and above -1": lambda number: -1 < number < math.inf,
    "finite and at least 0": lambda number: 0 <= number < math.inf,
}


def _store(schedule: object, wanted: str, *names: str) -> None:
    """Convert fields of a schedule to floats, which must be in a range of `_RANGES`."""
    for name in names:
        label = f"{type(schedule).__name__}: {name}"
        number = _number(label, getattr(schedule, name))
        if not _RANGES[wanted](number):
            raise ValueError(f"{label} must be {wanted}, not {number!r}")
        object.__setattr__(schedule, name, number)


def _relative_width(x: float) -> float:
    """sigma_rel of the exponent gamma = x - 1, without squares that may overflow."""
    return math.sqrt(x / (x + 2)) / (x + 1)


# x at the widest profile, where d(sigma_rel)/dx = 0 <=> x**2 + x - 1 = 0; from here on sigma_rel
# falls with x, and is below 1 / x.
_WIDEST = (math.sqrt(5) - 1) / 2


def _solve_gamma(sigma_rel: object) -> float:
    """The larger gamma with this sigma_rel, by bisection to the last bit of x = gamma + 1."""
    target = _number("PowerFunction: sigma_rel", sigma_rel)
    if not 0 < target <= _relative_width(_WIDEST):
        raise ValueError(
            f"PowerFunction: sigma_rel must be above 0 and at most {_relative_width(_WIDEST):.5f}, "
            f"not {target!r}; no power function has that width"
        )
    low, high = _WIDEST, 1 / target
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _relative_width(middle) > target else (low, middle)
    return high - 1
