"""`ShardedEMA`: averaged weights for the bytes that each rank owns."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dist_ema import replicas as storage
from dist_ema.engines import select
from dist_ema.engines.plain import PlainEngine
from dist_ema.export import TensorSpec, export
from dist_ema.gather import Entry, Gatherer, on_every_rank, one_by_one
from dist_ema.lerp import MultiAvgFn, squared_norms
from dist_ema.names import slots, unwrap
from dist_ema.plan import Plan, chosen, make_plan, rebind
from dist_ema.ranks import Ranks
from dist_ema.schedule import Schedule, as_schedule, decay_at, to_json
from dist_ema.shadow import Buffers, Shadow, Swap

_NAME = "ema"


class ShardedEMA:
    """An average of a model's weights, kept only for the bytes that this rank owns.

    Build it when the model is as it will be trained: after `fully_shard`, DDP or
    `accelerator.prepare`, with what they return. The average starts as a copy of the live weights;
    each update with decay d makes it `d * average + (1 - d) * live`. Collective: every rank calls
    the constructor; two small exchanges find out which ranks hold equal weights.

    Args:
        model: a plain module (also in one process), DDP, FSDP2, HSDP or tensor-parallel module,
            compiled or not, or what accelerate returned for one of these.
        decay: part of the average that is kept per optimizer step, in [0, 1]; or a schedule
            (t, delta) -> decay; or a mapping of names to either, for several averages that are kept
            in one pass over the live weights.
        multi_avg_fn: in place of a decay, a function in the convention of torch's `AveragedModel`,
            (averaged tensors, live tensors, updates before). The first update copies. It must be
            elementwise: it sees 1-D pieces of weights, in lists of one dtype, several times an
            update.
        update_every: apply every k-th call, with the decay of k steps at once.
        start_step: the first calls that copy the weights. 1 makes the first update copy.
        params: "trainable", "all", or a predicate (fqn, parameter) -> bool. What is not averaged
            costs nothing, and is read live when gathering.
        buffers: "copy" uses live buffers; "average" averages the persistent floating ones too.
        replicas: "split" lets ranks that hold equal weights average a slice each; "whole" keeps
            all that a rank holds.
        dtype: of the average. The live weights' own is no good if it is narrower than fp32: at a
            decay of 0.9999 a bf16 average stops moving.
        process_group: the ranks that together hold the model; the default group if None.

    Raises:
        ValueError: an argument is out of range, or nothing is averaged. On every rank.
        TypeError: `model` is no module. On every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float | Schedule | Mapping[str, float | Schedule] = 0.9999,
        *,
        multi_avg_fn: MultiAvgFn | None = None,
        update_every: int = 1,
        start_step: int = 0,
        params: str | Callable[[str, nn.Parameter], bool] = "trainable",
        buffers: str = "copy",
        replicas: str = "split",
        dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._ranks = Ranks(process_group)
        with self._ranks.together():
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"model is a {type(model).__name__}, wanted the torch.nn.Module that is "
                    "trained (wrapped or not), not its parameters"
                )
            self._schedules = _schedules(decay)
            if multi_avg_fn is not None and (
                not callable(multi_avg_fn) or isinstance(decay, Mapping)
            ):
                raise ValueError("multi_avg_fn must be callable, and keeps one average only")
            self._multi_avg_fn = multi_avg_fn
            _check_options(update_every, start_step, params, buffers, replicas, dtype)
            self._engine = select(model)
            weights = self._engine.weights()
            averaged = chosen(weights, params, buffers)
        self._model = model
        self._params = params
        self._buffers = buffers
        self._update_every, self._start_step = update_every, start_step
        self._step = self._num_updates = 0
        self._decays: list[float] | None = None
        self._agree_on_options(replicas, dtype)
        split = replicas == "split"
        self._plan = make_plan(weights, averaged, self._engine, split, self._ranks)
        shares = any(s.group is not None for s in self._plan.sets)
        # Where no rank shares anything, a swap needs no other rank.
        self._any_shares = any(self._ranks.all_gather(shares))
        self._shadow = Shadow([p.fragment for p in self._plan.pieces], dtype, len(self._schedules))
        self._shadow.copy()
        self._stamp = self._engine.stamp()
        self._frozen = _frozen(self._plan, params)
        self._applied_steps = self._engine.applied_steps()
        self._shown: str | None = None  # name of the average that the model shows just now
        self._replicas_checked = False
        self._gatherer: Gatherer | None = None
        self._warn_of_low_precision(dtype)

    # What the average is at.

    @property
    def names(self) -> list[str]:
        """The averages kept."""
        return list(self._schedules)

    @property
    def step(self) -> int:
        """Optimizer steps seen: calls of `update()` that counted, or the last `step` given."""
        return self._step

    @property
    def num_updates(self) -> int:
        """Times that the average took the live weights in, copies of the first steps included."""
        return self._num_updates

    @property
    def decay(self) -> float | dict[str, float] | None:
        """The decay last applied (0.0 for a copy), of each average if there are several.

        None before the first update, and where `multi_avg_fn` decides.
        """
        if self._decays is None:
            return None
        if list(self._schedules) == [_NAME]:
            return self._decays[0]
        return dict(zip(self._schedules, self._decays, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds for its averages."""
        return self._shadow.nbytes

    @property
    def source(self) -> str:
        """What is averaged: "master" (the engine's fp32 copy) or "weights"."""
        return self._engine.source

    def __repr__(self) -> str:
        rule = self._multi_avg_fn or self._schedules
        return (
            f"ShardedEMA({rule!r}, step={self.step}, num_updates={self.num_updates}, "
            f"{type(self._engine).__name__}, source={self.source!r}, nbytes={self.nbytes})"
        )

    # Averaging.

    @torch.no_grad()
    def update(self, step: int | None = None) -> bool:
        """Fold the live weights into the average; call it after each optimizer step.

        Local: no collective, no host sync, no allocation.

        Args:
            step: the number of this optimizer step, where the caller counts; else calls count.

        Returns:
            Whether the average took the live weights in: False where no optimizer step happened
            (for engines that tell) and on the calls that `update_every` skips.

        Raises:
            RuntimeError: inside `average_parameters()`; the model's parameters were replaced, or a
                frozen one trains now. The average is unchanged.
        """
        self._refuse_while_shown("update()")
        self._follow_storage()
        self._refuse_thawed()
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise ValueError(f"step is {step!r}, wanted the number of an optimizer step, >= 0")
        applied = self._engine.applied_steps()
        if applied is not None:
            if applied == self._applied_steps:
                return False
            self._applied_steps = applied
        now = self._step + 1 if step is None else step
        since = now - self._start_step
        if since > 0 and since % self._update_every:
            self._step = now
            return False
        if self._multi_avg_fn is None:
            decays = [
                decay_at(schedule, since, self._update_every) if since > 0 else 0.0
                for schedule in self._schedules.values()
            ]
            self._shadow.fold(decays)
            self._decays = decays
        elif since <= 0 or self._num_updates == 0:
            self._shadow.copy()
        else:
            self._shadow.apply(self._multi_avg_fn, self._num_updates)
        self._step = now
        self._num_updates += 1
        return True

    @torch.no_grad()
    def reset(self) -> None:
        """Start again: the average is the live weights, `step` and `num_updates` are 0. Local."""
        self._refuse_while_shown("reset()")
        self._follow_storage()
        self._shadow.copy()
        self._step = self._num_updates = 0
        self._decays = None

    @torch.no_grad()
    def drift(self, name: str | None = None) -> float:
        """‖average - live‖ / ‖live‖ over all averaged weights, 0.0 if nothing was averaged yet.

        Collective: every rank calls it. One all-reduce of two numbers.
        """
        with self._ranks.together():
            self._refuse_while_shown("drift()")
            self._check_name(name)
            self._follow_storage()
        sums = torch.zeros(2, dtype=torch.float64)
        for piece, value in zip(self._plan.pieces, self._values(name), strict=True):
            if piece.sends:
                sums += squared_norms(value, piece.fragment.view).cpu()
        if self._ranks.size > 1:
            sums = sums.to(self._ranks.device)
            dist.all_reduce(sums, group=self._ranks.group)
        apart, length = sums.sqrt().tolist()
        if apart == 0:
            return 0.0
        return apart / length if length else math.inf

    # Evaluating.

    @contextmanager
    def average_parameters(self, name: str | None = None) -> Iterator[None]:
        """Within the block the model computes with the averaged weights.

        Afterwards, also on an exception, weights and buffers are what they were, bit for bit. Live
        and averaged values change places in storage, so there is no second copy of either. Inside,
        all that reads or writes the average raises; the block cannot be nested.

        Collective where weights are replicated and the average is split (DDP, HSDP, FSDP2 with
        tensor parallelism): an all-gather of the averaged weights on entry, of the live ones on
        exit, and on the first entry one all-reduce that checks that replicas are equal. Else local.
        """
        agree = self._ranks if self._any_shares else Ranks.alone()
        with torch.no_grad():
            with agree.together():
                self._refuse_while_shown("average_parameters()")
                self._check_name(name)
                self._follow_storage()
            self._check_replicas(agree)
            num_parameters = len(self._plan.parameters)
            values = self._values(name)
            swap = Swap([p.fragment for p in self._plan.parameters], values[:num_parameters])
            buffers = Buffers(self._model, self._plan.buffer_views())
            self._engine.release()
            try:
                with agree.together():
                    swap.enter()
                    for piece, value in zip(
                        self._plan.buffers, values[num_parameters:], strict=True
                    ):
                        piece.fragment.view.copy_(value)
            except BaseException:
                swap.leave()
                buffers.restore()
                raise
        self._shown = name or _NAME
        try:
            with torch.no_grad():
                self._share()
            yield
        finally:
            with torch.no_grad():
                self._engine.release()
                swap.leave()
                buffers.restore()
                self._share()
            self._shown = None

    @torch.no_grad()
    def copy_to(self, module: nn.Module | None = None, *, name: str | None = None) -> None:
        """Make the average permanent in the live weights, or write it into a plain module.

        Without a module, the live weights become the average, masters and low-precision copies
        too, so that training goes on from there. With one, its whole state dict is written on every
        rank: averaged weights, and frozen weights and buffers as they live here.

        Args:
            module: a module of the model's own class that no engine shards, on every rank.

        Raises:
            ValueError: `module` is sharded, or its names or shapes are others (they are listed).
                On every rank; nothing is changed.

        Collective: every rank calls it. Without a module, an all-gather of replicated weights;
        with one, each byte is sent to rank 0 once and broadcast, in bounded buckets.
        """
        if module is not None:
            self._write_into(module, name)
            return
        with self._ranks.together():
            self._refuse_while_shown("copy_to()")
            self._check_name(name)
            self._follow_storage()
        self._engine.release()
        for piece, value in zip(self._plan.pieces, self._values(name), strict=True):
            piece.fragment.view.copy_(value)
        for replica_set in self._plan.sets:
            replica_set.share(storage.source)
        for weight in self._plan.weights:
            if weight.fqn in self._plan.averaged:
                for fragment in weight.fragments:
                    if not fragment.in_place:
                        fragment.shown.copy_(fragment.view)
        self._engine.publish()

    # Gathering.

    def gather_state_dict(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """The whole averaged state dict on rank 0, on the CPU; {} on the other ranks.

        Keys and shapes are those of the unwrapped model's `state_dict()`: tied weights under each
        of their names (one tensor), frozen weights and persistent buffers as they live.

        Args:
            dtype: of floating tensors. None: the average's (fp32), half-precision tensors that are
                not averaged being widened to fp32.

        Collective: every rank calls it. Each byte is sent to rank 0 once, in bounded buckets.
        """
        state: dict[str, torch.Tensor] = {}
        for entry, tensor in self._gathered("gather_state_dict()", name, dtype):
            for fqn in (entry.fqn, *entry.aliases):
                state[fqn] = tensor
        if self._ranks.rank != 0:
            return {}
        order = {slot.fqn: i for i, slot in enumerate(slots(self._model))}
        return dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order))))

    def gather_tensors(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`gather_state_dict()` as an iterator of (fqn, tensor) that holds one tensor at a time.

        Collective: every rank calls it and exhausts the iterator, which is empty off rank 0.
        """
        gathered = self._gathered("gather_tensors()", name, dtype)
        return ((fqn, tensor) for entry, tensor in gathered for fqn in (entry.fqn, *entry.aliases))

    def export(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        weights_name: str | None = None,
    ) -> None:
        """Write the average as a consolidated safetensors checkpoint, for `from_pretrained`.

        The directory holds what the model's library expects: `model.safetensors` and
        `config.json` (transformers), `diffusion_pytorch_model.safetensors` and `config.json`
        (diffusers), or `model.safetensors` alone, which `safetensors.torch.load_model` reads; with
        several files, their index. It is written aside and renamed: whoever reads `path` sees the
        old export or the new one, whole.

        Args:
            path: directory, on rank 0's file system; made, or replaced, as a whole. Files in it
                that are not of an export (a tokenizer, say) are kept.
            dtype: of floating tensors, and of `config.json`; None as in `gather_state_dict`.
            max_shard_size: of a file, in bytes or as "5GB"; a larger tensor gets its own file.
            weights_name: name of the weights file; None for the library's own.

        Raises:
            ValueError: the average holds NaN or Inf (the tensors are named), an argument is out of
                range. On every rank; an earlier export is left as it was.

        Collective: every rank calls it. Tensors are streamed through rank 0, one at a time.
        """
        gathered = self._gathered("export()", name, dtype)
        with self._ranks.together():
            try:
                if self._ranks.rank == 0:
                    export(
                        Path(path),
                        unwrap(self._model),
                        [
                            TensorSpec(e.fqn, e.aliases, e.shape, e.dtype_as(dtype), e.averaged)
                            for e in self._entries()
                        ],
                        (tensor for _, tensor in gathered),
                        max_shard_size=max_shard_size,
                        weights_name=weights_name,
                    )
                for _ in gathered:
                    pass
            finally:
                gathered.close()  # lets the others go on sending if writing failed

    # Inside.

    def _gathered(
        self, what: str, name: str | None, dtype: torch.dtype | None
    ) -> Generator[tuple[Entry, torch.Tensor], None, None]:
        return one_by_one(self._buckets_of(what, name, dtype))

    def _buckets_of(
        self, what: str, name: str | None, dtype: torch.dtype | None
    ) -> Generator[list[tuple[Entry, torch.Tensor]], None, None]:
        with self._ranks.together():
            self._refuse_while_shown(what)
            self._check_name(name)
            if dtype is not None and not (
                isinstance(dtype, torch.dtype) and dtype.is_floating_point
            ):
                raise ValueError(f"dtype is {dtype!r}, wanted a floating torch.dtype or None")
            self._follow_storage()
        # A rank that holds nothing does not notice that storage moved: all do it if one must.
        gatherer = self._gatherer
        if self._ranks.any(gatherer is None) or gatherer is None:
            gatherer = Gatherer(self._plan, self._values(name), self._ranks)
            self._gatherer = gatherer
        rest = [piece.fragment.view for piece in self._plan.rest]
        return gatherer.buckets([*self._values(name), *rest], dtype)

    def _write_into(self, module: nn.Module, name: str | None) -> None:
        buckets = self._buckets_of("copy_to()", name, None)
        entries: list[Entry] = self._ranks.broadcast(self._entries())
        with self._ranks.together():
            if not isinstance(module, nn.Module) or not isinstance(select(module), PlainEngine):
                raise ValueError(
                    f"module is a {type(module).__name__}, wanted a plain torch.nn.Module whose "
                    "weights every rank holds whole; copy_to() without it writes the live weights"
                )
            targets = {slot.fqn: slot.tensor for slot in slots(module) if slot.persistent}
            shapes = {fqn: e.shape for e in entries for fqn in (e.fqn, *e.aliases)}
            wrong = [
                f"{fqn}: average has {shapes.get(fqn, 'nothing')}, module has "
                f"{tuple(targets[fqn].shape) if fqn in targets else 'nothing'}"
                for fqn in dict.fromkeys([*shapes, *targets])
                if fqn not in targets or shapes.get(fqn) != tuple(targets[fqn].shape)
            ]
            if wrong:
                raise ValueError(f"module has another layout: {'; '.join(wrong)}")
        for entry, tensor in on_every_rank(buckets, self._ranks):
            for fqn in (entry.fqn, *entry.aliases):
                targets[fqn].copy_(tensor)

    def _share(self) -> None:
        """Let replicas have each other's slices, and the forward pass what stands in storage."""
        for replica_set in self._plan.sets:
            replica_set.share()
        self._engine.publish()

    def _follow_storage(self) -> None:
        """Make the plan again if the model's storage moved. Local.

        Raises:
            RuntimeError: the model is cut in another way than when the average was built.
        """
        if self._engine.stamp() == self._stamp:
            return
        engine = select(self._model)
        plan = None
        if type(engine) is type(self._engine):
            plan = rebind(self._plan, engine.weights(), self._ranks)
        if plan is None:
            raise RuntimeError(
                "the model's parameters were replaced since this average was built (it was cut by "
                f"{type(self._engine).__name__}, is by {type(engine).__name__} now, or its weights "
                "have other names, shapes or shards); build ShardedEMA after fully_shard(), DDP or "
                "accelerator.prepare(), with the model that they return"
            )
        self._engine, self._plan, self._stamp = engine, plan, engine.stamp()
        self._shadow.bind([p.fragment for p in plan.pieces])
        self._frozen = _frozen(plan, self._params)
        self._gatherer = None

    def _entries(self) -> list[Entry]:
        assert self._gatherer is not None
        return self._gatherer.entries

    def _refuse_thawed(self) -> None:
        for fqn, tensor in self._frozen:
            if tensor.requires_grad:
                raise RuntimeError(
                    f"{fqn}: was frozen when the average was built, so it is not averaged, and "
                    "requires grad now; build ShardedEMA with params='all', or after unfreezing"
                )

    def _refuse_while_shown(self, what: str) -> None:
        if self._shown is not None:
            raise RuntimeError(
                f"{what} inside average_parameters(): the model shows the average {self._shown!r} "
                "and its storage holds the live weights; leave the block first"
            )

    def _values(self, name: str | None) -> list[torch.Tensor]:
        """One average, a tensor for each of the plan's pieces."""
        return self._shadow.values[self.names.index(name) if name is not None else 0]

    def _check_name(self, name: str | None) -> None:
        if name is None and len(self._schedules) > 1:
            raise ValueError(f"there are several averages, {self.names}; say which by name=")
        if name is not None and name not in self._schedules:
            raise ValueError(f"no average is named {name!r}; there is {self.names}")

    def _agree_on_options(self, replicas: str, dtype: torch.dtype) -> None:
        options = (
            {name: to_json(schedule) for name, schedule in self._schedules.items()},
            self._update_every,
            self._start_step,
            replicas,
            str(dtype),
        )
        told = self._ranks.all_gather(options)
        for rank, theirs in enumerate(told):
            if theirs != told[0]:
                raise ValueError(
                    f"ranks build different averages: rank 0 has (decay, update_every, start_step, "
                    f"replicas, dtype) = {told[0]}, rank {rank} has {theirs}"
                )

    def _warn_of_low_precision(self, dtype: torch.dtype) -> None:
        if dtype.itemsize < 4:
            warnings.warn(
                f"the average is kept in {dtype}: small updates are rounded away, at a decay near "
                "1 it stops moving; use dtype=torch.float32",
                stacklevel=3,
            )
        views = [p.fragment for p in self._plan.parameters]
        low = sorted({str(f.view.dtype) for f in views if f.view.element_size() < 4})
        if low and self.source == "weights":
            warnings.warn(
                f"the live weights are {', '.join(low)} and there is no fp32 master: steps smaller "
                "than their precision are lost before they can be averaged; keep fp32 weights and "
                "use mixed precision (MixedPrecisionPolicy, autocast) if that matters",
                stacklevel=3,
            )

    def _check_replicas(self, agree: Ranks) -> None:
        """Warn of weights that replicas do not hold alike, once. Collective where they share."""
        if self._replicas_checked:
            return
        self._replicas_checked = True
        names = sorted({n for s in self._plan.sets for n in s.differing()})
        with agree.together():
            if names:
                warnings.warn(
                    f"weights that ranks should hold alike differ: {', '.join(names)}; the average "
                    "is made of slices of each rank's, and after average_parameters() all ranks "
                    "hold their owners' values; synchronise them, or build ShardedEMA with "
                    "replicas='whole'",
                    stacklevel=5,
                )


def _schedules(decay: object) -> dict[str, Schedule]:
    if not isinstance(decay, Mapping):
        return {_NAME: as_schedule(decay)}
    if not decay:
        raise ValueError("decay is an empty mapping, wanted at least one name")
    found = {}
    for name, value in decay.items():
        # Names become names of files.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
            raise ValueError(f"{name!r} cannot name an average; use letters, digits, _ . -")
        found[name] = as_schedule(value)
    return found


def _frozen(plan: Plan, params: object) -> list[tuple[str, torch.Tensor]]:
    """Parameters that are left out because they do not train."""
    if params != "trainable":
        return []
    return [
        (w.fqn, w.tensor) for w in plan.weights if not w.is_buffer and w.fqn not in plan.averaged
    ]


def _check_options(
    update_every: int,
    start_step: int,
    params: object,
    buffers: str,
    replicas: str,
    dtype: torch.dtype,
) -> None:
    for label, number, least in (("update_every", update_every, 1), ("start_step", start_step, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{label} is {number!r}, wanted a whole number >= {least}")
    if not callable(params) and params not in ("trainable", "all"):
        raise ValueError(f"params is {params!r}, wanted 'trainable', 'all' or a predicate")
    if buffers not in ("copy", "average"):
        raise ValueError(f"buffers is {buffers!r}, wanted 'copy' or 'average'")
    if replicas not in ("split", "whole"):
        raise ValueError(f"replicas is {replicas!r}, wanted 'split' or 'whole'")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype is {dtype!r}, wanted a floating torch.dtype of 16 bits or more")
