"""An average in a second module: a model, an adapter of PEFT, a reference model under ZeRO-3."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import ShardedEMA
from tests import worlds_deepspeed
from tests.grid import KINDS, WORLDS, named, one_size
from tests.net import TRAINABLE, Net
from tests.oracle import Oracle, worst_relative_error
from tests.runs import DECAY, MAX_RELATIVE_ERROR, make_ema, same
from tests.test_cost import HOST_SYNCS, Counted, counted_collectives
from tests.worlds import Plain, Training, World, evaluate, from_rank_0, parametrized
from tests.worlds_deepspeed import HPZ_NET, Zero, persistence

[DDP, FSDP2] = named(WORLDS, "ddp", "fsdp2")
HPZ = {"zero_hpz_partition_size": 2}  # copies of the weights within a node
TABLE = [
    *named(WORLDS, "plain", "ddp", "fsdp2", "fsdp2_root_only", "fsdp2_no_reshard", "hsdp"),
    *named(WORLDS, "z0", "z3"),
    World(name="z3_cut", ranks=(3,), engine=Zero(stage=3, zero=persistence(0))),
    World(name="z3_hpz", ranks=(4,), engine=Zero(stage=3, zero=HPZ | persistence(0)), net=HPZ_NET),
]
every = parametrized(TABLE, one_size)
few = parametrized(named(TABLE, "plain", "ddp", "fsdp2", "z3"), lambda world, n: n in (0, 2))
# Of a module of its own. FSDP1 in bf16 warns.
MODULES = [
    world
    for world in KINDS
    if not isinstance(world.engine, Zero) and world.engine.weights_dtype == torch.float32
]


@parametrized(MODULES, lambda world, n: n == world.ranks[-1])
def test_a_teacher_computes_with_the_average_after_each_update(world: World):
    training, teacher = world.train(seed=0), world.train(seed=3)
    ema = ShardedEMA(training.model, 0.9, into=teacher.model)
    for i in range(2):
        training.train_step(i)
        ema.update()
        state, logits = from_rank_0(ema.gather_state_dict()), teacher.evaluate()
        same(logits, world.parallel_twin(state).evaluate())
    with ema.average_parameters():
        same(training.evaluate(), logits)
    same(teacher.evaluate(), logits)


@parametrized(MODULES[:5], lambda world, n: n == world.ranks[-1])
def test_a_teacher_keeps_what_is_not_averaged(world: World):
    training, teacher = world.train(seed=0), world.train(seed=3)
    chosen = {"blocks.0.l1.weight", "blocks.1.norm.bias"}
    ema = ShardedEMA(training.model, 0.5, into=teacher.model, params=lambda n, _: n in chosen)
    before = teacher.full_weights()
    training.train_step(0)
    ema.update()
    after = teacher.full_weights()
    assert {n for n in before if not torch.equal(before[n], after[n])} <= chosen


@pytest.mark.ranks(0, 2)
def test_a_teacher_of_another_layout_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks\.0\.\S+ has shape"):
        ShardedEMA(Net(), into=Net(hidden=12))
    net = Net()
    with pytest.raises(ValueError, match="shares weights"):
        ShardedEMA(net, into=net)


@pytest.mark.ranks(0)
def test_a_teacher_has_the_frozen_weights_that_were_loaded_after_it_was_made(tmp_path):
    def model() -> nn.Module:
        frozen = nn.Linear(3, 3).requires_grad_(False)
        return nn.Sequential(frozen, nn.Linear(3, 2))

    student, teacher, saved = model(), model(), model()
    ShardedEMA(saved, 0.5).save(tmp_path / "ema")
    for average_first in (False, True):
        ema = ShardedEMA(student, 0.5, into=teacher)
        with torch.no_grad():
            student[0].weight.fill_(-1)
        if average_first:
            ema.load(tmp_path / "ema")
        student.load_state_dict(saved.state_dict())
        if not average_first:
            ema.load(tmp_path / "ema")
        ema.update()
        assert torch.equal(teacher[0].weight, saved[0].weight)
        with torch.no_grad():
            student[0].weight.fill_(-2)
        ema.reset()
        assert torch.equal(teacher[0].weight, student[0].weight)


def lora(world: World, **options: Any) -> Any:
    from peft import LoraConfig

    # PEFT does not gather the weights that DoRA needs under DeepSpeed without transformers.
    dora = {} if isinstance(world.engine, Zero) else {"use_dora": True}
    chosen = {"target_modules": ["l1", "l2", "emb"], "modules_to_save": ["norm"], **dora}
    return LoraConfig(**{"r": 2, "lora_alpha": 3, **chosen, **options})


def adapted(world: World, *, seed: int = 0, teacher: bool = True, **options: Any) -> nn.Module:
    """A net with an adapter that trains, "default", and a frozen one, "teacher"."""
    from peft import get_peft_model

    model: Any = get_peft_model(world.make_net(seed=seed), lora(world))
    if teacher:
        model.add_adapter("teacher", lora(world, **options))
        freeze_teacher(model)  # PEFT 0.17 lets the magnitudes of an embedding's DoRA train
    with torch.no_grad():  # PEFT starts one of the two matrices at zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def train_adapted(world: World) -> Training:
    training = world.train(adapted(world))
    if isinstance(world.engine, Zero):
        # PEFT lends the attributes of a module to save to its wrapper, so stage 3 of DeepSpeed 0.17
        # and 0.18 trains it only after a forward pass without gradients.
        training.evaluate()
    return training


def freeze_teacher(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if ".teacher" in name:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def shown(training: Training) -> Iterator[None]:
    """Within the block the model computes with the teacher, which does not train."""
    training.engine.settle(training)
    training.net.set_adapter("teacher")
    freeze_teacher(training.net)  # as inference_mode=True does, since PEFT 0.18
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
def test_an_adapter_is_the_average_in_float64_and_its_update_communicates_nothing(world: World):
    training = train_adapted(world)
    ema = make_ema(training, into="teacher")
    oracle = Oracle(full_adapter(training, "default"), DECAY)
    same(full_adapter(training, "teacher"), full_adapter(training, "default"))
    same(teacher_logits(training), training.evaluate())
    for i in range(2):
        training.train_step(i)
        with counted_collectives() as seen, Counted() as counted:
            assert ema.update()
        assert seen == [], seen
        assert not HOST_SYNCS & set(counted.operators), counted.operators
        oracle.update(full_adapter(training, "default"))
        logits = teacher_logits(training)
        assert not torch.equal(logits, training.evaluate())
        with ema.average_parameters():
            same(training.evaluate(), logits)
            same(teacher_logits(training), logits)
        same(teacher_logits(training), logits)  # which gathers the teacher before the next update
    held = full_adapter(training, "teacher")
    assert worst_relative_error(held, oracle.average) <= MAX_RELATIVE_ERROR
    state = from_rank_0(ema.gather_state_dict())
    same(adapter(state, "default"), adapter(state, "teacher"))
    same({k: v.to(held[k]) for k, v in adapter(state, "default").items()}, held)


@few
def test_an_update_while_the_teacher_is_active_averages_the_student(world: World):
    training = train_adapted(world)
    ema = make_ema(training, into="teacher")
    oracle = Oracle(full_adapter(training, "default"), DECAY)
    training.train_step(0)
    oracle.update(full_adapter(training, "default"))
    with shown(training):
        before = training.evaluate()  # under FSDP2 the root stays gathered
        assert ema.update()
        logits = training.evaluate()
        assert not torch.equal(logits, before)
        same(full_adapter(training, "teacher"), full_adapter_of(ema))
    held = full_adapter(training, "teacher")
    assert worst_relative_error(held, oracle.average) <= MAX_RELATIVE_ERROR
    same(teacher_logits(training), logits)
    training.net.set_adapter("teacher")  # which lets it train, and freezes the student
    training.engine.settle(training)
    with pytest.raises(RuntimeError, match=r"teacher\S*: requires grad.*set_adapter\('default'\)"):
        ema.update()
    training.net.set_adapter("default")
    same(full_adapter(training, "teacher"), held)
    training.train_step(1)
    assert ema.update()
    assert ema.num_updates == 2


def full_adapter_of(ema: ShardedEMA) -> dict[str, Tensor]:
    return adapter(from_rank_0(ema.gather_state_dict()), "default")


@few
def test_an_adapter_teacher_is_saved_loaded_swapped_and_reset(world: World, tmp_path):
    training = train_adapted(world)
    ema = make_ema(training, into="teacher")
    for i in range(3):
        training.train_step(i)
        ema.update()
    live, average = full_adapter(training, "default"), full_adapter(training, "teacher")
    assert 0 < ema.drift() < 1
    with pytest.raises(ZeroDivisionError), ema.average_parameters():
        same(full_adapter_shown(training), average)
        raise ZeroDivisionError
    same(full_adapter(training, "default"), live)
    same(full_adapter(training, "teacher"), average)
    ema.save(tmp_path / "ema")

    elsewhere = DDP if not isinstance(world.engine, Plain) else FSDP2
    if dist.is_initialized():  # another engine, without a teacher; and the same with one
        net = adapted(dataclasses.replace(world, net=elsewhere.net), seed=1, teacher=False)
        other = make_ema(elsewhere.train(net))
        other.load(tmp_path / "ema")
        same(adapter(from_rank_0(other.gather_state_dict()), "default"), average)
        other.save(tmp_path / "ema")
    again = world.train(adapted(world, seed=2))
    resumed = make_ema(again, into="teacher")
    resumed.load(tmp_path / "ema")
    assert (resumed.step, resumed.num_updates) == (3, 3)
    same(full_adapter(again, "teacher"), average)

    ema.copy_to()
    same(full_adapter(training, "default"), average)
    training.train_step(3)
    ema.reset()
    same(full_adapter(training, "teacher"), full_adapter(training, "default"))
    assert ema.drift() == 0


def full_adapter_shown(training: Training) -> dict[str, Tensor]:
    """What the forward pass computes with."""
    engine: Any = training.engine
    training.engine.settle(training)
    weights = getattr(engine, "shown_weights", engine.full_weights)(training)
    return adapter(weights, "default")


@few
def test_the_adapter_that_is_exported_is_the_average(world: World, tmp_path):
    from peft import PeftModel

    training = train_adapted(world)
    ema = make_ema(training, into="teacher")
    for i in range(2):
        training.train_step(i)
        ema.update()
    with shown(training), pytest.raises(ValueError, match="average the active one only"):
        ema.export(tmp_path)
    ema.export(tmp_path)
    net = PeftModel.from_pretrained(world.make_net(seed=0), tmp_path)
    loaded = {k: v.detach() for k, v in net.named_parameters()}
    same(adapter(loaded, "default"), full_adapter(training, "teacher"))


def refused(
    match: str, model: nn.Module, error: type[Exception] = ValueError, **options: Any
) -> None:
    with pytest.raises(error, match=match):
        ShardedEMA(model, **{"into": "teacher", **options})


OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 4}, "lora_alpha is 4, of 'default' 3; scaling is 2.0, of 'default' 1.5"),
    ({"r": 3}, "r is 3, of 'default' 2"),
    ({"target_modules": ["l1"]}, "target_modules is"),
    ({"modules_to_save": None}, "modules_to_save is None"),
    ({"lora_dropout": 0.1}, "lora_dropout is 0.1, of 'default' 0.0"),
]


@few
def test_a_teacher_of_another_configuration_is_refused(world: World):
    for options, words in OTHER_SETTINGS:
        model = world.train(adapted(world, **options)).model
        refused(f"(?s)other settings.*{words}", model)


@few
def test_adapters_that_cannot_be_a_teacher_are_refused(world: World):
    training = world.train(adapted(world))
    refused(
        r"no adapter of this name.*default.* and \d+ more.*add_adapter\('other'",
        training.model,
        into="other",
    )
    refused("no adapter of this name", training.model, into="")
    refused("default.* is of that adapter and would be averaged", training.model, into="default")
    refused(
        r"no adapter of this name.*: \S*emb\.base_layer\.weight\. ",
        training.model,
        params=lambda fqn, p: p.requires_grad or "emb.base_layer" in fqn,
    )
    training.net.set_adapter("teacher")
    refused(r"teacher\S* is of that adapter and would be averaged itself", training.model)
    refused(
        r"teacher\S*: requires grad",
        training.model,
        params=lambda fqn, _: "lora_A.default" in fqn,
    )


@parametrized(named(WORLDS, "z2", "full"), lambda world, n: n == 2)
def test_an_adapter_in_flat_buffers_is_refused(world: World):
    """A rank holds other elements of the teacher's weights than it averages."""
    refused(r"teacher\S* is sharded in another way.*FSDP2", world.train(adapted(world)).model)


def reference(world: World, *, seed: int, **config: Any) -> Any:
    """A frozen model that DeepSpeed holds at stage 3, without an optimizer."""
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    deepspeed, net = worlds_deepspeed.library(), world.make_net(seed=seed)
    return deepspeed.initialize(model=net, config=settings | config)[0]


STAGE_3 = TABLE[-3:]  # kept whole, cut, and cut within a node


@parametrized(STAGE_3)
@pytest.mark.parametrize("threshold", [0, 10**6])
def test_a_reference_model_without_optimizer_is_the_average_in_float64(
    world: World, threshold: int, tmp_path
):
    zero = {"stage": 3, **world.engine.zero, **persistence(threshold)}
    training, teacher = world.train(), reference(world, seed=3, zero_optimization=zero)
    ema = make_ema(training, into=teacher)
    oracle = Oracle({n: w for n, w in training.full_weights().items() if n in TRAINABLE}, DECAY)
    for i in range(2):
        evaluate(teacher)  # gathers what stays gathered
        training.train_step(i)
        with counted_collectives() as seen:
            assert ema.update()
        assert seen == [], seen
        oracle.update(training.full_weights())
        state = from_rank_0(ema.gather_state_dict())
        twin = world.plain_twin(state)
        same(teacher.module.running, training.net.running)
        same(evaluate(teacher), evaluate(twin))
        with ema.average_parameters():
            same(training.evaluate(), evaluate(teacher))
        same(evaluate(teacher), evaluate(twin))
    assert worst_relative_error(state, oracle.average) <= MAX_RELATIVE_ERROR
    ema.save(tmp_path / "ema")
    other = make_ema(FSDP2.train(seed=5, **world.net))
    other.load(tmp_path / "ema")
    same(from_rank_0(other.gather_state_dict())["blocks.0.l1.weight"], state["blocks.0.l1.weight"])
    again = reference(world, seed=6, zero_optimization=zero)
    resumed = make_ema(training, into=again)
    resumed.load(tmp_path / "ema")
    same(evaluate(again), evaluate(twin))


@pytest.mark.ranks(2)
def test_a_reference_model_in_bf16_is_warned_of_and_takes_the_masters_of_the_student():
    [world] = named(WORLDS, "z3_bf16")
    training = world.train()
    teacher = reference(world, seed=3, bf16={"enabled": True})
    with pytest.warns(UserWarning, match=r"kept in torch.bfloat16.* a teacher in torch.float32"):
        ema = ShardedEMA(training.model, 0.5, into=teacher)
    assert ema.source == "master"
    before = {n: w.bfloat16() for n, w in training.full_weights().items() if n in TRAINABLE}
    training.train_step(0)
    ema.update()
    after = training.full_weights()
    wanted = {n: torch.lerp(w.float(), after[n], 0.5).bfloat16() for n, w in before.items()}
    state = from_rank_0(ema.gather_state_dict())
    same({n: state[n].bfloat16() for n in wanted}, wanted)


@pytest.mark.ranks(2)
def test_engines_that_cannot_be_a_teacher_or_a_model_are_refused():
    z3, z2 = named(WORLDS, "z3", "z2")
    teacher = reference(z3, seed=3)
    with pytest.raises(ValueError, match=r"has no optimizer.* into="):
        ShardedEMA(teacher)
    refused("sharded in another way", z2.train().model, into=teacher)
    refused("sharded by ZeroEngine", DDP.train().model, into=teacher)
    parameter: Any = teacher.module.emb.weight
    parameter.ds_tensor.ds_quant_scale = torch.ones(1)
    refused(r"emb\.weight .*quantized", z3.train().model, into=teacher)
