"""`ShardedEMA`: averaged weights for the bytes that each rank owns."""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.checkpoint import dcp
from dist_ema.checkpoint.background import TIMEOUT_S, BackgroundSaves, Handle
from dist_ema.checkpoint.reader import load
from dist_ema.checkpoint.writer import non_finite_names, refuse_non_finite, save
from dist_ema.core.average import Average
from dist_ema.core.engine import FindMaster
from dist_ema.core.errors import CheckpointError
from dist_ema.core.gather import Gatherer, one_by_one, whole_tensors, write_into
from dist_ema.core.group import Group
from dist_ema.core.layout import Fragment, TensorMeta
from dist_ema.core.lerp import MultiAvgFn, squared_norms
from dist_ema.core.names import Modules, as_module, registrations
from dist_ema.core.swap import DeferredSignals
from dist_ema.engines import select
from dist_ema.export import export
from dist_ema.export.layouts import model_state, unregistered_tensors
from dist_ema.options import (
    ATTRIBUTES,
    DEFAULT_NAME,
    EMAOptions,
    no_attribute,
    no_module,
    no_name,
    no_pickles,
)
from dist_ema.schedule import BEMA, Schedule, decay_at, highest, is_constant, same_rule, uncorrected

_LOG = logging.getLogger(__name__)


class ShardedEMA:
    """An average of a model's weights, kept only for the bytes that this rank owns.

    Build it when the model is ready for training: after `fully_shard`, DDP or
    `accelerator.prepare`, with what they return. The average starts as a copy of the live weights;
    each update with decay d makes it `d * average + (1 - d) * live`. Collective: every rank calls
    the constructor. Two small exchanges tell which ranks hold equal weights.

    Args:
        model: a plain module (also in one process), a DDP, FSDP, HSDP or tensor-parallel module,
            compiled or not, a `DeepSpeedEngine`, or what accelerate returned for one of these.
            A list of modules holds this rank's parts of one model (pipeline stages); tensors have
            the same names in parts as in the whole model, and ranks may hold different parts. A
            mapping holds several models that are averaged in step ({"unet": unet, "text": text}),
            each sharded in its own way; names of tensors start with the name of the model.
        decay: share of the average that is kept per optimizer step, in [0, 1]; or a schedule
            (t, delta) -> decay; or a mapping of names to either, for several averages that are
            updated in one pass over the live weights.
        multi_avg_fn: replaces the decay: a function in the convention of torch's `AveragedModel`,
            called with lists of averaged and of live tensors, and the number of updates before
            this one. The first update copies instead. The function must be elementwise: an update
            calls it several times, with 1-D pieces of weights in lists of one dtype.
        update_every: apply every k-th call, with the decay of k steps at once.
        start_step: number of initial calls that copy the weights instead of averaging them.
        params: "trainable", "all", or a predicate (fqn, parameter) -> bool. Parameters that are
            not averaged cost nothing, and are read live when gathering.
        buffers: "copy" uses live buffers; "average" averages persistent floating-point buffers
            too; a predicate (fqn, buffer) -> bool averages those among them that it selects and
            copies the rest (an expert bias yes, the vectors of spectral norm no).
        replicas: "split": ranks that hold equal weights average a slice each; "whole": each rank
            averages all that it holds.
        dtype: of the average. At a decay of 0.9999 a bf16 average stops moving.
        device: "cpu" offloads the average to (pinned) host memory; each update copies chunks of it
            to the accelerator and back, behind the forward pass that follows. None keeps it beside
            the weights.
        overlap: run updates on a side stream, behind the forward pass that follows. The next step
            of any `torch.optim` optimizer waits for it, and so does everything that reads the
            average; nothing else may write to the weights in between. No effect without an
            accelerator.
        masters: (parameter) -> the fp32 master that an optimizer keeps of a low-precision
            parameter, of the parameter's shape and placement, or None: for instance
            `lambda p: optimizer.state[p].get("master_param")` for TransformerEngine's FusedAdam.
            Masters are averaged in place of the parameters. Called for each averaged parameter at
            the build and at each update, since an optimizer may make or replace its masters at any
            time. Not for DeepSpeed, whose masters are averaged anyway, and not for FSDP1.
        into: a teacher, whose weights become the average: a second module (DINO, BYOL, mean
            teacher), sharded as the model is (for a DDP model, a plain one; for a DeepSpeedEngine
            at stage 3, one without an optimizer, as for a reference policy), or the name of a
            second adapter of a PEFT model, frozen, of the same configuration as the adapter that
            is trained. It starts as a copy, and is ready for a forward pass after each update (an
            adapter, after `model.set_adapter(into)`; under FSDP2 call `model.reshard()` before, or
            PEFT freezes gathered copies in place of the weights). Its own dtype is used; replicas
            keep it whole.
        process_group: the ranks that together hold the model; the default group if None.

    Raises:
        ValueError: an argument is out of range, or nothing is averaged. On every rank.
        TypeError: `model` is not a module, or a list or mapping of modules. On every rank.
    """

    def __init__(
        self,
        model: Modules,
        decay: float | Schedule | Mapping[str, float | Schedule] = 0.9999,
        *,
        multi_avg_fn: MultiAvgFn | None = None,
        update_every: int = 1,
        start_step: int = 0,
        params: str | Callable[[str, nn.Parameter], bool] = "trainable",
        buffers: str | Callable[[str, torch.Tensor], bool] = "copy",
        replicas: str = "split",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        overlap: bool = False,
        masters: FindMaster | None = None,
        into: Modules | str | None = None,
        process_group: dist.ProcessGroup | None = None,
        **unknown: Never,
    ) -> None:
        self._group = Group(process_group)
        arguments: dict[str, str] = {}  # compared between ranks when the block ends
        with self._group.together("ShardedEMA()", arguments):
            self._options = EMAOptions.of(
                decay=decay,
                multi_avg_fn=multi_avg_fn,
                update_every=update_every,
                start_step=start_step,
                params=params,
                buffers=buffers,
                replicas=replicas,
                dtype=dtype,
                device=device,
                overlap=overlap,
                masters=masters,
                into=into,
                process_group=process_group,
                **unknown,
            )
            try:
                module = as_module(model)
            except TypeError:
                raise no_module(model) from None
            arguments.update(self._options.arguments())
            if isinstance(model, Mapping):
                arguments["argument model"] = f"a mapping with {list(model)}"
            elif not isinstance(model, nn.Module):
                arguments["argument model"] = "a list of modules"
        self._model = model
        self._average = Average(module, self._options, into, self._group, select)
        self._step = self._num_updates = 0
        self._num_resets = 0  # since the build or a load: ranks must agree
        self._has_compared = False  # replicas, since the first update
        self._decays: list[float] | None = None
        self._applied_steps = self._average.engine.applied_steps()
        # Returns whether an optimizer step has just happened, where the engine does not know. Local
        # and cheap: every update() calls it. Set by dist_ema.integrations.
        self.gate: Callable[[], bool] | None = None
        self._saves = BackgroundSaves()
        # If a whole training step is compiled, the update is a graph break: a compiler would treat
        # decays, counters and the addresses of weights as constants of its graph.
        self._untraced_update: Callable[..., bool] = torch.compiler.disable(ShardedEMA._update)
        self._mixed: set[str] = set()  # averages whose history mixes schedules
        if into is not None:
            dtype = min((meta.dtype for meta in self._tensors()), key=lambda d: d.itemsize)
        if dtype.itemsize < 4:
            wanted = "dtype=" if into is None else "a teacher in "
            warnings.warn(
                f"the average is kept in {dtype}: small updates are rounded away, and at a decay "
                f"near 1 the average stops moving; use {wanted}torch.float32",
                stacklevel=2,
            )
        if masters is None:
            self._warn_of_low_precision()
        self._warn_of_standstill(dtype)

    @property
    def group(self) -> Group:
        """The ranks that together hold the model. Used by `dist_ema.integrations`."""
        return self._group

    def refuse_non_finite(self) -> None:
        """Raise a `CheckpointError` that names tensors with NaN or Inf. Used by integrations.

        Collective: every rank calls it. An all-reduce of one integer.
        """
        refuse_non_finite(non_finite_names(self._fragments()), self._group)

    # State.

    @property
    def model(self) -> Any:
        """What was passed to the constructor."""
        return self._model

    @property
    def names(self) -> list[str]:
        """The names of the averages."""
        return list(self._options.schedules)

    @property
    def step(self) -> int:
        """Optimizer steps seen: calls of `update()` that counted, or the last `step` given."""
        return self._step

    @property
    def num_updates(self) -> int:
        """Number of updates applied, including the initial copies."""
        return self._num_updates

    @property
    def decay(self) -> float | dict[str, float] | None:
        """The decay last applied (0.0 for a copy), of each average if there are several.

        None before the first update, and always with `multi_avg_fn`.
        """
        if self._decays is None:
            return None
        if self.names == [DEFAULT_NAME]:
            return self._decays[0]
        return dict(zip(self.names, self._decays, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds for its averages."""
        return self._average.storage.nbytes

    @property
    def source(self) -> str:
        """What is averaged: "master" (fp32 copies of the engine or optimizer) or "weights"."""
        return self._average.source

    def __repr__(self) -> str:
        rule = self._options.multi_avg_fn or self._options.schedules
        return (
            f"ShardedEMA({rule!r}, step={self.step}, num_updates={self.num_updates}, "
            f"{self._average.engine.kind}, source={self.source!r}, nbytes={self.nbytes})"
        )

    if not TYPE_CHECKING:  # a type checker would take any name

        def __getattr__(self, name: str) -> NoReturn:
            raise no_attribute(self, name)

        def __call__(self, *arguments: object, **named: object) -> NoReturn:
            raise TypeError(f"an average is not called: {ATTRIBUTES['forward']}")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an average cannot be copied or pickled, since it refers to its model: "
            "`ema.save(path)` writes a checkpoint, and `ema.state_dict()` is for torch.save"
        )

    # Averaging.

    def update(self, step: int | None = None) -> bool:
        """Update the average with the live weights; call it after each optimizer step.

        Local: no collective, no host sync, no allocation.

        Args:
            step: the number of this optimizer step, where the caller counts; else calls count.

        Returns:
            Whether the update was applied: False if no optimizer step happened (where the engine or
            framework reports it), and for calls that `update_every` skips.

        Raises:
            RuntimeError: inside `average_parameters()`; while a CUDA graph is captured; parameters
                were replaced by ones of another shape or layout, or a frozen one trains now. The
                average is unchanged.
        """
        return self._untraced_update(self, step)

    def _update(self, step: int | None) -> bool:
        with self._average.lock, DeferredSignals():  # complete and counted, or not begun
            self._average.marks.refuse("update()")
            self._average.follow()
            self._average.refuse_unfrozen()
            if self._num_updates == 0 and self._options.masters is not None:
                self._warn_of_low_precision()  # the optimizer has made its masters now
            if step is not None and not _is_count(step):
                what = type(step).__name__ if isinstance(step, nn.Module) else repr(step)
                raise ValueError(f"step is {what}, wanted the number of an optimizer step >= 0")
            applied_steps = self._average.engine.applied_steps()
            if applied_steps is not None:
                if self._applied_steps is not None and applied_steps <= self._applied_steps:
                    self._applied_steps = applied_steps  # fewer: the engine has loaded a checkpoint
                    return False
            elif self.gate is not None and not self.gate():
                return False
            now = self._step + 1 if step is None else operator.index(step)
            applies = self._fold(now - self._options.start_step)
            self._applied_steps, self._step = applied_steps, now
            self._num_updates += applies
            return applies

    def _fold(self, since: int) -> bool:
        """Update the averages, `since` steps after the initial copies; False if skipped."""
        options, storage = self._options, self._average.storage
        if since > 0 and since % options.update_every:
            return False
        if options.multi_avg_fn is None:
            self._decays, of_values = options.decays(since)
            storage.update(of_values)
        elif since <= 0 or self._num_updates == 0:
            storage.copy()
        else:
            storage.apply(options.multi_avg_fn, self._num_updates)
        self._average.refresh_teacher()
        return True

    @torch.no_grad()
    def reset(self) -> None:
        """Start again: the average is the live weights, `step` and `num_updates` are 0. Local."""
        with self._average.lock, DeferredSignals():
            self._average.marks.refuse("reset()", mends=True)
            self._average.follow()
            self._average.reset()
            self._average.marks.mend()
            self._step = self._num_updates = 0
            self._num_resets += 1
            self._decays = None
            self._mixed = set()
            self._applied_steps = self._average.engine.applied_steps()

    @torch.no_grad()
    def drift(self, name: str | None = None) -> float:
        """‖average - live‖ / ‖live‖ over all averaged weights, 0.0 if nothing was averaged yet.

        Collective: every rank calls it. One all-reduce of two numbers.
        """
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        with self._average.lock:
            self._meet("drift()", {"name": name})
            fragments = self._average.plan.fragments
            for fragment, value in zip(fragments, self._values(name), strict=True):
                if fragment.is_owner:
                    sums += squared_norms(value, fragment.view).cpu()
        if self._group.size > 1:
            sums = sums.to(self._group.device)
            dist.all_reduce(sums, group=self._group.process_group)
        apart, length = sums.sqrt().tolist()
        return apart / length if length else (math.inf if apart else 0.0)

    # Evaluating.

    @contextmanager
    def average_parameters(self, name: str | None = None) -> Iterator[None]:
        """Within the block the model computes with the averaged weights.

        Afterwards, also after an exception, weights and buffers are restored bit for bit. Live and
        averaged values are exchanged in place, without a second copy (a `BEMA` and `into=` copy
        this rank's part); signals (Ctrl-C) wait meanwhile. Inside the block, averages of the model
        and of modules around or inside it refuse to read or write, the block cannot be nested, and
        writes to weights (an optimizer step) are warned of. Complete backward passes before the
        block: activation checkpointing would recompute their forward pass with averaged weights.

        Raises:
            RuntimeError: replicas differ, or compiled code may hold copies of the weights (nothing
                has changed); or the way back failed, since another rank died. Then the weights are
                in part averaged ones, and every call of the average raises until the model's
                weights are loaded again and `reset()`, `load()` or `load_state_dict()` is called.

        Collective under DeepSpeed, and where weights are replicated and the average is split (DDP,
        HSDP, FSDP2 with tensor parallelism): replicas are compared, the averaged weights are
        all-gathered on entry and the live ones on exit. Otherwise local (FSDP): nothing is
        compared, so every rank must enter with the same `name` and the same number of updates.
        """
        self._meet("average_parameters()", {"name": name}, group=self._average.swap_group)
        with self._average.swap(name or self.names[0], self._values(name)):
            try:
                yield
            except BaseException as error:
                if self._average.swap_group.size > 1:
                    # The other ranks may not get there, and this one would only tell of a timeout.
                    _LOG.error("average_parameters(): left by %r; restoring weights", error)
                raise

    @torch.no_grad()
    def copy_to(self, module: Modules | None = None, *, name: str | None = None) -> None:
        """Make the average permanent in the live weights, or write it into a plain module.

        Without a module, the live weights become the average, masters and low-precision copies
        too, so that training goes on from there. With one, its whole state dict is written on every
        rank: averaged weights, and the current frozen weights and buffers.

        Args:
            module: a module of the model's own class that no engine shards, on every rank; or a
                mapping of them, where the model is one.

        Raises:
            ValueError: `module` is sharded, or its names or shapes are others (they are listed).
                On every rank; nothing is changed.

        Collective: every rank calls it. Without a module, an all-gather of replicated weights;
        with one, each byte is sent to rank 0 once and broadcast, in bounded buckets.
        """
        with self._average.lock:
            if module is None:
                self._meet("copy_to()", {"name": name, "dtype": None, "module": None})
                self._average.make_permanent(self._values(name))
                return
            gatherer, values = self._gathered("copy_to()", name, None, module="a module")
            self._unregistered("copy_to()", None)
            buckets = whole_tensors(gatherer, values, None)
            write_into(module, gatherer.tensors, buckets, self._group, select)

    # Gathering.

    def gather_state_dict(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """The whole averaged state dict on rank 0, on the CPU; {} on the other ranks.

        Keys and shapes are those of the unwrapped model's `state_dict()`: tied weights under each
        of their names (one tensor), frozen weights and persistent buffers as they live. What
        `state_dict()` adds to frozen weights (the state of a quantization) is in, as it is, and so
        is the extra state that modules of rank 0 return, which need not be tensors.

        Args:
            dtype: of floating tensors. None: the average's (fp32), half-precision tensors that are
                not averaged being widened to fp32.

        Collective: every rank calls it. Each byte is sent to rank 0 once, in bounded buckets.
        """
        state = dict(self._whole_tensors("gather_state_dict()", name, dtype))
        order = {known.fqn: i for i, known in enumerate(registrations(self._average.model))}
        return dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order))))

    def gather_tensors(
        self, name: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`gather_state_dict()` as an iterator of (fqn, tensor) that holds one tensor at a time.

        Collective: every rank calls it and exhausts the iterator, which is empty off rank 0.
        """
        every = self._whole_tensors("gather_tensors()", name, dtype)
        return ((fqn, tensor) for fqn, tensor in every if isinstance(tensor, torch.Tensor))

    def export(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        weights_name: str | None = None,
        method: str = "auto",
    ) -> None:
        """Write the average as a consolidated safetensors checkpoint, for `from_pretrained`.

        Of several models, each is written to a directory of its own, `path/<name>`, and replaced
        by itself when the files of all of them are complete.

        The directory holds what the model's library expects: `model.safetensors`, `config.json`
        and the generation config (transformers), `diffusion_pytorch_model.safetensors` and
        `config.json` (diffusers), `adapter_model.safetensors` and `adapter_config.json` (the active
        adapter of a PEFT model), or `model.safetensors` alone, which
        `safetensors.torch.load_model` reads; with several files, their index. Averaged and frozen
        weights and persistent buffers are in it, tied weights once.

        Only these files are replaced, and no other file in the directory is touched. New files
        are written to a hidden directory inside `path` and take their places by one rename, so
        `from_pretrained` finds the old export or the new one, complete, even if the export is
        killed. Two exceptions: a load during that rename may read files of both; and on a file
        system without symbolic or hard links, an export of several files that is killed while it
        renames them leaves a directory that does not load until the next export.

        Args:
            path: directory, the same on every rank; made if it does not exist. Files of an earlier
                export of this name that this one does not write are removed.
            dtype: of floating tensors, and of `config.json`; None as in `gather_state_dict`.
            max_shard_size: of a file, in bytes or as "5GB"; a larger tensor gets its own file.
            weights_name: name of the weights file; None for the library's own.
                "diffusion_pytorch_model.ema.safetensors" is what diffusers reads with
                variant="ema", beside the raw weights.
            method: "direct": every rank writes what it owns into the files, on a file system that
                all see; "rank0": all is sent to rank 0, which writes; "auto": direct if all ranks
                are on one host.

        Raises:
            ValueError: the average holds NaN or Inf (the tensors are named), an argument is out of
                range, the model's `state_dict()` has other names than its tensors, or `path` is a
                checkpoint of `save` or has weights that `export` did not write and that loaders
                might prefer. On every rank; what is at `path` is left as it was.

        Collective: every rank calls it. With "direct", only tensors of which a rank has more than
        runs of elements (columns of a matrix) are sent, each byte once; memory: 16 MiB on each
        rank, with such tensors buckets of 16 MiB. With "rank0", each byte is sent to rank 0 once,
        in buckets of 16 MiB.
        """
        files: dict[str, Any] = {"max_shard_size": max_shard_size, "weights_name": weights_name}
        files["method"] = method
        with self._average.lock:
            gatherer, values = self._gathered("export()", name, dtype, path=path, **files)
            export(
                Path(path),
                self._average.model,
                gatherer,
                values,
                self._group,
                dtype=dtype,
                **files,
            )

    # Resuming.

    def save(
        self, path: str | Path, *, asynchronous: bool = False, timeout: float = TIMEOUT_S
    ) -> Handle | None:
        """Write a sharded checkpoint of all averages, with their counters and schedules.

        It is a directory of safetensors files, one or a few per rank, and a manifest with
        checksums, without any pickle. A checkpoint at `path` is replaced atomically, when every
        rank has written and synced its files.

        Args:
            path: directory on a file system that all ranks share.
            asynchronous: return after one copy of this rank's values, and write in the background.
                `result()` of the returned handle waits, and raises if the save failed. A later save
                or load waits for it, and so does the exit of the process. A signal that kills the
                process, as SIGTERM does by default, loses this save; `path` is unchanged.
            timeout: seconds without progress after which an asynchronous save gives up ranks that
                have not written: `result()` raises on the other ranks and names them, and the exit
                of the process does not wait longer (on other ranks than 0, up to 30 s more). A
                process that has died is noticed within seconds on file systems with locks.

        Raises:
            ValueError: `timeout` is not a positive number.
            CheckpointError: an average holds NaN or Inf (the tensors are named), a rank cannot
                write, or `path` holds other files or the working directory. On every rank; `path`
                is unchanged.

        Collective: every rank calls it. Each rank writes what it owns. Four small exchanges; if
        weights are replicated, they are also read once, and compared in one more.
        """
        with self._average.lock:  # no other thread updates or exchanges values meanwhile
            self._meet("save()", {"asynchronous": asynchronous, "timeout": timeout, "path": path})
            self._compare_replicas()
            averages = self._fragments(corrected=True)
            state = self._state()
            model = model_state(self._average.model, self._average.others(), self._group)
            if self._group.rank == 0:  # which writes the manifest
                state["model"] = model
            return save(
                path,
                averages,
                self._tensors(),
                state,
                self._group,
                asynchronous=asynchronous,
                timeout=timeout,
                background=self._saves,
            )

    def load(self, path: str | Path, *, strict: bool = True, step: int | None = None) -> None:
        """Load averages and counters from a checkpoint of any engine and world size.

        A consolidated safetensors file or directory with these names can be loaded too, and so can
        an export of several models, and a directory of `torch.distributed.checkpoint`: the average
        that torchtitan has saved in it (`ema.state.<name>.ema_params`, formerly `ema_optimizer`),
        or else, with a warning, the weights of the model. No pickle in it is executed.

        If the saved schedule, `start_step` or `update_every` differs from the constructor's, a
        warning says so and the constructor's is used. A custom callable is compared by its name,
        its code and the plain values in its closure.

        Args:
            strict: refuse missing and unexpected tensors, instead of warning of them.
            step: the optimizer steps behind an average that was saved without counters;
                `num_updates` is set as if all of them had been counted here. None: torchtitan's
                `train_state.step` or diffusers' `optimization_step` in `config.json` if it is
                there, else 0. If the next update would discard most of the loaded average, a
                warning says so.

        Raises:
            CheckpointError: the checkpoint is damaged or there is none; an average or a tensor is
                missing, unexpected or of another shape (all are listed). On every rank; nothing has
                changed.

        Collective: every rank calls it, and reads what it holds.
        """
        with self._average.lock, ExitStack() as signals:  # complete and counted, or not begun
            arguments = {"path": path, "strict": strict, "step": step}
            self._meet("load()", arguments, counters=False)
            with self._group.together():
                if step is not None and not _is_count(step):
                    raise ValueError(f"step is {step!r}, wanted a number of optimizer steps >= 0")
                step = None if step is None else operator.index(step)  # NumPy's are not JSON
                if not Path(path).is_dir() and (problem := no_pickles(Path(path))):
                    raise CheckpointError(problem)
            weights = [*self._average.plan.weights, *self._average.others()]
            names = {n for w in weights for n in (w.fqn, *w.aliases)}
            state = load(
                Path(path),
                self._fragments(),
                self._tensors(),
                self._group,
                strict=strict,
                others=names,
                background=self._saves,
                copying=lambda: signals.enter_context(DeferredSignals()),
            )
            if "averages" not in state:
                step = state.get("step") if step is None else step
                if step is None:
                    step = self._group.broadcast(_diffusers_step(Path(path)))
                self._resume(self._uncounted(step or 0))
                self._warn_of_discarding()
                return
            self._resume(state)
            if step is not None and step != state["step"]:
                text = f"step={step} is ignored: the checkpoint was saved at step {state['step']}"
                warnings.warn(text, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """For `torch.distributed.checkpoint`: `dcp.save({"model": ..., "ema": ema})`. Local.

        Values are tensors that it can reshard; they share the average's storage. In a single
        process they are plain tensors, for `torch.save` and `torch.load(weights_only=True)`. A rank
        of several holds only a part; use `gather_state_dict()` for whole tensors.
        """
        self._average.marks.refuse("state_dict()")
        self._average.follow()
        return dcp.state_dict(
            self._fragments(), self._tensors(), self._state(), alone=self._group.size == 1
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict that `torch.distributed.checkpoint` has filled. Local.

        Raises:
            CheckpointError: an average is missing, or tensors differ. Nothing has changed.
        """
        with self._average.lock, DeferredSignals():
            self._average.marks.refuse("load_state_dict()", mends=True)
            self._average.follow()
            self._resume(dcp.load_state_dict(state_dict, self._fragments(), self._tensors()))

    # Inside.

    def _meet(
        self,
        call: str,
        arguments: Mapping[str, object],
        *,
        group: Group | None = None,
        counters: bool = True,
    ) -> None:
        """Begin a public call in which ranks meet: check its arguments and compare between ranks.

        Collective: every rank calls it. One all-reduce of three integers.

        Args:
            group: the ranks that meet; by default all that hold the model.
            counters: whether `step` and `num_updates` must be equal.
        """
        values = {f"argument {label}": str(v) for label, v in arguments.items() if label != "path"}
        if "path" in arguments and call != "save()":  # `checkpoint.save` compares its own
            values["argument path"] = os.path.abspath(str(arguments["path"]))
        if not isinstance(name := arguments.get("name"), str | None):
            values["argument name"] = type(name).__name__  # its text may contain an address
        if counters:
            values["(step, num_updates)"] = str((self.step, self.num_updates))
            values["the number of reset() calls"] = str(self._num_resets)
        with (group or self._group).together(call, values):
            self._average.marks.refuse(call, mends=call == "load()")
            if "name" in arguments:
                self._check_name(arguments["name"])
            dtype = arguments.get("dtype")
            if dtype is not None and not (
                isinstance(dtype, torch.dtype) and dtype.is_floating_point
            ):
                raise ValueError(f"dtype is {dtype!r}, wanted a floating torch.dtype or None")
            path = arguments.get("path", "")
            if not isinstance(path, str | os.PathLike):
                raise TypeError(f"path is {path!r}, wanted a str or Path")
            timeout = arguments.get("timeout", 1)
            if not isinstance(timeout, int | float) or not timeout > 0:
                raise ValueError(f"timeout is {timeout!r}, wanted a positive number of seconds")
            self._average.follow()

    def _fragments(self, *, corrected: bool = False) -> dict[str, list[Fragment]]:
        """This rank's fragments of all values that are kept, and of bias-corrected averages."""
        every = dict(zip(self._options.values, self._average.storage.values, strict=True))
        if corrected:
            every |= {name: self._values(name) for name in self.names}
        return {
            name: [
                Fragment(fragment.meta, value, is_owner=fragment.is_owner)
                for fragment, value in zip(self._average.plan.fragments, values, strict=True)
            ]
            for name, values in every.items()
        }

    def _tensors(self) -> list[TensorMeta]:
        """The averaged tensors of all ranks that hold this part of the model."""
        return [
            TensorMeta(w.fqn, w.aliases, w.shape, self._average.dtype_of(w))
            for w in self._average.plan.weights
            if w.fqn in self._average.plan.averaged
        ]

    def _state(self) -> dict[str, Any]:
        """Counters and schedules, as JSON."""
        options = self._options
        decays: dict[str, float | None] = dict.fromkeys(self.names)
        decays |= zip(self.names, self._decays or (), strict=False)
        return {
            "step": self._step,
            "num_updates": self.num_updates,
            "update_every": options.update_every,
            "start_step": options.start_step,
            "averages": {
                value: {"schedule": options.rule(name), "decay": decays[name]}
                | ({"mixed": True} if name in self._mixed else {})
                for value, name in {**options.values, **{n: n for n in self.names}}.items()
            },
        }

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; from the start if it is empty."""
        own = self._state()
        averages = {n: a for n, a in state.get("averages", {}).items() if n in self.names}
        changed = {
            name
            for name, saved in averages.items()
            if not same_rule(saved["schedule"], own["averages"][name]["schedule"])
        }
        notes = [
            f"the average {name!r} was saved with {averages[name]['schedule']}, and goes on with "
            f"the constructor's {own['averages'][name]['schedule']}"
            for name in averages
            if name in changed
        ]
        notes += [
            f"the average was saved with {label}={state[label]}, and goes on with "
            f"{label}={own[label]}, as ShardedEMA was built"
            for label in ("update_every", "start_step")
            if state.get(label, own[label]) != own[label]
        ]
        self._mixed = changed | {name for name, saved in averages.items() if saved.get("mixed")}
        if not averages and state.get("step"):
            self._mixed = set(self.names)  # the schedule that made it is not known
        self._step, self._num_updates = state.get("step", 0), state.get("num_updates", 0)
        self._num_resets = 0
        decays: list[Any] = [averages[n]["decay"] for n in self.names] if averages else [None]
        self._decays = None if None in decays else [float(decay) for decay in decays]
        self._applied_steps = self._average.engine.applied_steps()
        self._average.refresh_teacher(loaded=True)
        self._average.marks.mend()
        for text in notes:  # last: warnings may be errors
            warnings.warn(text, stacklevel=3)

    def _uncounted(self, step: int) -> dict[str, int]:
        """The state after a number of steps of an average that was saved without counters."""
        start, every = self._options.start_step, self._options.update_every
        applied = min(step, start) + max(0, step - start) // every
        # Not 0 once there were steps: the first update of a `multi_avg_fn` copies.
        return {"step": step, "num_updates": max(applied, min(step, 1))}

    def _warn_of_discarding(self) -> None:
        """Warn if the next update that is applied will discard most of the average. Local."""
        options = self._options
        since = self._step + 1 - options.start_step
        t = -(-since // options.update_every) * options.update_every  # the next that is applied
        if options.multi_avg_fn is not None:
            kept = {DEFAULT_NAME: 0.0} if since <= 0 or self._num_updates == 0 else {}
        else:
            kept = {
                name: decay_at(rule, t, options.update_every) if since > 0 else 0.0
                for name, rule in options.schedules.items()
                # A constant decay is what the user wants at every step.
                if since <= 0 or not is_constant(rule)
            }
        for name, decay in kept.items():
            if decay < 0.5:
                warnings.warn(
                    f"the average {name!r} stands at step {self._step} after this load, and its "
                    f"next update will keep only {decay:.3g} of what was loaded: if more optimizer "
                    "steps are behind it, pass load(path, step=n), or build it with a constant "
                    "decay and start_step=0",
                    stacklevel=3,
                )

    def _gathered(
        self, what: str, name: str | None, dtype: torch.dtype | None, **others: object
    ) -> tuple[Gatherer, list[torch.Tensor]]:
        """The gatherer of an average, and the values to gather. Collective."""
        self._meet(what, {"name": name, "dtype": dtype, **others})
        self._compare_replicas()
        values = self._values(name)
        gatherer = self._average.gatherer(values)
        return gatherer, [*values, *(fragment.view for fragment in gatherer.rest)]

    def _whole_tensors(
        self, call: str, name: str | None, dtype: torch.dtype | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What `gather_tensors()` returns. Collective."""
        # First: state_dict() of quantized layers may move them.
        unregistered = self._unregistered(call, dtype)
        gatherer, values = self._gathered(call, name, dtype)
        num_updates = self._num_updates

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for meta, tensor in one_by_one(whole_tensors(gatherer, values, dtype)):
                with self._average.lock:  # until an update in progress is counted
                    self._average.marks.refuse(call)
                if self._num_updates != num_updates:
                    raise RuntimeError(
                        f"the average was updated while {call} was in progress; consume its "
                        "iterator before the next update()"
                    )
                yield from ((fqn, tensor) for fqn in (meta.fqn, *meta.aliases))
            if self._group.rank == 0:
                yield from unregistered.items()

        return tensors()

    def _compare_replicas(self) -> None:
        """Compare replicas, once after the first update. Collective: every rank calls it."""
        if self._num_updates > 0 and not self._has_compared:
            self._average.refuse_differing_replicas()
            self._has_compared = True

    def _unregistered(self, call: str, dtype: torch.dtype | None) -> dict[str, Any]:
        average = self._average
        return unregistered_tensors(call, average.model, average.plan.averaged, self._group, dtype)

    def _values(self, name: str | None) -> list[torch.Tensor]:
        """One average: a tensor for each fragment of the plan."""
        name = name or self.names[0]
        kept, values = list(self._options.values), self._average.storage.values
        if name in kept:
            return values[kept.index(name)]
        schedule = self._options.schedules[name]
        assert isinstance(schedule, BEMA)
        averages, initials = (values[kept.index(each)] for each in uncorrected(name))
        options = self._options
        since = self._step - options.start_step
        since -= since % options.update_every  # of the last update
        if since <= 0:  # a copy of the weights
            return [average.clone() for average in averages]
        alpha = schedule.alpha(since + options.start_step)
        lives = (fragment.view for fragment in self._average.plan.fragments)
        num_parameters = len(self._average.plan.parameters)
        return [
            average + (live.to(average) - initial).mul_(alpha)
            if number < num_parameters
            else average.clone()  # a corrected variance could be negative
            for number, (average, live, initial) in enumerate(
                zip(averages, lives, initials, strict=True)
            )
        ]

    def _check_name(self, name: object) -> None:
        if name is None and len(self.names) > 1:
            raise ValueError(f"there are several averages, {self.names}; say which by name=")
        # Integrations also gather what a BEMA is computed from.
        if name is not None and name not in (*self.names, *self._options.values):
            raise no_name(name, self.names)

    def _warn_of_standstill(self, dtype: torch.dtype) -> None:
        """Warn if a decay is so near to 1 that an update is lost in rounding.

        An average comes to rest where (1 - decay) times its distance from the weights is half the
        spacing of its numbers: at a relative distance of eps / 4 to eps / 2 over (1 - decay).
        """
        every = self._options.update_every
        if self._options.multi_avg_fn is not None or dtype.itemsize < 4:
            return  # not known, or warned of already
        for name, rule in self._options.schedules.items():
            decay = highest(rule, every)
            if decay is None or decay == 1:
                continue
            distance = torch.finfo(dtype).eps / 2 / (1 - decay)
            if distance > 0.02:
                warnings.warn(
                    f"the average {name!r} reaches a decay of {decay:.10g} an update, too near to "
                    f"1 for {dtype}: it may stop {min(distance, 1):.0%} away from constant "
                    "weights; pass dtype=torch.float64, or a larger update_every",
                    stacklevel=3,
                )

    def _warn_of_low_precision(self) -> None:
        views = [fragment.view for fragment in self._average.plan.parameters]
        low = sorted({str(view.dtype) for view in views if view.element_size() < 4})
        if low and self.source == "weights":
            warnings.warn(
                f"the live weights are {', '.join(low)} and there is no fp32 master: steps smaller "
                "than their precision are lost before they can be averaged; keep fp32 weights and "
                "use mixed precision (MixedPrecisionPolicy, autocast) if that matters",
                stacklevel=3,
            )


def _diffusers_step(path: Path) -> int | None:
    """The `optimization_step` that diffusers' `EMAModel.save_pretrained` wrote; None if none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        step = json.loads(config.read_text(encoding="utf-8"))["optimization_step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return step if type(step) is int and step >= 0 else None


def _is_count(step: object) -> bool:
    try:
        return not isinstance(step, bool) and operator.index(step) >= 0  # type: ignore[arg-type]
    except TypeError:
        return False
