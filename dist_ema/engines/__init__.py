"""Engine selection."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.core.engine import Cut, Engine, Weight
from dist_ema.core.errors import require
from dist_ema.core.names import Models
from dist_ema.engines.deepspeed import ZeroEngine
from dist_ema.engines.fsdp1 import Fsdp1Engine
from dist_ema.engines.plain import PlainEngine, require_caches


def select(model: nn.Module) -> Engine:
    """The engine for a model as the user holds it, wrapped or not. Local."""
    require("torch")
    require_caches()
    if isinstance(model, Models):
        return SeveralEngines(model, [(prefix, select(module)) for prefix, module in model.named()])
    engines: list[type[Engine]] = [ZeroEngine, Fsdp1Engine]  # the most specific first
    if "torch.distributed.tensor" in sys.modules:  # takes a second to import
        from dist_ema.engines.dtensor import DTensorEngine

        engines.append(DTensorEngine)
    return next((engine for engine in engines if engine.claims(model)), PlainEngine)(model)


class SeveralEngines(Engine):
    """The engines of several modules, each with the prefix of its tensors' names."""

    def __init__(self, model: Models, engines: Sequence[tuple[str, Engine]]) -> None:
        super().__init__(model)
        self._engines = [engine for _, engine in engines]
        self._prefixes = [prefix for prefix, _ in engines]
        self._engine_of: dict[str, Engine] = {}  # by fqn
        self.communicates = any(engine.communicates for engine in self._engines)
        self.is_plain = all(engine.is_plain for engine in self._engines)
        self.takes_masters = all(engine.takes_masters for engine in self._engines)
        sources = {engine.source for engine in self._engines}
        self.source = "master" if sources == {"master"} else "weights"

    @property
    def kind(self) -> str:
        return ", ".join(dict.fromkeys(engine.kind for engine in self._engines))

    @staticmethod
    def claims(model: nn.Module) -> bool:
        return isinstance(model, Models)

    def weights(self) -> list[Weight]:
        return self._joined(lambda engine: engine.weights())

    def buffers(self) -> list[Weight]:
        return self._joined(lambda engine: engine.buffers())

    def _joined(self, weights_of: Callable[[Engine], list[Weight]]) -> list[Weight]:
        """Each distinct tensor once: one that several modules share is tied."""
        tied: dict[int, Weight] = {}
        for prefix, engine in zip(self._prefixes, self._engines, strict=True):
            for weight in weights_of(engine):
                weight = _renamed(weight, prefix) if prefix else weight
                self._engine_of[weight.fqn] = engine
                first = tied.setdefault(id(weight.tensor), weight)
                if first is not weight:
                    names = dict.fromkeys((*first.aliases, weight.fqn, *weight.aliases))
                    names.pop(first.fqn, None)
                    tied[id(weight.tensor)] = replace(first, aliases=tuple(names))
        return list(tied.values())

    def cut(self, fqn: str, tensor: torch.Tensor) -> Cut:
        return self._engine_of[fqn].cut(fqn, tensor)

    def stamp(self) -> list[int]:
        return [number for engine in self._engines for number in engine.stamp()]

    def applied_steps(self) -> int | None:
        counts = [n for engine in self._engines if (n := engine.applied_steps()) is not None]
        return sum(counts) if counts else None

    def process_groups(self) -> list[dist.ProcessGroup]:
        return [group for engine in self._engines for group in engine.process_groups()]

    def versioned(self, weight: Weight) -> Iterator[torch.Tensor]:
        return self._engine_of[weight.fqn].versioned(weight)

    def precomputed(self) -> list[tuple[dict[str, torch.Tensor | None], str]]:
        return [place for engine in self._engines for place in engine.precomputed()]

    def release(self) -> None:
        for engine in self._engines:
            engine.release()

    def refresh(self, weights: Sequence[Weight]) -> None:
        for engine in self._engines:
            engine.refresh([w for w in weights if self._engine_of[w.fqn] is engine])

    def publish(self) -> None:
        for engine in self._engines:
            engine.publish()


def _renamed(weight: Weight, prefix: str) -> Weight:
    return replace(
        weight,
        fqn=prefix + weight.fqn,
        aliases=tuple(prefix + alias for alias in weight.aliases),
        fragments=tuple(
            replace(fragment, meta=fragment.meta._replace(fqn=prefix + fragment.meta.fqn))
            for fragment in weight.fragments
        ),
    )
