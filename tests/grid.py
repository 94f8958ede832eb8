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
from tests.runs import Run, check_average, same, start
from tests.worlds import World, evaluate, from_rank_0, parametrized

Body = Callable[..., None]


def over(table: Iterable[World], *bodies: Body) -> dict[str, Body]:
    """The same test bodies under their own names, run on these worlds in place of their own.

    A test file adds them to itself: `globals().update(over(ROWS, test_swap.test_this, ...))`.
    """
    mark = parametrized(table)
    return {body.__name__: mark(_without_worlds(body)) for body in bodies}


def rows(table: Iterable[World], *names: str) -> pytest.MarkDecorator:
    """Run a body on some worlds, each with its first number of ranks."""
    firsts = {world.name: world.ranks[0] for world in table}
    return parametrized(named(table, *names), lambda world, n: n == firsts[world.name])


def named(table: Iterable[World], *names: str) -> list[World]:
    """Some rows of a table."""
    by_name = {world.name: world for world in table}
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


def test_weights_that_do_not_train_are_averaged_with_all_and_shown(world: World, tmp_path):
    """By a predicate, with some that do: the others are read as they live."""
    chosen = {*FROZEN, "blocks.0.l1.weight", "tiny"}
    run, other = (start(world, seed=s, params=lambda fqn, _: fqn in chosen) for s in (0, 1))
    other.ema.save(tmp_path / "other")
    run.ema.load(tmp_path / "other")
    live = run.train(1).weights[-1]
    first = other.weights[0]
    check_average(run.ema, {n: 0.9 * first[n].double() + 0.1 * live[n].double() for n in chosen})
    state = from_rank_0(run.ema.gather_state_dict())
    for name in set(TRAINABLE) - chosen:
        assert torch.equal(state[name], live[name].float()), name
    before = run.training.evaluate()
    same(run.averaged_logits(), evaluate(world.plain_twin(state)))
    same(run.training.evaluate(), before)
    same(run.training.full_weights(), live)


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

    around = step(forward_inside=False, backward_inside=False)
    if around is not None:
        same(around, step_or_refusal(run := start(world).train(1), run.training.loss(1)))
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
