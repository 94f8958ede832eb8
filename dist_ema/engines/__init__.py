"""Engine selection."""

from __future__ import annotations

import sys

from torch import nn

from dist_ema.core.engine import Engine
from dist_ema.core.requirements import require
from dist_ema.engines.caches import require_caches
from dist_ema.engines.deepspeed import ZeroEngine
from dist_ema.engines.fsdp1 import Fsdp1Engine
from dist_ema.engines.plain import PlainEngine


def select(model: nn.Module) -> Engine:
    """The engine for a model as the user holds it, wrapped or not. Local."""
    require("torch")
    require_caches()
    engines: list[type[Engine]] = [ZeroEngine, Fsdp1Engine]  # the most specific first
    if "torch.distributed.tensor" in sys.modules:  # takes a second to import
        from dist_ema.engines.dtensor import DTensorEngine

        engines.append(DTensorEngine)
    return next((engine for engine in engines if engine.claims(model)), PlainEngine)(model)
