"""`EMACallback`: averaged weights in a Trainer of `lightning` or `pytorch_lightning`.

Tested with one device, DDP and `ModelParallelStrategy`; `FSDPStrategy` and others need a GPU.

[Note: Lightning's events]
Some strategies load a checkpoint after `on_fit_start`, so the average is built at `on_train_start`.
Callbacks do not learn a checkpoint's path, and only rank 0 saves what they add to a folder of
shards, so `trainer.save_checkpoint` is wrapped. `trainer.ckpt_path` may be a file that a finder of
learning rates or batch sizes made: it is ignored. Such a finder may run in `on_validation_start`,
so the average is swapped in one event later.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from dist_ema.core.errors import CheckpointError
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.base import RESTART, AveragingCallback, Decay, load_from
from dist_ema.options import EMAKeywords

try:  # A Trainer of either package only calls the hooks and does not check the class.
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]

KEY = "dist_ema"  # in a checkpoint that is a file; the folder in one that is a folder


class EMACallback(AveragingCallback, Callback):
    """Averages the weights that a `Trainer` trains. Evaluates with the average, saves and loads it.

    The average, `self.ema`, is updated at the end of each batch in which an optimizer stepped and
    no gradient scaler skipped the step. Validation, test and predict use it; afterwards, also on an
    exception, weights and buffers are what they were. Checkpoints hold live weights and the average
    (one file: whole, under `torch.load(path)["dist_ema"]["averages"]["ema"]`; a folder of shards:
    in a folder `dist_ema`). `ckpt_path=` of `fit` or `test` loads it on any number of devices.

    Args:
        decay, options: as for `ShardedEMA`. Names of weights are those in the LightningModule.
        evaluate: whether evaluations use the average; or the name of one of several averages.
        optimizer: number of the optimizer whose steps count, from 0 (a GAN's generator, say).
        missing: when a checkpoint has no average (`weights_only`, say), "raise", or "restart" with
            a warning: the average starts from the weights of the checkpoint.
        log: whether to log `ema/decay` and `ema/updates` at logging steps, and `ema/drift` where
            the average is validated or saved; of several averages, `ema/<name>/decay`.
    """

    def __init__(
        self,
        decay: Decay = 0.9999,
        *,
        evaluate: bool | str = True,
        optimizer: int | None = None,
        missing: str = "raise",
        log: bool = True,
        **options: Unpack[EMAKeywords],
    ) -> None:
        super().__init__(decay, options, evaluate, missing, log)
        if optimizer is not None and (type(optimizer) is not int or optimizer < 0):
            raise ValueError(f"optimizer is {optimizer!r}, wanted a number from 0, or None")
        self._optimizer = optimizer
        self._shown = ExitStack()
        self._own: set[str] = set()  # paths that this run of the trainer saved to
        self._path: Any = None  # of the checkpoint that the user resumes from
        self._saved: Mapping[str, Any] | None = None  # the average, if that checkpoint is a file
        self._saved_step: int | None = None  # `ema.step` according to it
        self._pending = self._stepped = False

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._settle()
        if self._optimizer is None or trainer.optimizers[self._optimizer] is optimizer:
            self._pending = True
            self._overflowed(self._trainer.precision_plugin)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._settle()
        if self._stepped and self.ema:
            self.ema.update()
            self._tell_loggers(drift=False)
        self._stepped = False

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.ema and self.ema.step == 0 and trainer.fit_loop.epoch_loop.total_batch_idx >= 0:
            text = "with manual optimization, step what self.optimizers() returns"
            warnings.warn(f"EMACallback saw no optimizer step; {text}", stacklevel=2)

    def _settle(self) -> None:
        """Count the step that was about to happen, unless a gradient scaler skipped it."""
        if self._pending:
            self._stepped |= not self._overflowed(self._trainer.precision_plugin)
            self._pending = False

    def _tell_loggers(self, *, drift: bool) -> None:
        """Log to each logger, as Lightning's monitors do. Collective if `drift`.

        Private names, checked in Lightning 2.6.
        """
        trainer = self._trainer
        is_time = self._logs and (drift or trainer._logger_connector.should_update_logs)
        if is_time and trainer.state.fn == "fit" and (trainer.training or trainer.validating):
            metrics = self._metrics(drift=drift)
            for logger in trainer.loggers if metrics else ():
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._saved = self._saved_step = self._path = None
        self._own.clear()
        if self._trainer is not trainer:
            self._trainer = trainer
            trainer.save_checkpoint = functools.partial(self._save, trainer.save_checkpoint)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if str(trainer.ckpt_path) not in self._own:
            uses_average = self._evaluates or trainer.state.fn == "fit"
            self._saved = checkpoint.get(KEY) if uses_average else None
            self._saved_step = checkpoint["callbacks"].get(self.state_key, {}).get("step")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        number, total = self._optimizer or 0, len(trainer.optimizers)
        if number >= max(total, 1):
            raise ValueError(f"optimizer is {number}, but the module has {total}, numbered from 0")
        self._pending = self._stepped = False
        self._build_or_load()

    def _current(self) -> ShardedEMA | None:
        """The average of the model that the trainer has now."""
        return self.ema if self.ema and self.ema.model is self._model() else None

    def _model(self) -> Any:
        """The module that holds the weights. After `fit`, a DDP model is not wrapped any more."""
        model, bare = self._trainer.strategy.model, self._trainer.lightning_module
        return bare if isinstance(model, DistributedDataParallel) else model

    def _note_path(self) -> None:
        """Keep the path that the trainer loads, which a finder replaces by its own."""
        if str(self._trainer.ckpt_path) not in self._own:
            self._path = self._trainer.ckpt_path

    def _build_or_load(self) -> None:
        self._note_path()
        if self._path is not None:
            self._load(self._build(self._model()))
        elif self._current() is None and self._trainer.state.fn == "fit":
            self._build(self._model())
        elif self._current() is None:
            text = "there is no average of this model, evaluation uses its live weights"
            warnings.warn(f"EMACallback: {text}; fit it before, or give ckpt_path", stacklevel=3)

    def _load(self, ema: ShardedEMA) -> None:
        path = Path(self._trainer.strategy.broadcast(str(self._path)))
        saved, self._saved = self._saved, None
        if saved is not None:
            for tensors in saved["averages"].values():
                tensors |= {fqn: t.view(1) for fqn, t in tensors.items() if t.dim() == 0}
            ema.load_state_dict(saved)
        # Without a saved step, a folder is what an earlier checkpoint left at this path.
        elif self._saved_step is None or not load_from(ema, path / KEY):
            reason = "saved without EMACallback, or weights_only, or without its folder dist_ema"
            self._report(f"{path}: holds no average, {reason}; {RESTART}")
        if self._saved_step not in (None, ema.step):
            steps = f"average is of step {ema.step}, its weights are of step {self._saved_step}"
            raise CheckpointError(f"{path}: its {steps}: saving was cut short; load another one")

    def state_dict(self) -> dict[str, Any]:
        return {} if (ema := self._current()) is None else {"step": ema.step}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        ema = self._current()
        if ema is None or _writes_folder(trainer.strategy):
            return
        ema.refuse_non_finite()
        state, whole = ema.state_dict(), {}
        for name, averaged in state["averages"].items():
            whole[name] = {fqn: t for fqn, t in ema.gather_tensors(name) if fqn in averaged}
        if ema.group.rank == 0:
            checkpoint[KEY] = {"averages": whole, "state": state["state"]}

    def _save(
        self, inner: Any, filepath: Any, weights_only: Any = None, storage_options: Any = None
    ) -> None:
        """Replaces `trainer.save_checkpoint`, which is `inner`: the model has its live weights."""
        self._note_path()
        self._own.add(str(filepath))
        strategy, ema, shows = self._trainer.strategy, self._current(), self._is_shown
        self._shown.close()
        try:
            if ema is not None and not weights_only:
                self._tell_loggers(drift=True)
            inner(filepath, weights_only, storage_options)
            if ema is not None and not weights_only and _writes_folder(strategy):
                ema.save(Path(strategy.broadcast(str(filepath))) / KEY)
        except BaseException:
            if shows and ema is not None and ema.group.size == 1:
                self._show()  # on one rank only: ranks that have not failed would not join
            raise
        if shows:
            self._show()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._evaluates and trainer.state.fn != "fit":
            self._build_or_load()
        if self._evaluates and self._current() is not None:
            self._tell_loggers(drift=True)
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


def _writes_folder(strategy: Any) -> bool:
    """Whether every rank writes to a checkpoint. By private names of Lightning 2.6."""
    cuts = getattr(strategy, "_state_dict_type", "") == "sharded"  # FSDPStrategy
    cuts |= getattr(strategy, "_save_distributed_checkpoint", False)  # ModelParallelStrategy
    return cuts or getattr(strategy, "strategy_name", "") == "deepspeed"
