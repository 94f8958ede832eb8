"""An average under the Hugging Face Trainer: `EMACallback(decay=0.9999).attach(trainer)`.

    trainer = Trainer(model, args, train_dataset=..., eval_dataset=...)
    ema = EMACallback(decay=0.9999, export="run/averaged").attach(trainer)
    trainer.train()

[Note: what attaching does]
A callback does not get its Trainer, and hears of an evaluation only when it is over. So `attach`
wraps two methods of the Trainer: `evaluation_loop`, which `evaluate` (for each data set of a dict)
and `predict` call, and `_inner_training_loop`, which gets the checkpoint to resume from, whatever a
subclass passes to `train`. Where a subclass resumes without either, the restored `global_step`
shows it, and the average is read from the checkpoint of that step.

[Note: which weights are where]
The Trainer's checkpoints hold the raw weights, from which training resumes, and the average in the
directory `ema`. Metrics are those of the averaged weights, and so is whatever depends on them:
early stopping, the best checkpoint, a scheduler that waits for a plateau. Outside evaluations the
model holds raw weights, after training too, unless `copy_at_end`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.core.names import unwrap
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.base import AveragingCallback, Decay, is_there

if TYPE_CHECKING:
    from transformers import Trainer
    from typing_extensions import Unpack

    from dist_ema.options import EMAKeywords

DIRECTORY = "ema"  # in each of the Trainer's checkpoints


class EMACallback(AveragingCallback, TrainerCallback):
    """Averages the weights that a Trainer trains, and evaluates, saves and resumes with them.

    Works with one process, DDP, FSDP and DeepSpeed, as `ShardedEMA` does. The average is updated
    after each optimizer step that was not skipped. Each `evaluate()` and `predict()` uses the
    averaged weights. Each checkpoint holds the average, which `train(resume_from_checkpoint=...)`
    loads on any number of processes. Each `train()` builds the average, `self.ema`, once the model
    is wrapped and its weights are loaded; it remains after training.

    With `load_best_model_at_end`, the best checkpoint is the one whose averaged weights were best.
    At the end the average becomes the best one again, and the Trainer gives the model the raw
    weights of that checkpoint; with `copy_at_end` the model becomes the average. If the best
    checkpoint has no average, the last average remains and is exported, the model keeps the best
    raw weights, and `missing` decides between a warning and an error.

    Args:
        decay, options: as for `ShardedEMA`. Steps are optimizer steps, whatever
            `gradient_accumulation_steps` is.
        evaluate: whether to evaluate and predict with averaged weights; with several averages, the
            name of one of them.
        export: directory for `from_pretrained`, written when training ends: the averaged weights
            (of several averages, the evaluated one), the config, and the Trainer's processing
            class.
        copy_at_end: make the model the average when training ends, so that `trainer.save_model()`
            and everything that follows uses the averaged weights.
        missing: when a checkpoint to resume from has no average, "raise", or "restart" with a
            warning: the average starts from the weights of the checkpoint.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Calls are collective where those of `ShardedEMA` are: all ranks run one Trainer each, on a
    shared file system. A checkpoint that is written without the event `on_save`, as
    `enable_jit_checkpoint` does on SIGTERM, has no average.
    """

    def __init__(
        self,
        decay: Decay = 0.9999,
        *,
        evaluate: bool | str = True,
        export: str | Path | None = None,
        copy_at_end: bool = False,
        missing: str = "raise",
        **options: Unpack[EMAKeywords],
    ) -> None:
        needs_name = export is not None or copy_at_end
        super().__init__(decay, options, evaluate=evaluate, missing=missing, needs_name=needs_name)
        self._export, self._copy_at_end = export, copy_at_end
        self._trainer: Any = None
        self._resume_from: Path | None = None
        self._trial: Any = None
        self._has_warned = False

    def attach(self, trainer: Trainer) -> EMACallback:
        """Join a Trainer; call it before `train()`. Local. Returns the callback itself.

        Adds the callback to the Trainer's callbacks unless it is among them. `remove_callback`
        removes it, and evaluations then use the raw weights. See [Note: what attaching does].

        Raises:
            ValueError: it is attached already, or the Trainer has another one.
        """
        if self._trainer is not None:
            raise ValueError("this EMACallback is attached to a Trainer already; make another one")
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(other, EMACallback) and other is not self for other in callbacks):
            raise ValueError(
                "this Trainer has an EMACallback already; several averages are one callback's: "
                "decay={'short': 0.999, 'long': 0.9999}"
            )
        if self not in callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        train, evaluation_loop = trainer._inner_training_loop, trainer.evaluation_loop

        @functools.wraps(train)
        def train_from(*args: Any, **kwargs: Any) -> Any:
            # `train` passes both by name, and has resolved `resume_from_checkpoint=True`.
            self._trial, source = kwargs.get("trial"), kwargs.get("resume_from_checkpoint")
            self._resume_from = Path(source) if source else None
            return train(*args, **kwargs)

        @functools.wraps(evaluation_loop)
        def evaluate_average(*args: Any, **kwargs: Any) -> Any:
            if not self._evaluates or self._is_shown or not self._times_listed():
                return evaluation_loop(*args, **kwargs)
            self._warn_of_raw_weights()
            with self._showing():
                return evaluation_loop(*args, **kwargs)

        trainer._inner_training_loop = train_from  # type: ignore[method-assign]
        trainer.evaluation_loop = evaluate_average  # type: ignore[method-assign]
        return self

    @contextmanager
    def raw_weights(self) -> Iterator[None]:
        """Within the block `evaluate()` and `predict()` use the raw weights, to compare. Local."""
        evaluates, self._evaluates = self._evaluates, False
        try:
            yield
        finally:
            self._evaluates = evaluates

    # Events.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer is None:
            raise RuntimeError(
                "this EMACallback does not know its Trainer: call ema.attach(trainer) before "
                "trainer.train()"
            )
        if self._evaluates and args.load_best_model_at_end and not self._copy_at_end:
            warnings.warn(
                "load_best_model_at_end: the metric is that of the averaged weights. At the end "
                "evaluate() and predict() use the best average, but the model holds the raw "
                "weights of that checkpoint, and save_model() writes those; build EMACallback with "
                "copy_at_end=True to make the model the best average, or with export= to write it",
                stacklevel=2,
            )
        ema = self._build(self._trainer.model_wrapped)
        with ema.group.together():
            self._refuse_misuse()
        self._overflowed(self._scaler())
        path, problem = None, "this checkpoint was saved without the average"
        if self._resume_from is not None:
            path = self._resume_from / DIRECTORY
        elif state.global_step > 0:
            path = self._directory_of(state.global_step)
            problem = (
                f"training goes on from step {state.global_step}, and not from a "
                "resume_from_checkpoint that the callback could see; the checkpoint of that step "
                "is without the average"
            )
        if path is None:
            return
        if not is_there(ema, path):
            self._refuse_missing(path, problem)
            return
        ema.load(path)
        if self._resume_from is None:
            warnings.warn(
                f"{path}: the average is taken from here; training goes on from step "
                f"{state.global_step}, and the callback saw no resume_from_checkpoint",
                stacklevel=2,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Under DeepSpeed, `update` itself asks the engine. A fused optimizer reports no overflow.
        overflowed = self._overflowed(self._scaler())
        if not overflowed and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._built().update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._built().save(self._directory_of(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ema, best, problem = self._built(), state.best_model_checkpoint, None
        if self._evaluates and args.load_best_model_at_end and best is not None:
            path = Path(best) / DIRECTORY
            if is_there(ema, path):
                ema.load(path)
            else:
                problem = (
                    f"{path}: the best checkpoint has no average, so the best average is lost. The "
                    f"average is the last one, of step {ema.step}"
                    + (f", which {self._export} has" if self._export is not None else "")
                    + "; the model holds the raw weights of the best checkpoint"
                    + (" (copy_at_end has not replaced them)" if self._copy_at_end else "")
                    + ". Call ema.ema.copy_to() to make it the last average"
                )
        if self._copy_at_end and problem is None:
            ema.copy_to(name=self._name)
        if self._export is not None:
            ema.export(self._export, name=self._name)
            processing = kwargs.get("processing_class")
            with ema.group.together():
                if processing is not None and args.should_save:
                    processing.save_pretrained(self._export)
        if problem is not None and self._missing == "raise":
            raise CheckpointError(problem)
        if problem is not None:
            warnings.warn(problem, stacklevel=2)

    # Inside.

    def _built(self) -> ShardedEMA:
        assert self.ema is not None, "on_train_begin comes first"
        return self.ema

    def _directory_of(self, step: int) -> Path:
        """The average in the checkpoint of a step of this run."""
        run = Path(self._trainer._get_output_dir(self._trial))
        return run / f"{PREFIX_CHECKPOINT_DIR}-{step}" / DIRECTORY

    def _scaler(self) -> Any:
        """The gradient scaler of fp16."""
        return getattr(getattr(self._trainer, "accelerator", None), "scaler", None)

    def _times_listed(self) -> int:
        """How often the Trainer calls this callback for an event; 0 once it is removed."""
        return sum(other is self for other in self._trainer.callback_handler.callbacks)

    def _refuse_misuse(self) -> None:
        """Raise before the first step what would fail at the end. Local."""
        if (times := self._times_listed()) > 1:
            raise RuntimeError(
                f"this EMACallback is {times} times among the Trainer's callbacks, so it would "
                "count each step as often; add it once: attach(trainer) does it"
            )
        path = None if self._export is None else Path(self._export).absolute()
        file = next((p for p in (path, *path.parents) if p.is_file()), None) if path else None
        if file is not None:
            raise FileExistsError(
                f"export is {str(self._export)!r}, but {file} is a file; name a directory"
            )

    def _warn_of_raw_weights(self) -> None:
        """Warn if an evaluation cannot use the average. Local."""
        problem = None
        if self.ema is None:
            if not self._has_warned:
                problem = (
                    "there is no average yet, train() makes it: evaluate() and predict() use the "
                    "raw weights"
                )
            self._has_warned = True
        elif self._trainer.model is not None:
            if unwrap(self._trainer.model) is not unwrap(self.ema.model):
                problem = (
                    "trainer.model is not the model that was trained, of which there is an "
                    "average: evaluate() and predict() use its own weights"
                )
        if problem is not None:
            warnings.warn(problem, stacklevel=4)  # the caller of evaluate()
