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
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from dist_ema import ShardedEMA
from tests.net import FROZEN, TRAINABLE
from tests.pool import fork_server
from tests.runs import EXACT, Run, a_few_worlds, live_buffers, make_ema, start
from tests.worlds import (
    Training,
    World,
    evaluate,
    every_world,
    from_rank_0,
    not_compiled,
    num_ranks,
    rank,
    state_of,
    worlds,
)


class Interruption(Exception):
    pass


@every_world()
def test_the_forward_under_the_swap_is_that_of_a_plain_model(world: World):
    run = start(world).train(1).train_unrecorded()
    training = run.training
    with run.ema.average_parameters():  # nothing is gathered, or what the backward left gathered
        shown = training.evaluate()
        torch.testing.assert_close(training.evaluate(), shown, **EXACT)
    live = training.evaluate()
    with run.ema.average_parameters():  # now live weights are gathered, and must not be used
        torch.testing.assert_close(training.evaluate(), shown, **EXACT)
    torch.testing.assert_close(training.evaluate(), live, **EXACT)
    average = from_rank_0(run.ema.gather_state_dict())
    torch.testing.assert_close(world.parallel_twin(average).evaluate(), shown, **EXACT)
    for state, logits in ((average, shown), (average | state_of(training.full_weights()), live)):
        plain = evaluate(world.plain_twin(state))
        torch.testing.assert_close(logits, plain, **world.forward_tolerance)
    assert not torch.equal(shown, live)


@every_world(not_compiled)
def test_every_averaged_weight_shows_the_average(world: World):
    run = start(world).train(2)
    state = from_rank_0(run.ema.gather_state_dict())
    with run.ema.average_parameters():
        shown = run.training.full_weights()
    for name in TRAINABLE:
        wanted = state[name].to(world.engine.weights_dtype)
        assert torch.equal(shown[name], wanted), name
    for name in FROZEN:
        assert torch.equal(shown[name], run.weights[-1][name]), name


@every_world()
def test_weights_and_buffers_come_back_bit_for_bit(world: World):
    run = start(world).train(2)
    training = run.training
    objects = [id(p) for p in training.parameters().values()]
    live = training.evaluate()
    buffers = live_buffers(training)  # after a forward: DDP lets rank 0's prevail in each
    with run.ema.average_parameters(), torch.no_grad():
        training.loss(5)  # in training mode, so that batch statistics move
        training.net.mask.add_(1)
        assert not torch.equal(training.net.running, buffers["running"])
    torch.testing.assert_close(live_buffers(training), buffers, **EXACT)
    torch.testing.assert_close(training.evaluate(), live, **EXACT)
    torch.testing.assert_close(training.full_weights(), run.weights[-1], **EXACT)
    assert [id(p) for p in training.parameters().values()] == objects


@every_world(not_compiled)
def test_weights_come_back_after_an_exception(world: World):
    run = start(world).train(2)
    average, live = run.ema.gather_state_dict(), run.training.evaluate()
    with pytest.raises(Interruption):
        with run.ema.average_parameters():
            run.training.evaluate()
            raise Interruption
    torch.testing.assert_close(run.training.evaluate(), live, **EXACT)
    torch.testing.assert_close(run.training.full_weights(), run.weights[-1], **EXACT)
    torch.testing.assert_close(run.ema.gather_state_dict(), average, **EXACT)
    run.train(1)
    with run.ema.average_parameters():
        assert not torch.equal(run.training.evaluate(), live)


@every_world(not_compiled)
def test_training_after_a_swap_is_bit_identical_to_training_without(world: World):
    def train(swap: bool) -> tuple[Run, dict[str, Tensor]]:
        run = start(world)
        for i in range(4):
            run.train_unrecorded()
            if swap and i in (0, 2):
                with run.ema.average_parameters():
                    run.training.evaluate()
        return run, run.ema.gather_state_dict()

    (swapped, average), (bare, wanted) = train(True), train(False)
    torch.testing.assert_close(average, wanted, **EXACT)
    torch.testing.assert_close(
        swapped.training.full_weights(), bare.training.full_weights(), **EXACT
    )
    torch.testing.assert_close(live_buffers(swapped.training), live_buffers(bare.training), **EXACT)


def gradients_or_refusal(training: Training, loss: Tensor) -> dict[str, Tensor] | None:
    """The gradients of this rank, or None if autograd finds that weights have changed."""
    try:
        loss.backward()
    except RuntimeError as error:
        # Not a lost message or a timeout, which are RuntimeErrors too.
        assert "modified by an inplace operation" in str(error), error
        return None
    grads = {name: parameter.grad for name, parameter in training.parameters().items()}
    return {
        name: (grad.to_local() if isinstance(grad, DTensor) else grad).clone()
        for name, grad in grads.items()
        if grad is not None
    }


def check_refused_or_equal(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> None:
    if dist.is_initialized():
        refused = [None] * num_ranks()
        dist.all_gather_object(refused, found is None)
        assert len(set(refused)) == 1, refused
    if found is not None:
        torch.testing.assert_close(found, wanted, **EXACT)


@every_world()
def test_a_swap_between_forward_and_backward_is_an_error_or_harmless(world: World):
    bare = start(world).train(1).training
    wanted = gradients_or_refusal(bare, bare.loss(1))
    run = start(world).train(1)
    loss = run.training.loss(1)
    with run.ema.average_parameters():
        run.training.evaluate()
    check_refused_or_equal(gradients_or_refusal(run.training, loss), wanted)


@every_world()
def test_a_backward_after_the_swap_of_a_forward_inside_is_an_error_or_right(world: World):
    run = start(world).train(1)
    with run.ema.average_parameters():
        wanted = gradients_or_refusal(run.training, run.training.loss(1))
    assert wanted is not None
    run = start(world).train(1)
    with run.ema.average_parameters():
        loss = run.training.loss(1)
    check_refused_or_equal(gradients_or_refusal(run.training, loss), wanted)


@every_world(not_compiled)
def test_an_average_of_zeros_makes_a_model_of_zeros(world: World):
    net = world.make_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    training = world.train(net)
    zeros = training.evaluate()
    ema = make_ema(training, decay=1.0, params="all")
    with torch.no_grad():
        for parameter in training.parameters().values():
            parameter.copy_(torch.full_like(parameter, 0.5))
    ema.update()
    assert not torch.equal(training.evaluate(), zeros)
    with ema.average_parameters():
        assert torch.equal(training.evaluate(), zeros)
        for name, weight in training.full_weights().items():
            assert not weight.any(), name
    for name, weight in training.full_weights().items():
        assert (weight == 0.5).all(), name


@a_few_worlds
def test_a_swap_works_in_inference_mode(world: World):
    run = start(world).train(2)
    with run.ema.average_parameters():
        wanted = run.training.evaluate()
    with torch.inference_mode(), run.ema.average_parameters():
        torch.testing.assert_close(run.training.evaluate().clone(), wanted, **EXACT)
    torch.testing.assert_close(run.training.full_weights(), run.weights[-1], **EXACT)
    run.train(1)


@a_few_worlds
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_averaged_buffers_are_shown_and_come_back(world: World, buffers: str):
    run = start(world, buffers=buffers).train(3)
    before = live_buffers(run.training)
    state = run.ema.gather_state_dict()
    with run.ema.average_parameters():
        shown = live_buffers(run.training)
    torch.testing.assert_close(live_buffers(run.training), before, **EXACT)
    assert torch.equal(shown["running"], before["running"]) == (buffers == "copy")
    if rank() == 0:
        torch.testing.assert_close(shown["running"], state["running"], **EXACT)


@a_few_worlds
def test_nothing_reads_or_writes_the_average_inside(world: World, tmp_path):
    run = start(world).train(2)
    ema = run.ema
    refused = {
        "update": ema.update,
        "reset": ema.reset,
        "drift": ema.drift,
        "gather_state_dict": ema.gather_state_dict,
        "gather_tensors": lambda: list(ema.gather_tensors()),
        "copy_to": ema.copy_to,
        "export": lambda: ema.export(tmp_path / "export"),
        "average_parameters": lambda: ema.average_parameters().__enter__(),
    }
    before = ema.gather_state_dict(), ema.step, ema.num_updates
    with ema.average_parameters():
        shown = run.training.evaluate()
        for name, call in refused.items():
            with pytest.raises(RuntimeError, match="average_parameters"):
                call()
            assert torch.equal(run.training.evaluate(), shown), name
    assert not (tmp_path / "export").exists()
    after = ema.gather_state_dict(), ema.step, ema.num_updates
    torch.testing.assert_close(after[0], before[0], **EXACT)
    assert after[1:] == before[1:]
    torch.testing.assert_close(run.training.full_weights(), run.weights[-1], **EXACT)


@a_few_worlds
def test_each_of_several_averages_is_shown_by_its_name(world: World):
    run = start(world, {"fast": 0.5, "slow": 0.99}).train(3)
    with pytest.raises(ValueError, match="slow"):
        run.ema.average_parameters().__enter__()
    shown = {}
    for name in ("fast", "slow", "fast"):
        with run.ema.average_parameters(name):
            shown[name] = run.training.full_weights()
    for name, weights in shown.items():
        state = from_rank_0(run.ema.gather_state_dict(name))
        for fqn in TRAINABLE:
            assert torch.equal(weights[fqn], state[fqn]), (name, fqn)
    torch.testing.assert_close(run.training.full_weights(), run.weights[-1], **EXACT)


@every_world(not_compiled)
def test_copy_to_makes_the_average_the_live_weights(world: World):
    run = start(world).train(3)
    run.training.evaluate()
    state = from_rank_0(run.ema.gather_state_dict())
    run.ema.copy_to()
    live = run.training.full_weights()
    for name in TRAINABLE:
        assert torch.equal(live[name], state[name].to(world.engine.weights_dtype)), name
    found = run.training.evaluate()
    torch.testing.assert_close(world.parallel_twin(state).evaluate(), found, **EXACT)
    run.training.train_step(3)
    assert not torch.equal(run.training.full_weights()["emb.weight"], live["emb.weight"])


@a_few_worlds
def test_copy_to_fills_a_plain_module_on_every_rank(world: World):
    run = start(world).train(3)
    state = from_rank_0(run.ema.gather_state_dict())
    net = world.make_net(seed=1)
    run.ema.copy_to(net)
    torch.testing.assert_close(dict(net.state_dict()), state, **EXACT)
    assert net.head.weight is net.emb.weight
    torch.testing.assert_close(run.training.full_weights(), run.weights[-1], **EXACT)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight"):
        run.ema.copy_to(other)
    run.ema.gather_state_dict()


@worlds("ddp-2", "ddp-3", "hsdp", "fsdp2_tp", "tp")
def test_whole_replicas_show_what_split_ones_show(world: World):
    split, whole = (start(world, replicas=kind).train(2) for kind in ("split", "whole"))
    with split.ema.average_parameters():
        wanted = split.training.evaluate()
    with whole.ema.average_parameters():
        torch.testing.assert_close(whole.training.evaluate(), wanted, **EXACT)
    torch.testing.assert_close(
        whole.training.full_weights(), split.training.full_weights(), **EXACT
    )


@worlds("ddp-2", "hsdp", "tp")
def test_replicas_that_differ_are_refused_at_every_swap_before_anything_is_written(world: World):
    run = start(world).train(1)
    with run.ema.average_parameters():
        pass
    weight = run.training.parameters()["emb.weight"].detach()
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if rank() == 1:
        local.view(-1)[[0, 1]] = local.view(-1)[[1, 0]]  # which a plain sum would not show
    for _ in range(2):
        before = local.clone()
        with pytest.raises(RuntimeError, match="replicas='whole'") as error:
            with run.ema.average_parameters():
                raise AssertionError("the block was entered")
        assert torch.equal(local, before)
        assert "blocks.0.l2.weight" not in str(error.value)


@pytest.mark.ranks(2)
def test_replicas_that_differ_are_refused_when_the_average_is_built():
    """As experts are, of which each rank holds its own under one name."""
    torch.manual_seed(rank())
    experts = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r"bias, weight.*process_group="):
        ShardedEMA(experts)
    alone = [dist.new_group([r]) for r in range(2)][rank()]
    ShardedEMA(experts, process_group=alone)
    ShardedEMA(experts, replicas="whole")


@worlds("ddp-2", "hsdp", "tp")
def test_replicas_that_differ_stay_apart_when_kept_whole(world: World):
    run = start(world, replicas="whole")
    with torch.no_grad():
        for parameter in run.training.parameters().values():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.mul_(1 + rank() * 1e-3)

    def held() -> dict[str, Tensor]:
        found = run.training.parameters().items()
        return {n: (p.to_local() if isinstance(p, DTensor) else p).clone() for n, p in found}

    before = held()
    with run.ema.average_parameters():
        run.training.evaluate()
    torch.testing.assert_close(held(), before, **EXACT)


@pytest.mark.ranks(0)
@pytest.mark.parametrize("going", ["in", "out"])
def test_ctrl_c_leaves_weights_and_average_as_they_were(going: str):
    """Wherever it comes: before each copy that a swap makes."""

    def parts() -> list[Tensor]:
        held: list[Tensor] = [*model.parameters(), *model.buffers(), *ema._values(None)]
        return [t.detach().clone() for t in held]

    model = torch.nn.Sequential(
        torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 700).bfloat16()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bf16 without a master
        ema = ShardedEMA(model, 0.5, buffers="average")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.add_(1)
    ema.update()
    before = parts()
    interrupted = 0
    for at in itertools.count():
        interrupts = Interrupts(at)
        try:
            with interrupts if going == "in" else contextlib.nullcontext():
                block = ema.average_parameters()
                block.__enter__()
            with interrupts if going == "out" else contextlib.nullcontext():
                block.__exit__(None, None, None)
        except KeyboardInterrupt:
            interrupted += 1
        ema._average.marks.refuse("a test")
        torch.testing.assert_close(parts(), before, **EXACT)
        if not interrupts.came:
            break
    assert interrupted > 15


class Interrupts(TorchFunctionMode):
    """Ctrl-C before the call of torch number `at`, counted from 0."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left, self.came = at, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.clone, torch.equal):
            self.left -= 1
            if self.left == -1:
                self.came = True
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def small_average(**options: Any) -> tuple[nn.Sequential, ShardedEMA]:
    """A model in one process whose average is not its weights."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    ema = ShardedEMA(model, 0.5, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    return model, ema


@a_few_worlds
def test_one_autocast_around_a_swap_shows_each_side(world: World):
    run = start(world).train(2)

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        live = run.training.evaluate()
        with run.ema.average_parameters():
            shown = run.training.evaluate()
        return live, shown, run.training.evaluate()

    def each_alone() -> tuple[Tensor, Tensor, Tensor]:
        def once() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run.training.evaluate()

        live = once()
        with run.ema.average_parameters():
            shown = once()
        return live, shown, once()

    wanted = each_alone()
    assert not torch.equal(wanted[0], wanted[1])
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        torch.testing.assert_close(outputs(), wanted, **EXACT)


@pytest.mark.ranks(0)
def test_caches_are_dropped_by_every_call_that_writes_weights():
    x = torch.randn(2, 5)
    teacher = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    for model, ema, read in (
        (*small_average(), None),
        (*small_average(into=teacher), teacher),
    ):
        with torch.autocast("cpu", torch.bfloat16), nn.utils.parametrize.cached():
            shown = read or model
            before = shown(x)
            if read is None:
                ema.copy_to()
            else:
                ema.update()
            after = shown(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(after, shown(x))
        assert not torch.equal(after, before)


@pytest.mark.ranks(0)
def test_a_parametrization_that_is_cached_is_computed_again():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    ema = ShardedEMA(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()
    live = model.weight.clone()
    with nn.utils.parametrize.cached():
        assert torch.equal(model.weight, live)
        with ema.average_parameters():
            assert not torch.equal(model.weight, live)
        assert torch.equal(model.weight, live)


@pytest.mark.parametrize("inside", [True, False])
@every_world(not_compiled)
def test_a_forward_that_fails_leaves_nothing_gathered(world: World, inside: bool):
    run = start(world).train(2)
    training = run.training
    live = training.evaluate()
    with run.ema.average_parameters():
        shown = training.evaluate()

    def fail() -> None:
        def raises(*_: Any) -> None:
            raise Interruption

        handle = training.net.blocks[-1].l2.register_forward_pre_hook(raises)
        try:
            with pytest.raises(Interruption):
                training.loss(3)
        finally:
            handle.remove()

    if not inside:
        fail()
    with run.ema.average_parameters():
        if inside:
            fail()
        else:
            torch.testing.assert_close(training.evaluate(), shown, **EXACT)
    torch.testing.assert_close(training.evaluate(), live, **EXACT)


@pytest.mark.parametrize("inside", [True, False])
@every_world(lambda world: world.name in ("fsdp2", "fsdp2_reshard", "hsdp"))
def test_an_unshard_that_nobody_waited_for_is_dropped(world: World, inside: bool):
    run = start(world).train(2)
    training = run.training
    live = training.evaluate()
    with run.ema.average_parameters():
        shown = training.evaluate()
    if not inside:
        training.net.unshard(async_op=True)
    with run.ema.average_parameters():
        torch.testing.assert_close(training.evaluate(), shown, **EXACT)
        if inside:
            training.net.unshard(async_op=True)
    torch.testing.assert_close(training.evaluate(), live, **EXACT)


@pytest.mark.ranks(0)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_of_the_engine_on_the_way_out_leaves_live_weights(error: type[BaseException]):
    model, ema = small_average()
    live = [p.clone() for p in model.parameters()]
    average = ema.gather_state_dict()

    calls = itertools.count()

    def fails() -> None:
        if next(calls):  # on the way out
            raise error("the engine")

    ema._average.engine.release = fails  # type: ignore[method-assign]
    with pytest.raises(error, match="the engine"):
        with ema.average_parameters():
            pass
    del ema._average.engine.release
    torch.testing.assert_close(list(model.parameters()), live, **EXACT)
    torch.testing.assert_close(ema.gather_state_dict(), average, **EXACT)


@a_few_worlds
def test_another_average_of_a_shown_model_refuses(world: World):
    run = start(world).train(2)
    net = run.training.net
    other = make_ema(run.training, decay=0.5)
    before = other.gather_state_dict()
    with run.ema.average_parameters():
        for call in (
            other.update,
            other.reset,
            other.drift,
            other.copy_to,
            other.state_dict,
            other.gather_state_dict,
            lambda: other.average_parameters().__enter__(),
            lambda: other.save("never"),
            lambda: other.load("never"),
            lambda: other.export("never"),
            lambda: ShardedEMA(net),
        ):
            with pytest.raises(RuntimeError, match=r"inside average_parameters\(\)"):
                call()
    torch.testing.assert_close(other.gather_state_dict(), before, **EXACT)
    assert other.update()


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


@every_world(not_compiled)
def test_an_optimizer_step_inside_the_block_is_told_and_undone_in_the_weights(world: World):
    run = start(world).train(2)
    masters = run.ema.source == "master"  # which the swap does not touch
    live = run.training.full_weights()
    with pytest.warns(UserWarning, match="written to inside average_parameters"):
        with run.ema.average_parameters():
            run.training.train_step(2)
    if not masters:
        torch.testing.assert_close(run.training.full_weights(), live, **EXACT)


@pytest.mark.ranks(0)
def test_a_write_inside_the_block_is_told_by_name():
    model, ema = small_average()
    emb = nn.Embedding(3, 5, max_norm=0.1)
    bounded = ShardedEMA(emb)
    live = [p.clone() for p in (*model.parameters(), emb.weight)]
    with pytest.warns(UserWarning, match=r"written to inside average_parameters.*: 1\.bias\."):
        with ema.average_parameters(), torch.no_grad():
            model[1].bias.add_(1)
    with pytest.warns(UserWarning, match=r"written to inside average_parameters.*: weight\."):
        with bounded.average_parameters():
            emb(torch.tensor([1]))
    torch.testing.assert_close([*model.parameters(), emb.weight], live, **EXACT)


@every_world(not_compiled)
def test_an_evaluation_is_not_taken_for_a_write(world: World):
    run = start(world).train(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "weights were written to")
        with run.ema.average_parameters():
            run.training.evaluate()
            run.training.loss(3)


@pytest.mark.ranks(0)
def test_frozen_constants_of_compiled_code_are_refused():
    import torch._inductor.config as config

    model, ema = small_average()
    live = [p.clone() for p in model.parameters()]
    with config.patch(freezing=True), pytest.raises(RuntimeError, match="freezing"):
        with ema.average_parameters():
            pass
    torch.testing.assert_close(list(model.parameters()), live, **EXACT)


@every_world(lambda world: world.name in ("ddp", "fsdp2", "hsdp"))
def test_a_swap_that_is_cut_short_is_marked_until_values_are_loaded(world: World):
    run = start(world).train(2)
    share = run.ema._average._publish

    def lost(**_: object) -> None:
        raise RuntimeError("a peer is gone")

    with pytest.raises(RuntimeError, match="a peer is gone"):
        with run.ema.average_parameters():
            run.ema._average._publish = lost  # type: ignore[method-assign]
    run.ema._average._publish = share  # type: ignore[method-assign]
    for call in (run.ema.update, run.ema.gather_state_dict, run.ema.copy_to):
        with pytest.raises(RuntimeError, match=r"way back .* failed"):
            call()
    run.ema.reset()
    assert run.ema.update()


@every_world(lambda world: world.name == "fsdp2")
def test_a_layer_that_was_replaced_under_fsdp2_is_told(world: World):
    run = start(world).train(1)
    run.training.net.blocks[0].l1 = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        run.ema.update()


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
    torch.testing.assert_close(list(model.parameters()), live, **EXACT)


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
    torch.testing.assert_close(ema._values(None), average, **EXACT)
    for call in (ema.update, ema.state_dict):
        with pytest.raises(RuntimeError, match="Load the model's weights again"):
            call()
    assert any(not torch.equal(t, model.module.state_dict()[n]) for n, t in live.items())
    model.module.load_state_dict(live)
    ema.reset()
    assert ema.update()
    os._exit(0)  # destroying the group would wait for the peer


@pytest.mark.ranks(0)
def test_a_signal_at_any_line_of_a_swap_leaves_everything_as_it_was():
    model, ema = small_average()

    def parts() -> list[Tensor]:
        return [t.detach().clone() for t in (*model.parameters(), *ema._values(None))]

    before = parts()
    for at in itertools.count():
        lines = itertools.count()
        raised = False

        def trace(frame: types.FrameType, event: str, _: object, /, at: int = at) -> Any:
            nonlocal raised
            if not frame.f_code.co_filename.endswith(("/binding.py", "/swap.py", "/contextlib.py")):
                return None
            if event == "line" and next(lines) == at:
                raised = True
                signal.raise_signal(signal.SIGINT)
            return trace

        outer, interrupted = sys.gettrace(), False
        sys.settrace(trace)
        try:
            with ema.average_parameters():
                pass
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(outer)
        assert interrupted == raised
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        torch.testing.assert_close(parts(), before, **EXACT)
        if not raised:
            break
    assert at > 200
    assert ema.update()


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
                    pass
        finally:
            stop.set()
        assert future.result()
    torch.testing.assert_close(list(model.parameters()), live, **EXACT)
    for _ in range(60):
        ema.update()
    assert ema.drift() < 1e-6


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
