"""One rank of a world of any size, in one process: what the other ranks would send is computed.

[Note: simulated ranks]
Torch's fake process group lets one process be rank k of 1,024 and answers every collective with
what was sent, which is right where all ranks send the same and wrong elsewhere. `SimulatedRanks`
puts the true answers there: a `World` knows what each rank holds, and the rows that rank k would
get from the others are made by the code under test, run in the place of each of them. Every byte
of payload that rank k sends or receives is counted; what a backend adds to that is not.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

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

    def places(self, rank: int) -> list[tuple[FragmentMeta, bool]]:
        """What a rank holds, and whether it is averaged."""
        return self._places_of_shard(rank % self.num_shards)

    def owned(self, rank: int) -> list[FragmentMeta]:
        """The places that a rank averages: its slice of the shard that its replicas hold too."""
        held = [place for place, averaged in self.places(rank) if averaged]
        total = sum(place.numel for place in held)
        cuts = replicas.even_cuts(total, self.num_replicas)
        index, at = rank // self.num_shards, 0
        own = []
        for place in held:
            start, stop = max(0, cuts[index] - at), min(place.numel, cuts[index + 1] - at)
            if start < stop:
                own += [part for _, part in place.slices(start, stop)]
            at += place.numel
        return own

    @functools.cache  # noqa: B019
    def _places_of_shard(self, shard: int) -> list[tuple[FragmentMeta, bool]]:
        found = []
        for fqn, shape, is_buffer in self.tensors:
            if is_buffer:
                found.append((FragmentMeta(fqn, shape, whole(shape)), False))
                continue
            step = -(-shape[0] // self.num_shards)  # as torch.chunk cuts
            start, size = step * shard, min(step, shape[0] - step * shard)
            if size > 0:
                box = Box((start,) + (0,) * (len(shape) - 1), (size, *shape[1:]))
                found.append((FragmentMeta(fqn, shape, box), True))
        return found

    @functools.cache  # noqa: B019
    def labels(self, shard: int) -> np.ndarray:
        """What a rank with this shard tells the others of what it holds."""
        places = [place for place, averaged in self._places_of_shard(shard) if averaged]
        return replicas.labels_of(places)


@dataclass
class Traffic:
    """Bytes of payload that one rank sent and received."""

    sent: int = 0
    received: int = 0

    @property
    def both(self) -> int:
        return self.sent + self.received


class SimulatedRanks(Group):
    """Rank k of a world, as the fake process group has it, with true answers. Counts bytes."""

    def __init__(self, world: World, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        assert self.size == world.size, (self.size, world.size)
        self.world = world
        self.traffic = Traffic()
        self.by_call: collections.Counter[str] = collections.Counter()
        self.seconds = 0.0  # spent on being the others
        # What another rank gives to the next calls of `gather`, in turn.
        self.given: list[Callable[[int], Any]] = []

    def all_gather_integers(self, own: np.ndarray) -> list[np.ndarray]:
        start = time.perf_counter()
        rows = [self.world.labels(rank % self.world.num_shards) for rank in range(self.size)]
        longest = 8 * (1 + max(map(len, rows)))  # rows are padded
        self._count("all_gather_integers", longest, longest * self.size)
        self.seconds += time.perf_counter() - start
        return rows

    def all_gather(self, obj: Any) -> list[Any]:
        """Every rank says the same."""
        nbytes = len(pickle.dumps(obj))
        self._count("all_gather", nbytes, nbytes * self.size)
        return [obj] * self.size

    def gather(self, obj: Any) -> list[Any]:
        if self.rank:
            self._count("gather", len(pickle.dumps(obj)), 0)
            return []
        start = time.perf_counter()
        give = self.given.pop(0)
        told = [pickle.dumps(give(rank)) for rank in range(1, self.size)]
        self.seconds += time.perf_counter() - start
        self._count("gather", 0, sum(map(len, told)))
        return [obj, *map(pickle.loads, told)]

    def scatter(self, objs: Sequence[Any]) -> Any:
        self._count("scatter", sum(len(pickle.dumps(obj)) for obj in objs[1:]), 0)
        return objs[0]

    def broadcast(self, obj: Any) -> Any:
        """Rank 0 sends it once: the others pass it on."""
        assert self.rank == 0
        self._count("broadcast", len(pickle.dumps(obj)), 0)
        return obj

    @contextlib.contextmanager
    def counting(self) -> Iterator[Traffic]:
        """Count the all-reduces of a block as well."""
        reduce = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._count("all_reduce", tensor.nbytes, tensor.nbytes)
            return reduce(tensor, *args, **kwargs)

        with mock.patch.object(dist, "all_reduce", counted):
            yield self.traffic

    def _count(self, call: str, sent: int, received: int) -> None:
        self.traffic.sent += sent
        self.traffic.received += received
        self.by_call[call] += sent + received
