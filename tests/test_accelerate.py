"""accelerate: real steps count, and its checkpoints carry the average, under all its engines."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema import ShardedEMA
from dist_ema.checkpoint import CheckpointError
from dist_ema.core.group import Group
from dist_ema.integrations.accelerate import register
from tests.net import TRAINABLE, Net
from tests.oracle import Oracle, worst_relative_error
from tests.runs import DECAY, MAX_RELATIVE_ERROR, same
from tests.worlds import evaluate, from_rank_0, num_ranks, rank
from tests.worlds_accelerate import CUT_BY, ENGINES, Session, accelerated
from tests.worlds_deepspeed import skip_without_overflow_checks

every_kind = pytest.mark.parametrize(
    ("kind", "num_ranks"), [pytest.param(k, 0 if k == "alone" else 2, id=k) for k in ENGINES]
)
NUM_STEPS, MICRO_STEPS = 4, 4  # of each step


def registered(session: Session, **options: str) -> ShardedEMA:
    ema = ShardedEMA(session.model, DECAY)
    register(session.accelerator, ema, **options)
    return ema


def train(session: Session, ema: ShardedEMA, micro_steps: Iterable[int]) -> None:
    for i in micro_steps:
        session.micro_step(i)
        ema.update()


def gathered(ema: ShardedEMA) -> dict[str, Tensor]:
    """The averaged state dict, on every rank."""
    return from_rank_0(ema.gather_state_dict())


def trained(session: Session) -> dict[str, Tensor]:
    weights = session.full_weights()
    return {name: weights[name] for name in TRAINABLE}


def result(session: Session, ema: ShardedEMA) -> dict[str, Tensor]:
    """All that must not depend on whether the run was stopped."""
    state = gathered(ema)
    live = {f"live {name}": weight for name, weight in trained(session).items()}
    return {"step": torch.tensor(ema.step), **live, **{name: state[name] for name in TRAINABLE}}


@every_kind
def test_an_update_is_a_real_step_and_evaluations_are_those_of_a_plain_model(kind: str):
    with accelerated(kind, accumulate=MICRO_STEPS) as session:
        assert session.accelerator.num_processes == num_ranks()
        ema = registered(session)
        assert CUT_BY[kind] in repr(ema)
        oracle, applied = Oracle(trained(session), DECAY), []
        for i in range(3 * MICRO_STEPS):
            session.micro_step(i)
            applied.append(ema.update())
            if applied[-1]:
                oracle.update(trained(session))
        assert [i for i, done in enumerate(applied) if done] == [3, 7, 11]
        assert (ema.step, ema.num_updates) == (3, 3)
        state, before = gathered(ema), session.evaluate()
        assert worst_relative_error(state, oracle.average) <= MAX_RELATIVE_ERROR
        with ema.average_parameters():
            shown = session.evaluate()
        same(session.evaluate(), before)
        assert not torch.equal(shown, before)
        plain = Net()
        plain.load_state_dict(state)
        plain.to(torch.bfloat16 if kind.startswith("zero") else torch.float32)
        same(shown, evaluate(plain).float())


@every_kind
def test_a_stopped_and_resumed_run_is_bit_identical_to_one_that_went_on(kind: str, tmp_path: Path):
    half, all_of_them = NUM_STEPS * MICRO_STEPS // 2, NUM_STEPS * MICRO_STEPS
    with accelerated(kind, accumulate=MICRO_STEPS) as session:
        ema = registered(session)
        train(session, ema, range(half))
        session.accelerator.save_state(str(tmp_path / "state"))
        assert not list((tmp_path / "state").glob("custom_checkpoint*"))
        train(session, ema, range(half, all_of_them))
        wanted = result(session, ema)
    with accelerated(kind, accumulate=MICRO_STEPS, seed=1) as session:
        ema = registered(session)
        session.accelerator.load_state(str(tmp_path / "state"))
        train(session, ema, range(half, all_of_them))
        same(result(session, ema), wanted)
    assert wanted["step"] == NUM_STEPS


@pytest.mark.parametrize(
    ("kind", "num_ranks"), [(kind, 2) for kind in ("ddp", "fsdp2", "zero2", "zero3")]
)
def test_a_step_that_overflows_is_no_update(kind: str):
    if kind.startswith("zero"):
        skip_without_overflow_checks(int(kind[-1]))
    with accelerated(kind, accumulate=2, scales=not kind.startswith("zero")) as session:
        ema = registered(session)
        applied = []
        for i in range(8):
            session.micro_step(i, scale=float("inf") if i == 4 else 1.0)
            applied.append(ema.update())
        assert [i for i, done in enumerate(applied) if done] == [1, 3, 7]
        assert (ema.step, ema.num_updates) == (3, 3)


@pytest.mark.ranks(0)
def test_a_fused_optimizer_does_not_tell_of_an_overflow():
    """What the module says cannot be known: if this ever fails, it can be."""
    with accelerated("alone", scales=True, fused=True) as session:
        ema = registered(session)
        before = trained(session)
        session.micro_step(0, scale=float("inf"))
        same(trained(session), before)
        assert ema.update()
        assert ema.drift() == 0.0


@pytest.mark.ranks(2)
def test_only_the_optimizer_that_is_named_says_whether_a_step_was_skipped():
    with accelerated("ddp", scales=True) as session:
        accelerator = session.accelerator
        _, others = accelerator.prepare(
            torch.nn.Linear(2, 2), torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        )
        ema, both = ShardedEMA(session.model, DECAY), ShardedEMA(session.model, DECAY)
        register(accelerator, ema, optimizer=session.optimizer)
        register(accelerator, both, name="both")
        session.micro_step(0)
        others.param_groups[0]["params"][0].grad = torch.full((2,), float("inf"))
        others.step()
        assert (others.step_was_skipped, session.optimizer.step_was_skipped) == (True, False)
        assert (ema.update(), both.update()) == (True, False)


# Checkpoints.


@pytest.mark.ranks(2)
def test_the_average_of_a_checkpoint_goes_when_the_checkpoint_goes(tmp_path: Path):
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(
        project_dir=str(tmp_path), automatic_checkpoint_naming=True, total_limit=2
    )
    with accelerated("ddp", project_config=project) as session:
        ema = registered(session)
        for i in range(3):
            train(session, ema, [i])
            session.accelerator.save_state()
        session.accelerator.wait_for_everyone()
        found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        assert found == ["checkpoint_1", "checkpoint_2"]
        wanted = gathered(ema)
        ema.reset()
        session.accelerator.load_state()
        assert ema.step == 3
        same(gathered(ema), wanted)


@pytest.mark.ranks(2)
def test_a_checkpoint_is_replaced_whole_and_a_failed_save_leaves_the_average_before(tmp_path: Path):
    with accelerated("ddp") as session:
        ema = registered(session)
        train(session, ema, range(2))
        session.accelerator.save_state(str(tmp_path))
        wanted = gathered(ema)
        train(session, ema, [2])
        session.accelerator.save_state(str(tmp_path))
        assert ema.step == 3
        session.accelerator.load_state(str(tmp_path))
        assert ema.step == 3
        assert not torch.equal(gathered(ema)["tiny"], wanted["tiny"])
        wanted = gathered(ema)
        with torch.no_grad():
            session.net.tiny.fill_(torch.nan)
        ema.update()
        with pytest.raises(CheckpointError, match="NaN or Inf in tiny"):
            session.accelerator.save_state(str(tmp_path))
        session.accelerator.load_state(str(tmp_path))
        same(gathered(ema), wanted)
        if rank() == 0:
            assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@every_kind
def test_a_state_without_the_average_is_refused_with_what_to_do(kind: str, tmp_path: Path):
    with accelerated(kind) as session:
        session.micro_step(0)
        session.accelerator.save_state(str(tmp_path))
        saved = session.full_weights()
        session.micro_step(1)
        ema = ShardedEMA(session.model, DECAY)
        session.accelerator.load_state(str(tmp_path))
        ema.reset()
        register(session.accelerator, ema)
        state = gathered(ema)
        same({n: state[n] for n in TRAINABLE}, {n: saved[n] for n in TRAINABLE})
        with pytest.raises(CheckpointError, match=r"without the average; load .* before register"):
            session.accelerator.load_state(str(tmp_path))
        same(gathered(ema), state)


@pytest.mark.ranks(2)
def test_several_averages_and_one_of_several_models_have_their_own_places(tmp_path: Path):
    with accelerated("ddp") as session:
        second, _ = session.accelerator.prepare(
            net := torch.nn.Linear(2, 2), torch.optim.SGD(net.parameters())
        )
        short, long = registered(session), ShardedEMA(session.model, 0.99)
        both = ShardedEMA({"first": session.model, "second": second}, DECAY)
        with pytest.raises(ValueError, match=r"registered as 'ema' .* already"):
            register(session.accelerator, long)
        unknown = ShardedEMA({"a": session.model, "b": Net()}, DECAY)
        with pytest.raises(ValueError, match="a Net that this accelerator has not prepared"):
            register(session.accelerator, unknown, name="unknown")
        register(session.accelerator, long, name="long")
        register(session.accelerator, both, name="both")
        train(session, short, [0])
        assert long.update() and both.update()
        session.accelerator.save_state(str(tmp_path))
        wanted = [gathered(ema) for ema in (short, long, both)]
        for ema in (short, long, both):
            ema.reset()
        session.accelerator.load_state(str(tmp_path))
        same([gathered(ema) for ema in (short, long, both)], wanted)
        assert [ema.step for ema in (short, long, both)] == [1, 1, 1]
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["both", "ema", "long"]


@pytest.mark.parametrize("num_ranks", [0, 2])
@pytest.mark.parametrize("kept", [False, True])
def test_a_function_that_is_tried_again_registers_again(kept: bool, num_ranks: int, tmp_path: Path):
    from accelerate.utils import find_executable_batch_size

    with accelerated("ddp" if num_ranks else "alone") as session:
        accelerator, tried = session.accelerator, []
        freed: list[weakref.ref[ShardedEMA]] = []

        @find_executable_batch_size(starting_batch_size=4)
        def run(batch_size: int) -> ShardedEMA:
            accelerator.free_memory()
            gc.collect()
            assert kept or all(ema() is None for ema in freed)
            net = Net()
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)
            session.model, session.optimizer = accelerator.prepare(net, optimizer)
            ema = registered(session)
            freed.append(weakref.ref(ema))
            tried.append(ema if kept else batch_size)
            if len(tried) < 3:
                raise RuntimeError("CUDA out of memory.")
            train(session, ema, range(2))
            return ema

        ema = run()
        assert len(tried) == 3 and ema.step == 2
        if kept:
            # The first of all belongs to no accelerator any more: all its updates count.
            assert tried[0].gate is None
        hooks = accelerator._save_model_state_pre_hook, accelerator._load_model_state_pre_hook
        assert [len(those) for those in hooks] == [1, 1]
        accelerator.save_state(str(tmp_path))
        wanted = gathered(ema)
        ema.reset()
        accelerator.load_state(str(tmp_path))
        assert ema.step == 2
        same(gathered(ema), wanted)


@pytest.mark.ranks(0)
def test_a_checkpoint_is_free_of_an_average_that_nobody_has(tmp_path: Path):
    with accelerated("alone") as session:
        registered(session)  # and let go
        gc.collect()
        with pytest.warns(UserWarning, match="registered as 'ema' is in no checkpoint any more"):
            session.accelerator.save_state(str(tmp_path))
        assert not (tmp_path / "ema").exists()
        with pytest.warns(UserWarning, match="nobody holds it; keep the ShardedEMA"):
            session.accelerator.load_state(str(tmp_path))


@pytest.mark.ranks(0)
def test_what_does_not_belong_together_is_refused():
    from accelerate import Accelerator

    with accelerated("alone") as session:
        net, accelerator, ema = session.net, session.accelerator, ShardedEMA(session.model, DECAY)
        for name in ("", "..", "a/b", "/ema", ".ema"):
            with pytest.raises(ValueError, match="name is"):
                register(accelerator, ema, name=name)
        with pytest.raises(TypeError, match="accelerator is a Net, wanted an Accelerator"):
            register(net, ema)
        with pytest.raises(TypeError, match="ema is a Net, wanted a ShardedEMA"):
            register(accelerator, net)
        with pytest.raises(TypeError, match="optimizer is a SGD, wanted what prepare"):
            register(accelerator, ema, optimizer=torch.optim.SGD(net.parameters()))
        other = ShardedEMA(Net(), DECAY)
        with pytest.raises(ValueError, match=r"a Net that .* not prepared; it has prepared: Net"):
            register(accelerator, other)
        register(Accelerator(cpu=True), other)  # before it prepares any
        register(accelerator, ema)
        for other in (accelerator, Accelerator(cpu=True)):
            with pytest.raises(ValueError, match="average is registered as 'ema' already"):
                register(other, ema, name="again")
        accelerator.free_memory()
        with pytest.raises(ValueError, match="register each ShardedEMA once"):
            register(accelerator, ema)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("call", ["save_state", "load_state"])
def test_a_checkpoint_of_one_rank_alone_names_the_others(call: str, tmp_path: Path):
    with accelerated("ddp") as session:
        ema = ShardedEMA(session.model, DECAY)
        register(session.accelerator, ema)
        if rank() == 0:
            wanted = rf"accelerator\.{call}\(\): ranks .*arrived: 1; .*is_main_process"
            with mock.patch.object(Group, "_timeout_s", lambda self: 0.1):
                with pytest.raises(RuntimeError, match=wanted):
                    getattr(session.accelerator, call)(tmp_path)
        dist.barrier()
        assert ema.drift() == 0
