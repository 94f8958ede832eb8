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
from typing import TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema import ema as ema_module
from dist_ema.checkpoint import manifest, writer
from dist_ema.core.gather import Gatherer
from dist_ema.core.layout import Fragment, FragmentMeta, TensorMeta
from dist_ema.core.names import registrations
from tests.benchmarks.launch import alone
from tests.benchmarks.measure import peak_memory
from tests.benchmarks.report import Row, Table
from tests.benchmarks.simulated import SimulatedGroup, World
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
    tensors = tuple((r.fqn, tuple(r.tensor.shape), r.is_buffer) for r in registrations(model))
    return World(tensors, num_replicas, num_shards)


def sharded(config: Config, num_replicas: int, num_shards: int) -> nn.Module:
    """The decoder as a rank of the mesh has it, its own shards with storage. Collective."""
    with torch.device("meta"):
        model = Decoder(config)
    sizes = (num_replicas, num_shards) if num_replicas > 1 else (num_shards,)
    names = ("replicate", "shard")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device="cpu")


class Simulation:
    """One rank of a mesh, in a process that has no process group yet."""

    def __init__(self, config: Config, num_replicas: int, num_shards: int, rank: int) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.set_num_threads(1)
        self.world = world_of(config, num_replicas, num_shards)
        dist.init_process_group("fake", rank=rank, world_size=self.world.size, store=FakeStore())
        self.model, self.seconds_to_shard = clocked(
            lambda: sharded(config, num_replicas, num_shards)
        )
        (self.ema, self.group), seconds = clocked(self.build)
        self.seconds = seconds - self.group.seconds
        self.plan = self.ema._average.plan
        held = {f.meta for w in self.plan.weights for f in w.fragments}
        assert held == set(self.world.averaged(rank))  # the world is right about this rank
        assert self.world.owned(rank) == [f.meta for f in self.plan.parameters]

    def build(self) -> tuple[ShardedEMA, SimulatedGroup]:
        group = SimulatedGroup(self.world)
        with mock.patch.object(ema_module, "Group", lambda _: group):
            return ShardedEMA(self.model), group

    def plan_bytes(self) -> int:
        """What Python holds for an average, without its values."""
        gc.collect()
        tracemalloc.start()
        traced, _ = self.build()
        del _
        gc.collect()
        held, _peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        plan, storage = traced._average.plan, traced._average.storage
        views = [f for w in plan.weights for f in w.fragments] + plan.fragments
        num_views = len({id(v) for f in views for v in (f.view, f.forward_view)})
        return held + TENSOR_BYTES * (num_views + len(storage.values[0]))

    def gathering(self) -> dict[str, float]:
        """What it costs rank 0 to plan a gather, the reports of other ranks included."""
        group = SimulatedGroup(self.world)
        group.given.append(self._report_to_gatherer)
        before = peak_memory(reset=True)
        values = self.ema._average.storage.values[0]
        _, seconds = clocked(lambda: Gatherer(self.plan, values, [], group))
        return {
            "gather: plan s": seconds - group.seconds,
            "gather: told MB": group.received / 1e6,
            "gather: tells MB": group.sent / 1e6,
            "gather: peak MB": (peak_memory() - before) / 1e6,
        }

    def _report_to_gatherer(
        self, rank: int
    ) -> tuple[list[TensorMeta], list[tuple[int, FragmentMeta]]]:
        owned = self.world.owned(rank)
        shapes = {meta.fqn: meta.shape for meta in owned}
        tensors = [TensorMeta(fqn, (), shape, torch.float32) for fqn, shape in shapes.items()]
        return tensors, list(enumerate(owned))

    def saving(self, directory: Path) -> dict[str, float]:
        """What a save costs rank 0 apart from its own data, and what a load costs every rank."""
        before = peak_memory(reset=True)
        own, plan_s = clocked(lambda: self._save(directory, self.plan.fragments).write(0))
        others = [
            self._save(directory, [on_meta(meta) for meta in self.world.owned(rank)]).write(rank)
            for rank in range(1, self.world.size)
        ]
        save = self._save(directory, [])
        data, made_s = clocked(lambda: manifest.dump(save.manifest([own, *others])))
        saved = {
            "save: plan s": plan_s,
            "save: told MB": sum(len(pickle.dumps(report)) for report in others) / 1e6,
            "save: peak MB": (peak_memory() - before) / 1e6,
            "manifest MB": len(data) / 1e6,
            "made s": made_s,
        }
        before = peak_memory(reset=True)
        parsed, seconds = clocked(lambda: manifest.parse(data))
        tensors = parsed.averages["ema"].tensors.values()
        return {
            "boxes": sum(len(tensor.boxes) for tensor in tensors),
            **saved,
            "parsed s": seconds,
            "parsed: peak MB": (peak_memory() - before) / 1e6,
        }

    def _save(self, directory: Path, fragments: Sequence[Fragment]) -> UnwrittenSave:
        tensors = [TensorMeta(n, (), shape, torch.float32) for n, shape in self.world.parameters]
        averages = {"ema": fragments}
        return UnwrittenSave(directory / "ema", directory, "0" * 32, averages, tensors, STATE, None)


def on_meta(meta: FragmentMeta) -> Fragment:
    return Fragment(meta, torch.empty(meta.numel, device="meta"))


class UnwrittenSave(writer._Save):
    """A save that reports what a rank would write, with made-up checksums."""

    def _write_file(
        self, path: Path, header: bytes, tensors: Sequence[tuple[str, torch.Tensor]]
    ) -> list[list[str]]:
        return [["0" * 16] * -(-t.nbytes // manifest.BLOCK_BYTES) for _, t in tensors]


def clocked(act: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds that it took."""
    gc.collect()
    start = time.perf_counter()
    result = act()
    return result, time.perf_counter() - start


def run(device: str, sizes: Sizes) -> list[Table]:
    """Simulated on the CPU, whatever the device."""
    built = Table("construction", "Building the average", CONSTRUCTION_NOTE)
    on_rank0 = Table("rank0", "What rank 0 is told", RANK0_NOTE)
    replicated = sizes.num_replicas, sizes.num_shards // sizes.num_replicas
    meshes = {
        f"FSDP2 {sizes.num_shards}": (1, sizes.num_shards),
        f"HSDP {replicated[0]} x {replicated[1]}": replicated,
    }
    for name, mesh in meshes.items():
        sys.stderr.write(f"tests.benchmarks.scale: {name}\n")
        built.rows.append({"mesh": name} | alone(construction, sizes.decoder, *mesh, 0))
        few = replace(sizes.decoder, layers=sizes.layers)
        on_rank0.rows.append({"mesh": name} | alone(planning, few, *mesh))
    return [built, on_rank0]


def construction(config: Config, num_replicas: int, num_shards: int, rank: int) -> Row:
    """A row of what one rank needs to build its average. In a process of its own."""
    simulation = Simulation(config, num_replicas, num_shards, rank)
    return {
        "billion parameters": simulation.world.numel / 1e9,
        "rank": rank,
        "seconds": simulation.seconds,
        "fully_shard seconds": simulation.seconds_to_shard,
        "plan MB": simulation.plan_bytes() / 1e6,
        "average MB": simulation.ema.nbytes / 1e6,
        "sent MB": simulation.group.sent / 1e6,
        "received MB": simulation.group.received / 1e6,
    }


def planning(config: Config, num_replicas: int, num_shards: int) -> Row:
    """A row of what rank 0 needs to plan a gather and to save. In a process of its own."""
    simulation = Simulation(config, num_replicas, num_shards, 0)
    gathered = simulation.gathering()
    with tempfile.TemporaryDirectory() as directory:
        saved = simulation.saving(Path(directory))
    return {
        "billion parameters": simulation.world.numel / 1e9,
        "boxes": saved.pop("boxes"),
        **gathered,
        **saved,
    }
