"""An average on another device than the weights, and updates on side streams.

These tests need no accelerator: they test the path itself, with chunks that come to the weights and
go back while there are no streams, and with stand-ins for streams that record who waits for whom.
tests/test_gpu.py runs the same on a device.
"""

from __future__ import annotations

import gc
import importlib
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dist_ema import HalfLife, ShardedEMA
from dist_ema.core import accelerator, lerp
from dist_ema.core.accelerator import SideStreams, synchronize_if_initialized
from tests.grid import rows
from tests.runs import same, start
from tests.worlds import World

CROSSING = {"target": lerp, "attribute": "_crosses", "new": lambda average, live: True}


@rows("plain", "plain_bf16", "ddp", "fsdp2", "hsdp", "z2_bf16", "z3")
def test_an_average_on_another_device_is_the_same(world: World):
    with (
        mock.patch.object(**CROSSING),
        mock.patch.object(lerp, "_CHUNK_ACROSS_DEVICES", 50),
    ):
        run = start(world, device="cpu", start_step=1, update_every=2).train(5)
        batches = [b for track in run.ema._average.storage._tracks for b in track.batches]
        # Neighbours have staging of their own.
        stagings = [b.staged_averages[0].data_ptr() for b in batches]
        assert all(a != b for a, b in itertools.pairwise(stagings))
        run.check(start_step=1, update_every=2)
        before = run.training.evaluate()
        assert not torch.equal(run.averaged_logits(), before)
        same(run.training.evaluate(), before)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9},
        {"decay": {"fast": 0.5, "slow": HalfLife(10)}},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        {"decay": 0.9, "dtype": torch.bfloat16},
        {"decay": 0.9, "buffers": "average", "start_step": 2},
    ],
    ids=["one", "two", "function", "bf16", "buffers"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:the average is kept in", "ignore:the live weights are")
def test_the_way_there_and_back_changes_no_bit(options: dict[str, Any], dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 7)).to(dtype)
    resident = ShardedEMA(model, **options)
    with (
        mock.patch.object(**CROSSING),
        mock.patch.object(lerp, "_CHUNK_ACROSS_DEVICES", 64),
    ):
        offloaded = ShardedEMA(model, device="cpu", overlap=True, **options)
    for _ in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        for ema in (resident, offloaded):
            ema.update()
    for name in resident.names:
        found, wanted = offloaded.gather_state_dict(name), resident.gather_state_dict(name)
        same(found, wanted)
        assert offloaded.drift(name) == resident.drift(name)


def test_buffers_are_read_before_the_next_forward_writes_to_them():
    slow: list[Any] = []

    class Slow:
        """In place of side streams: nothing runs before something waits for it."""

        is_capturing = staticmethod(lambda: False)

        def __init__(self, device: torch.device, count: int) -> None:
            self.queued: list[Any] = []
            slow.append(self)

        def run(self, work: Any, items: Any) -> None:
            self.queued += [(work, item) for item in items]

        def fence(self) -> None:
            while self.queued:
                work, item = self.queued.pop(0)
                work(item)

        synchronize = fence

    def final(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ema = ShardedEMA(model, 0.5, buffers="average", **options)
        for _ in range(3):
            model(torch.randn(5, 4)).sum().backward()
            for streams in slow:
                streams.fence()  # as the hook before an optimizer's step does
            optimizer.step()
            ema.update()
        return ema.gather_state_dict()

    wanted = final()
    with mock.patch.object(lerp, "SideStreams", Slow):
        same(final(overlap=True), wanted)
    assert slow


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "meta"}, "device is meta, wanted 'cpu'"),
        ({"device": "cpu", "into": nn.Linear(2, 2)}, "device and overlap have no meaning"),
        ({"overlap": True, "into": nn.Linear(2, 2)}, "device and overlap have no meaning"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ShardedEMA(nn.Linear(2, 2), **options)


class Recorder:
    """An accelerator whose streams and events write down who waits for whom."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.current = self.stream("current")
        self.num_streams = 0
        self.capturing = False

    def stream(self, name: str) -> mock.MagicMock:
        stream = mock.MagicMock(label=name)
        stream.wait_event = lambda event: self.lines.append(f"{name} waits for {event.label}")
        stream.__enter__ = lambda _: self.lines.append(f"enter {name}")
        stream.__exit__ = lambda *_: self.lines.append(f"leave {name}")
        return stream

    def new_stream(self, device: torch.device) -> mock.MagicMock:
        assert device.type == "xpu"
        self.num_streams += 1
        return self.stream(f"stream {self.num_streams}")

    def new_event(self, device: torch.device) -> mock.Mock:
        assert device.type == "xpu"
        event = mock.Mock(label="nothing")

        def record(stream: mock.Mock) -> None:
            event.label = f"the work of {stream.label}"
            self.lines.append(f"{stream.label} is recorded")

        event.record = record
        event.synchronize = lambda: self.lines.append(f"the host waits for {event.label}")
        return event

    def streams(self, count: int) -> SideStreams:
        importlib.import_module("torch._dynamo")  # it derives classes from those replaced here
        xpu = torch.device("xpu:0")
        module = mock.Mock(is_current_stream_capturing=lambda: self.capturing)
        backend = torch.accelerator
        mock.patch.object(backend, "current_accelerator", lambda: torch.device("xpu")).start()
        mock.patch.object(backend, "current_stream", lambda device: self.current).start()
        mock.patch.object(torch, "get_device_module", lambda device: module).start()
        with (
            mock.patch.object(torch, "Stream", self.new_stream),
            mock.patch.object(torch, "Event", self.new_event),
        ):
            return SideStreams(xpu, count)


@pytest.fixture
def recorder():
    yield Recorder()
    mock.patch.stopall()


def an_optimizer() -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return torch.optim.SGD([weight], lr=0.1)


def offloaded(recorder: Recorder) -> ShardedEMA:
    """An average in host memory, of three chunks that take turns on two streams."""
    with (
        mock.patch.object(**CROSSING),
        mock.patch.object(lerp, "_CHUNK_ACROSS_DEVICES", 250),
        mock.patch.object(lerp, "SideStreams", lambda device, count: recorder.streams(count)),
    ):
        return ShardedEMA(nn.Linear(30, 20), 0.9, device="cpu")


def test_chunks_take_turns_on_two_streams_and_optimizers_and_readers_wait(recorder: Recorder):
    ema, optimizer = offloaded(recorder), an_optimizer()
    ema.drift()
    recorder.lines.clear()
    optimizer.step()
    assert recorder.lines == []  # nothing is under way
    ema.update()
    assert recorder.lines == [
        "current is recorded",
        "stream 1 waits for the work of current",
        "stream 2 waits for the work of current",
        *(f"{what} stream {n}" for n in (1, 2, 1) for what in ("enter", "leave")),
        "stream 1 is recorded",
        "stream 2 is recorded",
    ]
    fence = [f"current waits for the work of stream {n}" for n in (1, 2)]
    recorder.lines.clear()
    optimizer.step()
    assert recorder.lines == fence
    recorder.lines.clear()
    ema.drift()
    assert recorder.lines == [
        *fence,
        *(f"the host waits for the work of stream {n}" for n in (1, 2)),
    ]
    recorder.lines.clear()
    ema.drift()
    assert recorder.lines == []


def test_a_compiled_training_step_waits_each_time_and_traces_no_stream(recorder: Recorder):
    traced: list[tuple[str, bool]] = []

    def run(self: SideStreams, work: Any, items: Any) -> None:
        traced.append(("run", torch.compiler.is_compiling()))
        for item in items:
            work(item)

    def fence(self: SideStreams) -> None:
        traced.append(("fence", torch.compiler.is_compiling()))

    optimizer = an_optimizer()
    model = nn.ParameterList(optimizer.param_groups[0]["params"])
    with (
        mock.patch.object(SideStreams, "run", run),
        mock.patch.object(SideStreams, "fence", fence),
    ):
        with mock.patch.object(lerp, "SideStreams", lambda device, count: recorder.streams(count)):
            ema = ShardedEMA(model, 0.5, overlap=True)
        mock.patch.stopall()  # the compiler asks for the accelerator too

        def step() -> None:
            optimizer.step()
            ema.update()

        traced.clear()
        wanted, compiled = torch.ones(2), torch.compile(step, backend="eager")
        for _ in range(3):
            compiled()
            wanted = (wanted + model[0].detach()) / 2
    assert traced == [("fence", False), ("run", False)] * 3
    torch.testing.assert_close(ema.gather_state_dict()["0"], wanted)


def test_a_graph_capture_that_could_not_wait_is_refused(recorder: Recorder):
    streams, optimizer = recorder.streams(1), an_optimizer()
    streams.run(list, [[]])
    recorder.capturing = True
    with pytest.raises(RuntimeError, match=r"a graph that is being captured cannot wait for"):
        optimizer.step()
    streams.synchronize()
    optimizer.step()


def test_an_update_in_a_graph_capture_is_refused():
    capturing = False
    with mock.patch.object(accelerator, "graph_capture_query", lambda device: lambda: capturing):
        ema = ShardedEMA(nn.Linear(2, 2))
    capturing = True
    with pytest.raises(RuntimeError, match="cannot be updated while a graph is captured"):
        ema.update()
    assert ema.step == 0
    capturing = False
    assert ema.update()


def test_an_average_that_is_gone_leaves_no_hook(recorder: Recorder):
    from torch.optim import optimizer as module

    gc.collect()
    before = len(module._global_optimizer_pre_hooks)
    streams = recorder.streams(1)
    assert len(module._global_optimizer_pre_hooks) == before + 1
    streams.run(list, [[]])
    recorder.lines.clear()
    del streams
    gc.collect()
    assert recorder.lines == ["the host waits for the work of stream 1"]
    assert len(module._global_optimizer_pre_hooks) == before


@pytest.mark.parametrize("is_initialized", [True, False])
def test_an_accelerator_is_waited_for_only_where_it_is_in_use(is_initialized: bool):
    module = mock.Mock(is_initialized=lambda: is_initialized)
    with (
        mock.patch.object(torch.accelerator, "current_accelerator", lambda: torch.device("xpu")),
        mock.patch.object(torch, "get_device_module", lambda device: module),
        mock.patch.object(torch.accelerator, "synchronize") as synchronize,
    ):
        synchronize_if_initialized()
    assert synchronize.called == is_initialized
