"""No cut: every rank that holds a weight holds all of it. One process, DDP."""

from __future__ import annotations

from torch import nn

from dist_ema.core.engine import Engine, Registered
from dist_ema.core.names import registrations
from dist_ema.engines.caches import outdate


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
