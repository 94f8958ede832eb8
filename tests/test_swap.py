"""The swap: the model computes with the average and nothing else, and comes back bit for bit."""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from dist_ema import ShardedEMA
from tests import worlds
from tests.grid import FSDP1_KINDS, WORLDS, ZERO_KINDS, every_kind, every_row, named, one_size, rows
from tests.net import FROZEN, TRAINABLE
from tests.pool import fork_server
from tests.runs import Run, a_few_worlds, live_buffers, make_ema, same, start
from tests.worlds import (
    World,
    evaluate,
    from_rank_0,
    not_compiled,
    parametrized,
    rank,
    state_of,
)


class Interruption(Exception):
    pass


NATIVE = [world for world in worlds.WORLDS if not_compiled(world)]
WHERE_BACKWARD = [*NATIVE, *FSDP1_KINDS, *ZERO_KINDS]
# FSDP1 with "no_shard" raises by itself in the forward pass after one that failed.
WHERE_FAILING = [world for world in WHERE_BACKWARD if world.name != "no_shard"]
WHERE_FAILING += named(WORLDS, "z3_hpz", "z3_offload_all")


@every_row
def test_the_model_computes_with_the_average_inside_and_comes_back_bit_for_bit(world: World):
    run = start(world).train(1).train_unrecorded()
    training = run.training

    def shown() -> dict[str, Tensor]:
        world.engine.settle(training)
        return world.engine.shown_weights(training)

    with run.ema.average_parameters():  # nothing is gathered, or what the backward left gathered
        averaged = training.evaluate()
        same(training.evaluate(), averaged)
    live = training.evaluate()
    buffers = live_buffers(training)  # after a forward: DDP lets rank 0's prevail in each
    weights, objects = training.full_weights(), [id(p) for p in training.parameters().values()]
    average = from_rank_0(run.ema.gather_state_dict())
    training.evaluate()
    with run.ema.average_parameters(), torch.no_grad():
        same(training.evaluate(), averaged)  # live weights were gathered, and must not be used
        for name, tensor in shown().items():
            wanted = weights if name in FROZEN else average
            assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
        if run.ema.source == "master":
            masters = training.full_weights()
            same({n: masters[n] for n in TRAINABLE}, {n: weights[n] for n in TRAINABLE})
        training.loss(5)  # in training mode, so that batch statistics move
        training.net.mask.add_(1)
        assert not torch.equal(training.net.running, buffers["running"])
    same(live_buffers(training), buffers)
    same(training.evaluate(), live)
    with torch.inference_mode():
        inferred = run.averaged_logits().clone()
    # Since torch 2.14 tensor parallelism adds in another order in inference mode.
    torch.testing.assert_close(inferred, averaged, **world.forward_tolerance)
    same(training.evaluate(), live)
    same(training.full_weights(), weights)
    for name, tensor in shown().items():
        assert torch.equal(tensor, weights[name].to(tensor.dtype)), name
    assert [id(p) for p in training.parameters().values()] == objects
    assert not torch.equal(averaged, live)
    for state, logits in ((average, averaged), (average | state_of(weights), live)):
        plain = evaluate(world.plain_twin(state))
        torch.testing.assert_close(logits, plain, **world.forward_tolerance)
        if world.engine.model_parallel > 1:  # which adds in another order than a plain model
            twin = world.parallel_twin(state)
            same(twin.evaluate(), logits)
            if logits is averaged:
                with torch.inference_mode():
                    same(twin.evaluate().clone(), inferred)

    same(training.evaluate(), live)  # which leaves live weights gathered
    run.ema.copy_to()
    same(training.evaluate(), averaged)
    copied = training.full_weights()
    for name in TRAINABLE:
        assert torch.equal(copied[name], average[name].to(copied[name].dtype)), name
    assert run.ema.drift() == 0 or world.engine.weights_dtype != torch.float32
    run.train(1)
    assert run.ema.drift() > 0
    assert not torch.equal(run.weights[-1]["emb.weight"], copied["emb.weight"])


@parametrized(WHERE_BACKWARD, one_size)
def test_a_backward_pass_never_mixes_weights_and_average(world: World):
    """Each way has a model of its own: FSDP2 is of no use after a backward pass that failed."""

    def step(forward_inside: bool, backward_inside: bool) -> dict[str, Tensor] | None:
        run = start(world).train(1)
        loss = None if forward_inside else run.training.loss(1)
        with run.ema.average_parameters():
            if forward_inside:
                loss = run.training.loss(1)
            if backward_inside:
                return step_or_refusal(run, loss)
        return step_or_refusal(run, loss)

    around = step(forward_inside=False, backward_inside=False)
    if around is not None:  # where the swap does not touch what the backward pass reads
        same(around, step_or_refusal(run := start(world).train(1), run.training.loss(1)))
    assert step(forward_inside=True, backward_inside=False) is None
    assert step(forward_inside=False, backward_inside=True) is None


def step_or_refusal(run: Run, loss: Tensor | None) -> dict[str, Tensor] | None:
    """The weights after a step, or None if autograd on every rank finds that weights changed."""
    refused = False
    try:
        run.training.engine.step(run.training, loss)
    except RuntimeError as error:
        # Not a lost message or a timeout, which are RuntimeErrors too.
        assert "inplace" in str(error), error
        refused = True
    assert from_rank_0(refused) == refused
    return None if refused else run.training.full_weights()


@worlds.worlds("plain", "fsdp2-3")
def test_nothing_reads_or_writes_an_average_of_the_model_inside(world: World, tmp_path):
    run = start(world).train(2)
    other = make_ema(run.training, decay=0.5)
    averages = (run.ema, other)

    def state() -> object:
        return [(a.gather_state_dict(), a.step, a.num_updates) for a in averages]

    before = state()
    path = tmp_path / "never"
    with run.ema.average_parameters():
        logits = run.training.evaluate()
        for ema in averages:
            for call in (
                ema.update,
                ema.reset,
                ema.drift,
                ema.copy_to,
                ema.state_dict,
                ema.gather_state_dict,
                lambda ema=ema: list(ema.gather_tensors()),
                lambda ema=ema: ema.average_parameters().__enter__(),
                lambda ema=ema: ema.save(path),
                lambda ema=ema: ema.load(path),
                lambda ema=ema: ema.export(path),
                lambda: ShardedEMA(run.training.net),
            ):
                with pytest.raises(RuntimeError, match=r"inside average_parameters\(\)"):
                    call()
        same(run.training.evaluate(), logits)
    assert not path.exists()
    same(state(), before)
    same(run.training.full_weights(), run.weights[-1])
    assert other.update()


@worlds.worlds("plain", "ddp-2", "fsdp2_tp")
def test_copy_to_fills_a_plain_module_on_every_rank(world: World):
    run = start(world).train(3)
    state = from_rank_0(run.ema.gather_state_dict())
    net = world.make_net(seed=1)
    run.ema.copy_to(net)
    same(dict(net.state_dict()), state)
    assert net.head.weight is net.emb.weight
    same(run.training.full_weights(), run.weights[-1])
    other = world.make_net(seed=9, hidden=14)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks\.0\."):
        run.ema.copy_to(other)
    same(dict(other.state_dict()), before)
    run.ema.gather_state_dict()


@rows("plain", "ddp", "hsdp", "fsdp2_tp", "tp", "no_shard", "hybrid")
def test_whole_replicas_give_and_show_what_split_ones_do(world: World):
    split, whole = (start(world, replicas=kind).train(3) for kind in ("split", "whole"))
    same(whole.ema.gather_state_dict(), split.ema.gather_state_dict())
    same(whole.averaged_logits(), split.averaged_logits())
    same(whole.training.full_weights(), split.training.full_weights())


@worlds.worlds("ddp-2", "hsdp", "tp")
def test_replicas_that_differ_are_refused_at_every_swap_before_anything_is_written(world: World):
    run = start(world).train(1)
    run.averaged_logits()
    local = local_part(run.training.parameters()["emb.weight"].detach())
    if rank() == 1:
        local.view(-1)[[0, 1]] = local.view(-1)[[1, 0]]  # which a plain sum would not show
    before = local.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="replicas='whole'") as error:
            with run.ema.average_parameters():
                raise AssertionError("the block was entered")
        assert torch.equal(local, before)
        assert "blocks.0.l2.weight" not in str(error.value)


@worlds.worlds("ddp-2", "hsdp", "tp")
def test_replicas_that_differ_stay_apart_when_kept_whole(world: World):
    run = start(world, replicas="whole")
    held = [local_part(p.detach()) for p in run.training.parameters().values()]
    for tensor in held:
        tensor.mul_(1 + rank() * 1e-3)
    before = [tensor.clone() for tensor in held]
    run.averaged_logits()
    same(held, before)


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.ranks(0)
@pytest.mark.parametrize("going", ["in", "out"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_weights_and_average_as_they_were(going: str, error: type[BaseException]):
    """Wherever it comes: before each copy that a swap makes."""
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 700).bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bf16 without a master
        _, ema = small_average(model, buffers="average")
    before = parts(model, ema)
    interrupted = 0
    for at in itertools.count():
        interrupts = Interrupts(at, error)
        try:
            with interrupts if going == "in" else contextlib.nullcontext():
                block = ema.average_parameters()
                block.__enter__()
            with interrupts if going == "out" else contextlib.nullcontext():
                block.__exit__(None, None, None)
        except error:
            interrupted += 1
        same(parts(model, ema), before)  # which raises inside of a block
        if not interrupts.came:
            break
    assert interrupted > 15


def parts(model: nn.Module, ema: ShardedEMA) -> list[Tensor]:
    """Copies of the live tensors, then the average."""
    live = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    return [*live, *ema.gather_state_dict().values()]


class Interrupts(TorchFunctionMode):
    """An error before the call of torch number `at`, counted from 0."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.came, self.error = at, False, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.clone, torch.equal):
            self.left -= 1
            if self.left == -1:
                self.came = True
                raise self.error
        return func(*args, **(kwargs or {}))


def small_average(
    model: nn.Module | None = None, **options: Any
) -> tuple[nn.Sequential, ShardedEMA]:
    """A model in one process whose average is not its weights."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)) if model is None else model
    ema = ShardedEMA(model, 0.5, **options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    ema.update()
    return model, ema


@a_few_worlds
def test_one_autocast_around_a_swap_shows_each_side(world: World):
    run = start(world).train(2)
    calls = (run.training.evaluate, run.averaged_logits, run.training.evaluate)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    wanted = []
    for call in calls:
        with autocast():
            wanted.append(call())
    assert not torch.equal(wanted[0], wanted[1])
    with autocast(), torch.enable_grad():
        same([call() for call in calls], wanted)


@pytest.mark.ranks(0)
@pytest.mark.parametrize("call", ["copy_to", "update"])
def test_caches_are_dropped_by_every_call_that_writes_weights(call: str):
    x, teacher = torch.randn(2, 5), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model, ema = small_average(**({"into": teacher} if call == "update" else {}))
    written = teacher if call == "update" else model
    with torch.autocast("cpu", torch.bfloat16), nn.utils.parametrize.cached():
        before = written(x)
        getattr(ema, call)()
        after = written(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, written(x))
    assert not torch.equal(after, before)


@pytest.mark.ranks(0)
def test_a_parametrization_that_is_cached_is_computed_again():
    model, ema = small_average(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
    live = model.weight.clone()
    with nn.utils.parametrize.cached():
        same(model.weight, live)
        with ema.average_parameters():
            assert not torch.equal(model.weight, live)
        same(model.weight, live)


@parametrized(WHERE_FAILING, one_size)
def test_a_forward_that_fails_changes_nothing_and_leaves_nothing_gathered(world: World):
    run = start(world).train(2)
    training = run.training
    live, averaged = training.evaluate(), run.averaged_logits()
    average = run.ema.gather_state_dict()

    def fail(*_: Any) -> None:
        raise Interruption

    for inside, forward in (
        (False, training.loss),
        (True, training.loss),
        (True, training.evaluate),
    ):
        hook = training.net.blocks[-1].l2.register_forward_pre_hook(fail)
        with pytest.raises(Interruption):
            with run.ema.average_parameters() if inside else contextlib.nullcontext():
                forward(3)
        hook.remove()
        if inside:
            same(training.evaluate(), live)
        same(run.averaged_logits(), averaged)
        same(training.evaluate(), live)
        same(training.full_weights(), run.weights[-1])
        same(run.ema.gather_state_dict(), average)


@worlds.worlds("fsdp2-3", "fsdp2_reshard", "hsdp")
def test_an_unshard_that_nobody_waited_for_is_dropped(world: World):
    run = start(world).train(2)
    training = run.training
    live, averaged = training.evaluate(), run.averaged_logits()
    for inside in (False, True):
        if not inside:
            training.net.unshard(async_op=True)
        with run.ema.average_parameters():
            same(training.evaluate(), averaged)
            if inside:
                training.net.unshard(async_op=True)
        same(training.evaluate(), live)


@pytest.mark.ranks(0)
@pytest.mark.parametrize("shows", ["whole", "part"])
def test_an_average_of_a_part_and_one_of_the_whole_refuse_each_other(shows: str):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    averages = {"whole": ShardedEMA(model), "part": ShardedEMA(model[0])}
    elsewhere = ShardedEMA(model[1])
    shown = averages.pop(shows)
    (other,) = averages.values()
    with shown.average_parameters():
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(RuntimeError, match=r"inside average_parameters\(\)"):
                pool.submit(other.update).result()
        copied = copy.deepcopy(model)
        if shows == "part":
            assert elsewhere.update()
    assert other.update()
    assert ShardedEMA(copied).update()


@every_kind
def test_an_optimizer_step_inside_the_block_is_told_and_undone_in_the_weights(world: World):
    run = start(world).train(2)
    masters = run.ema.source == "master"  # which the swap does not touch
    live = run.training.full_weights()
    with pytest.warns(UserWarning, match="written to inside average_parameters"):
        with run.ema.average_parameters():
            run.training.train_step(2)
    if not masters:
        same(run.training.full_weights(), live)


@pytest.mark.ranks(0)
def test_a_write_inside_the_block_is_told_by_name():
    model, ema = small_average()
    emb = nn.Embedding(3, 5, max_norm=0.1)
    bounded = ShardedEMA(emb)
    live = [p.clone() for p in (*model.parameters(), emb.weight)]
    text = r"written to inside average_parameters.*: {}\."
    with pytest.warns(UserWarning, match=text.format(r"1\.bias")):
        with ema.average_parameters(), torch.no_grad():
            model[1].bias.add_(1)
    with pytest.warns(UserWarning, match=text.format("weight")):
        with bounded.average_parameters():
            emb(torch.tensor([1]))
    same([*model.parameters(), emb.weight], live)


@pytest.mark.ranks(0)
def test_frozen_constants_of_compiled_code_are_refused():
    import torch._inductor.config as config

    model, ema = small_average()
    before = parts(model, ema)
    with config.patch(freezing=True), pytest.raises(RuntimeError, match="freezing"):
        ema.average_parameters().__enter__()
    same(parts(model, ema), before)


@worlds.worlds("ddp-2", "fsdp2-3", "hsdp")
def test_a_swap_that_is_cut_short_is_marked_until_values_are_loaded(world: World):
    run = start(world).train(2)
    lost = mock.patch.object(torch, "clear_autocast_cache", side_effect=RuntimeError("it is gone"))
    with pytest.raises(RuntimeError, match="it is gone"), contextlib.ExitStack() as stack:
        with run.ema.average_parameters():
            stack.enter_context(lost)
    for call in (run.ema.update, run.ema.gather_state_dict, run.ema.copy_to):
        with pytest.raises(RuntimeError, match=r"way back .* failed"):
            call()
    run.ema.reset()
    assert run.ema.update()


@pytest.mark.ranks(2)
def test_a_process_group_that_was_destroyed_is_told():
    group = dist.new_group([0, 1])
    model = nn.Linear(5, 3)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)
    ema = ShardedEMA(model, process_group=group)
    dist.destroy_process_group(group)
    assert ema.update()
    live = [p.clone() for p in model.parameters()]
    for call in (lambda: ema.average_parameters().__enter__(), ema.gather_state_dict, ema.copy_to):
        with pytest.raises(RuntimeError, match=r"process group .* has been destroyed"):
            call()
    same(list(model.parameters()), live)


def test_a_peer_that_dies_inside_leaves_a_model_that_is_marked():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with fork_server() as context:
        workers = [context.Process(target=_one_dies_inside, args=(r, store.port)) for r in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0, -signal.SIGKILL]


def _one_dies_inside(rank: int, port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(50, 30))
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    live = copy.deepcopy(model.module.state_dict())
    average = [value.clone() for value in ema._values(None)]
    with pytest.raises(RuntimeError, match=r"way back .* has failed.*Load the model's weights"):
        with ema.average_parameters():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    same(ema._values(None), average)
    for call in (ema.update, ema.state_dict):
        with pytest.raises(RuntimeError, match="Load the model's weights again"):
            call()
    assert any(not torch.equal(t, model.module.state_dict()[n]) for n, t in live.items())
    model.module.load_state_dict(live)
    ema.reset()
    assert ema.update()
    os._exit(0)  # destroying the group would wait for the peer


def interrupted(call: Callable[[], object], at: int, files: tuple[str, ...]) -> str:
    """Run a call with Ctrl-C before line number `at` that it runs in these files; where that is."""
    lines = itertools.count()
    where, raised = "", False

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal where
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line" and next(lines) == at:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            signal.raise_signal(signal.SIGINT)
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.settrace(outer)
    assert raised == bool(where), (at, where)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return where


@pytest.mark.ranks(0)
def test_a_signal_at_any_line_of_a_swap_leaves_everything_as_it_was():
    model, ema = small_average()
    before = parts(model, ema)

    def swap() -> None:
        with ema.average_parameters():
            pass

    files = ("/average.py", "/swap.py", "/contextlib.py")
    for at in itertools.count():
        where = interrupted(swap, at, files)
        same(parts(model, ema), before)
        if not where:
            break
    assert at > 200
    assert ema.update()


@pytest.mark.ranks(0)
@pytest.mark.parametrize("call", ["update", "reset", "copy_to", "load_state_dict", "load"])
def test_a_signal_at_any_line_finds_a_call_complete_or_not_begun(call: str, tmp_path: Path):
    def new() -> tuple[nn.Module, ShardedEMA, Callable[[], object]]:
        torch.manual_seed(0)
        model, ema = small_average(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).double()))
        state = copy.deepcopy(ema.state_dict())
        for value in state["averages"]["ema"].values():
            value.add_(1)
        arguments = {"load_state_dict": [state], "load": [tmp_path / "other"]}.get(call, [])
        return model, ema, lambda: getattr(ema, call)(*arguments)

    def held(model: nn.Module, ema: ShardedEMA) -> list[float]:
        values = [t.double().flatten() for t in parts(model, ema)]
        return [*torch.cat(values).tolist(), ema.step, ema.num_updates]

    other = new()[1]
    for _ in range(2):
        other.model[0].weight.data += 1
        other.update()
    other.save(tmp_path / "other")
    before, complete = held(*new()[:2]), new()
    complete[2]()
    after, seen = held(*complete[:2]), set()
    for at in itertools.count():
        model, ema, run = new()
        files = ("/ema.py", "/average.py", "/lerp.py", "/dcp.py", "/reader.py")
        where = interrupted(run, at, files)
        found = held(model, ema)
        assert found in (before, after), (at, where)
        seen.add(found == after)
        if not where:
            break
    assert seen == {False, True}


@pytest.mark.ranks(0)
def test_what_was_made_in_inference_mode_is_written_and_restored():
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "calls"):
                self.register_buffer("calls", torch.zeros(2, 3))
                self.register_buffer("column", torch.zeros(2, 3)[:, 0], persistent=False)
            for buffer in self.buffers():
                buffer.add_(1)
            return super().forward(x)

    model = Counting(5, 3)
    with torch.inference_mode():
        teacher, exported = copy.deepcopy(model), copy.deepcopy(model)
        model(torch.ones(1, 5))
        exported.register_buffer("calls", torch.zeros(2, 3))
    live = [p.detach().clone() for p in model.parameters()]
    average = ShardedEMA(model, 0.5, buffers="average")
    into = ShardedEMA(model, 0.5, into=teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update()
    into.update()
    with average.average_parameters(), torch.inference_mode():
        model(torch.ones(1, 5))
    assert [buffer.unique().tolist() for buffer in model.buffers()] == [[1.0], [1.0]]
    average.copy_to(exported)
    for shown in (teacher, exported):
        for before, value in zip(live, shown.parameters(), strict=True):
            torch.testing.assert_close(value, before + 0.5)


@pytest.mark.ranks(0)
def test_an_update_in_another_thread_never_meets_a_swap():
    model, ema = small_average()
    live = [p.clone() for p in model.parameters()]
    stop = threading.Event()

    def updates() -> int:
        refused = 0
        while not stop.is_set():
            try:
                ema.update()
            except RuntimeError as error:
                assert "inside average_parameters()" in str(error)
                refused += 1
        return refused

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(updates)
        try:
            for _ in range(200):
                with ema.average_parameters():
                    time.sleep(1e-4)  # for the other thread to be refused
        finally:
            stop.set()
        assert future.result()
    same(list(model.parameters()), live)
    for _ in range(60):
        ema.update()
    assert ema.drift() < 1e-6


@pytest.mark.ranks(0)
@pytest.mark.parametrize("call", ["save", "export", "gather_state_dict"])
def test_nothing_reads_half_an_update_in_another_thread(tmp_path: Path, call: str):
    halfway, batches = threading.Event(), itertools.count()

    def slow(averaged: list[Tensor], live: list[Tensor], _: object) -> None:
        if next(batches) == 1:  # the first of two dtypes is done
            halfway.set()
            time.sleep(0.5)
        for average in averaged:
            average.fill_(7)

    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).double())
    ema = ShardedEMA(model, multi_avg_fn=slow, start_step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2)
    ema.update()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ema.update)
        assert halfway.wait(60)
        try:
            read = getattr(ema, call)(*([] if call == "gather_state_dict" else [tmp_path / "a"]))
        except RuntimeError as error:
            assert "was updated while" in str(error)
            read = {}
        assert future.result()
    for file in tmp_path.rglob("*.safetensors"):
        read = load_file(file)
    assert len({float(x) for t in (read or {}).values() for x in t.flatten()}) <= 1


@pytest.mark.ranks(0)
def test_a_swap_of_a_compiled_model_compiles_nothing_again():
    model, ema = small_average()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 5)
    with torch.no_grad():
        live = compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            with ema.average_parameters():
                assert not torch.equal(compiled(x), live)
            assert torch.equal(compiled(x), live)
