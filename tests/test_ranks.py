"""Groups of some of the ranks are found or made, whatever groups there were before."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
import torch.distributed as dist

from dist_ema.ranks import Ranks


def sums(ranks: Ranks, groups: dict[tuple[int, ...], dist.ProcessGroup]) -> dict[object, int]:
    """The sum of the members' ranks, as each group finds it."""
    found = {}
    for members in sorted(groups):
        tensor = torch.tensor(ranks.rank)
        dist.all_reduce(tensor, group=groups[members])
        found[members] = int(tensor)
    return found


@pytest.mark.ranks(3, 4)
def test_ranks_that_are_in_several_groups_do_not_wait_for_each_other():
    ranks = Ranks()
    every = [
        members
        for size in range(2, ranks.size + 1)
        for members in itertools.combinations(range(ranks.size), size)
    ]
    for wanted in (every, every[1::2], every[::-1]):
        mine = [members for members in wanted if ranks.rank in members]
        assert sums(ranks, ranks.subgroups(mine, ())) == {members: sum(members) for members in mine}


@pytest.mark.ranks(4)
def test_ranks_that_are_in_different_numbers_of_groups_meet():
    ranks = Ranks()
    known = [dist.new_group([0]), dist.new_group([0, 1]), dist.new_group([0, 1, 2])]
    pairs = [(0, 3), (1, 2), (0, 2), (1, 3), (0, 1)]
    mine = [pair for pair in pairs if ranks.rank in pair]
    known = [group for group in known if isinstance(group, dist.ProcessGroup)]
    for here in (known, known if ranks.rank else []):  # one rank does not know of (0, 1)
        assert sums(ranks, ranks.subgroups(mine, here)) == {pair: sum(pair) for pair in mine}


@pytest.mark.ranks(4)
def test_members_of_a_group_need_no_one_else():
    group = dist.new_group([1, 2, 3])
    if dist.get_rank() == 0:
        return
    ranks = Ranks(group)
    mine = [pair for pair in ((0, 1), (1, 2)) if ranks.rank in pair]
    assert sums(ranks, ranks.subgroups(mine, ())) == {pair: sum(pair) for pair in mine}


@pytest.mark.ranks(4)
def test_groups_are_made_once_and_again_where_others_were_destroyed():
    other = dist.new_group([0, 1, 2, 3])
    ranks = Ranks()
    first = [(0, 1)] if ranks.rank < 2 else []
    made = ranks.subgroups(first, ())
    dist.destroy_process_group(other)
    assert ranks.subgroups(first, ()) == made
    second = [(0, 1, 2)] if ranks.rank < 3 else []
    assert sums(ranks, ranks.subgroups(second, ())) == dict.fromkeys(second, 3)
    for group in made.values():
        dist.destroy_process_group(group)
    assert sums(ranks, ranks.subgroups(first, ())) == dict.fromkeys(first, 1)


@pytest.mark.ranks(3)
def test_a_group_that_is_made_again_has_a_name_of_its_own():
    """Else a rank that is late finds the others gone to where its first group met."""
    from torch.distributed.distributed_c10d import _world

    ranks, names = Ranks(), set()
    mine = [pair for pair in ((0, 1), (1, 2)) if ranks.rank in pair]
    for turn in range(4):
        if ranks.rank == turn % 3:
            time.sleep(0.2)
        made = ranks.subgroups(mine, ())
        assert sums(ranks, made) == {pair: sum(pair) for pair in mine}
        names |= {_world.pg_names[group] for group in made.values()}
        dist.barrier()
        for group in made.values():
            dist.destroy_process_group(group)
    assert len(names) == 4 * len(mine)


@pytest.mark.ranks(2)
def test_the_first_of_two_known_groups_is_taken():
    a, b = dist.new_group([0, 1]), dist.new_group([1, 0])
    pair = Ranks(dist.new_group([1, 0], sort_ranks=False))
    known = [a, b] if dist.get_rank() else [a]
    (group,) = pair.subgroups([(1, 0)], known).values()
    assert group is a


@pytest.mark.ranks(4)
def test_a_group_has_its_ranks_in_the_order_of_the_group_that_it_is_part_of():
    group = dist.new_group([3, 1, 0], sort_ranks=False)
    if dist.get_rank() == 2:
        return
    ranks = Ranks(group)
    mine = [pair for pair in ((0, 1), (1, 2)) if ranks.rank in pair]
    for pair, made in ranks.subgroups(mine, ()).items():
        assert pair.index(ranks.rank) == dist.get_rank(made)


@pytest.mark.ranks(2)
def test_no_group_is_made_where_all_are_known():
    from torch.distributed.distributed_c10d import _world

    before = len(_world.pg_names)
    ranks = Ranks()
    assert ranks.subgroups([(0, 1)], ()) == {(0, 1): ranks.group}
    assert ranks.subgroups([], ()) == {}
    assert len(_world.pg_names) == before
