"""The ranks that together hold a model, and collectives that fail on all of them or on none."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from dist_ema.core.errors import CheckpointError

_LOG = logging.getLogger(__name__)

# Its name since torch 2.13, where the older one warns.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)

_TAG = 0xE3A  # of messages: gloo does not take them for those of a training that is under way
_BROADCAST_BYTES = 32 << 20  # at a time
_ADVICE = (
    "every rank must make this call: move it out of `if rank == 0:` or "
    "`if accelerator.is_main_process:`"
)
_ERRORS = {
    error.__name__: error
    for error in (
        *(ValueError, TypeError, RuntimeError, ImportError, MemoryError, OSError, CheckpointError),
        *(FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError),
    )
}


class Group:
    """A process group, or the one process there is. Ranks are counted within the group."""

    warn_after_s = 30.0  # of waiting for other ranks at the start of a public call
    process_group: dist.ProcessGroup | None = None
    rank, size = 0, 1
    device = torch.device("cpu")  # of the tensors that the group can send

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ValueError("process_group was given but torch.distributed is not initialized")
            if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
                warnings.warn(
                    f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and torch.distributed is not "
                    "initialized: this process averages alone, and would overwrite the "
                    "checkpoints of the others; call init_process_group() first",
                    stacklevel=4,
                )
            return
        group = group if group is not None else dist.group.WORLD
        assert group is not None
        self.process_group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group: this rank is not a member; call from its members only")
        self.device = device_for(group, self.device)

    @classmethod
    def alone(cls) -> Group:
        """This process by itself: the same calls, and no communication."""
        return cls.__new__(cls)

    def outdated(self) -> bool:
        """Whether this process was taken for the only one and is now one of several. Local."""
        if self.process_group is not None or not dist.is_available():
            return False
        return dist.is_initialized() and dist.get_world_size() > 1

    def _global_rank(self, rank: int) -> int:
        assert self.process_group is not None
        return dist.get_global_rank(self.process_group, rank)

    def point_to_point(
        self, operation: Callable[..., object], tensor: torch.Tensor, rank: int
    ) -> dist.P2POp:
        """`isend` to or `irecv` from a rank of this group, for `batch_isend_irecv`."""
        assert self.process_group is not None
        return message(operation, tensor, self.process_group, rank)

    @contextmanager
    def together(
        self,
        call: str = "",
        values: Mapping[str, str] | None = None,
        *,
        error: type[Exception] | None = None,
    ) -> Iterator[None]:
        """Run a local block, then compare: if it raises on any rank, raise on every rank.

        Collective: every rank calls it. Where all is well it costs an all-reduce of three integers,
        and a few small requests to the store if there is a `call`.

        Args:
            call: the public call that begins with this block. Ranks in different calls raise, and
                a rank that waits names the ranks that have not arrived.
            values: texts that must be equal on all ranks, by label; read when the block ends.
            error: the type to raise in place of any other.

        Raises:
            RuntimeError: ranks are in different calls, or differ in a label that is no argument.
            ValueError: ranks differ in the value of an argument.
            Exception: what the block raised; if several ranks fail, with the texts of all. The same
                on every rank.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as raised:
            problem = raised
        if self.size == 1:
            if problem is not None:
                if error is None or isinstance(problem, error):
                    raise problem
                raise error(describe(problem)) from problem
            return
        if is_destroyed(self.process_group):
            raise RuntimeError(
                "the process group that this average was built with has been destroyed; build "
                "ShardedEMA again after init_process_group(), and load() the average's checkpoint"
            )
        labels = {"the call": call} | dict(values or {})
        bits = digest(sorted(labels.items()))[0] >> 1  # the order of labels may differ
        self._meet(call)
        failed, highest, lowest = self.maxima([int(problem is not None), bits, -bits])
        if not failed and highest == -lowest:
            return
        own = None if problem is None else (type(problem).__name__, describe(problem))
        reports = self.all_gather((own, labels))
        failures = [failure for failure, _ in reports]
        if any(failures):
            text = merge_errors([failure and failure[1] for failure in failures])
            kind = next(failure[0] for failure in failures if failure)
            raise (error or _ERRORS.get(kind, RuntimeError))(text) from problem
        _raise_difference(call, [labels for _, labels in reports], error)

    def _meet(self, call: str) -> None:
        """Wait until every rank is in a public call, before any collective begins. Collective.

        Ranks meet in the store of the default process group: a collective of ours that one rank
        alone begins would be matched with one of the training of the others, and gloo would abort
        them. A few small requests to the store; without a store, returns at once.

        Raises:
            RuntimeError: some ranks have not arrived after 0.9 of the process group's timeout.
        """
        store = _default_store()
        if not call or store is None:
            return
        # By its ranks, since the members of a group may know it by different names.
        prefix = f"dist_ema/{digest(dist.get_process_group_ranks(self.process_group))[0]}"
        key = f"{prefix}/arrivals"
        try:
            number = int(store.add(key, 1))
        except Exception:  # the process that hosts the store has ended
            return
        complete = -(-number // self.size) * self.size  # when all ranks have arrived

        def is_complete() -> bool:
            try:
                return int(store.get(key)) >= complete
            except Exception:  # the store is gone: there is nothing to wait for
                return True

        def absent() -> str:
            with suppress(Exception):
                ranks = {r: f"{prefix}/{r}" for r in range(self.size)}
                missing = [
                    str(r)
                    for r, own in ranks.items()
                    if not (store.check([own]) and int(store.get(own)) >= complete)
                ]
                return f"ranks that have not arrived: {', '.join(missing) or 'those that gave up'}"
            return "not all ranks have arrived"

        started, limit_s, has_warned = time.monotonic(), self._timeout_s(), False
        try:
            with suppress(Exception):
                store.set(f"{prefix}/{self.rank}", str(complete))
            while number < complete and not is_complete():
                waited_s = time.monotonic() - started
                time.sleep(min(max(waited_s / 10, 2e-4), 0.1))
                if waited_s > limit_s:
                    raise RuntimeError(f"{call}: {absent()}; {_ADVICE}")
                if waited_s > self.warn_after_s and not has_warned:
                    has_warned = True
                    text = "%s: rank %d has waited for %.0f s, and fails after %.0f s; %s; %s"
                    _LOG.warning(text, call, self.rank, waited_s, limit_s, absent(), _ADVICE)
        except BaseException as error:
            with suppress(Exception):
                if store.add(key, -1) == complete - 1:  # the last rank arrived just now
                    store.add(key, 1)
                    if isinstance(error, Exception):
                        return
            raise

    def _timeout_s(self) -> float:
        """How long to wait for ranks: less than those that wait in a collective of this group.

        Private names, read in torch 2.8 to 2.15.
        """
        group, timeout = self.process_group, dist.default_pg_timeout
        with suppress(Exception):
            timeout = group._get_backend(self.device).options._timeout  # type: ignore[union-attr]
        return float(0.9 * timeout.total_seconds())

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """The elementwise maximum over all ranks. Collective: every rank calls it."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.process_group)
        largest: list[int] = tensor.tolist()
        return largest

    def connect(self) -> None:
        """Prepare the group's backend for the accelerator, if it has one, for point to point.

        Collective: every rank calls it. The first call on a device makes NCCL connect all ranks, so
        a first call among some ranks would wait for the others. With `cpu:gloo,cuda:nccl`, NCCL has
        had no call yet, since `Group` has used tensors on the CPU until now.
        """
        assert self.process_group is not None
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or not torch.accelerator.is_available():
            return
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
        if device_for(self.process_group, device, point_to_point=True) == device != self.device:
            dist.all_reduce(torch.zeros(1, device=device), group=self.process_group)

    def groups_by_members(
        self, known: Sequence[dist.ProcessGroup]
    ) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """This group and the known groups by their ranks, counted within this group. Local."""
        if self.process_group is None:
            return {}
        ranks = dist.get_process_group_ranks(self.process_group)
        rank_of = dict(zip(ranks, range(self.size), strict=True))
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for group in (self.process_group, *known):
            members = tuple(map(rank_of.get, dist.get_process_group_ranks(group)))
            if None not in members:
                groups.setdefault(members, group)  # type: ignore[arg-type]
        return groups

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective: every rank calls it."""
        return bool(self.maxima([int(flag)])[0])

    def equal(self, value: object) -> bool:
        """Whether all ranks pass the same value, by its `repr`. Collective.

        One all-reduce of two integers.
        """
        bits = digest(value)[0] >> 1
        highest, lowest = self.maxima([bits, -bits])
        return highest == -lowest

    def all_gather(self, obj: Any) -> list[Any]:
        """One small object of each rank, on every rank. Collective: every rank calls it."""
        if self.size == 1:
            return [obj]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, obj, group=self.process_group)
        return out

    def gather(self, obj: Any) -> list[Any]:
        """One object of each rank, on rank 0; [] elsewhere. Collective: every rank calls it."""
        if self.size == 1:
            return [obj]
        out: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(obj, out, dst=self._global_rank(0), group=self.process_group)
        return out or []

    def broadcast(self, obj: Any) -> Any:
        """The object of rank 0, on every rank. Collective: every rank calls it."""
        if self.size == 1:
            return obj
        out = [obj]
        dist.broadcast_object_list(out, src=self._global_rank(0), group=self.process_group)
        return out[0]

    def broadcast_tensor(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with rank 0's. Collective: every rank calls it."""
        if self.size == 1 or tensor.numel() == 0:
            return
        for part in tensor.view(-1).view(torch.uint8).split(_BROADCAST_BYTES):
            staged = part.to(self.device)
            dist.broadcast(staged, src=self._global_rank(0), group=self.process_group)
            if staged is not part:
                part.copy_(staged)

    def all_gather_integers(self, own: np.ndarray) -> list[np.ndarray]:
        """A 1-D int64 array of each rank, of any length, on every rank. Collective."""
        if self.size == 1:
            return [own]
        longest = self.maxima([len(own)])[0]
        row = torch.zeros(1 + longest, dtype=torch.int64, device="cpu")
        row[0], row[1 : 1 + len(own)] = len(own), torch.from_numpy(own)
        rows = torch.empty(self.size * len(row), dtype=torch.int64, device=self.device)
        all_gather_single(rows, row.to(self.device), group=self.process_group)
        return [r[1 : 1 + r[0]] for r in rows.view(self.size, -1).cpu().numpy()]


def _raise_difference(
    call: str, reports: Sequence[Mapping[str, str]], error: type[Exception] | None
) -> NoReturn:
    """Name the first label in which ranks differ."""
    for label in dict.fromkeys(label for labels in reports for label in labels):
        values = [labels.get(label, "absent") for labels in reports]
        rank = next((r for r, value in enumerate(values) if value != values[0]), None)
        if rank is not None:
            kind = ValueError if label.startswith("argument ") else RuntimeError
            raise (error or kind)(
                f"{call}: {label} is {values[0]} on rank 0 and {values[rank]} on rank {rank}; "
                "every rank must make the same calls with the same arguments, update() included"
            )
    raise AssertionError("digests differ and values do not")


def describe(problem: Exception) -> str:
    """The text of an error to raise on all ranks, with the name of its type unless it is known."""
    if isinstance(problem, OSError) and problem.filename:
        return f"{problem.filename}: {problem.strerror}"
    known = type(problem).__name__ in _ERRORS
    return str(problem) if known else f"{type(problem).__name__}: {problem}"


def merge_errors(texts: Sequence[str | None]) -> str:
    """The errors of all ranks in one text, each once. None for ranks without an error."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and None not in texts:
        return next(iter(ranks_of))
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {text}"
        for text, ranks in ranks_of.items()
    )


def _default_store() -> Any:
    """The store of the default process group; None where torch has no such function.

    Private, read in torch 2.8 to 2.15. Used for messages only.
    """
    from torch.distributed import distributed_c10d

    with suppress(Exception):
        return distributed_c10d._get_default_store()
    return None


def digest(*parts: object) -> tuple[int, int]:
    """A 128-bit digest of the `repr` of some values, as two int64."""
    raw = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    first, second = struct.unpack("<2q", raw)
    return first, second


def message(
    operation: Callable[..., object], tensor: torch.Tensor, group: dist.ProcessGroup, rank: int
) -> dist.P2POp:
    """`isend` to or `irecv` from a rank of a process group, for `batch_isend_irecv`."""
    return dist.P2POp(operation, tensor, group=group, tag=_TAG, group_peer=rank)


def is_destroyed(group: dist.ProcessGroup | None) -> bool:
    """Whether a process group has been destroyed; False for None. Local."""
    try:
        return group is not None and not dist.get_backend(group)
    except ValueError:
        return True


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """The name of a process group's backend for each type of device."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def device_for(
    group: dist.ProcessGroup, wanted: torch.device, *, point_to_point: bool = False
) -> torch.device:
    """A device whose tensors the group can send: the wanted one, the CPU, or the accelerator.

    Gloo accepts tensors of an accelerator in collectives, but not in `isend` and `irecv`.
    """
    supported = {
        device
        for device, backend in backends_of(group).items()
        if device == "cpu" or backend != "gloo" or not point_to_point
    }
    if wanted.type in supported:
        return wanted
    if "cpu" in supported:
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type not in supported:
        raise RuntimeError(
            f"the process group needs tensors on {sorted(supported)}; none is available"
        )
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
