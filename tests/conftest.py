"""Runs test bodies on worker pools; see [Note: worker pool] in tests/pool.py.

    @pytest.mark.ranks(2, 4)
    def test_something(tmp_path): ...       # on every rank of a pool of 2, then of 4

A test parametrized over `num_ranks` itself, as `tests.worlds.worlds` does, needs no mark. The
body's fixtures are made here and pickled to the workers. All other tests run in this process.

`--sample K` runs at most K cases of each test function, the same ones in every run.
"""

from __future__ import annotations

import zlib

import pytest

from tests.pool import NO_GROUP, TIMEOUT_S, PoolKeeper, RankFailure, Task

POOLS = pytest.StashKey[PoolKeeper]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", type=int, metavar="K", help="run at most K cases of each test function"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "ranks(*num_ranks): run the body on every rank of gloo pools of these sizes;"
        " 0 is one process without a process group",
    )
    config.addinivalue_line("markers", "gpu: needs an accelerator; skipped without one")
    config.addinivalue_line("markers", "timeout_s(seconds): limit for a body on the workers")
    config.stash[POOLS] = PoolKeeper()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[POOLS].close()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = list(metafunc.definition.iter_markers("parametrize"))
    names = [name.strip() for mark in marks for name in _argument_names(mark.args[0])]
    mark = metafunc.definition.get_closest_marker("ranks")
    if (mark is not None or "num_ranks" in names) and "num_ranks" not in metafunc.fixturenames:
        # A body need not take `num_ranks`: dist.get_world_size() tells it.
        metafunc.fixturenames.append("num_ranks")
    if mark is not None:
        metafunc.parametrize("num_ranks", mark.args, ids=_pool_id)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One pool at a time: first what runs in this process, then by number of ranks."""
    limit = config.getoption("sample")
    if limit is not None:
        kept = _sample(items, limit)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    items.sort(key=lambda item: -1 if (ranks := _num_ranks(item)) is None else ranks)


def _sample(items: list[pytest.Item], limit: int) -> list[pytest.Item]:
    """At most `limit` cases of each function, evenly spaced from a case that its name determines.

    So functions with the same parameters run in different worlds, and every run picks the same. A
    function that runs over tables of several engines counts once for each.
    """
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        world = item.callspec.params.get("world") if hasattr(item, "callspec") else None
        table = type(world.engine).__module__ if world else ""
        functions.setdefault(item.nodeid.split("[")[0] + table, []).append(item)
    kept = []
    for name, cases in functions.items():
        first, count = zlib.crc32(name.encode()), min(limit, len(cases))
        kept += [cases[(first + i * len(cases) // count) % len(cases)] for i in range(count)]
    return kept


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    num_ranks = _num_ranks(pyfuncitem)
    if num_ranks is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    limit = pyfuncitem.get_closest_marker("timeout_s")
    task = Task(pyfuncitem.module.__name__, pyfuncitem.originalname, arguments)
    pools, failure = pyfuncitem.config.stash[POOLS], None
    try:
        reason = pools.run(task, num_ranks, limit.args[0] if limit else TIMEOUT_S)
    except RankFailure as error:
        failure = str(error)
    if failure is not None:  # out here, or pytest would show the chain of both
        pytest.fail(failure, pytrace=False)
    if reason is not None:
        pytest.skip(reason)
    return True


def _argument_names(names: str | list[str] | tuple[str, ...]) -> list[str]:
    return names.split(",") if isinstance(names, str) else list(names)


def _pool_id(num_ranks: int) -> str:
    return "alone" if num_ranks == NO_GROUP else f"{num_ranks}ranks"


def _num_ranks(item: pytest.Item) -> int | None:
    return item.callspec.params.get("num_ranks") if hasattr(item, "callspec") else None
