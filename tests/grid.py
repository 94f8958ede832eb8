"""The rows of all engines in one table, and marks that run a test on some of them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests import worlds, worlds_deepspeed, worlds_fsdp1
from tests.worlds import World, not_compiled, parametrized

WORLDS = [*worlds.WORLDS, *worlds_fsdp1.WORLDS, *worlds_deepspeed.WORLDS]


def named(table: Iterable[World], *names: str) -> list[World]:
    """Some rows of a table."""
    by_name = {world.name: world for world in table}
    return [by_name[name] for name in names]


def one_size(world: World, num_ranks: int) -> bool:
    """Whether this number of ranks stands for all of a row: 2 where there is a choice."""
    return num_ranks == (2 if 2 in world.ranks else world.ranks[0])


def rows(*names: str) -> pytest.MarkDecorator:
    """Run a body on some rows, each with one number of ranks."""
    return parametrized(named(WORLDS, *names), one_size)


every_row = parametrized(WORLDS)
every_eager_row = parametrized(WORLDS, lambda world, num_ranks: not_compiled(world))

# One row of each way of cutting, of gathering, and of keeping masters.
FSDP1_KINDS = named(
    WORLDS, *"full full_flat full_bf16 full_ignored grad_op_flat_mixed no_shard hybrid".split()
)
ZERO_KINDS = named(WORLDS, "z0_bf16", "z1_bf16", "z2_bf16", "z3", "z3_bf16_cut")
KINDS = [*named(WORLDS, "plain", "ddp", "fsdp2", "hsdp", "fsdp2_tp"), *FSDP1_KINDS, *ZERO_KINDS]
every_kind = parametrized(KINDS, one_size)
