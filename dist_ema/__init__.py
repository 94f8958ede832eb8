"""An exponential moving average of the weights that lives where the weights live."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_ema.batchnorm import update_bn
    from dist_ema.ema import ShardedEMA
    from dist_ema.posthoc.merge import merge
    from dist_ema.posthoc.synthesize import synthesize
    from dist_ema.schedule import (
        BEMA,
        Constant,
        Cosine,
        EqualWeight,
        HalfLife,
        PowerFunction,
        Warmup,
    )

__all__ = [
    "BEMA",
    "Constant",
    "Cosine",
    "EqualWeight",
    "HalfLife",
    "PowerFunction",
    "ShardedEMA",
    "Warmup",
    "merge",
    "synthesize",
    "update_bn",
]

_MODULES = {
    "ShardedEMA": "ema",
    "merge": "posthoc.merge",
    "synthesize": "posthoc.synthesize",
    "update_bn": "batchnorm",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line works without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        import_module(f"{__name__}.core.errors").require("torch")
    module = import_module(f"{__name__}.{_MODULES.get(name, 'schedule')}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
