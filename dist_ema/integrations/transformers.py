"""An average under the Hugging Face Trainer: `EMACallback(decay=0.9999).attach(trainer)`.

[Note: what attaching does]
A callback does not get its Trainer, and is called after evaluations and after loggers. So `attach`
wraps `log`, `evaluation_loop`, which `evaluate` and `predict` call, and `_inner_training_loop`,
which gets the checkpoint to resume from. Where a subclass resumes without it, the average is read
from the checkpoint of the restored `global_step`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import Unpack

from dist_ema.core.names import unwrap
from dist_ema.integrations.base import RESTART, AveragingCallback, Decay, load_from
from dist_ema.options import EMAKeywords

DIRECTORY = "ema"  # in each of the Trainer's checkpoints


class EMACallback(AveragingCallback, TrainerCallback):
    """Averages the weights that a Trainer trains, and evaluates, saves and resumes with them.

    Each `train()` builds the average, `self.ema`, and updates it after each optimizer step that was
    not skipped. `evaluate()` and `predict()` use it; otherwise the model holds raw weights. Each
    checkpoint has it in the directory `ema`; `train(resume_from_checkpoint=...)` loads it on any
    number of processes. With `load_best_model_at_end`, it becomes the best one at the end, and the
    model gets the raw weights of that checkpoint.

    Args:
        decay, options: as for `ShardedEMA`. Steps are optimizer steps, not batches.
        evaluate: whether to evaluate with averaged weights; or the name of one of several averages.
        export: directory for `from_pretrained`, written when training ends, with config and
            processing class. Of several averages, the evaluated one.
        copy_at_end: make the model the average when training ends, for `trainer.save_model()`.
        missing: when a checkpoint has no average, "raise", or "restart" with a warning: the average
            starts from the weights of the checkpoint.
        log: whether to log `ema/decay` and `ema/updates` with the training loss, and `ema/drift`
            where the average is evaluated or saved; of several averages, `ema/<name>/decay`.
    """

    def __init__(
        self,
        decay: Decay = 0.9999,
        *,
        evaluate: bool | str = True,
        export: str | Path | None = None,
        copy_at_end: bool = False,
        missing: str = "raise",
        log: bool = True,
        **options: Unpack[EMAKeywords],
    ) -> None:
        names_one = (bool(export) or copy_at_end) if evaluate is False else evaluate
        super().__init__(decay, options, names_one, missing, log)
        self._evaluates, self._has_warned = evaluate is not False, False
        self._export, self._copy_at_end = export, copy_at_end
        self._trial: Any = None
        self._resume_from: Path | None = None

    def attach(self, trainer: Trainer) -> EMACallback:
        """Join a Trainer before `train()`, until `trainer.remove_callback`. Local. Returns self."""
        if self._trainer is not None:
            raise ValueError("this EMACallback is attached to a Trainer already; make another one")
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(other, EMACallback) and other is not self for other in callbacks):
            text = "several averages are one callback's: decay={'short': 0.999, 'long': 0.9999}"
            raise ValueError(f"this Trainer has an EMACallback already; {text}")
        if self not in callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        methods: Any = trainer
        methods._inner_training_loop = functools.partial(self._train, trainer._inner_training_loop)
        methods.evaluation_loop = functools.partial(self._evaluate, trainer.evaluation_loop)
        methods.log = functools.partial(self._log, trainer.log)
        return self

    def _train(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # `train` passes both by name, and has resolved `resume_from_checkpoint=True`.
        self._trial, source = kwargs.get("trial"), kwargs.get("resume_from_checkpoint")
        self._resume_from = Path(source) if source else None
        return inner(*args, **kwargs)

    def _evaluate(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._evaluates or self._is_shown or not self._times_listed():
            return inner(*args, **kwargs)
        if self.ema is None and not self._has_warned:
            self._has_warned = True
            text = "there is no average yet, train() makes it: an evaluation uses the raw weights"
            warnings.warn(text, stacklevel=3)  # the caller of evaluate()
        elif self.ema is not None and unwrap(self._trainer.model) is not unwrap(self.ema.model):
            text = "trainer.model is not the model that was trained, and is evaluated as it is"
            warnings.warn(text, stacklevel=3)
        self._log_drift()
        with self._showing():
            return inner(*args, **kwargs)

    def _log(self, inner: Callable[..., Any], logs: dict[str, float], *args: Any, **kw: Any) -> Any:
        if "loss" in logs and self._times_listed():  # a logging step; any rank may log other things
            logs.update(self._metrics())
        return inner(logs, *args, **kw)

    def _log_drift(self) -> None:
        if drift := self._metrics(drift=True):  # collective
            self._trainer.log(drift)

    @contextmanager
    def raw_weights(self) -> Iterator[None]:
        """Within the block `evaluate()` and `predict()` use the raw weights, to compare. Local."""
        evaluates, self._evaluates = self._evaluates, False
        try:
            yield
        finally:
            self._evaluates = evaluates

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is None:
            raise RuntimeError("call ema.attach(trainer) before trainer.train()")
        if self._evaluates and args.load_best_model_at_end and not self._copy_at_end:
            warnings.warn(
                "load_best_model_at_end: at the end the average is the best one, but the model "
                "holds the raw weights of that checkpoint; copy_at_end=True makes it the average",
                stacklevel=2,
            )
        ema, step = self._build(self._trainer.model_wrapped), state.global_step
        with ema.group.together():
            if (times := self._times_listed()) > 1:
                raise RuntimeError(
                    f"this EMACallback is {times} times among the Trainer's callbacks, and would "
                    f"count each step {times} times; attach(trainer) adds it once"
                )
            path = Path(self._export or ".").absolute()
            if file := next((p for p in (path, *path.parents) if p.is_file()), None):
                raise FileExistsError(f"export={self._export}: {file} is a file; name a directory")
        self._overflowed(self._trainer.accelerator)
        if (source := self._resume_from) is None and step == 0:
            return
        path = (source or self._checkpoint(step)) / DIRECTORY
        goes_on = "" if source else f"training goes on from step {step}, "
        if not load_from(ema, path):
            self._report(f"{path}: {goes_on}the checkpoint has no average; {RESTART}")
        elif goes_on:
            warnings.warn(
                f"{path}: {goes_on}the average is loaded from this directory", stacklevel=2
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.ema is not None
        # A fused optimizer does not report that it skipped. DeepSpeed's engine counts by itself.
        overflowed = self._overflowed(self._trainer.accelerator)
        if not overflowed and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.ema.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.ema is not None
        self._log_drift()
        self.ema.save(self._checkpoint(state.global_step) / DIRECTORY)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ema, best, problem = self.ema, state.best_model_checkpoint, None
        assert ema is not None
        if self._evaluates and args.load_best_model_at_end and best is not None:
            if not load_from(ema, Path(best) / DIRECTORY):
                problem = (
                    f"{best}: the best checkpoint has no average, the last is of step {ema.step}. "
                    "The model holds raw weights: copy_at_end has not replaced them"
                )
        if self._copy_at_end and problem is None:
            ema.copy_to(name=self._name)
        if self._export is not None:
            ema.export(self._export, name=self._name)
            with ema.group.together():
                if kwargs.get("processing_class") is not None and args.should_save:
                    kwargs["processing_class"].save_pretrained(self._export)
        if problem is not None:
            self._report(problem)

    def _checkpoint(self, step: int) -> Path:
        return Path(self._trainer._get_output_dir(self._trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")

    def _times_listed(self) -> int:
        """How often the Trainer calls this callback for an event; 0 once it is removed."""
        return sum(other is self for other in self._trainer.callback_handler.callbacks)
