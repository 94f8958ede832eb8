"""The ranks that together hold a model: who they are, and how they fail together."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist

_BROADCAST_BYTES = 32 << 20  # at a time
_GLOO_GATHER_BYTES = 2 << 20  # of all ranks, at a time
_GATHER_BYTES = 8 << 20
_GATHER_BYTES_OF_A_RANK = 1 << 18
_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        ValueError,
        TypeError,
        RuntimeError,
        MemoryError,
        OSError,
        FileExistsError,
        FileNotFoundError,
        NotADirectoryError,
        PermissionError,
    )
}


class Ranks:
    """A process group, or the one process there is. Ranks are counted within the group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")  # of the tensors that the group can send
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ValueError("process_group was given but torch.distributed is not initialized")
            if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
                warnings.warn(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and torch.distributed is not "
                    "initialized: this process averages for itself, and would save over what the "
                    "others save; call init_process_group() first",
                    stacklevel=4,
                )
            return
        group = group if group is not None else dist.group.WORLD
        assert group is not None
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group: this rank is not a member; call from its members only")
        self.device = device_for(group, self.device)

    @classmethod
    def alone(cls) -> Ranks:
        """This process by itself: the same calls, and no communication."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.size = None, 0, 1
        ranks.device = torch.device("cpu")
        return ranks

    def outdated(self) -> bool:
        """Whether processes were joined since this process was taken for the only one. Local."""
        joined = dist.is_available() and dist.is_initialized()
        return self.group is None and joined and dist.get_world_size() > 1

    def global_rank(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    def agree(self, problem: Exception | None = None) -> None:
        """Raise on every rank if any rank has a problem. Collective: every rank calls it.

        Costs an all-reduce of one number where all is well.
        """
        if self.size == 1 and problem is not None:
            raise problem
        if not self.any(problem is not None):
            return
        told = self.all_gather((type(problem).__name__, str(problem)) if problem else None)
        if problem is not None:
            raise problem
        rank, (kind, text) = next((r, t) for r, t in enumerate(told) if t is not None)
        raise _ERRORS.get(kind, RuntimeError)(f"rank {rank}: {text}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a local block; if it raises on any rank, raise on every rank. Collective."""
        try:
            yield
        except Exception as error:
            self.agree(error)
            raise AssertionError("unreachable") from error
        self.agree()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective: every rank calls it."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def equal(self, value: object) -> bool:
        """Whether all call with one value, by its `repr`. Collective: every rank calls it.

        An all-reduce of two numbers, however many ranks there are and however long the value is.
        """
        if self.size == 1:
            return True
        bits = digest(value)[0] >> 1
        both = torch.tensor([bits, -bits], device=self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        highest, lowest = both.tolist()
        return bool(highest == -lowest)

    def refuse_different(self, what: str, value: object) -> None:
        """Raise on every rank unless all call with one value. Collective: every rank calls it.

        Costs an all-reduce of two numbers where all is well.
        """
        if not self.equal(value):
            told = self.all_gather(repr(value))
            other = next(rank for rank, theirs in enumerate(told) if theirs != told[0])
            raise ValueError(
                f"{what} with {told[0]} on rank 0 and {told[other]} on rank {other}; every rank "
                "calls it with the same arguments"
            )

    def all_gather(self, obj: Any) -> list[Any]:
        """One small object of each rank, on every rank. Collective: every rank calls it."""
        if self.size == 1:
            return [obj]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, obj, group=self.group)
        return out

    def gather(self, obj: Any) -> list[Any]:
        """One object of each rank, on rank 0; [] elsewhere. Collective: every rank calls it."""
        if self.size == 1:
            return [obj]
        out: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(obj, out, dst=self.global_rank(0), group=self.group)
        return out or []

    def scatter(self, objs: Sequence[Any]) -> Any:
        """Rank r gets `objs[r]` of rank 0. Collective: every rank calls it."""
        if self.size == 1:
            return objs[0]
        out: list[Any] = [None]
        given = list(objs) if self.rank == 0 else None
        dist.scatter_object_list(out, given, src=self.global_rank(0), group=self.group)
        return out[0]

    def broadcast(self, obj: Any) -> Any:
        """The object of rank 0, on every rank. Collective: every rank calls it."""
        if self.size == 1:
            return obj
        out = [obj]
        dist.broadcast_object_list(out, src=self.global_rank(0), group=self.group)
        return out[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with rank 0's. Collective: every rank calls it."""
        if self.size == 1 or tensor.numel() == 0:
            return
        for part in tensor.view(-1).view(torch.uint8).split(_BROADCAST_BYTES):
            staged = part.to(self.device)
            dist.broadcast(staged, src=self.global_rank(0), group=self.group)
            if staged is not part:
                part.copy_(staged)

    def exchange(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send `rows[r]` (1-D int64) to rank r, get one from each. Collective: every rank calls."""
        if self.size == 1:
            return [rows[0]]
        counts = torch.tensor([len(row) for row in rows], device=self.device)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sizes = theirs.tolist()
        out = torch.empty(sum(sizes), dtype=torch.int64, device=self.device)
        sent = torch.cat(list(rows)).to(self.device)
        dist.all_to_all_single(out, sent, sizes, [len(row) for row in rows], group=self.group)
        return list(out.cpu().split(sizes))

    def subgroups(
        self, wanted: Sequence[tuple[int, ...]], known: Sequence[dist.ProcessGroup]
    ) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """A group of each of these tuples of ranks: a known one, or a new one.

        Collective: every rank calls it, with those that it is in. Costs an all-reduce of one number
        where all are known; else one all-gather of the missing ones, and their rendezvous.
        """
        if self.group is None:
            return {}  # alone
        from torch.distributed.distributed_c10d import _world  # not there in every build

        me = self.global_rank(self.rank)
        made_before = [group for group in _MADE.values() if group in _world.pg_names]
        found: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for group in (self.group, *made_before, *known):  # all members know of those made here
            found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
        inner = {tuple(self.global_rank(r) for r in ranks): ranks for ranks in wanted}
        missing = [ranks for ranks in inner if ranks not in found]
        if self.any(bool(missing)):
            # [Note: names of groups] Only the members of `self.group` are here, so the new groups
            # must be local; torch names such a group by its ranks and by how many groups this
            # process is in (read in 2.13), and ranks that disagree on the name wait for ever. So do
            # those that meet under a name again, if its group was destroyed: what the first ones
            # left in the store is there still. So all ranks are brought to one number, under which
            # none of the groups was made before, and each then makes a group in every round: that
            # which it is in, or one of itself.
            num_here = len(_world.pg_names)
            told = self.all_gather(
                (num_here, {ranks: _USED.get(ranks, set()) for ranks in missing})
            )
            used: dict[tuple[int, ...], set[int]] = {}
            for _, theirs in told:
                for ranks, numbers in theirs.items():
                    used.setdefault(ranks, set()).update(numbers)
            rounds = _rounds(sorted(used))
            start = max(number for number, _ in told)
            while any(
                start + i in used[ranks] for i, each in enumerate(rounds) for ranks in each.values()
            ):
                start += 1
            alone = [_new_group((me,), "gloo") for _ in range(start - num_here)]
            for number, members in enumerate(rounds, start):
                mine = members.get(me, (me,))
                made = _new_group(mine)
                if me in members:
                    found[mine] = _MADE[mine] = made
                    _USED.setdefault(mine, set()).add(number)
                else:
                    alone.append(made)
            for group in alone:
                dist.destroy_process_group(group)
        return {ranks: found[outer] for outer, ranks in inner.items()}


# What was made here, by global ranks: two averages of one layout have the same groups. Weak: a
# group that outlives `destroy_process_group()` keeps its threads.
_MADE: WeakValueDictionary[tuple[int, ...], dist.ProcessGroup] = WeakValueDictionary()
_USED: dict[tuple[int, ...], set[int]] = {}  # the numbers of [Note: names of groups]


def _rounds(groups: Sequence[tuple[int, ...]]) -> list[dict[int, tuple[int, ...]]]:
    """Deal the groups out into rounds in which no rank has two; each round is {rank: its group}."""
    rounds: list[dict[int, tuple[int, ...]]] = []
    for group in groups:
        free = next((r for r in rounds if r.keys().isdisjoint(group)), None)
        if free is None:
            rounds.append(free := {})
        free.update(dict.fromkeys(group, group))
    return rounds


def _new_group(ranks: tuple[int, ...], backend: str | None = None) -> dist.ProcessGroup:
    group = dist.new_group(
        list(ranks), backend=backend, use_local_synchronization=True, sort_ranks=False
    )
    assert isinstance(group, dist.ProcessGroup)
    return group


def digest(*parts: object) -> tuple[int, int]:
    """128 bits that tell equal descriptions from different ones, as two int64."""
    raw = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return (
        int.from_bytes(raw[:8], "little", signed=True),
        int.from_bytes(raw[8:], "little", signed=True),
    )


def gather_chunk(device: torch.device, num_ranks: int, itemsize: int) -> int:
    """How many elements of each rank an all-gather of a large tensor should take at a time.

    Gloo copies it, and its threads let go of some copies late: with 8 MB a swap held up to 95 MB on
    a CPU, for a fifth of the time less. NCCL wants more, and not too little from each rank.
    """
    if device.type == "cpu":
        nbytes = _GLOO_GATHER_BYTES // num_ranks
    else:
        nbytes = max(_GATHER_BYTES // num_ranks, _GATHER_BYTES_OF_A_RANK)
    return max(1, nbytes // itemsize)


def device_for(group: dist.ProcessGroup, wanted: torch.device) -> torch.device:
    """A device whose tensors the group can send: the wanted one, the CPU, or this rank's own."""
    able = {pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")}
    if wanted.type in able:
        return wanted
    if "cpu" in able:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type not in able:
        raise RuntimeError(f"process group sends tensors of {sorted(able)}, none of which is here")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
