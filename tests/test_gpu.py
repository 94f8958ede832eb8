"""What only an accelerator can show. Each body runs on the CPU too, as part of the suite.

    bash launch/gpu.sh tests        (= pytest -m gpu tests/test_gpu.py)

The tests marked `gpu` are skipped where there is no accelerator. On the CPU there are no streams
and no device memory, so there the bodies show that they run, and that the values are right.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA, update_bn
from dist_ema.core.accelerator import SideStreams
from tests.oracle import Oracle, worst_relative_error
from tests.runs import MAX_RELATIVE_ERROR, same
from tests.worlds_deepspeed import configuration, library

DECAY = 0.9
MB = 1 << 20
A_FEW_CHUNKS = 32 * MB  # offload and swap stage chunks of 4 MB
LARGE = 2048  # width on an accelerator: 16 MB a layer
pytestmark = pytest.mark.filterwarnings("ignore:the live weights are")


def accelerator() -> torch.device:
    if not torch.accelerator.is_available():
        pytest.skip("there is no accelerator")
    return torch.device(torch.accelerator.current_accelerator().type, 0)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if request.param == "cpu" else accelerator()


def on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


class Net(nn.Module):
    """Layers whose weights change much at each step, so that an average of other steps is seen."""

    def __init__(self, width: int, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


class Training:
    """A model in training that never lets the host wait, and its weights after each step."""

    def __init__(
        self,
        device: torch.device,
        *,
        width: int = LARGE,
        dtype: torch.dtype = torch.float32,
        wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    ) -> None:
        torch.manual_seed(0)
        self.width = 24 if on_cpu(device) else width
        self.net = Net(self.width).to(device, dtype)
        self.model = wrap(self.net)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.batches = [torch.randn(16, self.width).to(device, dtype) for _ in range(8)]
        self.recorded = [self.weights()]

    def weights(self) -> dict[str, Tensor]:
        """Copies of the whole weights, made on the device."""
        is_fsdp1, summon = isinstance(self.model, FSDP1), FSDP1.summon_full_params
        with summon(self.model, writeback=False) if is_fsdp1 else contextlib.nullcontext():
            named = [(n, p.detach()) for n, p in self.net.named_parameters()]
            wholes = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}
            return {n.replace("_fsdp_wrapped_module.", ""): p.clone() for n, p in wholes.items()}

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        self.loss(number).backward()
        self.optimizer.step()
        self.recorded.append(self.weights())

    def loss(self, number: int) -> Tensor:
        return self.model(self.batches[number]).float().square().mean()

    def average(self, decay: Any = DECAY, num_steps: int = 4, **options: Any) -> ShardedEMA:
        """The average of a number of steps."""
        ema = ShardedEMA(self.model, decay, **options)
        for number in range(num_steps):
            self.step(number)
            ema.update()
        return ema

    def evaluate(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            logits = self.model(self.batches[-1]).clone()
        self.model.train()
        return logits

    def error(self, ema: ShardedEMA, decay: float = DECAY, **options: Any) -> float:
        """How far an average is from that of the recorded weights in float64."""
        name = options.pop("name", None)
        recorded = [{n: w.cpu() for n, w in weights.items()} for weights in self.recorded]
        oracle = Oracle(recorded[0], decay, **options)
        for weights in recorded[1:]:
            oracle.update(weights)
        return worst_relative_error(ema.gather_state_dict(name), oracle.average)

    def evaluate_with(self, state: dict[str, Tensor]) -> Tensor:
        """The forward pass of a plain model with these weights."""
        plain = Net(self.width).to(self.batches[0])
        plain.load_state_dict(state)
        plain.eval()
        with torch.no_grad():
            return plain(self.batches[-1])


def averaged_logits(ema: ShardedEMA, training: Training) -> Tensor:
    with ema.average_parameters():
        return training.evaluate()


class Hold:
    """Work that keeps a stream busy for about 50 ms, and leaves the device to other streams.

    On a CPU next to nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out = torch.zeros(64, 64, device=device)
        self.repeats = 1 if on_cpu(device) else 5000

    def __call__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda._sleep(100_000_000)  # clock cycles of a single thread
            return
        for _ in range(self.repeats):
            torch.mm(self.out, self.out, out=self.out.new_empty(64, 64))

    def average(self, averaged: list[Tensor], live: list[Tensor], num_averaged: int) -> None:
        """A `multi_avg_fn` that is held up before it reads the weights."""
        self()
        torch._foreach_lerp_(averaged, live, 1 - DECAY)


# Fences.

BEHIND = pytest.mark.parametrize(
    "behind", [{"overlap": True}, {"device": "cpu"}], ids=["overlap", "offload"]
)


@BEHIND
@pytest.mark.parametrize("fenced", [True, False])
def test_the_next_step_waits_for_an_update_that_is_held_up(
    device: torch.device, behind: Any, fenced: bool
):
    if not fenced and on_cpu(device):
        pytest.skip("a CPU has no streams: only on an accelerator the average would be wrong")
    training = Training(device, width=512)
    no_fence = mock.patch.object(SideStreams, "fence", lambda self: None)
    with contextlib.nullcontext() if fenced else no_fence:
        ema = training.average(multi_avg_fn=Hold(device).average, **behind)
        error = training.error(ema, start_step=1)
    assert error <= MAX_RELATIVE_ERROR if fenced else error > 100 * MAX_RELATIVE_ERROR


@BEHIND
def test_several_averages_and_buffers_behind_the_next_forward_pass(
    device: torch.device, behind: Any
):
    """The forward pass writes to buffers, and no optimizer step comes before it."""
    training = Training(device)
    decays = {"fast": 0.5, "slow": DECAY}
    ema = ShardedEMA(training.model, decays, buffers="average", **behind)
    wanted = dict.fromkeys(decays, training.net.norm.running_mean.double())
    for number in range(4):
        training.step(number)
        ema.update()
        now = training.net.norm.running_mean.double()
        wanted = {name: d * wanted[name] + (1 - d) * now for name, d in decays.items()}
    for name, decay in decays.items():
        assert training.error(ema, decay, name=name) <= MAX_RELATIVE_ERROR
        average = ema.gather_state_dict(name)["norm.running_mean"]
        torch.testing.assert_close(average, wanted[name].float().cpu(), rtol=1e-5, atol=1e-6)


@BEHIND
@pytest.mark.parametrize("reader", ["drift", "swap", "copy_to", "dcp", "save"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:the average 'ema' was")
def test_whatever_reads_the_average_waits_for_it(
    device: torch.device, behind: Any, reader: str, tmp_path: Path
):
    training = Training(device, width=512)
    ema = training.average(DECAY, 3, multi_avg_fn=Hold(device).average, **behind)
    other = Net(training.width).to(device)
    copy = ShardedEMA(other, DECAY)
    if reader == "drift":
        first = ema.drift()
        assert first > 0 and ema.drift() == first
        return
    if reader == "swap":
        with ema.average_parameters():
            other.load_state_dict(training.net.state_dict())
        copy.reset()
    elif reader == "copy_to":
        ema.copy_to(other)
        copy.reset()
    elif reader == "dcp":
        dcp.save({"ema": ema}, checkpoint_id=tmp_path, no_dist=True)
        dcp.load({"ema": copy}, checkpoint_id=tmp_path, no_dist=True)
    else:
        ema.save(tmp_path / "ema")
        copy.load(tmp_path / "ema")
    assert training.error(copy, start_step=1) <= MAX_RELATIVE_ERROR


@pytest.mark.gpu
def test_graph_captures_are_refused():
    device = accelerator()
    if device.type != "cuda":
        pytest.skip("captures a CUDA graph")
    training = Training(device, width=64)
    training.average(0.9, 1)
    resident = ShardedEMA(training.model, DECAY)
    with pytest.raises(RuntimeError, match="cannot be updated while a graph is captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            resident.update()
    assert resident.step == 0 and resident.update()
    overlapped = ShardedEMA(training.model, DECAY, overlap=True)
    overlapped.update()
    with pytest.raises(RuntimeError, match="a graph that is being captured cannot wait for"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            training.optimizer.step()


# Memory.


def held(device: torch.device, *, peak: bool = False) -> int:
    """Bytes allocated on an accelerator now, or the most since the last call without `peak`."""
    if on_cpu(device):
        return 0
    module = torch.get_device_module(device)
    module.synchronize()
    if peak:
        return module.max_memory_allocated()
    module.reset_peak_memory_stats()
    return module.memory_allocated()


def test_an_offloaded_average_holds_a_few_chunks_on_the_device(device: torch.device):
    training = Training(device)
    training.average(0.9, 1)  # what libraries allocate once
    model = sum(p.nbytes for p in training.net.parameters())
    before = held(device)
    ema = ShardedEMA(training.model, DECAY, device="cpu")
    for _ in range(3):
        ema.update()
    values = [value for of_one in ema._average.storage.values for value in of_one]
    assert all(value.device.type == "cpu" for value in values)
    assert all(value.is_pinned() for value in values) != on_cpu(device)
    assert ema.nbytes >= model
    extra = held(device, peak=True) - before
    assert extra <= A_FEW_CHUNKS, (extra / MB, model / MB)
    assert on_cpu(device) or extra < model / 2, "the model is too small to show anything"


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}], ids=["resident", "offload"])
def test_a_swap_needs_a_few_chunks(device: torch.device, options: Any):
    training = Training(device)
    ema = training.average(**options)
    raw, before = training.evaluate(), held(device)
    with ema.average_parameters():
        extra = held(device, peak=True) - before
        averaged = training.evaluate()
    extra = max(extra, held(device, peak=True) - before)
    assert extra <= A_FEW_CHUNKS, extra / MB
    state = ema.gather_state_dict()
    torch.testing.assert_close(averaged, training.evaluate_with(state), rtol=1e-4, atol=1e-5)
    same(training.evaluate(), raw)
    same(training.weights(), training.recorded[-1])


# Precision.


def test_steps_that_a_grad_scaler_skips_are_not_averaged(device: torch.device):
    training = Training(device, width=64)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, growth_interval=1000)
    ema = ShardedEMA(training.model, DECAY, overlap=True)
    for number in range(6):
        training.optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = training.loss(number) * (torch.inf if number in (0, 3) else 1)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= scale:
            ema.update()
            training.recorded.append(training.weights())
    assert ema.step == 4
    assert training.error(ema) <= MAX_RELATIVE_ERROR


def test_autocast_computes_with_the_weights_that_are_shown(device: torch.device):
    training = Training(device, width=64)
    ema = training.average(DECAY)
    x = training.batches[0]
    training.model.eval()
    outputs = []
    for block in (contextlib.nullcontext, ema.average_parameters, contextlib.nullcontext):
        with block(), torch.autocast(device.type, torch.bfloat16):
            outputs.append(training.model(x).detach())
    raw, averaged, again = outputs
    assert not torch.equal(averaged, raw)
    same(again, raw)


@BEHIND
def test_bf16_weights_are_averaged_in_fp32(device: torch.device, behind: Any):
    training = Training(device, dtype=torch.bfloat16)
    ema = training.average(**behind)
    assert training.error(ema) <= MAX_RELATIVE_ERROR
    raw = training.evaluate()
    state = {
        n: t.bfloat16() if t.is_floating_point() else t for n, t in ema.gather_state_dict().items()
    }
    with ema.average_parameters():
        averaged = training.evaluate()
    torch.testing.assert_close(averaged, training.evaluate_with(state), rtol=0.02, atol=0.02)
    same(training.evaluate(), raw)
    same(training.weights(), training.recorded[-1])


# What users do.


def test_a_compiled_model_follows_the_swap(device: torch.device):
    """On an accelerator with CUDA graphs, whose kernels read the addresses of the weights."""
    if not on_cpu(device) and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("triton needs a C compiler")
    how: dict[str, Any] = {"backend": "eager"} if on_cpu(device) else {"mode": "reduce-overhead"}
    training = Training(device, width=256, wrap=lambda net: torch.compile(net, **how))
    ema = training.average(DECAY, 6, overlap=True)
    for _ in range(3):  # the first calls warm up and capture
        raw = training.evaluate()
    for _ in range(2):
        averaged = averaged_logits(ema, training)
        wanted = training.evaluate_with(ema.gather_state_dict())
        torch.testing.assert_close(averaged, wanted, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(averaged, raw, rtol=1e-3, atol=1e-4)
        same(training.evaluate(), raw)
    training.step(6)
    ema.update()
    assert training.error(ema) <= MAX_RELATIVE_ERROR


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}], ids=["resident", "offload"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_of_an_average_on_a_device(device: torch.device, options: Any, tmp_path: Path):
    training = Training(device, width=512)
    ema = training.average(**options)
    wanted = ema.gather_state_dict()
    ema.save(tmp_path / "now")
    ema.save(tmp_path / "later", asynchronous=True).result()
    ema.export(tmp_path / "fp32")
    ema.export(tmp_path / "bf16", dtype=torch.bfloat16, method="rank0")
    same(load_file(tmp_path / "fp32" / "model.safetensors"), wanted)
    narrow = {n: t.bfloat16() if t.is_floating_point() else t for n, t in wanted.items()}
    same(load_file(tmp_path / "bf16" / "model.safetensors"), narrow)
    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for source in ("now", "later", "fp32", "dcp"):
        other = ShardedEMA(training.model, DECAY, **options)
        if source == "dcp":
            dcp.load({"ema": other}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        else:
            other.load(tmp_path / source)
        same(other.gather_state_dict(), wanted)
        other.update()
    ema.copy_to()
    torch.testing.assert_close(
        training.evaluate(), training.evaluate_with(wanted), rtol=1e-4, atol=1e-5
    )


def test_a_teacher_and_batch_norm_on_a_device(device: torch.device):
    training = Training(device)
    teacher = Net(training.width).to(device).requires_grad_(False)
    ema = training.average(into=teacher)
    assert training.error(ema) <= MAX_RELATIVE_ERROR
    torch.testing.assert_close(
        teacher.layers[0].weight.cpu(), ema.gather_state_dict()["layers.0.weight"]
    )
    ema = ShardedEMA(training.model, DECAY)
    before = training.net.norm.running_mean.clone()
    with ema.average_parameters():
        update_bn(training.batches, training.model)
        assert not torch.equal(training.net.norm.running_mean, before)
    same(training.net.norm.running_mean, before)


def test_a_model_that_moves_to_the_host_and_back(device: torch.device):
    """Storage moves while an update may be under way."""
    training = Training(device)
    ema = training.average(DECAY, 3, multi_avg_fn=Hold(device).average, overlap=True)
    training.model.cpu()
    training.model.to(device)
    junk = [torch.full_like(p, 1e9) for p in training.net.parameters()]  # where weights were
    ema.update()
    training.recorded.append(training.recorded[-1])
    del junk
    assert training.error(ema, start_step=1) <= MAX_RELATIVE_ERROR


# Engines, in processes of their own.

TORCH_ENGINES = ("ddp", "fsdp1", "fsdp2")
ZERO_ENGINES = ("zero1", "zero2", "zero3")


def wrapped(engine: str, net: nn.Module, device: torch.device) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(net, device_ids=None if on_cpu(device) else [device])
    if engine == "fsdp1":
        for number, layer in enumerate(net.layers):
            net.layers[number] = FSDP1(layer, device_id=device, use_orig_params=True)
        return FSDP1(net, device_id=device, use_orig_params=True)
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


class ZeroTraining(Training):
    """Steps of a DeepSpeed engine, and its fp32 masters after each."""

    def __init__(self, device: torch.device, stage: int) -> None:
        config = configuration(stage, batch_size=16, bf16={"enabled": True})

        def wrap(net: Any) -> nn.Module:
            net.norm = nn.Identity()  # not every device has a bf16 batch norm with fp32 statistics
            optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
            return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]

        pytest.importorskip("deepspeed")
        if on_cpu(device):
            deepspeed = library()
        else:
            import deepspeed

            deepspeed.init_distributed(dist.get_default_backend_for_device(device))
        super().__init__(device, width=256, dtype=torch.bfloat16, wrap=wrap)

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {n: safe_get_full_fp32_param(p).clone() for n, p in self.net.named_parameters()}

    def step(self, number: int) -> None:
        self.model.backward(self.loss(number))
        self.model.step()
        self.recorded.append(self.weights())


def check(training: Training, ema: ShardedEMA, path: Path) -> None:
    """What holds of an average under any engine. Collective."""
    error = training.error(ema) if dist.get_rank() == 0 else float(bool(ema.gather_state_dict()))
    assert error <= MAX_RELATIVE_ERROR
    raw = training.evaluate()
    assert not torch.equal(averaged_logits(ema, training), raw)
    same(training.evaluate(), raw)
    wanted = ema.gather_state_dict()
    ema.save(path / "ema")
    ema.save(path / "later", asynchronous=True).result()
    ema.export(path / "hf", method="direct")
    ema.export(path / "rank0", method="rank0")
    for name in ("hf", "rank0") if dist.get_rank() == 0 else ():
        found_in = load_file(path / name / "model.safetensors")
        same({n: found_in[n] for n in wanted}, wanted)
    ema.reset()
    assert ema.drift() == 0
    ema.load(path / "ema")
    assert ema.drift() > 0
    same(ema.gather_state_dict(), wanted)
    ema.copy_to()
    assert ema.drift() == 0
    dist.barrier()


def check_engine(engine: str, device: torch.device, path: Path) -> None:
    with warnings.catch_warnings():
        # Of torch 2.8 when FSDP2 gathers; the pool makes errors of warnings.
        warnings.filterwarnings("ignore", message="Deallocating Tensor that still has live")
        is_zero = engine in ZERO_ENGINES
        for behind in ({},) if is_zero else ({}, {"overlap": True}, {"device": "cpu"}):
            if is_zero:
                training: Training = ZeroTraining(device, int(engine[-1]))
            else:
                training = Training(device, width=256, wrap=lambda n: wrapped(engine, n, device))
            check(training, training.average(**behind), path)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("engine", [*TORCH_ENGINES, *ZERO_ENGINES])
@pytest.mark.filterwarnings("ignore")
def test_engines_on_the_cpu(engine: str, tmp_path: Path):
    check_engine(engine, torch.device("cpu"), tmp_path)


# Number of ranks and backend: one rank with the accelerator's own, two on it with gloo.
GROUPS = {
    "one rank": (1, "{own}"),
    "one rank, both": (1, "cpu:gloo,{type}:{own}"),
    "two ranks on one device": (2, "cpu:gloo,{type}:gloo"),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("engine", "group"),
    [
        *itertools.product(TORCH_ENGINES, GROUPS),
        *itertools.product(ZERO_ENGINES, ["one rank, both"]),
    ],
)
def test_engines_on_an_accelerator(engine: str, group: str, tmp_path: Path):
    device = accelerator()
    if engine in ZERO_ENGINES and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    num_ranks, backend = GROUPS[group]
    own = dist.get_default_backend_for_device(device)
    backend = backend.format(type=device.type, own=own)
    mp.spawn(process, (num_ranks, backend, engine, device, tmp_path), nprocs=num_ranks)


def process(
    rank: int, num_ranks: int, backend: str, engine: str, device: torch.device, path: Path
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # deepspeed wants one, and asks MPI otherwise
    )
    torch.accelerator.set_device_index(device.index)
    store = dist.FileStore(str(path / "store"), num_ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    try:
        check_engine(engine, device, path)
    finally:
        dist.destroy_process_group()
