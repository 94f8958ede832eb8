"""The numbers of other libraries, from their own code, whatever the engine.

A peer runs in one process, in float64, on the full weights that the engine's own gather gave after
each step; ours runs where the shards are. The schedules' own numbers are in test_schedule.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import dist_ema
from dist_ema import EqualWeight, HalfLife, PowerFunction, ShardedEMA, Warmup
from tests.grid import rows
from tests.net import TRAINABLE
from tests.oracle import worst_relative_error
from tests.readme import ROOT
from tests.runs import EXACT, Run, start
from tests.worlds import World, rank, worlds

NUM_STEPS = 8
SAME = 1e-6  # relative to the largest element of a tensor

# What follows a model: a call after each of its steps, and one that gives the average by name.
Follower = tuple[Callable[[], None], Callable[[], Iterable[tuple[str, Tensor]]]]


def torchs(**options: Any) -> Callable[[nn.Module], Follower]:
    def follow(net: nn.Module) -> Follower:
        peer = AveragedModel(net, **options)
        return lambda: peer.update_parameters(net), lambda: named_tensors(peer.module)

    return follow


def torchvisions(decay: float) -> Callable[[nn.Module], Follower]:
    """Its `ExponentialMovingAverage` is this class with this function, and no code beside it."""

    def ema_avg(avg_model_param, model_param, num_averaged):
        return decay * avg_model_param + (1 - decay) * model_param

    return torchs(avg_fn=ema_avg, use_buffers=True)


def diffusers(**options: Any) -> Callable[[nn.Module], Follower]:
    def follow(net: nn.Module) -> Follower:
        from diffusers.training_utils import EMAModel

        peer = EMAModel(net.parameters(), **options)
        return lambda: peer.step(net.parameters()), lambda: by_name(net, peer.shadow_params)

    return follow


def ema_pytorch(**options: Any) -> Callable[[nn.Module], Follower]:
    def follow(net: nn.Module) -> Follower:
        from ema_pytorch import EMA

        peer = EMA(net, **options)
        return peer.update, lambda: named_tensors(peer.ema_model)

    return follow


def torch_ema(**options: Any) -> Callable[[nn.Module], Follower]:
    def follow(net: nn.Module) -> Follower:
        from torch_ema import ExponentialMovingAverage

        peer = ExponentialMovingAverage(net.parameters(), **options)
        return peer.update, lambda: by_name(net, peer.shadow_params)

    return follow


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def by_name(net: nn.Module, values: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
    return [(name, value) for (name, _), value in zip(net.named_parameters(), values, strict=True)]


def one_step_every_few(t: int, delta: int) -> float:
    """ema-pytorch's `update_every` takes the decay of one step, however many it covers."""
    return Warmup(0.8, 3.0, 0.75)(t, 1)


EMA_FN, SWA_FN = get_ema_multi_avg_fn(0.8), get_swa_multi_avg_fn()
WARMUP = {"inv_gamma": 3.0, "power": 0.75}

# By name, our arguments and the peer; all other ways are in the table below, in one process.
PEERS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Follower]]] = {
    "torch, equal weights": ({"multi_avg_fn": SWA_FN}, torchs(multi_avg_fn=SWA_FN)),
    "torch, a decay": ({"multi_avg_fn": EMA_FN}, torchs(multi_avg_fn=EMA_FN)),
    "diffusers": (
        {"decay": Warmup(0.65, 3.0, 0.75), "start_step": 3},
        diffusers(decay=0.65, use_ema_warmup=True, update_after_step=2, foreach=True, **WARMUP),
    ),
    "ema-pytorch": (
        {"decay": one_step_every_few, "start_step": 3, "update_every": 2},
        ema_pytorch(beta=0.8, update_after_step=2, update_every=2, **WARMUP),
    ),
}

# The last two are of ZeRO's masters: of fp32 weights, and of bf16 weights, where they are averaged.
ROWS = rows("plain", "fsdp2", "z2", "z2_bf16").args[1]
# A function of the user's sees pieces of weights, so further cuts may tell.
OTHER_ROWS = worlds("ddp-2", "hsdp", "fsdp2_tp").args[1]


def replayed(
    world: World, recorded: list[dict[str, Tensor]], peer: Callable[[nn.Module], Follower]
) -> dict[str, Tensor]:
    """The peer's average of a bare net that takes these weights one after the other."""
    net = world.make_net().double()
    tensors = dict(named_tensors(net))
    update: Callable[[], None] | None = None
    for weights in recorded:
        with torch.no_grad():
            for name, value in weights.items():
                tensors[name].copy_(value)
        if update is None:  # the weights before the first step
            update, averaged = peer(net)
        else:
            update()
    return {name: tensor.detach() for name, tensor in averaged()}


def check_trained(run: Run, wanted: dict[str, Tensor]) -> None:
    """The weights moved by so much that an average of other numbers would be seen."""
    assert run.ema.num_updates > 0
    assert worst_relative_error(run.weights[-1], {n: wanted[n] for n in TRAINABLE}) > 1000 * SAME


@pytest.mark.parametrize(
    ("world", "num_ranks", "peer"),
    [
        pytest.param(*row.values, peer, id=f"{peer}, {row.id}")
        for peer in PEERS
        for row in (*ROWS, *(OTHER_ROWS if "multi_avg_fn" in PEERS[peer][0] else ()))
    ],
)
def test_the_average_is_the_peers_on_the_gathered_weights(world: World, peer: str):
    ours, follow = PEERS[peer]
    run = start(world, **ours).train(NUM_STEPS)
    state = run.ema.gather_state_dict()
    if rank() != 0:
        return
    wanted = replayed(world, run.weights, follow)
    check_trained(run, wanted)
    error = worst_relative_error(state, {name: wanted[name] for name in TRAINABLE})
    assert error <= SAME, error


@worlds("fsdp2-2")
def test_averaged_buffers_are_those_of_torchvision(world: World):
    run = start(world, 0.8, start_step=1, buffers="average")
    run.weights[0] |= rank_0s_buffers(run)
    for _ in range(NUM_STEPS):
        run.train(1)
        run.weights[-1] |= rank_0s_buffers(run)
    state = run.ema.gather_state_dict()
    if rank() != 0:
        return
    wanted = replayed(world, run.weights, torchvisions(0.8))
    check_trained(run, wanted)
    error = worst_relative_error(state, {name: wanted[name] for name in (*TRAINABLE, "running")})
    assert error <= SAME, error
    # It averages integers too, rounding down each time; here they are copied.
    torch.testing.assert_close(state["num_batches"], run.training.net.num_batches, **EXACT)


def rank_0s_buffers(run: Run) -> dict[str, Tensor]:
    """Copies of this rank's persistent buffers, of which rank 0's are averaged."""
    net = run.training.net
    return {"running": net.running.clone(), "num_batches": net.num_batches.clone()}


# The table of examples/README.md, row by row, beside what its left column says.

PAIRS = [(0, 3), (2, 3), (3, 2), (4, 3), (5, 7), (6, 3), (7, 5), (1, 1), (3, 1), (0, 1)]
D, H, TAU, M, F = 0.8, 4, 5.0, 0.2, 0.5  # of the letters in the table, those without a phase
Reference = Callable[[int, int], Callable[[nn.Module], Follower]]  # of a pair (s or u, k)


def walk(num_steps: int = 30) -> list[float]:
    """A weight after each step, that no two averages of it agree on by chance."""
    return [((7 * n) % 11) / 3 + n / 5 for n in range(1, num_steps + 1)]


def formula(decay_of_step: Callable[[int], float | None]) -> Callable[[nn.Module], Follower]:
    """Another library by its formula: the decay of its update at a step; None where it has none."""

    def follow(net: nn.Module) -> Follower:
        average, steps = net.weight.detach().clone(), itertools.count(1)

        def update() -> None:
            decay = decay_of_step(next(steps))
            if decay is not None:
                average.copy_(decay * average + (1 - decay) * net.weight.detach())

        return update, lambda: [("weight", average)]

    return follow


def where(
    is_updated: Callable[[int], bool],
    peer: Callable[[nn.Module], Follower],
) -> Callable[[nn.Module], Follower]:
    """A peer that its user's script updates after some steps only."""

    def follow(net: nn.Module) -> Follower:
        update, averaged = peer(net)
        steps = itertools.count(1)
        return lambda: update() if is_updated(next(steps)) else None, averaged

    return follow


def torchvisions_warmup(w: int, k: int) -> Callable[[nn.Module], Follower]:
    """As its reference script: within the warm-up each update is followed by `n_averaged = 0`."""

    def follow(net: nn.Module) -> Follower:
        peer, steps = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(D)), itertools.count(1)

        def update() -> None:
            if ((step := next(steps)) - 1) % k == 0:
                peer.update_parameters(net)
                if step <= w:
                    peer.n_averaged.fill_(0)

        return update, lambda: named_tensors(peer.module)

    return follow


def timms(u: int, *, warms_up: bool) -> Callable[[nn.Module], Follower]:
    def decay(n: int) -> float:
        t = max(0, n - u - 1)
        return min(D, 1 - (1 + t) ** (-2 / 3)) if warms_up or t == 0 else D

    return formula(decay)


def lightnings(s: int, k: int) -> Callable[[nn.Module], Follower]:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    callback = callbacks.EMAWeightAveraging(
        decay=D, update_every_n_steps=k, update_starting_at_step=s
    )
    return where(
        lambda step: callback.should_update(step_idx=step - 1),
        lambda net: torchs(**callback._kwargs)(net),
    )


def composers(n: int, k: int) -> Callable[[nn.Module], Follower]:
    """At the end of step n it copies, and there and later, at multiples of k, it averages."""
    start = max(n, 1)

    def decay(step: int) -> float | None:
        if step == start:
            return 0.0
        return 2 ** (-k / H) if step > start and step % k == 0 else None

    return formula(decay)


def edms(step: int) -> float:
    """It counts images after the update, so that none were seen at the first."""
    return 0.5 ** (1 / max(min(H, F * (step - 1)), 1e-8))


EMA_OF_D = torchs(multi_avg_fn=get_ema_multi_avg_fn(D))
TABLE: dict[tuple[str, str], Reference] = {
    ("torch", "`AveragedModel(model, multi"): lambda s, k: EMA_OF_D,
    ("torch", "the same, updated where `i"): lambda s, k: where(
        lambda n: (n - 1) % k == 0, EMA_OF_D
    ),
    ("torch", "the same, updated where `step"): lambda s, k: where(lambda n: n % k == 0, EMA_OF_D),
    ("torch", "`AveragedModel(model)`"): lambda s, k: torchs(),
    ("torch", "the same, updated at step s"): lambda s, k: where(
        lambda n: n >= s + k and (n - s) % k == 0, torchs()
    ),
    ("torchvision", "`Exp"): lambda s, k: where(lambda n: (n - 1) % k == 0, torchvisions(D)),
    ("torchvision", "the same with w"): lambda s, k: torchvisions_warmup(2 * k, k),
    ("timm", "`ModelEmaV3(model, decay=d)`"): lambda s, k: formula(lambda n: D),
    ("timm", "`ModelEmaV3(model, decay=d, u"): lambda s, k: timms(s, warms_up=False),
    ("timm", "the same"): lambda s, k: timms(s, warms_up=True),
    ("diffusers", "`EMAModel"): lambda s, k: diffusers(decay=D, update_after_step=s),
    ("diffusers", "the same"): lambda s, k: diffusers(
        decay=D, update_after_step=s, use_ema_warmup=True
    ),
    ("ema-pytorch", "`EMA"): lambda s, k: ema_pytorch(beta=D, update_after_step=s, update_every=k),
    ("ema-pytorch", "the same"): lambda s, k: ema_pytorch(
        beta=D, update_after_step=s, update_every=1
    ),
    ("torch-ema", "`Exp"): lambda s, k: torch_ema(decay=D),
    ("torch-ema", "the same"): lambda s, k: torch_ema(decay=D, use_num_updates=False),
    ("Lightning", "`EMA"): lightnings,
    ("Composer", "`EMA"): lambda s, k: composers(s, 1),
    ("Composer", "the same, `update"): lambda s, k: composers(2 * k, k),
    ("EDM", " (and"): lambda s, k: formula(edms),
    ("EDM2", "`Power"): lambda s, k: formula(
        lambda n: (1 - 1 / n) ** (PowerFunction(sigma_rel=0.2).gamma + 1)
    ),
    ("Ultralytics", "`Model"): lambda s, k: formula(lambda n: D * (1 - math.exp(-n / TAU))),
    ("MMEngine", "`ExponentialMov"): lambda s, k: formula(
        lambda n: 0.0 if n == 1 else 1 - M if (n - 1) % k == 0 else None
    ),
    ("MMEngine", "`ExponentialMom"): lambda s, k: formula(
        lambda n: 0.0 if n == 1 else 1 - ((1 - M) * math.exp(-n / TAU) + M)
    ),
}
# Rows with a test of their own: their first weights count (torchtitan), or calls differ (Composer);
# BEMA's numbers are in test_bema.py, widths in test_posthoc.py.
OF_THEIR_OWN = {
    ("torchtitan", "`EMA"),
    ("torchtitan", "its `decay"),
    ("Composer", "the same, any n"),
    ("TRL", "`BEMA"),
    ("ema-pytorch", "`PostHoc"),
}


def constructors() -> dict[tuple[str, str], str]:
    """The constructor in the right column of each row that has one, by library and left column."""
    rows, library = {}, ""
    text = (ROOT / "examples/README.md").read_text().split("## Moving from another EMA")[1]
    for left, right in re.findall(r"^\| (.*?) \| (.*?) \|$", text, re.M):
        if name := re.match(r"\*\*(\S+)\*\* ?", left):
            library, left = name[1], left[name.end() :]
        if code := re.match(r"`((?:ShardedEMA|EMACallback)\(.*?\))`", right):
            rows[library, left] = code[1]
    return rows


def built(code: str, net: nn.Module, s: int, k: int, **options: Any) -> tuple[ShardedEMA, int]:
    """The average that a row of the table builds, in float64, and its `start_step`."""
    starts = []

    def build(_: object, *decay: Any, **named: Any) -> ShardedEMA:
        starts.append(named.get("start_step", 0))
        return ShardedEMA(net, *decay, dtype=torch.float64, **named, **options)

    names = {name: getattr(dist_ema, name) for name in dist_ema.__all__} | {"math": math}
    names |= {"ShardedEMA": build, "EMACallback": lambda *decay, **named: build(0, *decay, **named)}
    names |= {"model": net, "model_parts": net, "d": D, "k": k, "u": s, "s": s, "h": H, "m": M}
    names |= {"w": 2 * k, "n": s, "tau": TAU, "f": F}
    if "PowerFunction" in code:
        names["f"] = 0.2
    if "start_step=s - k" in code:  # the first update there, which the pair puts at s + k
        names["s"] = s + k
    if "start_step=n, update_every=k" in code:
        names["n"] = 2 * k
    return eval(code, names), starts[0]


def rows_of(library: str, left: str) -> dict[tuple[str, str], str]:
    return {
        row: code
        for row, code in constructors().items()
        if row[0] == library and row[1].lstrip().startswith(left.strip())
    }


def test_every_row_of_the_table_has_a_test_and_can_be_built():
    rows = {*constructors()}
    for library, left in [*TABLE, *OF_THEIR_OWN]:
        [(row, code)] = rows_of(library, left).items()
        rows.remove(row)
        if "..." not in code:
            built(code, nn.Linear(1, 1), 3, 2)
    assert not rows


@pytest.mark.ranks(0)
@pytest.mark.parametrize(("library", "left"), TABLE, ids=lambda text: text.strip("` "))
def test_a_row_of_the_table(library: str, left: str):
    [code] = rows_of(library, left).values()
    for s, k in PAIRS if re.search(r"\b[skunw]\b", code) else [(0, 1)]:
        net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        ema, start = built(code, net, s, k)
        update, averaged = TABLE[library, left](s, k)(net)
        # Before, ours is the weights, and theirs may be older ones.
        first = s + k if "start_step=s - k" in code else start
        for step, value in enumerate(walk(), 1):
            net.weight.data.fill_(value)
            ema.update()
            update()
            if step >= first:
                wanted = dict(averaged())["weight"].detach()
                own = ema.gather_state_dict()["weight"]
                torch.testing.assert_close(own, wanted, msg=f"{code}, {s=}, {k=}, {step=}")
        assert ema.num_updates > start


@pytest.mark.ranks(0)
@pytest.mark.parametrize("rule", [0.05, 0.5, None])
@pytest.mark.parametrize(("s", "k"), [*PAIRS, (0, 5)])
def test_torchtitans_formula(s: int, k: int, rule: float | None):
    """Equal but for what is left of the first weights, which it keeps until step s."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    decay = D ** (1 / k) if rule is None else HalfLife(fraction=rule)
    ema = ShardedEMA(net, decay, start_step=s, update_every=k, dtype=torch.float64)
    average = first = net.weight.item()
    left, at_start = 1.0, first
    for step, value in enumerate(walk(), 1):
        net.weight.data.fill_(value)
        ema.update()
        if step == s:
            at_start = value
        if step >= s and (step - s) % k == 0:
            number = max((step - s) // k, 1)
            decay = D if rule is None else 2 ** (-1 / (rule * number))
            average = decay * average + (1 - decay) * value
            left *= decay
        if step >= s:
            own = ema.gather_state_dict()["weight"].item()
            assert abs(own + left * (first - at_start) - average) < 1e-9
            if rule == 0.05 and s:
                assert left < 1e-6
    assert ema.num_updates > s


@pytest.mark.ranks(0)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("n", [0, 1, 4, 10])
def test_composers_phase(n: int, k: int):
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = ShardedEMA(net, HalfLife(steps=H), update_every=k, dtype=torch.float64)
    update, averaged = composers(n, k)(net)
    for step, value in enumerate(walk(), 1):
        net.weight.data.fill_(value)
        update()
        if step == max(n, 1):
            ema.reset()
        elif step > n:
            ema.update(step=step)
        if step >= n:
            own = ema.gather_state_dict()["weight"]
            torch.testing.assert_close(own, dict(averaged())["weight"])


@pytest.mark.ranks(0)
@pytest.mark.parametrize("u", [0, 6])
def test_a_run_of_diffusers_goes_on(u: int, tmp_path: Path):
    """From what its `save_pretrained` wrote at step 20, step counter included."""
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    size = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    block = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    net = UNet2DModel(8, in_channels=1, out_channels=1, **size, **block)
    peer = EMAModel(
        net.parameters(),
        decay=0.6,
        update_after_step=u,
        model_cls=UNet2DModel,
        model_config=net.config,
    )
    ema = ShardedEMA(net, Warmup(0.6), start_step=u + 1)
    for step in range(1, 31):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        peer.step(net.parameters())
        if step > 20:
            ema.update()
        if step == 20:
            peer.save_pretrained(tmp_path / "unet_ema")
            ema.load(tmp_path / "unet_ema")
    assert ema.step == 30
    wanted = dict(by_name(net, peer.shadow_params))
    assert worst_relative_error(ema.gather_state_dict(), wanted) <= SAME


@pytest.mark.ranks(0)
def test_a_run_with_torchs_average_goes_on(tmp_path: Path):
    net = nn.Linear(3, 2)
    peer, ema = AveragedModel(net, multi_avg_fn=SWA_FN), ShardedEMA(net, EqualWeight())
    for step in range(1, 21):
        with torch.no_grad():
            net.weight.normal_()
        peer.update_parameters(net)
        if step > 10:
            ema.update()
        if step == 10:
            save_file(peer.module.state_dict(), tmp_path / "model.safetensors")
            ema.load(tmp_path / "model.safetensors", step=10)
    assert worst_relative_error(ema.gather_state_dict(), peer.module.state_dict()) <= SAME
