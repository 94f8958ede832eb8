"""No cut: every rank that holds a weight holds all of it. One process, DDP."""

from __future__ import annotations

from torch import nn

from dist_ema.core.engine import Engine, Registered
from dist_ema.core.names import registrations
from dist_ema.engines.caches import drop_caches


class PlainEngine(Engine):
    """Whole tensors, read and written where the module keeps them. Nothing here communicates."""

    is_plain = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._parameters = [module._parameters for module in model.modules()]
        self._registered = Registered(
            (registration.registry, registration.name)
            for registration in registrations(model)
            if not registration.is_buffer
        )

    @staticmethod
    def claims(model: nn.Module) -> bool:
        return True

    def publish(self) -> None:
        drop_caches()

    def stamp(self) -> list[int]:
        # Parameters that came since are no part of the average: they make another layout.
        return [*self._registered.addresses(), sum(map(len, self._parameters))]
