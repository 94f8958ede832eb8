"""The worker pool itself: what it reports, and that a failure costs only the test that failed."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import NO_GROUP, PoolKeeper, RankFailure, Task


@pytest.fixture(scope="module")
def pools():
    keeper = PoolKeeper()
    yield keeper
    keeper.close()


def run(pools: PoolKeeper, body, *, num_ranks=2, timeout_s=30.0, **arguments):
    return pools.get(num_ranks).run(Task(__name__, body.__name__, arguments), timeout_s)


def passes(path=None, amount=1.0):
    total = torch.full((), amount)
    dist.all_reduce(total)
    assert total.item() == amount * dist.get_world_size()
    if path is not None:
        (path / f"{os.getpid()}").touch()


def fails_on_rank_1():
    print("said before the failure")
    if dist.get_rank() == 1:
        raise ValueError("boom")
    dist.barrier()


def dies_on_rank_1():
    print("last words", file=sys.stderr)
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hangs_on_rank_0():
    if dist.get_rank() == 0:
        time.sleep(60)


def crashes_on_rank_1():
    if dist.get_rank() == 1:  # in a thread of C
        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, libc.abort, None)
    dist.barrier()
    time.sleep(30)


def fails_on_rank_0_and_then_crashes_on_rank_1():
    if dist.get_rank() == 0:
        raise ValueError("boom")
    time.sleep(0.3)
    crashes_on_rank_1()


def skips():
    pytest.skip("not today")


def skips_on_rank_1():
    if dist.get_rank() == 1:
        pytest.skip("not today")


def has_no_group_and_the_state_that_every_test_has():
    assert not dist.is_initialized()
    assert torch.get_num_threads() == 1
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert torch.is_grad_enabled()
    assert torch.initial_seed() == 0


def leaves_state_behind():
    torch.manual_seed(5)
    torch.set_grad_enabled(False)


def test_a_pool_is_used_again_after_a_pass_a_skip_and_what_cannot_be_pickled(pools, tmp_path):
    assert run(pools, passes, amount=2.5, path=tmp_path) is None
    assert run(pools, skips) == "not today"
    assert run(pools, passes, path=tmp_path) is None
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises((TypeError, AttributeError)):
        run(pools, passes, amount=lambda: None)
    assert run(pools, passes) is None


@pytest.mark.parametrize(
    ("body", "crashed", "texts"),
    [
        # The last is the stack of the rank that was left waiting.
        (fails_on_rank_1, False, ["--- rank 1", "boom", "said before", "--- rank 0", "barrier"]),
        (dies_on_rank_1, False, ["--- rank 1", "exit code 3", "last words", "--- rank 0"]),
        (crashes_on_rank_1, True, ["--- rank 1", "exit code -6", "Fatal Python error"]),
        (fails_on_rank_0_and_then_crashes_on_rank_1, False, ["--- rank 0", "boom"]),
        (hangs_on_rank_0, False, ["--- rank 0 of 2: still running", "hangs_on_rank_0"]),
        (skips_on_rank_1, False, ["ranks [1] skipped"]),
    ],
)
def test_a_failure_is_reported_at_once_in_the_order_in_which_ranks_failed(
    pools, body, crashed, texts
):
    start = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        run(pools, body, timeout_s=1.0 if body is hangs_on_rank_0 else 30.0)
    assert time.monotonic() - start < 15  # not the timeout of the barrier that others wait in
    message, at = str(failure.value), 0
    for text in texts:
        at = message.index(text, at)
    assert failure.value.crashed == crashed
    assert run(pools, passes) is None, "the next test has a fresh pool"


def test_a_test_does_not_inherit_state(pools):
    run(pools, leaves_state_behind, num_ranks=NO_GROUP)
    run(pools, has_no_group_and_the_state_that_every_test_has, num_ranks=NO_GROUP)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("value", [1, 2])
def test_fixtures_and_parameters_reach_the_body(value, tmp_path, num_ranks):
    assert num_ranks == dist.get_world_size()
    (tmp_path / f"{dist.get_rank()}-{value}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == num_ranks


def crashes_on_rank_1_the_first_time(marks, tmp_path):
    mark = marks / f"{dist.get_rank()}"
    first = not mark.exists()
    mark.touch()
    assert not list(tmp_path.iterdir())
    dist.barrier()
    (tmp_path / f"{dist.get_rank()}").touch()
    if first:
        crashes_on_rank_1()


def test_a_body_runs_again_after_a_crash_but_only_one(tmp_path):
    keeper = PoolKeeper()
    warned = pytest.warns(UserWarning, match="run once more after a crash")
    refused = pytest.raises(RankFailure, match="exit code -6")
    try:
        for name, outcome in (("first", warned), ("second", refused)):
            arguments = {"marks": tmp_path / f"{name}-marks", "tmp_path": tmp_path / name}
            for path in arguments.values():
                path.mkdir()
            with outcome:
                keeper.run(Task(__name__, "crashes_on_rank_1_the_first_time", arguments), 2)
    finally:
        keeper.close()
