"""A 70-billion-parameter transformer on 1,024 ranks, as one of them sees it; see simulated.py.

What is timed runs on one core, and is the code that runs on that rank, without the network: what is
sent and received is counted. The model is built on the meta device, `fully_shard` cuts it on torch's
fake process group, and only the rank's own shards get storage.
"""

from __future__ import annotations

import dataclasses
import gc
import pickle
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema import ema as ema_module
from dist_ema.checkpoint import api, manifest, parsing
from dist_ema.checkpoint.boxed import Part, TensorInfo
from dist_ema.checkpoint.planners import EmaSavePlanner
from dist_ema.checkpoint.shards import nbytes_of
from dist_ema.checkpoint.writer import ShardWriter
from dist_ema.gather import Entry, Gatherer
from dist_ema.layout import Place
from dist_ema.names import slots
from tests.benchmarks.measure import peak_memory
from tests.benchmarks.simulated import SimulatedRanks, World

T = TypeVar("T")
STATE = {"step": 0, "num_updates": 0, "averages": {"ema": {"schedule": {}, "decay": None}}}
TENSOR_BYTES = 1024  # of the objects behind a view, which tracemalloc does not see: at most


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a decoder in the manner of Llama; by default those of its 70-billion model."""

    layers: int = 80
    width: int = 8192
    hidden: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        kv = c.width // c.heads * c.kv_heads
        self.q_proj, self.o_proj = _linear(c.width, c.width), _linear(c.width, c.width)
        self.k_proj, self.v_proj = _linear(c.width, kv), _linear(c.width, kv)
        self.gate_proj, self.up_proj = _linear(c.width, c.hidden), _linear(c.width, c.hidden)
        self.down_proj = _linear(c.hidden, c.width)
        self.input_norm, self.post_norm = nn.RMSNorm(c.width), nn.RMSNorm(c.width)


class Decoder(nn.Module):
    """The weights of a decoder; it is never run."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        self.lm_head = _linear(c.width, c.vocabulary)
        self.register_buffer("inv_freq", torch.empty(c.width // c.heads // 2), persistent=False)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def world_of(config: Config, num_replicas: int, num_shards: int) -> World:
    """What each rank of a mesh holds of the decoder."""
    with torch.device("meta"):
        model = Decoder(config)
    tensors = tuple((slot.fqn, tuple(slot.tensor.shape), slot.is_buffer) for slot in slots(model))
    return World(tensors, num_replicas, num_shards)


def sharded(config: Config, num_replicas: int, num_shards: int) -> nn.Module:
    """The decoder as a rank of the mesh has it, its own shards with storage. Collective."""
    with torch.device("meta"):
        model = Decoder(config)
    if num_replicas > 1:
        mesh = init_device_mesh(
            "cpu", (num_replicas, num_shards), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh("cpu", (num_shards,), mesh_dim_names=("shard",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


def fake_group(rank: int, size: int) -> None:
    """Be one rank of a process group that communicates nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())


class Simulation:
    """One rank of a mesh, in a process that has no process group yet."""

    def __init__(self, config: Config, num_replicas: int, num_shards: int, rank: int | None) -> None:
        """`rank` None: the one that has most to answer when replicas are looked for."""
        torch.set_num_threads(1)
        self.world = world_of(config, num_replicas, num_shards)
        self.rank = self.world.home_of_the_widest() if rank is None else rank
        fake_group(self.rank, self.world.size)
        start = time.perf_counter()
        self.model = sharded(config, num_replicas, num_shards)
        self.seconds_to_shard = time.perf_counter() - start
        self.ema, self.ranks = self.build()

    def build(self) -> tuple[ShardedEMA, SimulatedRanks]:
        ranks = SimulatedRanks(self.world)
        with mock.patch.object(ema_module, "Ranks", lambda group: ranks), ranks.counting():
            return ShardedEMA(self.model), ranks

    def construction(self) -> dict[str, Any]:
        """What the rank's average costs to build."""
        self.check()
        del self.ema
        (self.ema, self.ranks), seconds = clocked(self.build)
        traffic = self.ranks.traffic
        gc.collect()
        tracemalloc.start()
        traced, _ = self.build()
        del _
        gc.collect()
        held, _peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        plan = traced._bound.plan
        views = [f for w in plan.weights for f in w.fragments] + [p.fragment for p in plan.pieces]
        num_views = len({id(v) for f in views for v in (f.view, f.shown)})
        return {
            "seconds": seconds - self.ranks.seconds,
            "seconds_of_fully_shard": self.seconds_to_shard,
            "plan_bytes": held + TENSOR_BYTES * (num_views + len(traced._bound.shadow.values[0])),
            "average_bytes": traced.nbytes,
            "sent_bytes": traffic.sent,
            "received_bytes": traffic.received,
            "by_call": dict(self.ranks.by_call),
        }

    def check(self) -> None:
        """The simulated world holds on this rank what the model does."""
        plan = self.ema._bound.plan
        told = [place for place, _ in self.world.places(self.rank)]
        assert sorted(map(repr, told)) == sorted(
            repr(f.place) for w in plan.weights for f in w.fragments
        )
        assert self.world.owned(self.rank) == [p.fragment.place for p in plan.parameters]

    def gathering(self) -> dict[str, Any]:
        """What the routes to rank 0 cost to make, here and by what is told to rank 0."""
        values = self.ema._bound.shadow.values[0]
        ranks = SimulatedRanks(self.world)
        ranks.given.append(self._catalogue)
        before = peak_memory(reset=True)
        (gatherer, seconds) = clocked(lambda: Gatherer(self.ema._bound.plan, values, ranks))
        return {
            "seconds": seconds - ranks.seconds,
            "peak_bytes": peak_memory() - before,
            "sent_bytes": ranks.traffic.sent,
            "received_bytes": ranks.traffic.received,
            "buckets": len(gatherer._buckets),
        }

    def _catalogue(self, rank: int) -> tuple[list[Entry], list[Place]]:
        """What a rank tells rank 0 when a gather is prepared."""
        places = self.world.owned(rank)
        shapes = {place.fqn: place.shape for place in places}
        entries = [Entry(fqn, (), shape, torch.float32, True) for fqn, shape in shapes.items()]
        return entries, places

    def saving(self, directory: Path) -> dict[str, Any]:
        """What a save costs rank 0 apart from its own data, and a load every rank."""
        ranks = SimulatedRanks(self.world)
        ranks.given.append(self._save_plan)
        tensors = self._tensors()
        planner, writer = EmaSavePlanner(), ShardWriter(
            directory / "ema", ["ema"], tensors, STATE, asynchronous=False
        )
        before = peak_memory(reset=True)
        (plan, metadata), planning = clocked(
            lambda: api._plan_save(planner, writer, self.ema._parts(), tensors, ranks)
        )
        told = ranks.traffic.received
        sums = [
            [["0" * 16] * -(-nbytes_of(item) // manifest.BLOCK_BYTES) for item in theirs.items]
            for theirs in planner.global_plan
        ]
        told_sums = sum(len(pickle.dumps(each)) for each in sums[1:])
        results = api._results(planner.global_plan, sums)
        about, seconds_to_make = clocked(
            lambda: writer._manifest(writer._plans[0].storage_data, results)
        )
        data, seconds_to_write = clocked(lambda: manifest.dump(about))
        peak = peak_memory() - before
        num_boxes = sum(len(t.boxes) for t in about.averages["ema"].tensors.values())
        del about, results, planner, writer, plan, metadata
        gc.collect()
        before = peak_memory(reset=True)
        _, seconds_to_parse = clocked(lambda: parsing.parse(data, "manifest.json"))
        return {
            "seconds_to_plan": planning - ranks.seconds,
            "seconds_to_make_manifest": seconds_to_make + seconds_to_write,
            "seconds_to_parse_manifest": seconds_to_parse,
            "manifest_bytes": len(data),
            "boxes": num_boxes,
            "peak_bytes_rank0": peak,
            "peak_bytes_parse": peak_memory() - before,
            "received_bytes_rank0": told + told_sums,
        }

    def _save_plan(self, rank: int) -> SavePlan:
        parts = [
            Part(place, torch.empty(place.numel, device="meta"), True)
            for place in self.world.owned(rank)
        ]
        planner = EmaSavePlanner()
        planner.set_up_planner(api._keyed({"ema": parts}, self._tensors()), None, False)
        return dataclasses.replace(planner.create_local_plan(), storage_data=True)

    def _tensors(self) -> list[TensorInfo]:
        return [TensorInfo(n, (), shape, torch.float32) for n, shape in self.world.parameters]


def clocked(act: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds that it took."""
    gc.collect()
    start = time.perf_counter()
    result = act()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    import json
    import sys
    import tempfile
    r, s, k, what = sys.argv[1:5]
    sim = Simulation(Config(layers=int(sys.argv[5])) if len(sys.argv) > 5 else Config(), int(r), int(s), None if k == "w" else int(k))
    for w in what.split(","):
        t=time.time()
        if w == "saving":
            with tempfile.TemporaryDirectory() as d: out = sim.saving(Path(d))
        else: out = getattr(sim, w)()
        print(w, time.time()-t, json.dumps(out), flush=True)
