"""An average in a second adapter of a PEFT model, and in an engine of DeepSpeed without optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA
from tests import worlds, worlds_deepspeed
from tests.grid import named
from tests.oracle import Oracle, worst_relative_error
from tests.runs import DECAY, MAX_RELATIVE_ERROR, make_ema, same
from tests.test_cost import HOST_SYNCS, Counted, counted_collectives
from tests.worlds import Training, World, from_rank_0, parametrized, rank
from tests.worlds_deepspeed import Zero, persistence

HPZ = {"zero_hpz_partition_size": 2}  # copies of the weights within a node
TABLE = [
    *named(worlds.WORLDS, "plain", "ddp", "fsdp2", "fsdp2_root_only", "fsdp2_no_reshard", "hsdp"),
    *named(worlds_deepspeed.WORLDS, "z0", "z3"),
    World(name="z3_cut", ranks=(3,), engine=Zero(stage=3, zero=persistence(0))),
    World(name="z3_hpz", ranks=(4,), engine=Zero(stage=3, zero=HPZ | persistence(0))),
]
every = parametrized(TABLE, lambda world, n: n in (2, world.ranks[0]))
few = parametrized(named(TABLE, "plain", "ddp", "fsdp2", "z3"), lambda world, n: n in (0, 2))


def lora(world: World, **options: Any) -> Any:
    peft = pytest.importorskip("peft", minversion="0.18")
    # PEFT does not gather the weights that DoRA needs under DeepSpeed without transformers.
    dora = {} if isinstance(world.engine, Zero) else {"use_dora": True}
    chosen = {"target_modules": ["l1", "l2", "emb"], "modules_to_save": ["norm"], **dora}
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **chosen, **options})


def adapted(world: World, *, seed: int = 0, teacher: bool = True, **options: Any) -> nn.Module:
    """A net with an adapter that trains, "default", and a frozen one, "teacher"."""
    from peft import get_peft_model

    model: Any = get_peft_model(world.make_net(seed=seed), lora(world))
    if teacher:
        model.add_adapter("teacher", lora(world, **options))
    with torch.no_grad():  # PEFT starts one of the two matrices at zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@contextlib.contextmanager
def shown(training: Training, adapter: str = "teacher") -> Iterator[None]:
    """Within the block the model computes with an adapter, and nothing trains."""
    training.engine.settle(training)
    training.net.set_adapter(adapter, inference_mode=True)
    try:
        yield
    finally:
        training.engine.settle(training)
        training.net.set_adapter("default")


def teacher_logits(training: Training) -> Tensor:
    with shown(training):
        return training.evaluate()


def adapter(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of an adapter, by their names without its own."""
    return {k.replace(f".{name}", ""): v for k, v in weights.items() if f".{name}" in k}


def full_adapter(training: Training, name: str) -> dict[str, Tensor]:
    return adapter(training.full_weights(), name)


@every
def test_an_adapter_is_the_average_in_float64(world: World):
    training = world.train(adapted(world))
    ema = make_ema(training, into="teacher")
    oracle = Oracle(full_adapter(training, "default"), DECAY)
    same(full_adapter(training, "teacher"), full_adapter(training, "default"))
    before = training.evaluate()
    same(teacher_logits(training), before)
    for i in range(4):
        training.train_step(i)
        assert ema.update()
        oracle.update(full_adapter(training, "default"))
        logits = teacher_logits(training)
        assert not torch.equal(logits, training.evaluate())
        with ema.average_parameters():
            same(training.evaluate(), logits)
            same(teacher_logits(training), logits)
        same(teacher_logits(training), logits)
    held = full_adapter(training, "teacher")
    assert worst_relative_error(held, oracle.average) <= MAX_RELATIVE_ERROR
    state = from_rank_0(ema.gather_state_dict())
    same(adapter(state, "default"), adapter(state, "teacher"))
    same({k: v.to(held[k]) for k, v in adapter(state, "default").items()}, held)
