"""What the constructor and `load` are asked for beyond a decay, and what they warn of."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dist_ema import Constant, Cosine, EqualWeight, HalfLife, PowerFunction, ShardedEMA, Warmup
from dist_ema.options import EMAKeywords, EMAOptions
from tests.net import Net
from tests.runs import start
from tests.worlds import World, rank, worlds

alone = pytest.mark.ranks(0)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


@worlds("plain", "ddp-2", "fsdp2-2")
def test_a_predicate_chooses_the_buffers_that_are_averaged(world: World):
    run = start(world, 0.5, buffers=lambda fqn, buffer: fqn == "running")
    before = run.training.net.running.clone()
    with torch.no_grad():
        run.training.net.running += 1
    run.ema.update()
    state = run.ema.gather_state_dict()
    if rank() == 0:
        torch.testing.assert_close(state["running"], before + 0.5)
    run = start(world, 0.5, buffers=lambda fqn, buffer: False)
    with torch.no_grad():
        run.training.net.running += 1
    run.ema.update()
    state = run.ema.gather_state_dict()
    if rank() == 0:
        torch.testing.assert_close(state["running"], run.training.net.running)


@alone
def test_integer_buffers_reach_a_teacher_whose_others_are_averaged():
    student, teacher = Normed(), Normed()
    ema = ShardedEMA(student, 0.5, buffers="average", into=teacher)
    mean = student.norm.running_mean.clone()
    for _ in range(3):
        student(torch.randn(4, 2))
    ema.update()
    assert teacher.norm.num_batches_tracked == 3
    torch.testing.assert_close(teacher.norm.running_mean, (mean + student.norm.running_mean) / 2)


RULES: list[dict[str, Any]] = [
    {"decay": 0.9, "start_step": 1},
    {"decay": EqualWeight()},
    {"decay": PowerFunction(5.0)},
    {"decay": Warmup(0.999)},
    {"decay": Warmup(0.999, inv_gamma=1.0), "start_step": 1},
    {"decay": EqualWeight(), "update_every": 7},
    {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
]


def plain_checkpoint(path: Path, net: nn.Module) -> Path:
    path.mkdir()
    save_file(
        {name: torch.full_like(tensor, 100.0) for name, tensor in net.state_dict().items()},
        path / "model.safetensors",
    )
    return path


def loads(path: Path, step: int | None, **options: Any) -> tuple[list[str], ShardedEMA]:
    ema = ShardedEMA(nn.Linear(2, 2), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ema.load(path, step=step)
    return [str(warning.message) for warning in caught], ema


@alone
@pytest.mark.parametrize("number", range(len(RULES)))  # functions cannot be sent to a worker
def test_a_checkpoint_without_counters_is_not_thrown_away_in_silence(number, tmp_path: Path):
    options = RULES[number]
    path = plain_checkpoint(tmp_path / "plain", nn.Linear(2, 2))
    told, _ = loads(path, None, **options)
    assert len(told) == 1
    assert "load(path, step=n)" in told[0]
    told, ema = loads(path, 1000, **options)
    assert told == []
    assert ema.step == 1000
    for _ in range(options.get("update_every", 1)):
        ema.update()
    assert ema.gather_state_dict()["weight"].min() > 89


@alone
def test_a_constant_decay_keeps_a_checkpoint_without_counters(tmp_path: Path):
    path = plain_checkpoint(tmp_path / "plain", nn.Linear(2, 2))
    assert loads(path, None, decay=0.3)[0] == []
    with pytest.raises(ValueError, match="step is -1"):
        loads(path, -1)


@alone
def test_the_step_of_a_diffusers_average_is_read(tmp_path: Path):
    path = plain_checkpoint(tmp_path / "plain", nn.Linear(2, 2))
    (path / "config.json").write_text(json.dumps({"optimization_step": 777}))
    told, ema = loads(path, None, decay=Warmup(0.999), start_step=1)
    assert (told, ema.step, ema.num_updates) == ([], 777, 777)
    assert loads(path, 5, decay=0.9)[1].step == 5


@alone
def test_a_step_beside_counters_is_left_aside_and_told(tmp_path: Path):
    ema = ShardedEMA(Net())
    ema.update()
    ema.save(tmp_path / "ema")
    with pytest.warns(UserWarning, match="step=9 is ignored.* step 1"):
        ema.load(tmp_path / "ema", step=9)
    assert ema.step == 1


def closes_over(decay: float) -> Callable[[int, int], float]:
    return lambda t, delta: decay


OTHER_RULES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"update_every": 2}, {"update_every": 3}, "update_every=2"),
    ({"start_step": 2}, {"start_step": 3}, "start_step=2"),
    ({"decay": closes_over(0.5)}, {"decay": closes_over(0.75)}, "closes_over"),
    ({"decay": lambda t, d: 0.5}, {"decay": lambda t, d: 0.5 + t * 0}, "lambda"),
    (
        {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.75)},
        "ema_update",
    ),
]


@alone
@pytest.mark.parametrize("number", range(len(OTHER_RULES)))
def test_resuming_with_another_rule_is_told(number, tmp_path: Path):
    saved, resumed, label = OTHER_RULES[number]
    net = Net()
    ShardedEMA(net, **saved).save(tmp_path / "ema")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedEMA(net, **saved).load(tmp_path / "ema")
    with pytest.warns(UserWarning, match=f"was saved with .*{label}.* and goes on with"):
        ShardedEMA(net, **resumed).load(tmp_path / "ema")


@alone
@pytest.mark.parametrize(
    ("decay", "every", "warned"),
    [
        (0.9999999, 1, True),
        (0.999999, 1, True),
        (HalfLife(steps=1e7), 1, True),
        (Warmup(0.9999999), 1, True),
        (0.9999999, 1000, False),
        (0.99999, 1, False),
        (1.0, 1, False),
        (Cosine(0.996, 1.0, 1000), 1, False),
        (Constant(0.9999), 1, False),
    ],
)
def test_a_decay_that_fp32_cannot_follow_is_warned_of(decay, every, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ShardedEMA(Net(), decay, update_every=every)
        ShardedEMA(Net(), decay, update_every=every, dtype=torch.float64)
    assert ["torch.float64, or" in str(w.message) for w in caught] == [True] * warned


@alone
def test_a_warned_decay_stands_still_in_fp32_and_moves_in_fp64():
    for dtype, moves in ((torch.float32, False), (torch.float64, True)):
        net = nn.Linear(1, 1, bias=False)
        net.weight.data.fill_(0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ema = ShardedEMA(net, 0.9999999, dtype=dtype)
        before = ema.gather_state_dict()["weight"].item()
        net.weight.data.fill_(1.0)
        ema.update()
        assert (ema.gather_state_dict()["weight"].item() != before) == moves


SEVERAL = {"a": 0.9, "b": 0.99}
LIGHTNING, TRAINER = "lightning", "transformers"


def callback_of(library: str, **options: Any) -> Any:
    """Imported in the workers only: the libraries take seconds."""
    return import_module(f"dist_ema.integrations.{library}").EMACallback(**options)


@alone
@pytest.mark.parametrize("library", [LIGHTNING, TRAINER])
@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"decay": 1.5}, ValueError, "decay"),
        ({"update_every": 0}, ValueError, "update_every is 0"),
        ({"beta": 0.9, "x": 1}, TypeError, r"'beta' \(decay here\), 'x'"),
        ({"missing": "ignore"}, ValueError, "missing is 'ignore', wanted 'raise' or 'restart'"),
        ({"evaluate": "long"}, ValueError, "evaluate is 'long'"),
        (
            {"decay": SEVERAL},
            ValueError,
            "several averages, .*'a', 'b'.*; select one with",
        ),
        ({"decay": SEVERAL, "evaluate": "c"}, ValueError, "evaluate is 'c'"),
    ],
)
def test_callbacks_refuse_at_once_what_sharded_ema_refuses(library, wrong, error, match):
    with pytest.raises(error, match=match):
        callback_of(library, **wrong)


@alone
def test_callbacks_refuse_what_only_they_take():
    with pytest.raises(ValueError, match="select one with evaluate="):
        callback_of(TRAINER, decay=SEVERAL, evaluate=False, export="x")
    with pytest.raises(ValueError, match="optimizer is -1, wanted a number from 0"):
        callback_of(LIGHTNING, optimizer=-1)
    for optimizer in ("g", 1.0, True):
        with pytest.raises(ValueError, match=f"optimizer is {optimizer!r}, wanted a number"):
            callback_of(LIGHTNING, optimizer=optimizer)
    for evaluate in ("b", False):
        callback_of(LIGHTNING, decay=SEVERAL, evaluate=evaluate)


def test_an_option_is_a_field_a_key_and_a_parameter():
    fields = {field.name: field.default for field in dataclasses.fields(EMAOptions)}
    parameters = dict(inspect.signature(ShardedEMA).parameters)
    del parameters["model"], parameters["unknown"]
    assert {name: p.default for name, p in parameters.items()} == fields
    assert {"decay", *EMAKeywords.__annotations__} == set(fields)


@worlds("ddp-2", "fsdp2-2")
def test_parameters_in_place_of_a_name_are_refused_on_every_rank(world: World):
    run = start(world)
    with (
        pytest.raises(ValueError, match="name is a generator, wanted the name of an average"),
        run.ema.average_parameters(run.training.model.parameters()),
    ):
        pass


@worlds("plain", "ddp-2")
def test_a_changed_layout_is_told_by_name_and_shape(world: World):
    run = start(world, buffers="average")
    net = run.training.net
    old = tuple(net.running.shape)
    net.running = torch.zeros(old[0] + 1)
    with pytest.raises(RuntimeError) as told:
        run.ema.update()
    assert f"running: was shape {old}, whole, is shape ({old[0] + 1},)" in str(told.value)
    assert "fully_shard" not in str(told.value)
