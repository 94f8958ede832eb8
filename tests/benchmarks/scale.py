"""A 70-billion-parameter transformer on 1,024 ranks, as one of them sees it; see simulated.py.

What is timed runs on one core, and is the code that runs on that rank, without the network: what is
sent and received is counted. The model is built on the meta device, `fully_shard` cuts it on
torch's fake process group, and only the rank's own shards get storage.
"""

from __future__ import annotations

import gc
import pickle
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema import ema as ema_module
from dist_ema.checkpoint import checksums, manifest, parsing
from dist_ema.checkpoint.writer import Orders, Report, Save
from dist_ema.core.gather import Gatherer
from dist_ema.core.layout import Fragment, FragmentMeta, TensorMeta
from dist_ema.core.names import registrations
from tests.benchmarks.launch import alone
from tests.benchmarks.measure import peak_memory
from tests.benchmarks.report import Row, Table
from tests.benchmarks.simulated import SimulatedRanks, World
from tests.benchmarks.sizes import Config, Sizes

T = TypeVar("T")
STATE = {"step": 0, "num_updates": 0, "averages": {"ema": {"schedule": {}, "decay": None}}}
CONSTRUCTION_NOTE = """\
One rank of the mesh, one core, the network not counted. *Seconds*: of `ShardedEMA(model)`.
*Plan*: what Python holds for it, and 1 kB for each tensor; *average* is not part of it. *Sent* and
*received*: payload of all collectives of the constructor."""
RANK0_NOTE = """\
On rank 0, one core, the network and the data not counted, of a model with fewer layers: all figures
grow with the boxes, of which all layers have as many more. *Peak*: resident memory beyond what was
held before. *Made*: the manifest, put together and written as JSON; *parsed*: read and checked, as
every rank does when it loads."""
DATA_NOTE = """\
Bytes of averages that move, computed from what ranks own; the update itself moves none."""
TENSOR_BYTES = 1024  # of the objects behind a view, which tracemalloc does not see: at most


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
    tensors = tuple(
        (slot.fqn, tuple(slot.tensor.shape), slot.is_buffer) for slot in registrations(model)
    )
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

    def __init__(self, config: Config, num_replicas: int, num_shards: int, rank: int) -> None:
        torch.set_num_threads(1)
        self.world = world_of(config, num_replicas, num_shards)
        self.rank = rank
        fake_group(self.rank, self.world.size)
        start = time.perf_counter()
        self.model = sharded(config, num_replicas, num_shards)
        self.seconds_to_shard = time.perf_counter() - start
        (self.ema, self.ranks), seconds = clocked(self.build)
        self.seconds = seconds - self.ranks.seconds

    def build(self) -> tuple[ShardedEMA, SimulatedRanks]:
        ranks = SimulatedRanks(self.world)
        with mock.patch.object(ema_module, "Ranks", lambda group: ranks), ranks.counting():
            return ShardedEMA(self.model), ranks

    def construction(self) -> dict[str, Any]:
        """What the rank's average costs to build."""
        self.check()
        traffic = self.ranks.traffic
        gc.collect()
        tracemalloc.start()
        traced, _ = self.build()
        del _
        gc.collect()
        held, _peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        plan = traced._average.plan
        views = [f for w in plan.weights for f in w.fragments] + plan.fragments
        num_views = len({id(v) for f in views for v in (f.view, f.forward_view)})
        return {
            "seconds": self.seconds,
            "seconds_of_fully_shard": self.seconds_to_shard,
            "plan_bytes": held
            + TENSOR_BYTES * (num_views + len(traced._average.storage.values[0])),
            "average_bytes": traced.nbytes,
            "sent_bytes": traffic.sent,
            "received_bytes": traffic.received,
            "by_call": dict(self.ranks.by_call),
        }

    def check(self) -> None:
        """The simulated world holds on this rank what the model does."""
        plan = self.ema._average.plan
        told = [place for place, averaged in self.world.places(self.rank) if averaged]
        assert sorted(map(repr, told)) == sorted(
            repr(f.meta) for w in plan.weights for f in w.fragments
        )
        assert self.world.owned(self.rank) == [p.meta for p in plan.parameters]

    def gathering(self) -> dict[str, Any]:
        """What the routes to rank 0 cost to make, here and by what is told to rank 0."""
        values = self.ema._average.storage.values[0]
        ranks = SimulatedRanks(self.world)
        ranks.given.append(self._catalogue)
        before = peak_memory(reset=True)
        _, seconds = clocked(lambda: Gatherer(self.ema._average.plan, values, [], ranks))
        return {
            "seconds": seconds - ranks.seconds,
            "peak_bytes": peak_memory() - before,
            "sent_bytes": ranks.traffic.sent,
            "received_bytes": ranks.traffic.received,
        }

    def _catalogue(self, rank: int) -> tuple[list[TensorMeta], list[tuple[int, FragmentMeta]]]:
        """What a rank tells rank 0 when a gather is prepared."""
        places = self.world.owned(rank)
        shapes = {place.fqn: place.shape for place in places}
        entries = [TensorMeta(fqn, (), shape, torch.float32, True) for fqn, shape in shapes.items()]
        return entries, list(enumerate(places))

    def saving(self, directory: Path) -> dict[str, Any]:
        """What a save costs rank 0 apart from its own data, and a load every rank."""
        before = peak_memory(reset=True)
        data, found = self._manifest(directory)
        found["peak_bytes_rank0"] = peak_memory() - before
        before = peak_memory(reset=True)
        about, found["seconds_to_parse_manifest"] = clocked(
            lambda: parsing.parse(data, "manifest.json")
        )
        tensors = about.averages["ema"].tensors.values()
        return found | {
            "manifest_bytes": len(data),
            "boxes": sum(len(tensor.boxes) for tensor in tensors),
            "peak_bytes_parse": peak_memory() - before,
        }

    def _manifest(self, directory: Path) -> tuple[bytes, dict[str, Any]]:
        """The manifest as rank 0 writes it, and what it took. No data is written."""
        own, planning = clocked(lambda: self._report(directory, self.ema._parts()["ema"], 0))
        others = [
            self._report(directory, self._parts_of(rank), rank)
            for rank in range(1, self.world.size)
        ]
        save = self._save(directory, [])
        data, making = clocked(lambda: manifest.dump(save._manifest([own, *others])))
        return data, {
            "seconds_to_plan": planning,
            "seconds_to_make_manifest": making,
            "received_bytes_rank0": sum(len(pickle.dumps(each)) for each in others),
        }

    def _report(self, directory: Path, parts: Sequence[Fragment], rank: int) -> Report:
        return self._save(directory, parts).write(rank)

    def _save(self, directory: Path, parts: Sequence[Fragment]) -> UnwrittenSave:
        orders = Orders(str(directory), "", "0" * 32, checksums.FAST)
        return UnwrittenSave(directory / "ema", {"ema": parts}, self._tensors(), STATE, orders)

    def _parts_of(self, rank: int) -> list[Fragment]:
        return [
            Fragment(place, torch.empty(place.numel, device="meta"))
            for place in self.world.owned(rank)
        ]

    def _tensors(self) -> list[TensorMeta]:
        return [TensorMeta(n, (), shape, torch.float32) for n, shape in self.world.parameters]


class UnwrittenSave(Save):
    """A save that reports what a rank would write, with made-up checksums."""

    def _write_file(
        self, path: Path, header: bytes, tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> tuple[list[list[str]], str]:
        sums = [["0" * 16] * -(-t.nbytes // manifest.BLOCK_BYTES) for _, t in tensors]
        return sums, "0" * 16


def clocked(act: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds that it took."""
    gc.collect()
    start = time.perf_counter()
    result = act()
    return result, time.perf_counter() - start


def run(device: str, sizes: Sizes) -> list[Table]:
    """Simulated on the CPU, whatever the device."""
    built = Table("construction", "Building the average", CONSTRUCTION_NOTE)
    told = Table("rank0", "What rank 0 is told", RANK0_NOTE)
    moved = Table("data", "What moves", DATA_NOTE)
    meshes = {
        f"FSDP2 {sizes.num_shards}": (1, sizes.num_shards),
        f"HSDP {sizes.num_replicas} x {sizes.num_shards // sizes.num_replicas}": (
            sizes.num_replicas,
            sizes.num_shards // sizes.num_replicas,
        ),
    }
    for name, mesh in meshes.items():
        sys.stderr.write(f"tests.benchmarks.scale: {name}\n")
        built.rows.append({"mesh": name} | alone(construction, sizes.decoder, *mesh, 0))
        few = replace(sizes.decoder, layers=sizes.layers)
        told.rows.append({"mesh": name} | alone(planning, few, *mesh))
        moved.rows.append({"mesh": name} | data(world_of(sizes.decoder, *mesh)))
    return [built, told, moved]


def construction(config: Config, num_replicas: int, num_shards: int, rank: int) -> Row:
    """A row of what one rank needs to build its average. In a process of its own."""
    simulation = Simulation(config, num_replicas, num_shards, rank)
    found = simulation.construction()
    return {
        "billion parameters": simulation.world.numel / 1e9,
        "rank": rank,
        "seconds": found["seconds"],
        "fully_shard seconds": found["seconds_of_fully_shard"],
        "plan MB": found["plan_bytes"] / 1e6,
        "average MB": found["average_bytes"] / 1e6,
        "sent MB": found["sent_bytes"] / 1e6,
        "received MB": found["received_bytes"] / 1e6,
    }


def planning(config: Config, num_replicas: int, num_shards: int) -> Row:
    """A row of what rank 0 needs to route a gather and to save. In a process of its own."""
    simulation = Simulation(config, num_replicas, num_shards, 0)
    gathered = simulation.gathering()
    with tempfile.TemporaryDirectory() as directory:
        saved = simulation.saving(Path(directory))
    return {
        "billion parameters": simulation.world.numel / 1e9,
        "boxes": saved["boxes"],
        "gather: plan s": gathered["seconds"],
        "gather: told MB": gathered["received_bytes"] / 1e6,
        "gather: tells MB": gathered["sent_bytes"] / 1e6,
        "gather: peak MB": gathered["peak_bytes"] / 1e6,
        "save: plan s": saved["seconds_to_plan"],
        "save: told MB": saved["received_bytes_rank0"] / 1e6,
        "save: peak MB": saved["peak_bytes_rank0"] / 1e6,
        "manifest MB": saved["manifest_bytes"] / 1e6,
        "made s": saved["seconds_to_make_manifest"],
        "parsed s": saved["seconds_to_parse_manifest"],
        "parsed: peak MB": saved["peak_bytes_parse"] / 1e6,
    }


def data(world: World) -> Row:
    """A row of the averaged bytes that move, by what each rank owns."""
    owned = [sum(place.numel for place in world.owned(rank)) for rank in range(world.size)]
    return {
        "save: GB to disk, of a rank": 4 * max(owned) / 1e9,
        "gather fp32: GB to rank 0": 4 * (world.numel - owned[0]) / 1e9,
        "gather fp32: GB from a rank": 4 * max(owned[1:]) / 1e9,
        "export bf16 through rank 0: GB to rank 0": 2 * (world.numel - owned[0]) / 1e9,
        "export bf16 direct: GB to disk, of a rank": 2 * max(owned) / 1e9,
    }
