"""The numbers of other libraries, from their own code, whatever the engine.

A peer runs in one process, in float64, on the full weights that the engine's own gather gave after
each step; ours runs where the shards are. The schedules' own numbers are in test_schedule.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from dist_ema import EqualWeight, HalfLife, ShardedEMA, Warmup
from tests.grid import named
from tests.net import TRAINABLE
from tests.oracle import worst_relative_error
from tests.runs import EXACT, Run, start
from tests.worlds import World, rank, worlds
from tests.worlds_deepspeed import WORLDS as DEEPSPEED

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
    return Warmup(0.8, 2.0, 0.75)(t, 1)


EMA_FN, SWA_FN = get_ema_multi_avg_fn(0.8), get_swa_multi_avg_fn()
SLOW = {"beta": 0.8, "inv_gamma": 2.0, "power": 0.75}

# By name, our arguments and the peer. Each cap of a warm-up is reached within NUM_STEPS.
PEERS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], Follower]]] = {
    "torch, equal weights": ({"decay": EqualWeight()}, torchs()),
    "torch, equal weights by its function": (
        {"multi_avg_fn": SWA_FN},
        torchs(multi_avg_fn=SWA_FN),
    ),
    "torch, a decay": ({"decay": 0.8, "start_step": 1}, torchs(multi_avg_fn=EMA_FN)),
    "torch, a decay by its function": ({"multi_avg_fn": EMA_FN}, torchs(multi_avg_fn=EMA_FN)),
    "diffusers": ({"decay": Warmup(0.35), "start_step": 1}, diffusers(decay=0.35)),
    "diffusers, after 3 steps": (
        {"decay": Warmup(0.9), "start_step": 4},
        diffusers(decay=0.9, update_after_step=3),
    ),
    "diffusers, use_ema_warmup": (
        {"decay": Warmup(0.65, 1.0), "start_step": 1},
        diffusers(decay=0.65, use_ema_warmup=True),
    ),
    "diffusers, use_ema_warmup, foreach": (
        {"decay": Warmup(0.65, 3.0, 0.75), "start_step": 3},
        diffusers(
            decay=0.65,
            use_ema_warmup=True,
            inv_gamma=3.0,
            power=0.75,
            update_after_step=2,
            foreach=True,
        ),
    ),
    "ema-pytorch": (
        {"decay": Warmup(0.65, 1.0), "start_step": 1},
        ema_pytorch(beta=0.65, update_after_step=0, update_every=1),
    ),
    "ema-pytorch, after 3 steps": (
        {"decay": Warmup(0.8, 2.0, 0.75), "start_step": 4},
        ema_pytorch(update_after_step=3, update_every=1, **SLOW),
    ),
    "ema-pytorch, every 2 steps": (
        {"decay": one_step_every_few, "start_step": 3, "update_every": 2},
        ema_pytorch(update_after_step=2, update_every=2, **SLOW),
    ),
    "torch-ema": ({"decay": Warmup(0.35)}, torch_ema(decay=0.35)),
    "torch-ema, without its warm-up": (
        {"decay": 0.8},
        torch_ema(decay=0.8, use_num_updates=False),
    ),
}

# The last two are of ZeRO's masters: of fp32 weights, and of bf16 weights, where they are averaged.
ROWS = [
    *worlds("plain", "fsdp2-2").args[1],
    *(
        pytest.param(world, world.ranks[0], id=f"{world.name}-{world.ranks[0]}")
        for world in named(DEEPSPEED, "z2", "z2_bf16")
    ),
]
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
    ours, theirs = PEERS[peer]
    run = start(world, **ours).train(NUM_STEPS)
    state = run.ema.gather_state_dict()
    if rank() != 0:
        return
    wanted = replayed(world, run.weights, theirs)
    check_trained(run, wanted)
    found = worst_relative_error(state, {name: wanted[name] for name in TRAINABLE})
    assert found <= SAME, found


@pytest.mark.parametrize(("world", "num_ranks"), ROWS)
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
    found = worst_relative_error(state, {name: wanted[name] for name in (*TRAINABLE, "running")})
    assert found <= SAME, found
    # It averages integers too, rounding down each time; here they are copied.
    torch.testing.assert_close(state["num_batches"], run.training.net.num_batches, **EXACT)


def rank_0s_buffers(run: Run) -> dict[str, Tensor]:
    """Copies of this rank's persistent buffers, of which rank 0's are averaged."""
    net = run.training.net
    return {"running": net.running.clone(), "num_batches": net.num_batches.clone()}


PAIRS = [(0, 3), (2, 3), (3, 2), (4, 3), (5, 7), (6, 3), (7, 5), (1, 1), (3, 1)]


def walk(num_steps: int = 24) -> list[float]:
    """A weight after each step, that no two averages of it agree on by chance."""
    return [((7 * n) % 11) / 3 + n / 5 for n in range(1, num_steps + 1)]


def followed(peer: Callable[[nn.Module], Follower], start: int, every: int, **options: Any) -> None:
    """Compare both averages of one weight after each step from the end of the peer's copies on."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = ShardedEMA(net, start_step=start, update_every=every, dtype=torch.float64, **options)
    update, averaged = peer(net)
    for step, value in enumerate(walk(), 1):
        net.weight.data.fill_(value)
        ema.update()
        update()
        if step >= start:
            wanted = dict(averaged())["weight"]
            torch.testing.assert_close(ema.gather_state_dict()["weight"], wanted.detach())
    assert ema.num_updates > start


@pytest.mark.ranks(0)
@pytest.mark.parametrize(("u", "k"), PAIRS)
def test_ema_pytorchs_phase(u: int, k: int):
    followed(
        ema_pytorch(update_after_step=u, update_every=k, beta=0.8),
        u - u % k + 1,
        k,
        decay=lambda t, delta: Warmup(0.8, 1.0)(t - u % k, 1),
    )


@pytest.mark.ranks(0)
@pytest.mark.parametrize(("s", "k"), PAIRS)
def test_lightnings_phase(s: int, k: int):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    theirs = callbacks.EMAWeightAveraging(
        decay=0.8, update_every_n_steps=k, update_starting_at_step=s
    )

    def follow(net: nn.Module) -> Follower:
        peer = AveragedModel(net, **theirs._kwargs)
        step = iter(range(1000))

        def update() -> None:
            if theirs.should_update(step_idx=next(step)):
                peer.update_parameters(net)

        return update, lambda: named_tensors(peer.module)

    followed(follow, -(-s // k) * k + 1, k, decay=0.8 ** (1 / k))


@pytest.mark.ranks(0)
@pytest.mark.parametrize("fraction", [0.05, 0.5])
@pytest.mark.parametrize(("s", "k"), [*PAIRS, (0, 1), (0, 5)])
def test_torchtitans_formula(s: int, k: int, fraction: float):
    """Equal but for what is left of the first weights, which it keeps until step s."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    options = {"start_step": s, "update_every": k, "dtype": torch.float64}
    ema = ShardedEMA(net, HalfLife(fraction=fraction), **options)
    average = first = net.weight.item()
    left, at_start = 1.0, first
    for step, value in enumerate(walk(), 1):
        net.weight.data.fill_(value)
        ema.update()
        if step == s:
            at_start = value
        if step >= s and (step - s) % k == 0:
            decay = 2 ** (-1 / (fraction * max((step - s) // k, 1)))
            average = decay * average + (1 - decay) * value
            left *= decay
        if step >= s:
            found = ema.gather_state_dict()["weight"].item()
            assert abs(found + left * (first - at_start) - average) < 1e-9
            if fraction == 0.05 and s:
                assert left < 1e-6
    assert ema.num_updates > s


@pytest.mark.ranks(0)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_composers_phase(k: int):
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    options = {"start_step": 0, "update_every": k, "dtype": torch.float64}
    ema = ShardedEMA(net, HalfLife(steps=4), **options)
    smoothing, average = 2 ** (-k / 4), 0.0
    for step, value in enumerate(walk(), 1):
        net.weight.data.fill_(value)
        if step == 1:
            ema.reset()
            average = value
        else:
            ema.update(step=step)
            if step % k == 0:
                average = smoothing * average + (1 - smoothing) * value
        torch.testing.assert_close(ema.gather_state_dict()["weight"].item(), average)
