"""Runs the generic checks over further worlds, and some checks that any engine should pass.

The bodies here are collected where a test file takes them in with `over`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
import torch

from tests.net import FROZEN, TRAINABLE
from tests.oracle import worst_relative_error
from tests.runs import EXACT, MAX_RELATIVE_ERROR, Run, live_buffers, start
from tests.worlds import World, evaluate, from_rank_0, rank, state_of

Body = Callable[..., None]


def over(rows: Iterable[World], *bodies: Body) -> dict[str, Body]:
    """The same test bodies under their own names, run on these worlds in place of their own.

    A test file adds them to itself: `globals().update(over(ROWS, test_swap.test_this, ...))`.
    """
    pairs = [
        pytest.param(world, num_ranks, id=f"{world.name}-{num_ranks}")
        for world in rows
        for num_ranks in world.ranks
    ]
    mark = pytest.mark.parametrize(("world", "num_ranks"), pairs)
    return {body.__name__: mark(_without_worlds(body)) for body in bodies}


def named(rows: Iterable[World], *names: str) -> list[World]:
    """Some rows of a table."""
    by_name = {world.name: world for world in rows}
    return [by_name[name] for name in names]


def _without_worlds(body: Body) -> Body:
    """A copy, since marks are kept on the function itself."""
    copy = types.FunctionType(
        body.__code__, body.__globals__, body.__name__, body.__defaults__, body.__closure__
    )
    copy.__kwdefaults__ = body.__kwdefaults__
    copy.__annotations__ = body.__annotations__
    marks = getattr(body, "pytestmark", [])
    copy.pytestmark = [mark for mark in marks if "num_ranks" not in mark.args[:1][0]]
    return copy


def test_an_average_of_zeros_makes_a_model_of_zeros(world: World):
    run = start(world, params="all").train(1)
    zeros = {name: torch.zeros_like(weight) for name, weight in run.weights[0].items()}
    wanted = evaluate(world.plain_twin({**state_of(zeros), **live_state_buffers(run)}))
    for values in run.ema._average.storage.values:
        for value in values:
            value.zero_()
    before = run.training.evaluate()
    with run.ema.average_parameters():
        torch.testing.assert_close(run.training.evaluate(), wanted, **EXACT)
    torch.testing.assert_close(run.training.evaluate(), before, **EXACT)


def test_weights_that_do_not_train_are_averaged_with_all_and_shown(world: World):
    """By a predicate, with some that do: the others are read as they live."""
    chosen = {*FROZEN, "blocks.0.l1.weight", "tiny"}
    run = start(world, params=lambda fqn, parameter: fqn in chosen)
    first = run.weights[0]
    for values in run.ema._average.storage.values:
        for value in values:
            value.mul_(3)
    live = run.train(1).weights[-1]
    state = run.ema.gather_state_dict()
    if rank() == 0:
        wanted = {n: 0.9 * 3 * first[n].double() + 0.1 * live[n].double() for n in chosen}
        assert worst_relative_error(state, wanted) <= MAX_RELATIVE_ERROR
        for name in set(TRAINABLE) - chosen:
            assert torch.equal(state[name], live[name].float()), name
    state = from_rank_0(state)
    before = run.training.evaluate()
    with run.ema.average_parameters():
        shown = run.training.evaluate()
    torch.testing.assert_close(shown, evaluate(world.plain_twin(state)), **EXACT)
    torch.testing.assert_close(run.training.evaluate(), before, **EXACT)
    torch.testing.assert_close(run.training.full_weights(), live, **EXACT)


def test_a_backward_pass_never_mixes_weights_and_average(world: World):
    def step(forward_inside: bool, backward_inside: bool) -> dict[str, torch.Tensor] | None:
        run = start(world).train(1)
        loss = None if forward_inside else run.training.loss(1)
        with run.ema.average_parameters():
            if forward_inside:
                loss = run.training.loss(1)
            if backward_inside:
                return step_or_refusal(run, loss)
        return step_or_refusal(run, loss)

    bare = step_or_refusal(run := start(world).train(1), run.training.loss(1))
    around = step(forward_inside=False, backward_inside=False)
    if around is not None:
        torch.testing.assert_close(around, bare, **EXACT)
    assert step(forward_inside=True, backward_inside=False) is None
    assert step(forward_inside=False, backward_inside=True) is None


def step_or_refusal(run: Run, loss: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """The weights after a step, or None if autograd finds that weights have changed."""
    try:
        run.training.engine.step(run.training, loss)
    except RuntimeError as error:
        # Not a lost message or a timeout, which are RuntimeErrors too.
        assert "inplace" in str(error), error
        return None
    return run.training.full_weights()


def lerped_tensors(run: Run) -> int:
    """How many tensors the next update passes to the operator that averages."""
    counts = []
    real = torch._foreach_lerp_

    def spy(shadows, lives, weight):
        counts.append(len(shadows))
        return real(shadows, lives, weight)

    run.train_unrecorded()
    run.training.train_step(run.next_step)
    with mock.patch.object(torch, "_foreach_lerp_", spy):
        assert run.ema.update()
    return sum(counts)


def live_state_buffers(run: Run) -> dict[str, torch.Tensor]:
    """The persistent buffers, by the names that the bare `Net` gives them."""
    return {n: b for n, b in live_buffers(run.training).items() if n in ("running", "num_batches")}
