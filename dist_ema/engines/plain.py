"""No sharding: every rank that holds a weight holds all of it. One process, DDP.

Also what torch keeps of weights besides their storage, under every engine: caches, and graphs for a
backward pass. Private name, checked in torch 2.8 to 2.15: `torch.nn.utils.parametrize._cache`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from dist_ema.core.engine import Engine, Registered
from dist_ema.core.errors import require_names
from dist_ema.core.names import registrations


class PlainEngine(Engine):
    """Whole tensors, read and written where the module keeps them. Nothing here communicates."""

    is_plain = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._registries = [module._parameters for module in model.modules()]
        self._parameters = Registered(r for r in registrations(model) if not r.is_buffer)

    @staticmethod
    def claims(model: nn.Module) -> bool:
        return True

    def publish(self) -> None:
        outdate(wrapper for _, wrapper in self.wrappers())

    def stamp(self) -> list[int]:
        # The number of parameters changes if some were added since, which are not averaged.
        return [*self._parameters.addresses(), sum(map(len, self._registries))]


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
