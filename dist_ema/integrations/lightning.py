"""`EMACallback`: averaged weights in a Lightning `Trainer`.

    trainer = Trainer(strategy=..., callbacks=[EMACallback(decay=0.9999)])

For the packages `lightning` and `pytorch_lightning`. Tested with single-device, DDP and
`ModelParallelStrategy` (FSDP2, tensor parallelism). `FSDPStrategy` and `DeepSpeedStrategy` need a
GPU and are not tested.

[Note: Lightning's events]
Some strategies load a checkpoint after `on_fit_start`, so the average is built at `on_train_start`.
The validation that Lightning runs as a check before uses the live weights, which it would equal.

[Note: Lightning's checkpoints]
A checkpoint that is one file (single device, DDP, `save_distributed_checkpoint=False`) holds the
average as whole tensors: `torch.load(path)["dist_ema"]["averages"]["ema"]` has them under the names
of `state_dict`, which keeps the live weights. A checkpoint that is a folder of shards has a folder
`dist_ema`, written by all ranks as `ShardedEMA.save` does. Callbacks do not learn the path of a
folder, and what they add to it is saved by rank 0 only: so `trainer.save_checkpoint` is wrapped.

[Note: finders]
Lightning's finders of a learning rate or batch size save a checkpoint, train or evaluate without
callbacks, load it and delete it; `trainer.ckpt_path` then remains theirs. So a file that this run
saved itself is never resumed from. The batch size finder does that in `on_validation_start` and the
like, so the average is swapped in one event later.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.base import AveragingCallback, Decay, is_there

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from typing_extensions import Unpack

    from dist_ema.options import EMAKeywords
else:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:
        # A Trainer of either package only calls the hooks and does not check the class.
        from pytorch_lightning.callbacks import Callback

KEY = "dist_ema"  # in a checkpoint that is a file; the folder in one that is a folder
_LOG = logging.getLogger(__name__)


class EMACallback(AveragingCallback, Callback):
    """Averages the weights that a `Trainer` trains, evaluates with the average, saves and resumes.

    The average is updated at the end of each batch in which an optimizer stepped. Batches that only
    accumulate gradients, and steps that a gradient scaler skipped, do not count. Steps that bypass
    Lightning (manual optimization with the bare torch optimizer) cannot be counted. A batch whose
    `training_step` returns None counts, as in `global_step`.

    From `on_validation_epoch_start` to `on_validation_end`, and so for test and predict, the model
    computes with the average; checkpoints saved meanwhile hold live weights. After an evaluation or
    an exception, weights and buffers are what they were before; what an evaluation writes to a
    buffer is lost. A model that was not fitted is evaluated as it is, with a warning.

    `fit(ckpt_path=...)` continues the average of the checkpoint, bit for bit, under any strategy
    and number of devices that can load it; `test(ckpt_path=...)` tests that average. Checkpoints
    saved with `weights_only` hold none. A checkpoint that is one file is refused, as
    `ShardedEMA.save` does, if the average holds NaN or Inf. After `fit`, `callback.ema` is the
    `ShardedEMA`: `callback.ema.export(path)`, `.gather_state_dict()`, `.copy_to()`. With a strategy
    that spawns processes it ends with them; test from a checkpoint then.

    Args:
        decay, options: as for `ShardedEMA`. Names of weights are those in the LightningModule.
        evaluate: whether validation, test and predict use the average; with several averages, the
            name of one of them.
        optimizer: number of the optimizer whose steps count (a GAN's generator, say), from 0;
            None: any.
        missing: when a checkpoint has no average, "raise", or "restart" with a warning: the average
            starts from the weights of the checkpoint.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Communication: none in training; around evaluation that of `ShardedEMA.average_parameters`; a
    checkpoint that is one file gathers the average in the memory of rank 0.
    """

    def __init__(
        self,
        decay: Decay = 0.9999,
        *,
        evaluate: bool | str = True,
        optimizer: int | None = None,
        missing: str = "raise",
        **options: Unpack[EMAKeywords],
    ) -> None:
        super().__init__(decay, options, evaluate=evaluate, missing=missing)
        if isinstance(optimizer, bool) or not isinstance(optimizer, int | None):
            raise TypeError(
                f"optimizer is {optimizer!r}, wanted the number of an optimizer, or None"
            )
        if optimizer is not None and optimizer < 0:
            raise ValueError(f"optimizer is {optimizer}, wanted a number from 0, or None")
        self._optimizer = optimizer
        self._trainer: Any = None
        self._shown = ExitStack()
        self._own: set[str] = set()  # paths that this run of the trainer saved to
        self._path: Any = None  # of the checkpoint that the user resumes from
        self._saved: Mapping[str, Any] | None = None  # the average in it, if it is a file
        self._saved_step: int | None = None  # `ema.step` according to it
        self._pending = self._stepped = False

    # Counting.

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._settle()
        if self._optimizer is None or trainer.optimizers[self._optimizer] is optimizer:
            self._pending = True
            self._overflowed(self._scaler())

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._settle()
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

    def _settle(self) -> None:
        """Count the step that was about to happen, unless a gradient scaler skipped it."""
        if self._pending:
            self._stepped |= not self._overflowed(self._scaler())
            self._pending = False

    def _scaler(self) -> Any:
        return getattr(self._trainer.precision_plugin, "scaler", None)

    # Building and loading.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._saved = self._saved_step = self._path = None
        self._own.clear()
        if self._trainer is not trainer:
            self._trainer = trainer
            self._wrap_save(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._saved = None  # a full copy

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if str(trainer.ckpt_path) not in self._own:
            self._saved = checkpoint.get(KEY)
            self._saved_step = checkpoint["callbacks"].get(self.state_key, {}).get("step")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        num_optimizers = len(trainer.optimizers)
        if self._optimizer is not None and self._optimizer >= num_optimizers:
            raise ValueError(
                f"EMACallback: optimizer is {self._optimizer}, but the module has "
                f"{num_optimizers}, numbered from 0"
            )
        self._pending = self._stepped = False
        self._build_or_load()

    def _current(self) -> ShardedEMA | None:
        """The average of the model that the trainer has now."""
        ema = self.ema
        return ema if ema is not None and ema.model is _model_of(self._trainer) else None

    def _note_path(self) -> None:
        """Keep the path that the trainer loads, which a finder replaces by its own."""
        if str(self._trainer.ckpt_path) not in self._own:
            self._path = self._trainer.ckpt_path

    def _build_or_load(self) -> None:
        trainer = self._trainer
        self._note_path()
        if self._path is not None:
            ema = self._build(_model_of(trainer))
            self._load_saved(ema, Path(trainer.strategy.broadcast(str(self._path))))
        elif self._current() is None and trainer.state.fn == "fit":
            self._build(_model_of(trainer))
        elif self._current() is None:
            warnings.warn(
                "EMACallback: there is no average of this model, evaluation uses its live weights; "
                "fit it with this callback before, or give ckpt_path",
                stacklevel=3,
            )

    def _load_saved(self, ema: ShardedEMA, path: Path) -> None:
        saved, self._saved = self._saved, None
        if saved is not None:
            _fill(ema, saved, path)
        elif self._saved_step is not None and is_there(ema, path / KEY):
            ema.load(path / KEY)
        else:
            # Without a saved step, a folder is what an earlier checkpoint left at this path.
            problem = (
                "holds no average; it was saved without EMACallback, or weights_only, or its "
                f"folder {KEY} was lost"
            )
            self._refuse_missing(path, problem)
        if self._saved_step not in (None, ema.step):
            raise CheckpointError(
                f"{path}: its average is of step {ema.step}, its weights are of step "
                f"{self._saved_step}: saving was cut short; load another checkpoint"
            )

    # Saving.

    def state_dict(self) -> dict[str, Any]:
        return {} if (ema := self._current()) is None else {"step": ema.step}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        ema = self._current()
        if ema is None or _writes_folder(trainer.strategy):
            return
        ema.refuse_non_finite()
        state = ema.state_dict()
        averages = {
            name: {fqn: tensor for fqn, tensor in ema.gather_tensors(name) if fqn in averaged}
            for name, averaged in state["averages"].items()
        }
        if ema.group.rank == 0:
            checkpoint[KEY] = {"averages": averages, "state": state["state"]}

    def _wrap_save(self, trainer: Any) -> None:
        inner = trainer.save_checkpoint

        @functools.wraps(inner)
        def save_checkpoint(
            filepath: Any, weights_only: bool | None = None, storage_options: Any = None
        ) -> None:
            self._note_path()
            self._own.add(str(filepath))
            with self._live_weights():
                inner(filepath, weights_only, storage_options)
                ema = None if weights_only else self._current()
                if ema is not None and _writes_folder(trainer.strategy):
                    ema.save(Path(trainer.strategy.broadcast(str(filepath))) / KEY)

        trainer.save_checkpoint = save_checkpoint

    # Evaluating.

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._evaluates:
            return
        if trainer.state.fn != "fit":
            self._build_or_load()
        if self._current() is not None:
            self._show()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._shown.close()

    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._shown.__exit__(type(exception), exception, exception.__traceback__)

    def _show(self) -> None:
        outer = self._trainer.strategy.model
        if isinstance(outer, DistributedDataParallel):
            # An evaluation makes DDP assume that buffers are equal on all ranks.
            synchronizes = outer.require_forward_param_sync
            self._shown.callback(setattr, outer, "require_forward_param_sync", synchronizes)
        self._shown.enter_context(self._showing())

    @contextmanager
    def _live_weights(self) -> Iterator[None]:
        """Within the block the model has its live weights."""
        ema = self.ema if self._is_shown else None
        self._shown.close()
        try:
            yield
        except BaseException as error:
            if ema is not None and ema.group.size > 1:
                # The other ranks may not have failed, and would not join an exchange of values.
                _LOG.error("saving failed (%r); evaluation continues with live weights", error)
                ema = None
            raise
        finally:
            if ema is not None:
                self._show()


def _fill(ema: ShardedEMA, saved: Mapping[str, Any], path: Path) -> None:
    """Take the whole tensors of a checkpoint, saved by any number of ranks. Local."""
    expected, given = (
        {f"{name}: {fqn}" for name, tensors in averages.items() for fqn in tensors}
        for averages in (ema.state_dict()["averages"], saved["averages"])
    )
    if expected != given:
        raise CheckpointError(
            f"{path}: missing: {', '.join(sorted(expected - given)) or 'none'}; "
            f"unexpected: {', '.join(sorted(given - expected)) or 'none'}"
        )
    averages = {
        name: {fqn: value if value.dim() else value.view(1) for fqn, value in tensors.items()}
        for name, tensors in saved["averages"].items()
    }
    ema.load_state_dict({"averages": averages, "state": saved["state"]})


def _model_of(trainer: Any) -> Any:
    """The module that holds the weights. After `fit` there is no DDP wrapper, but its module."""
    model = trainer.strategy.model
    return trainer.lightning_module if isinstance(model, DistributedDataParallel) else model


def _writes_folder(strategy: Any) -> bool:
    """Whether checkpoints of a strategy are folders to which every rank adds.

    By class name, since either package has its own. Private names of Lightning 2.6.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if "ModelParallelStrategy" in names:
        return bool(strategy._save_distributed_checkpoint)
    if "FSDPStrategy" in names:
        return bool(strategy._state_dict_type == "sharded")
    return "DeepSpeedStrategy" in names
