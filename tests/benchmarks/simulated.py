"""One rank of a world of any size, in one process: what the other ranks would send is computed.

[Note: simulated ranks]
Torch's fake process group lets one process be rank k of 1,024. It answers every collective with
what was sent, which is wrong where ranks send different data. `SimulatedGroup` gives true answers:
a `World` knows what each rank holds, and the code under test computes what each would send. Each
byte of payload that rank k sends or receives is counted; what a backend adds is not.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ema.core import replicas
from dist_ema.core.group import Group
from dist_ema.core.layout import Box, FragmentMeta, Shape, whole


@dataclass(frozen=True, eq=False)
class World:
    """What the ranks of an FSDP2 or HSDP mesh hold of a model: parameters in rows, buffers whole.

    Rank r is number `r // num_shards` among its replicas and has shard `r % num_shards`.
    """

    tensors: tuple[tuple[str, Shape, bool], ...]  # in the order of the state dict; is it a buffer
    num_replicas: int
    num_shards: int

    @property
    def size(self) -> int:
        return self.num_replicas * self.num_shards

    @property
    def parameters(self) -> list[tuple[str, Shape]]:
        return [(fqn, shape) for fqn, shape, is_buffer in self.tensors if not is_buffer]

    @property
    def numel(self) -> int:
        """Of all parameters."""
        return sum(whole(shape).numel for _, shape in self.parameters)

    def held(self, rank: int) -> list[FragmentMeta]:
        """What a rank holds, in the order of the state dict."""
        return self._shards[rank % self.num_shards]

    def averaged(self, rank: int) -> list[FragmentMeta]:
        """Of that, the parts of parameters."""
        buffers = {fqn for fqn, _, is_buffer in self.tensors if is_buffer}
        return [meta for meta in self.held(rank) if meta.fqn not in buffers]

    def owned(self, rank: int) -> list[FragmentMeta]:
        """What a rank averages: its slice of the shard that its replicas hold too."""
        held = self.averaged(rank)
        cuts = replicas.even_cuts(sum(meta.numel for meta in held), self.num_replicas)
        index, at = rank // self.num_shards, 0
        own = []
        for meta in held:
            start, stop = max(0, cuts[index] - at), min(meta.numel, cuts[index + 1] - at)
            if start < stop:
                own += [part for _, part in meta.slices(start, stop)]
            at += meta.numel
        return own

    @functools.cached_property
    def _shards(self) -> list[list[FragmentMeta]]:
        shards: list[list[FragmentMeta]] = [[] for _ in range(self.num_shards)]
        for fqn, shape, is_buffer in self.tensors:
            step = -(-shape[0] // self.num_shards)  # as torch.chunk cuts
            for i, shard in enumerate(shards):
                start, size = step * i, min(step, shape[0] - step * i)
                box = Box((start,) + (0,) * (len(shape) - 1), (size, *shape[1:]))
                if is_buffer:
                    box = whole(shape)
                if box.numel > 0:
                    shard.append(FragmentMeta(fqn, shape, box))
        return shards

    @functools.cached_property
    def labels(self) -> list[np.ndarray]:
        """What the ranks with each shard send to the others of what they hold."""
        return [replicas.labels_of(self.averaged(shard)) for shard in range(self.num_shards)]


class SimulatedGroup(Group):
    """Rank k of a world, on the fake process group, with true answers. Counts bytes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        assert self.size == world.size, (self.size, world.size)
        self.world = world
        self.sent = self.received = 0  # bytes
        self.seconds = 0.0  # spent on computing what other ranks send
        # What another rank gives to the next calls of `gather`, in turn.
        self.given: list[Callable[[int], Any]] = []

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """Every rank has the same numbers."""
        self._count(8 * len(numbers), 8 * len(numbers))
        return list(numbers)

    def all_gather_integers(self, own: np.ndarray) -> list[np.ndarray]:
        start = time.perf_counter()
        rows = [self.world.labels[rank % self.world.num_shards] for rank in range(self.size)]
        self.seconds += time.perf_counter() - start
        longest = 8 * (1 + max(map(len, rows)))  # rows are padded
        self._count(longest, longest * self.size)
        return rows

    def all_gather(self, obj: Any) -> list[Any]:
        """Every rank has the same object."""
        nbytes = len(pickle.dumps(obj))
        self._count(nbytes, nbytes * self.size)
        return [obj] * self.size

    def gather(self, obj: Any) -> list[Any]:
        if self.rank:
            self._count(len(pickle.dumps(obj)), 0)
            return []
        start = time.perf_counter()
        give = self.given.pop(0)
        reports = [pickle.dumps(give(rank)) for rank in range(1, self.size)]
        self.seconds += time.perf_counter() - start
        self._count(0, sum(map(len, reports)))
        return [obj, *map(pickle.loads, reports)]

    def broadcast(self, obj: Any) -> Any:
        """Rank 0 sends it once: the others pass it on."""
        assert self.rank == 0
        self._count(len(pickle.dumps(obj)), 0)
        return obj

    def _count(self, sent: int, received: int) -> None:
        self.sent += sent
        self.received += received
