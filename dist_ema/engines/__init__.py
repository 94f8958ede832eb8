"""The engines, and which one a model is in the hands of."""

from __future__ import annotations

from torch import nn

from dist_ema.engines.deepspeed import ZeroEngine
from dist_ema.engines.dtensor import DTensorEngine
from dist_ema.engines.engine import Engine
from dist_ema.engines.fsdp1 import Fsdp1Engine
from dist_ema.engines.plain import PlainEngine

# The most specific first; the last claims any module.
_ENGINES = (ZeroEngine, Fsdp1Engine, DTensorEngine, PlainEngine)


def select(model: nn.Module) -> Engine:
    """The engine for a model as the user holds it, wrapped or not. Local."""
    return next(engine for engine in _ENGINES if engine.claims(model))(model)
