"""What is refused, and how: with an error that names the cause, on every rank, nothing changed."""

from __future__ import annotations

import copy
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import ShardedEMA, Warmup
from dist_ema.checkpoint import CheckpointError
from dist_ema.options import ATTRIBUTES
from tests.grid import rows
from tests.net import Net
from tests.runs import live_state, make_ema, same, start
from tests.worlds import World, rank, worlds

two_worlds = worlds("plain", "fsdp2-2")


def check_usable(world: World, training) -> None:
    """A good average can be built and gathered after a refusal: the ranks are in step."""
    ema = make_ema(training)
    state = ema.gather_state_dict()
    wanted = world.make_net().state_dict() if rank() == 0 else {}
    assert list(state) == list(wanted)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"unet": [nn.Linear(2, 2)]}, r"a dict, .*; model\['unet'\] is a list"),
        ([nn.Linear(2, 2), "x"], r"a list, .*; model\[1\] is a str"),
        (None, "a NoneType, wanted the torch.nn.Module that is trained"),
        (torch.optim.SGD(nn.Linear(2, 2).parameters()), "a SGD, wanted the torch.nn.Module"),
        (nn.Linear(2, 2).state_dict(), "OrderedDict, wanted the torch.nn.Module"),
    ],
)
def test_the_item_that_is_not_a_module_is_named(model, match: str):
    with pytest.raises(TypeError, match=match):
        ShardedEMA(model)


def test_what_has_no_storage_yet_is_named():
    with pytest.raises(ValueError, match=r"0\.weight: no storage yet; materialize the model"):
        ShardedEMA(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize("device", ["gpu", 1.5])
def test_what_is_not_a_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device is {device!r}, wanted 'cpu', or None"):
        ShardedEMA(nn.Linear(2, 2), device=device)


@pytest.mark.ranks(0, 2)
def test_parameters_in_place_of_the_model_say_how_users_of_others_move_over():
    net = Net()
    for parameters in (list(net.parameters()), tuple(net.parameters()), net.parameters()):
        with pytest.raises(
            TypeError, match=r"(?s)nn\.Module .*diffusers' EMAModel.*torch-ema's"
        ) as told:
            ShardedEMA(parameters, 0.9)
        ours = re.findall(
            r"ShardedEMA\(model, .*?start_step=1\)|ShardedEMA\(model, .*?\)\)", str(told.value)
        )
        for call in ours:  # what it says to write works
            eval(call, {"ShardedEMA": ShardedEMA, "Warmup": Warmup, "model": net, "decay": 0.9})
        assert len(ours) == 2
    for other in (net.state_dict(), None, [0.9], torch.optim.SGD(net.parameters())):
        with pytest.raises(TypeError, match=f"model is a {type(other).__name__}, ") as told:
            ShardedEMA(other, 0.9)
        assert "EMAModel" not in str(told.value)


@pytest.mark.ranks(0)
def test_what_other_averages_are_asked_for_is_answered_with_the_right_call():
    net = Net()
    ema = ShardedEMA(net, 0.9)
    assert ema.model is net
    assert type(ema.step) is int  # so that it can be saved anywhere
    answers = {
        "module": "average_parameters() copy_to(module) gather_state_dict()",
        "ema_model": "average_parameters() copy_to(module) gather_state_dict()",
        "shadow_params": "gather_tensors() average_parameters()",
        "store": "average_parameters() copy_to()",
        "restore": "average_parameters() copy_to()",
        "update_parameters": "update()",
        "save_pretrained": "export(path) save(path)",
        "n_averaged": "num_updates",
        "get_decay": "decay",
        "ema": "average_parameters()",
        "set": "load(path) reset()",
        "update_bn": "model average_parameters()",
        "num_averaged": "num_updates",
    }
    for name, calls in answers.items():
        with pytest.raises(AttributeError, match=f"no attribute '{name}': ") as told:
            getattr(ema, name)
        for call in calls.split():
            assert f"ema.{call}" in str(told.value)
    for hint in ATTRIBUTES.values():
        for name in re.findall(r"ema\.(\w+)", hint):
            assert hasattr(ShardedEMA, name), name
    for name in ATTRIBUTES:
        assert not hasattr(ema, name)
    with pytest.raises(
        AttributeError, match=r"^'ShardedEMA' object has no attribute 'upd'$"
    ) as told:
        ema.upd  # noqa: B018
    assert (told.value.name, told.value.obj) == ("upd", ema)  # Python's "Did you mean" looks there
    with pytest.raises(TypeError, match=r"ema\.average_parameters\(\)"):
        ema(torch.zeros(1))
    with pytest.raises(Exception, match=r"weights_only=True.*safetensors"):
        ema.load("x.pth.tar")
    with pytest.raises(TypeError, match=r"'beta' \(decay here\), 'use_buffers' \(buffers=") as told:
        ShardedEMA(ema.model, beta=0.9, use_buffers=True, unheard_of=1)
    assert "'unheard_of'" in str(told.value)


@two_worlds
def test_a_model_with_nothing_to_average_is_refused(world: World):
    training = world.train(world.make_net().requires_grad_(True))
    with pytest.raises(ValueError, match="params"):
        ShardedEMA(training.model, params=lambda fqn, parameter: False)
    frozen = world.make_net().requires_grad_(False)
    with pytest.raises(ValueError, match="params"):
        ShardedEMA(world.engine.wrap(frozen))
    with pytest.raises(ValueError, match="0 parameters"):
        ShardedEMA(torch.nn.Identity())
    check_usable(world, training)


BAD_VALUES = [
    ("decay", -0.1, ValueError),
    ("decay", 1.1, ValueError),
    ("decay", math.nan, ValueError),
    ("decay", True, ValueError),
    ("decay", "0.99", ValueError),
    ("decay", None, TypeError),
    ("decay", {}, ValueError),
    ("decay", {"fast": 2.0}, ValueError),
    ("multi_avg_fn", 0.9, TypeError),
    ("update_every", 0, ValueError),
    ("update_every", -1, ValueError),
    ("update_every", 1.5, ValueError),
    ("update_every", True, ValueError),
    ("start_step", -1, ValueError),
    ("start_step", 0.5, ValueError),
    ("params", "some", ValueError),
    ("params", ["emb.weight"], ValueError),
    ("buffers", "none", ValueError),
    ("buffers", None, ValueError),
    ("replicas", "both", ValueError),
    ("dtype", torch.int32, ValueError),
    ("dtype", "float32", ValueError),
]


@two_worlds
def test_a_bad_value_is_refused_by_name(world: World):
    training = world.train()
    before = live_state(training)
    for option, value, error in BAD_VALUES:
        with pytest.raises(error, match=option):
            ShardedEMA(training.model, **{option: value})
    same(live_state(training), before)
    check_usable(world, training)


@worlds("ddp-2", "fsdp2-3", "fsdp2_tp")
def test_a_bad_value_or_another_on_one_rank_is_refused_on_every_rank(world: World):
    def fails(fqn, parameter):
        raise RuntimeError("no such layer")

    training = world.train()
    with pytest.raises(ValueError, match="decay"):
        ShardedEMA(training.model, 1.5 if rank() == 1 else 0.9)
    for options in (
        {"decay": 0.99},
        {"update_every": 2},
        {"params": lambda *_: True},
        {"decay": {"ema": 0.9, "b": 0}},
    ):
        match = f"argument {next(iter(options))} is .* on rank 0 and .* on rank 1"
        with pytest.raises(ValueError, match=match):
            ShardedEMA(training.model, **options if rank() == 1 else {})
    with pytest.raises(RuntimeError, match="no such layer"):
        ShardedEMA(training.model, params=lambda *_: fails(*_) if rank() == 1 else True)
    check_usable(world, training)


@rows(*"fsdp2 hsdp fsdp2_tp full full_flat z1 z2_bf16 z3 z3_bf16".split())
def test_an_average_built_before_the_model_is_wrapped_raises_at_the_first_update(world: World):
    net = world.make_net()
    ema = ShardedEMA(net, 0.5)
    world.train(net)
    match = "build ShardedEMA after|DeepSpeedEngine"
    for call in (ema.update, ema.reset, lambda: ema.average_parameters().__enter__()):
        with pytest.raises((RuntimeError, ValueError), match=match):
            call()
    assert (ema.step, ema.num_updates) == (0, 0)


@rows("plain", "ddp", "fsdp2", "hsdp", "fsdp2_tp", "full", "full_flat")
def test_a_weight_that_thaws_is_refused_and_one_that_freezes_is_averaged_on(world: World):
    run = start(world).train(2)
    before, frozen = run.ema.gather_state_dict(), run.training.net.frozen
    frozen.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"frozen\.\w+.*params='all'"):
        run.ema.update()
    assert (run.ema.step, run.ema.num_updates) == (2, 2)
    frozen.requires_grad_(False)
    same(run.ema.gather_state_dict(), before)
    next(p for p in run.training.model.parameters() if p.requires_grad).requires_grad_(False)
    assert run.ema.update()


@two_worlds
def test_bad_steps_dtypes_and_decays_are_refused_and_change_nothing(world: World):
    run = start(world, lambda t, delta: 0.5 if t < 3 else 1.5).train(2)
    before = run.ema.gather_state_dict()
    for step in (-1, 1.0, 1.5, True, "3"):
        with pytest.raises(ValueError, match="wanted the number of an optimizer step"):
            run.ema.update(step=step)
    for dtype in (torch.int32, "float32"):
        with pytest.raises(ValueError, match="dtype"):
            run.ema.gather_state_dict(dtype=dtype)
    with pytest.raises(ValueError, match=r"1\.5"):
        run.ema.update()
    assert (run.ema.step, run.ema.num_updates) == (2, 2)
    same(run.ema.gather_state_dict(), before)


@pytest.mark.ranks(0, 2)
def test_a_model_without_storage_is_refused_by_name():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match=r"tiny.*to_empty"):
        ShardedEMA(net)


@pytest.mark.ranks(0)
def test_a_process_group_without_torch_distributed_is_refused():
    with pytest.raises(ValueError, match="process_group"):
        ShardedEMA(Net(), process_group=object())


@two_worlds
def test_a_submodule_that_was_replaced_or_a_parameter_that_came_later_is_noticed(world: World):
    """A new module may get the `id` of one that is gone."""
    run = start(world).train(1)
    run.training.net.blocks[0].l1 = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        run.ema.update()
    for _ in range(20):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4), nn.ReLU())
        ema = ShardedEMA(model, 0.5)
        del model[1]
        model.insert(1, nn.Linear(4, 9))
        with pytest.raises(RuntimeError, match="parameters were replaced"):
            ema.update()
    ema = ShardedEMA(model, 0.5)
    model[2].extra = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="parameters were replaced"):
        ema.update()


def test_one_process_where_several_were_started_is_warned_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 2 and torch.distributed is not init"):
        ShardedEMA(nn.Linear(2, 2))


def test_the_number_of_a_step_may_be_of_any_kind_of_integer():
    ema = ShardedEMA(nn.Linear(2, 2))
    assert ema.update(step=np.int64(3)) and ema.step == 3


@pytest.mark.ranks(0, 2)
@pytest.mark.parametrize("call", ["save", "load", "export"])
def test_a_path_that_is_none_is_refused_on_every_rank(tmp_path: Path, call: str):
    ema = ShardedEMA(nn.Linear(2, 2), 0.5)
    for wrong in (None, 3):
        with pytest.raises(TypeError, match=rf"path is {wrong}, wanted a str or Path"):
            getattr(ema, call)(wrong)
    if dist.is_initialized():
        with pytest.raises(TypeError, match="rank 1: path is None, wanted a str or Path"):
            getattr(ema, call)(tmp_path / "x" if rank() == 0 else None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_average_is_not_copied_or_pickled(copied):
    with pytest.raises(TypeError, match=r"cannot be copied or pickled.*ema\.save\(path\)"):
        copied(ShardedEMA(nn.Linear(2, 2), 0.5))


def test_the_state_dict_of_a_model_is_refused_with_the_remedy():
    net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"no state dict of this average.*load\(path\)"):
        ShardedEMA(net, 0.5).load_state_dict(net.state_dict())


@pytest.mark.ranks(0, 2)
def test_a_complex_average_is_not_written_where_its_imaginary_part_would_be_lost():
    module = nn.ParameterDict({"w": torch.ones(3, dtype=torch.complex64)})
    real = nn.ParameterDict({"w": torch.zeros(3)})
    ema, other = ShardedEMA(module), ShardedEMA(copy.deepcopy(real))
    for call in (
        lambda: ShardedEMA(module, into=real),
        lambda: ema.copy_to(real),
        lambda: other.load_state_dict(ema.state_dict()),
    ):
        with pytest.raises((ValueError, CheckpointError), match="complex64"):
            call()
    assert not real["w"].any()
    assert not any(t.any() for t in other.gather_state_dict().values())


@pytest.mark.parametrize("kinds", [(torch.float32, torch.complex64), (torch.float32, torch.int8)])
def test_a_weight_that_becomes_of_another_kind_of_number_is_refused(kinds):
    module = nn.ParameterDict({"w": torch.zeros(3, dtype=kinds[0]), "v": torch.zeros(3)})
    ema = ShardedEMA(module, 0.5)
    module.w = nn.Parameter(torch.ones(3, dtype=kinds[1]), requires_grad=kinds[1].is_complex)
    for call in (ema.update, ema.drift, ema.copy_to, ema.reset, ema.gather_state_dict):
        with pytest.raises(RuntimeError, match=f"w: was .*{kinds[0]}, is .*{kinds[1]}"):
            call()
    assert ema.step == 0
