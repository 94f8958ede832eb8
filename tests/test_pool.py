"""The worker pool itself: what it reports, and that a failure costs only the test that failed."""

from __future__ import annotations

import ctypes
import os
import signal
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


def passes(amount=1.0):
    total = torch.full((), amount)
    dist.all_reduce(total)
    assert total.item() == amount * dist.get_world_size()


def fails_on_rank_1():
    print("said before the failure")
    if dist.get_rank() == 1:
        raise ValueError("boom")
    dist.barrier()


def fails_on_both_ranks_rank_1_first():
    time.sleep(0.3 * (1 - dist.get_rank()))
    raise ValueError(f"boom {dist.get_rank()}")


def dies_on_rank_1():
    print("last words", file=sys.stderr)
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def crashes_in_a_thread_of_c_on_rank_1():
    if dist.get_rank() == 1:
        libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
        libc.pthread_create(ctypes.byref(thread), None, libc.abort, None)
    dist.barrier()
    time.sleep(30)


def fails_on_rank_0_and_then_crashes_on_rank_1():
    if dist.get_rank() == 0:
        raise ValueError("boom")
    time.sleep(0.3)
    crashes_in_a_thread_of_c_on_rank_1()


def fails_after_words_of_a_crash():
    print("Fatal Python error: in a program that the body started", flush=True)
    raise ValueError("boom")


def crashes_in_python_on_rank_1():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def hangs_on_rank_0():
    if dist.get_rank() == 0:
        time.sleep(60)


def skips():
    pytest.skip("not today")


def skips_on_rank_1():
    if dist.get_rank() == 1:
        pytest.skip("not today")


def says_pid(path):
    (path / f"{os.getpid()}").touch()


def has_no_group():
    assert not dist.is_initialized()
    assert torch.get_num_threads() == 1
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def leaves_state_behind():
    torch.manual_seed(5)
    torch.set_grad_enabled(False)


def sees_the_state_that_every_test_sees():
    assert torch.is_grad_enabled()
    assert torch.initial_seed() == 0


def test_arguments_reach_every_rank(pools):
    assert run(pools, passes, amount=2.5) is None


def test_a_pool_is_used_again(pools, tmp_path):
    run(pools, says_pid, path=tmp_path)
    run(pools, says_pid, path=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failing_rank_is_reported_at_once_with_what_it_printed(pools):
    start = time.monotonic()
    with pytest.raises(RankFailure, match="boom") as failure:
        run(pools, fails_on_rank_1)
    text = str(failure.value)
    assert time.monotonic() - start < 15  # not the timeout of the barrier that rank 0 waits in
    assert text.index("--- rank 1") < text.index("--- rank 0")
    assert "said before the failure" in text
    assert "barrier" in text, "the stack of the rank that was left waiting"


def test_the_first_rank_to_fail_is_printed_first(pools):
    with pytest.raises(RankFailure) as failure:
        run(pools, fails_on_both_ranks_rank_1_first)
    assert str(failure.value).index("boom 1") < str(failure.value).index("boom 0")


@pytest.mark.parametrize(
    ("body", "outside_python"),
    [
        (crashes_in_a_thread_of_c_on_rank_1, True),
        (crashes_in_python_on_rank_1, False),
        (fails_on_rank_0_and_then_crashes_on_rank_1, False),
        (fails_after_words_of_a_crash, False),
        (dies_on_rank_1, False),
        (fails_on_rank_1, False),
    ],
)
def test_a_crash_outside_of_python_is_told_from_others(pools, body, outside_python):
    with pytest.raises(RankFailure) as failure:
        run(pools, body)
    assert failure.value.outside_python == outside_python, str(failure.value)


def test_a_dead_worker_is_seen_at_once(pools):
    start = time.monotonic()
    with pytest.raises(RankFailure, match="exit code 3") as failure:
        run(pools, dies_on_rank_1)
    assert time.monotonic() - start < 15
    assert "last words" in str(failure.value)


def test_the_test_after_a_failure_gets_a_fresh_pool(pools):
    with pytest.raises(RankFailure):
        run(pools, fails_on_rank_1)
    assert run(pools, passes) is None


def test_a_hanging_rank_is_killed_at_its_limit(pools):
    start = time.monotonic()
    with pytest.raises(RankFailure, match="still running"):
        run(pools, hangs_on_rank_0, timeout_s=2.0)
    assert time.monotonic() - start < 15


def test_a_skip_on_every_rank_is_a_skip(pools):
    assert run(pools, skips) == "not today"
    assert pools.get(2).usable


def test_a_skip_on_some_ranks_is_a_failure(pools):
    with pytest.raises(RankFailure, match="skipped"):
        run(pools, skips_on_rank_1)


def test_an_argument_that_cannot_be_pickled_leaves_the_next_test_a_pool(pools):
    with pytest.raises((TypeError, AttributeError)):
        run(pools, passes, amount=lambda: None)
    assert run(pools, passes) is None


def test_one_worker_without_a_process_group(pools):
    assert run(pools, has_no_group, num_ranks=NO_GROUP) is None


def test_a_test_does_not_inherit_state(pools):
    run(pools, leaves_state_behind)
    run(pools, sees_the_state_that_every_test_sees)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("value", [1, 2])
def test_fixtures_and_parameters_reach_the_body(value, tmp_path, num_ranks):
    assert num_ranks == dist.get_world_size()
    (tmp_path / f"{dist.get_rank()}-{value}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == num_ranks


@pytest.mark.ranks(2)
def test_a_body_may_skip():
    pytest.skip("shows that a body can skip")


def crashes_on_rank_1_the_first_time(marks, tmp_path):
    mark = marks / f"{dist.get_rank()}"
    first = not mark.exists()
    mark.touch()
    assert not list(tmp_path.iterdir())
    dist.barrier()
    (tmp_path / f"{dist.get_rank()}").touch()
    if first:
        crashes_in_a_thread_of_c_on_rank_1()


def test_a_body_runs_again_after_a_crash_outside_of_python_but_only_one(tmp_path):
    keeper = PoolKeeper()
    try:
        for name in ("first", "second"):
            arguments = {"marks": tmp_path / f"{name}-marks", "tmp_path": tmp_path / name}
            for path in arguments.values():
                path.mkdir()
            task = Task(__name__, "crashes_on_rank_1_the_first_time", arguments)
            if name == "first":
                with pytest.warns(UserWarning, match="run once more after a crash"):
                    keeper.run(task, 2)
            else:
                with pytest.raises(RankFailure, match="exit code -6"):
                    keeper.run(task, 2)
    finally:
        keeper.close()
