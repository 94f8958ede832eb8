"""What libraries keep of weights besides their storage: caches, and graphs for a backward pass.

Private names: `torch.nn.utils.parametrize._cache`, checked in torch 2.8 to 2.15;
`_precomputed_scale` of the weights of float8 and BitNet training, checked in torchao 0.18.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.utils import parametrize

from dist_ema.core.requirements import require_names

# Of a sharded weight; where it is None, the all-gather of FSDP2 computes it.
PRECOMPUTED = frozenset({"_precomputed_scale"})


def require_caches() -> None:
    """Raise RuntimeError if this version of torch caches in another way. Local."""
    require_names(parametrize, "_cache", "torch")


def outdate(weights: Iterable[torch.Tensor] = ()) -> None:
    """Clear the caches of autocast and of `parametrize.cached()`. Local.

    Args:
        weights: gathered tensors, whose change autograd does not see by itself. It refuses a
            backward pass through their earlier values from now on.
    """
    torch.autograd.graph.increment_version(list(weights))
    torch.clear_autocast_cache()
    parametrize._cache.clear()
