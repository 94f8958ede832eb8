"""`EMACallback`: averaged weights in a Lightning `Trainer`.

    trainer = Trainer(strategy=..., callbacks=[EMACallback(decay=0.9999)])

For the packages `lightning` and `pytorch_lightning`. Tested under single-device, DDP and
`ModelParallelStrategy` (FSDP2, tensor parallelism); `FSDPStrategy` and `DeepSpeedStrategy` take the
same way through this file, but refuse to run without a GPU, so nothing has tried them.

[Note: the order of Lightning's events]
Parameters are what they will be in training from `on_fit_start` on, but some strategies load a
checkpoint after that: the average is built at `on_train_start`. Until then, so in the validation
that Lightning runs as a check beforehand, the average would be the live weights, and they are used.

[Note: the average in Lightning's checkpoints]
A checkpoint that is one file (single device, DDP, `save_distributed_checkpoint=False`) holds the
average as whole tensors, so that it is wherever the file is moved, linked or uploaded to:
`torch.load(path)["dist_ema"]["averages"]["ema"]` has them under the names of `state_dict`, which
keeps the live weights. One that is a folder of shards holds it in a folder `dist_ema`, in this
project's own format, written by all ranks. Lightning writes what a callback puts into a sharded
checkpoint from rank 0 alone, gives that to every rank on loading, and tells callbacks no path: so
`trainer.save_checkpoint`, through which everything is saved, is wrapped.

[Note: what the finders load]
Lightning's finders of a learning rate or a batch size save what is there, train or evaluate without
callbacks, load what they saved and delete it; `trainer.ckpt_path` stays what they loaded. A file
that this run of the trainer saved itself is therefore nothing to resume from. The batch size finder
does that in `on_validation_start` and the like, so the average is shown one event later, or it
would be written over.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema.core.errors import CheckpointError
from dist_ema.core.lerp import MultiAvgFn
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.beside import is_there
from dist_ema.integrations.whole import fill, whole
from dist_ema.options import Options, average_meant, schedules_of
from dist_ema.schedule import Schedule

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
else:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:
        # A Trainer of either package wants the hooks only, and asks no callback for its class.
        from pytorch_lightning.callbacks import Callback

KEY = "dist_ema"  # in a checkpoint that is a file; the folder in one that is a folder
_log = logging.getLogger(__name__)


class EMACallback(Callback):
    """Averages the weights that a `Trainer` trains, evaluates with the average, saves and resumes.

    The average takes the weights in at the end of each batch in which an optimizer stepped:
    batches that only accumulate gradients, and steps that a gradient scaler skipped, do not count.
    Steps that Lightning does not see (manual optimization that calls the bare torch optimizer)
    cannot be counted. A batch whose `training_step` returns None counts, as in `global_step`.

    From `on_validation_epoch_start` to `on_validation_end` the model computes with the average, and
    so for test and predict; checkpoints written in between hold live weights nevertheless. After an
    evaluation, or an exception, the live weights are back, and buffers are what they were before
    it: what an evaluation writes into a buffer is lost. Another model than the one that was fitted
    is evaluated as it is, with a warning.

    `fit(ckpt_path=...)` goes on with the average of the checkpoint, bit for bit, under any strategy
    and number of devices that Lightning can load it with; `test(ckpt_path=...)` tests that average.
    Checkpoints saved with `weights_only` hold none. After `fit`, `callback.ema` is the
    `ShardedEMA`: `callback.ema.export(path)`, `.gather_state_dict()`, `.copy_to()`. A strategy that
    spawns its processes ends it with them; test from a checkpoint then. A checkpoint that is one
    file is refused, as `ShardedEMA.save` refuses its own, if the average holds NaN or Inf.

    Args:
        decay, multi_avg_fn, update_every, start_step, params, buffers, replicas, dtype, device,
            overlap: as for `ShardedEMA`. Names of weights are those in the LightningModule.
        evaluate: whether validation, test and predict use the average; with several averages, the
            name of one of them.
        optimizer: number of the optimizer whose steps count (a GAN's generator, say), from 0;
            None: any. One that the module does not have is refused when training starts.
        missing: when a checkpoint has no average, "raise", or "restart" with a warning: the average
            starts from the weights of the checkpoint.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Communication: none in training; around evaluation that of `ShardedEMA.average_parameters`; a
    checkpoint that is one file gathers the average on rank 0, whose memory holds one full copy.
    """

    def __init__(
        self,
        decay: float | Schedule | Mapping[str, float | Schedule] = 0.9999,
        *,
        evaluate: bool | str = True,
        optimizer: int | None = None,
        missing: str = "raise",
        multi_avg_fn: MultiAvgFn | None = None,
        update_every: int = 1,
        start_step: int = 0,
        params: str | Callable[[str, nn.Parameter], bool] = "trainable",
        buffers: str | Callable[[str, torch.Tensor], bool] = "copy",
        replicas: str = "split",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        overlap: bool = False,
    ) -> None:
        super().__init__()
        schedules = schedules_of(decay)
        options: dict[str, Any] = {
            "multi_avg_fn": multi_avg_fn,
            "update_every": update_every,
            "start_step": start_step,
            "params": params,
            "buffers": buffers,
            "replicas": replicas,
            "dtype": dtype,
            "device": None if device is None else torch.device(device),
            "overlap": overlap,
        }
        Options(schedules, **options, has_teacher=False)  # refuses here what it would refuse later
        if missing not in ("raise", "restart"):
            raise ValueError(f"missing is {missing!r}, wanted 'raise' or 'restart'")
        _check_optimizer(optimizer)
        self.ema: ShardedEMA | None = None  # from on_train_start on
        self._options: dict[str, Any] = {"decay": decay, **options}
        self._evaluates = evaluate is not False
        self._name = average_meant(evaluate, list(schedules))
        self._optimizer, self._missing = optimizer, missing
        self._model: nn.Module | None = None  # what `ema` averages
        self._shown: ExitStack | None = None
        self._found: Mapping[str, Any] | None = None  # in the checkpoint that is being loaded
        self._saved_step: int | None = None  # `ema.step` according to the same
        self._path: Any = None  # of the same
        self._own: set[str] = set()  # paths that this run of the trainer saved to
        self._elsewhere = False  # the trainer evaluates another model than `ema` averages
        self._pending = self._stepped = False
        self._scale: float | None = None

    # Counting.

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._settle(trainer)
        if self._optimizer is None or trainer.optimizers[self._optimizer] is optimizer:
            self._pending, self._scale = True, _scale(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._settle(trainer)
        if self._stepped and self.ema is not None:
            self.ema.update()
        self._stepped = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        ran = trainer.fit_loop.epoch_loop.total_batch_idx >= 0
        if ran and self.ema is not None and self.ema.step == 0:
            warnings.warn(
                "EMACallback saw no optimizer step, so the average is the initial weights; with "
                "manual optimization step what self.optimizers() returns",
                stacklevel=2,
            )

    def _settle(self, trainer: Any) -> None:
        """Count the step that was about to happen, unless a gradient scaler skipped it."""
        if self._pending:
            scale = _scale(trainer)
            # The scale falls when, and only when, gradients overflowed.
            self._stepped |= scale is None or self._scale is None or scale >= self._scale
            self._pending = False

    # Building and loading.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._found = self._saved_step = self._path = None
        self._own.clear()
        self._elsewhere = False
        self._wrap_save(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._found = None  # one full copy

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if str(trainer.ckpt_path) not in self._own:
            self._found = checkpoint.get(KEY)
            self._saved_step = checkpoint["callbacks"].get(self.state_key, {}).get("step")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        num_optimizers = len(trainer.optimizers)
        if self._optimizer is not None and self._optimizer >= num_optimizers:
            raise ValueError(
                f"EMACallback: optimizer is {self._optimizer}, but the module has "
                f"{num_optimizers}, numbered from 0"
            )
        self._pending = self._stepped = False
        self._attach(trainer)

    def _note_path(self, trainer: Any) -> None:
        """Keep what the trainer was told to load, which a finder writes over."""
        if str(trainer.ckpt_path) not in self._own:
            self._path = trainer.ckpt_path

    def _attach(self, trainer: Any) -> None:
        """Let `self.ema` be the average of the model as it is now."""
        model = _model_of(trainer)
        self._note_path(trainer)
        if self._path is not None:
            path = Path(trainer.strategy.broadcast(str(self._path)))
            self._load(self._build(model), path)
        elif self.ema is None or self._model is not model:
            if trainer.state.fn == "fit":
                self._build(model)
            else:
                self._elsewhere = True
                warnings.warn(
                    "EMACallback: there is no average of this model, evaluation uses its live "
                    "weights; fit it with this callback before, or give ckpt_path",
                    stacklevel=3,
                )

    def _build(self, model: nn.Module) -> ShardedEMA:
        self.ema = None  # its memory first
        self.ema, self._model = ShardedEMA(model, **self._options), model
        return self.ema

    def _load(self, ema: ShardedEMA, path: Path) -> None:
        found, self._found = self._found, None
        if found is not None:
            fill(ema, found, path)
        elif self._saved_step is not None and is_there(ema, path / KEY):
            # Without that, it is what an earlier checkpoint left in a folder that was used again.
            ema.load(path / KEY)
        elif self._missing == "raise" or self._saved_step is not None:
            raise CheckpointError(
                f"{path}: holds no average; it was saved without EMACallback, or weights_only, or "
                f"its folder {KEY} was lost; EMACallback(missing='restart') takes its weights "
                "where it was saved without"
            )
        else:
            warnings.warn(
                f"{path}: holds no average; it starts from the weights of the checkpoint",
                stacklevel=4,
            )
        if self._saved_step not in (None, ema.step):
            raise CheckpointError(
                f"{path}: its average is of step {ema.step}, its weights are of step "
                f"{self._saved_step}: saving was cut short; load another checkpoint"
            )

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None or self._elsewhere else {"step": self.ema.step}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.ema is None or self._elsewhere or _writes_folder(trainer.strategy):
            return
        average = whole(self.ema)
        if average:
            checkpoint[KEY] = average

    def _wrap_save(self, trainer: Any) -> None:
        inner = trainer.save_checkpoint
        if getattr(inner, "ema_callback", None) is self:
            return

        @functools.wraps(inner)
        def save_checkpoint(
            filepath: Any, weights_only: bool | None = None, storage_options: Any = None
        ) -> None:
            self._note_path(trainer)
            self._own.add(str(filepath))
            with self._hidden(trainer.strategy.model):
                inner(filepath, weights_only, storage_options)
                ema = None if self._elsewhere or weights_only else self.ema
                if ema is not None and _writes_folder(trainer.strategy):
                    ema.save(Path(trainer.strategy.broadcast(str(filepath))) / KEY)

        save_checkpoint.ema_callback = self  # type: ignore[attr-defined]
        trainer.save_checkpoint = save_checkpoint

    # Evaluating.

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_starts(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._hide()

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_starts(trainer)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._hide()

    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_starts(trainer)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._hide()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._shown is not None:
            # Restoring may wait for the other ranks; if they are elsewhere, this is all one sees.
            _log.error("evaluation failed, restoring the live weights", exc_info=exception)
        self._hide()

    def _evaluation_starts(self, trainer: Any) -> None:
        if not self._evaluates:
            return
        if trainer.state.fn != "fit":
            self._attach(trainer)
        if self.ema is not None and self._model is _model_of(trainer):
            self._show(self.ema, trainer.strategy.model)

    def _show(self, ema: ShardedEMA, outer: nn.Module) -> None:
        with ExitStack() as stack:
            if isinstance(outer, DistributedDataParallel):
                # An evaluation lets DDP take buffers to be equal on all ranks, as `Buffers` tells.
                sync = outer.require_forward_param_sync
                stack.callback(setattr, outer, "require_forward_param_sync", sync)
            stack.enter_context(ema.average_parameters(self._name))
            self._shown = stack.pop_all()

    def _hide(self) -> None:
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.close()

    @contextmanager
    def _hidden(self, outer: nn.Module) -> Iterator[None]:
        """Within the block the model has its live weights."""
        ema = None if self._shown is None else self.ema
        self._hide()
        try:
            yield
        except BaseException as error:
            if ema is not None and ema._average.swap_group.size > 1:
                # Showing it again would wait for ranks that may know of no error.
                _log.error("saving failed (%r); evaluation goes on with the live weights", error)
                ema = None
            raise
        finally:
            if ema is not None:
                self._show(ema, outer)


def _model_of(trainer: Any) -> nn.Module:
    """What holds the weights. A DDP wrapper ends with `fit`, its module goes on."""
    model = trainer.strategy.model
    if isinstance(model, DistributedDataParallel):
        model = trainer.lightning_module
    assert isinstance(model, nn.Module)
    return model


def _writes_folder(strategy: Any) -> bool:
    """Whether a strategy writes checkpoints as folders to which every rank adds.

    By name, since either package has its own classes. Private names of Lightning 2.6.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "ModelParallelStrategy" in names:
        return bool(strategy._save_distributed_checkpoint)
    if "FSDPStrategy" in names:
        return bool(strategy._state_dict_type == "sharded")
    return "DeepSpeedStrategy" in names


def _scale(trainer: Any) -> float | None:
    """The factor of the gradient scaler, where there is one (fp16). A host sync there."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _check_optimizer(optimizer: object) -> None:
    if optimizer is None:
        return
    if isinstance(optimizer, bool) or not isinstance(optimizer, int):
        raise TypeError(f"optimizer is {optimizer!r}, wanted the number of an optimizer, or None")
    if optimizer < 0:
        raise ValueError(f"optimizer is {optimizer}, wanted a number from 0, or None")
