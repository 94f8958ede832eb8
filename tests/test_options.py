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

alone = pytest.mark.ranks(0)


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
def test_a_checkpoint_without_counters_is_not_thrown_away_in_silence(tmp_path: Path):
    path = plain_checkpoint(tmp_path / "plain", nn.Linear(2, 2))
    for options in RULES:
        [warning], _ = loads(path, None, **options)
        assert "load(path, step=n)" in warning
        warned, ema = loads(path, 1000, **options)
        assert (warned, ema.step) == ([], 1000)
        for _ in range(options.get("update_every", 1)):
            ema.update()
        assert ema.gather_state_dict()["weight"].min() > 89
    assert loads(path, None, decay=0.3)[0] == []  # which keeps most of it
    with pytest.raises(ValueError, match="step is -1"):
        loads(path, -1)
    (path / "config.json").write_text(json.dumps({"optimization_step": 777}))  # of diffusers
    warned, ema = loads(path, None, decay=Warmup(0.999), start_step=1)
    assert (warned, ema.step, ema.num_updates) == ([], 777, 777)
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
    (*({"multi_avg_fn": get_ema_multi_avg_fn(decay)} for decay in (0.5, 0.75)), "ema_update"),
]


@alone
def test_resuming_with_another_rule_is_told(tmp_path: Path):
    net = Net()
    for saved, resumed, label in OTHER_RULES:
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


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("", {"decay": 1.5}, ValueError, "decay"),
    ("", {"update_every": 0}, ValueError, "update_every is 0"),
    ("", {"beta": 0.9, "x": 1}, TypeError, r"'beta' \(decay here\), 'x'"),
    ("", {"missing": "ignore"}, ValueError, "missing is 'ignore', wanted 'raise' or 'restart'"),
    ("", {"evaluate": "long"}, ValueError, "evaluate is 'long'"),
    ("", {"decay": SEVERAL}, ValueError, "several averages, .*'a', 'b'.*; select one with"),
    ("", {"decay": SEVERAL, "evaluate": "c"}, ValueError, "evaluate is 'c'"),
    (TRAINER, {"decay": SEVERAL, "evaluate": False, "export": "x"}, ValueError, "with evaluate="),
    (LIGHTNING, {"optimizer": -1}, ValueError, "optimizer is -1, wanted a number from 0"),
    (LIGHTNING, {"optimizer": "g"}, ValueError, "optimizer is 'g', wanted a number"),
    (LIGHTNING, {"optimizer": 1.0}, ValueError, "optimizer is 1.0, wanted a number"),
    (LIGHTNING, {"optimizer": True}, ValueError, "optimizer is True, wanted a number"),
]


@alone
@pytest.mark.parametrize("library", [LIGHTNING, TRAINER])
def test_callbacks_refuse_at_once_what_sharded_ema_refuses(library: str):
    for only, wrong, error, match in WRONG:
        if only in ("", library):
            with pytest.raises(error, match=match):
                callback_of(library, **wrong)
    for evaluate in ("b", False):
        callback_of(library, decay=SEVERAL, evaluate=evaluate)


def test_an_option_is_a_field_a_key_and_a_parameter():
    fields = {field.name: field.default for field in dataclasses.fields(EMAOptions)}
    parameters = dict(inspect.signature(ShardedEMA).parameters)
    del parameters["model"], parameters["unknown"]
    assert {name: p.default for name, p in parameters.items()} == fields
    assert {"decay", *EMAKeywords.__annotations__} == set(fields)
