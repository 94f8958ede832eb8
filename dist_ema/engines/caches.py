"""What torch computes from weights and caches by the identity of a tensor.

Private name, checked in torch 2.8 to 2.15: `torch.nn.utils.parametrize._cache`.
"""

from __future__ import annotations

import torch
from torch.nn.utils import parametrize

from dist_ema.core.requirements import require_names


def require_caches() -> None:
    """Raise RuntimeError if this version of torch caches otherwise. Local."""
    require_names(parametrize, "_cache", "torch")


def drop_caches() -> None:
    """Clear the caches of autocast and of `parametrize.cached()`. Local."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()
