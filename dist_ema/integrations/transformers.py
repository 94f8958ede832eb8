"""An average under the Hugging Face Trainer: `EMACallback(decay=0.9999).attach(trainer)`.

    trainer = Trainer(model, args, train_dataset=..., eval_dataset=...)
    ema = EMACallback(decay=0.9999, export="run/averaged").attach(trainer)
    trainer.train()

[Note: what attaching does]
A callback is told what happens, not in which Trainer, and of an evaluation only when it is over.
So `attach` takes the Trainer itself, and puts a function of its own around two of its methods:
`evaluation_loop`, through which `evaluate`, each data set of a dict, and `predict` all go, and
`_inner_training_loop`, which is told from where to resume, whatever the `train` of a subclass takes
or passes on. Nothing else of the Trainer is changed. Where a subclass resumes behind both, the
restored `global_step` tells that it did, and the average is looked for in the checkpoint of that
step.

[Note: which weights are where]
The Trainer's checkpoints hold the raw weights, which training resumes from; the average is in the
directory `ema` of each. Metrics are those of the averaged weights, and so is whatever follows from
them: early stopping, the best checkpoint, a scheduler that waits for a plateau. The model itself
holds raw weights whenever no evaluation runs, after training too, unless `copy_at_end`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dist_ema.checkpoint.directory import target
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.lerp import MultiAvgFn
from dist_ema.core.names import unwrap
from dist_ema.ema import ShardedEMA
from dist_ema.integrations.beside import is_there
from dist_ema.options import Options, average_meant, schedules_of
from dist_ema.schedule import Schedule

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

DIRECTORY = "ema"  # in each of the Trainer's checkpoints
_REMEDY = (
    "resume from one that has it, or build EMACallback with missing='restart' to start from the "
    "weights of the checkpoint"
)


class EMACallback(TrainerCallback):
    """Averages the weights that a Trainer trains, and evaluates, saves and resumes with them.

    Works with one process, DDP, FSDP and DeepSpeed, as `ShardedEMA` does. After each optimizer
    step that was not skipped the average is updated; each `evaluate()` and `predict()`, of the
    Trainer's own and of the user's, sees the averaged weights; the average is saved in each
    checkpoint, and is loaded with it by `train(resume_from_checkpoint=...)`, on any number of
    processes. Each `train()` builds the average anew, `self.ema`, once the model is wrapped and its
    weights are loaded; it stays after training.

    With `load_best_model_at_end`, the best checkpoint is the one whose averaged weights were best;
    at the end the average becomes the best one again, while the Trainer gives the model the raw
    weights of the same checkpoint. `copy_at_end` makes the model the average then. If the best
    checkpoint has no average, the last one stays and is exported, the model keeps the best raw
    weights in spite of `copy_at_end`, and that is warned of, or raised as `missing` says.

    Args:
        decay, multi_avg_fn, update_every, start_step, params, buffers, replicas, dtype, device,
            overlap: as for `ShardedEMA`. Steps are optimizer steps, whatever
            `gradient_accumulation_steps` is.
        evaluate: whether to evaluate and predict with averaged weights; with several averages, the
            name of one of them.
        export: directory for `from_pretrained`, written when training ends: the averaged weights
            (with several averages, those of the one that is evaluated), the config, and the
            processing class if the Trainer has one.
        copy_at_end: make the model the average when training ends, so that `trainer.save_model()`
            and whatever uses the model from then on have the averaged weights. Training cannot go
            on from there as if nothing had happened.
        missing: when a checkpoint to resume from has no average, "raise", or "restart" with a
            warning: the average starts from the weights of the checkpoint.

    Raises:
        ValueError, TypeError: an argument is out of range.

    The callback's calls are collective where those of `ShardedEMA` are: all ranks run one Trainer
    each, and see one file system. A checkpoint that is written past the event `on_save`, as
    `enable_jit_checkpoint` does on SIGTERM, has no average.
    """

    def __init__(
        self,
        decay: float | Schedule | Mapping[str, float | Schedule] = 0.9999,
        *,
        evaluate: bool | str = True,
        export: str | Path | None = None,
        copy_at_end: bool = False,
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
        self.ema: ShardedEMA | None = None
        self._make: Callable[[nn.Module], ShardedEMA]
        self._make = functools.partial(ShardedEMA, decay=decay, **options)
        self._name = average_meant(
            evaluate, list(schedules), needed=export is not None or copy_at_end
        )
        self._evaluates = evaluate is not False
        self._export, self._copy_at_end, self._missing = export, copy_at_end, missing
        self._trainer: Trainer | None = None
        self._resume_from: Path | None = None
        self._trial: Any = None
        self._is_shown = False
        self._has_warned = False
        self._scale = 1.0

    def attach(self, trainer: Trainer) -> EMACallback:
        """Belong to a Trainer; call it before `train()`. Local. Returns the callback itself.

        It is added to the Trainer's callbacks, if it is not among them yet; `remove_callback` takes
        it away again, and evaluations then use the raw weights. See [Note: what attaching does].

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
        def train_and_tell(*args: Any, **kwargs: Any) -> Any:
            # `train` names them, and has found the last checkpoint by now if it was to.
            self._trial, source = kwargs.get("trial"), kwargs.get("resume_from_checkpoint")
            self._resume_from = Path(source) if source else None
            return train(*args, **kwargs)

        @functools.wraps(evaluation_loop)
        def evaluate_average(*args: Any, **kwargs: Any) -> Any:
            with self._showing():
                return evaluation_loop(*args, **kwargs)

        trainer._inner_training_loop = train_and_tell  # type: ignore[method-assign]
        trainer.evaluation_loop = evaluate_average  # type: ignore[method-assign]
        return self

    def _times_listed(self) -> int:
        """How often the Trainer calls this callback for an event: none, once it is removed."""
        assert self._trainer is not None
        return sum(other is self for other in self._trainer.callback_handler.callbacks)

    @contextmanager
    def raw_weights(self) -> Iterator[None]:
        """Within the block `evaluate()` and `predict()` use the raw weights, to compare. Local."""
        evaluates, self._evaluates = self._evaluates, False
        try:
            yield
        finally:
            self._evaluates = evaluates

    # What the Trainer tells.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is None:
            raise RuntimeError(
                "this EMACallback does not know its Trainer: call ema.attach(trainer) before "
                "trainer.train()"
            )
        with Group().together():
            if (times := self._times_listed()) > 1:
                raise RuntimeError(
                    f"this EMACallback is {times} times among the Trainer's callbacks, so it would "
                    "count each step as often; add it once: attach(trainer) does it"
                )
            self._refuse_export_at_a_file()
        if self._evaluates and args.load_best_model_at_end and not self._copy_at_end:
            warnings.warn(
                "load_best_model_at_end: the metric is that of the averaged weights. At the end "
                "the average is the best one again, and is what evaluate() and predict() use, but "
                "the model holds the raw weights of that checkpoint, and save_model() writes "
                "those; build EMACallback with copy_at_end=True to have the model be the best "
                "average, or with export= to write it",
                stacklevel=2,
            )
        self.ema = None  # lets go of an earlier one before there is room for the next
        self.ema = self._make(self._trainer.model_wrapped)
        self._scale = self._scale_now()
        if self._resume_from is not None:
            self._resume(self.ema, self._resume_from / DIRECTORY, "this checkpoint was saved")
        elif state.global_step > 0:
            path = self._directory_of(state.global_step)
            told = (
                f"training goes on from step {state.global_step}, and not from a "
                "resume_from_checkpoint that the callback could see; the checkpoint of that step is"
            )
            if self._resume(self.ema, path, told):
                warnings.warn(f"{path}: the average is taken from here; {told} this", stacklevel=2)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Under DeepSpeed, `update` itself asks the engine.
        if not self._was_skipped(kwargs["optimizer"]):
            self._built().update()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._built().save(self._directory_of(state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ema, best, lost = self._built(), state.best_model_checkpoint, None
        if self._evaluates and args.load_best_model_at_end and best is not None:
            path = Path(best) / DIRECTORY
            if is_there(ema, path):
                ema.load(path)
            else:
                lost = self._without_best(path, ema.step)
        if self._copy_at_end and lost is None:
            ema.copy_to(name=self._name)
        if self._export is not None:
            ema.export(self._export, name=self._name)
            processing = kwargs.get("processing_class")
            with Group().together():
                if processing is not None and args.should_save:
                    processing.save_pretrained(self._export)
        if lost is not None and self._missing == "raise":
            raise CheckpointError(lost)
        if lost is not None:
            warnings.warn(lost, stacklevel=2)

    # Inside.

    def _directory_of(self, step: int) -> Path:
        """The average in the checkpoint of a step of this run."""
        assert self._trainer is not None
        run = Path(self._trainer._get_output_dir(self._trial))
        return run / f"{PREFIX_CHECKPOINT_DIR}-{step}" / DIRECTORY

    def _refuse_export_at_a_file(self) -> None:
        """Now and not when training has ended. Local."""
        if self._export is None:
            return
        path = target(Path(self._export))
        there = next(place for place in (path, *path.parents) if place.exists())
        if not there.is_dir():
            raise FileExistsError(
                f"export is {str(self._export)!r}, but {there} is a file; name a directory, or one "
                "to be made"
            )

    def _without_best(self, path: Path, step: int) -> str:
        """What to say at the end if the best checkpoint has no average."""
        written = "" if self._export is None else f", which {self._export} has"
        copied = " (copy_at_end has not replaced them)" if self._copy_at_end else ""
        return (
            f"{path}: the best checkpoint has no average, so the best average cannot be had again. "
            f"The average is the last one, of step {step}{written}; the model holds the raw "
            f"weights of the best checkpoint{copied}. Call ema.ema.copy_to() to have it be the "
            "last average"
        )

    def _built(self) -> ShardedEMA:
        assert self.ema is not None, "the Trainer trains without having begun to"
        return self.ema

    def _was_skipped(self, optimizer: Any) -> bool:
        """Whether gradients overflowed, so that the step that has just been taken changed nothing.

        With fp16, costs a host sync. The optimizer alone does not know if it is fused.
        """
        before, self._scale = self._scale, self._scale_now()
        return getattr(optimizer, "step_was_skipped", False) or self._scale < before

    def _scale_now(self) -> float:
        """What losses are multiplied by for fp16: only an overflow makes it smaller."""
        scaler = getattr(getattr(self._trainer, "accelerator", None), "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Within the block the model shows the average, if there is one and it is wanted."""
        if not self._times_listed():
            yield
            return
        if self.ema is None and self._evaluates and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "there is no average yet, train() makes it: evaluate() and predict() use the raw "
                "weights",
                stacklevel=5,  # who calls evaluate()
            )
        # A metric may itself evaluate.
        if self.ema is None or not self._evaluates or self._is_shown:
            yield
            return
        assert self._trainer is not None
        model = self._trainer.model
        if model is not None and unwrap(model) is not unwrap(self.ema._average.model):
            warnings.warn(
                "trainer.model is not the model that was trained, of which there is an average: "
                "evaluate() and predict() use its own weights",
                stacklevel=5,  # who calls evaluate()
            )
        with self.ema.average_parameters(self._name):
            self._is_shown = True
            try:
                yield
            finally:
                self._is_shown = False

    def _resume(self, ema: ShardedEMA, path: Path, told: str) -> bool:
        """Load the average, or start from the weights of now with a warning if that is wanted.

        Returns whether it was loaded. `told` begins the message if nothing is there.
        """
        if is_there(ema, path):
            ema.load(path)
            return True
        if self._missing == "raise":
            raise CheckpointError(f"{path}: {told} without the average; {_REMEDY}")
        warnings.warn(
            f"{path}: {told} without the average; it starts again from the weights of now",
            stacklevel=3,
        )
        return False
