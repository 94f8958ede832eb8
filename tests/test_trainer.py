"""The Hugging Face Trainer: updates, evaluation, checkpoints and export with the average."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_ema.checkpoint import CheckpointError
from tests.oracle import Oracle, worst_relative_error
from tests.runs import DECAY, MAX_RELATIVE_ERROR, same, to_zero
from tests.worlds import barrier, from_rank_0, num_ranks, rank
from tests.worlds_accelerate import CUT_BY
from tests.worlds_deepspeed import skip_without_overflow_checks
from tests.worlds_trainer import (
    EVALUATED,
    every_kind,
    full_weights,
    losses,
    losses_of_plain,
    trainer_of,
    with_weights,
)


def ema_callback(*args: Any, **options: Any) -> Any:
    """Imported in the workers only: transformers takes seconds."""
    from dist_ema.integrations.transformers import EMACallback

    return EMACallback(*args, **options)


@contextmanager
def attached(
    kind: str, directory: Path, *, decay: Any = DECAY, ema: Any = None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A Trainer and its callback, whose `weights` are the full ones before and after each step."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            callback.weights = [full_weights(kind, trainer)]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            callback.weights.append(full_weights(kind, trainer))

    with trainer_of(kind, directory, **options) as trainer:
        trainer.add_callback(Recorder())
        callback = ema_callback(decay, **(ema or {})).attach(trainer)
        yield trainer, callback


@contextmanager
def trained(
    *args: Any, zeros: bool = False, resume: Any = None, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """The same after training, with an average or with zeros."""
    options |= {"ema": {"multi_avg_fn": to_zero}} if zeros else {}
    with attached(*args, **options) as (trainer, callback):
        trainer.train(resume_from_checkpoint=resume)
        yield trainer, callback


SAVES = {"save_strategy": "steps", "save_steps": 2}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 1}
KEEPS_BEST = {
    **EVALUATES,
    **SAVES,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_first_loss",
}


def assert_average_is_right(callback: Any) -> None:
    """It is the float64 one of the recorded weights."""
    oracle = Oracle(callback.weights[0], DECAY)
    for weights in callback.weights[1:]:
        oracle.update(weights)
    assert worst_relative_error(averages(callback), oracle.average) <= MAX_RELATIVE_ERROR


def averages(callback: Any) -> dict[str, Tensor]:
    """The averaged state dict, on every rank."""
    return from_rank_0(callback.ema.gather_state_dict())


def reloaded(directory: Path) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


@every_kind
def test_the_average_is_that_of_the_weights_after_each_step_is_logged_and_is_what_evaluates(
    kind: str, tmp_path: Path
):
    from transformers import TrainerCallback

    drifts, live_keys = {}, {"epoch", "step", "loss", "grad_norm", "learning_rate"}

    class Drifts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            drifts[state.global_step] = callback.ema.drift()

    logs = {"logging_strategy": "steps", "logging_steps": 2}
    evaluates = {**EVALUATES, "eval_steps": 3}
    options = {**logs, **evaluates, **SAVES, "max_steps": 6, "gradient_accumulation_steps": 2}
    with attached(kind, tmp_path, **options) as (trainer, callback):
        trainer.add_callback(Drifts())
        trainer.train()
        ema, live, lines = callback.ema, callback.weights[-1], [*trainer.state.log_history]
        assert trainer.accelerator.num_processes == num_ranks()
        assert CUT_BY[kind] in repr(ema)
        assert (ema.step, ema.num_updates, trainer.state.global_step) == (6, 6, 6)
        assert_average_is_right(callback)
        metrics = trainer.evaluate()
        assert not any(name.startswith("ema/") for name in metrics)
        found = losses(metrics)
        in_training = {k: v for line in lines if line["step"] == 6 for k, v in losses(line).items()}
        assert found == in_training
        predicted = losses(trainer.predict(EVALUATED["first"]).metrics)
        with callback.raw_weights():
            raw = losses(trainer.evaluate())
        assert losses(trainer.evaluate()) == found
        same(full_weights(kind, trainer), live)
        state = averages(callback)
    assert found == losses_of_plain(kind, state, tmp_path)
    assert raw == losses_of_plain(kind, live, tmp_path) != found
    assert list(found) == ["eval_first_loss", "eval_second_loss"]
    assert predicted == {"test_loss": found["eval_first_loss"]}

    of_loss = {line["step"]: line for line in lines if "loss" in line}
    assert set(of_loss[2]) == live_keys | {"ema/decay", "ema/updates"}
    logged = [(line["ema/decay"], line["ema/updates"]) for line in of_loss.values()]
    assert logged == [(DECAY, 2), (DECAY, 4), (DECAY, 6)]
    drift = [(line["step"], line["ema/drift"]) for line in lines if "ema/drift" in line]
    assert drift == [(step, drifts[step]) for step in (2, 3, 4, 6)]  # evaluations of two data sets
    assert min(drifts.values()) > 0


@every_kind
def test_a_stopped_and_resumed_run_is_bit_identical_to_one_that_went_on(kind: str, tmp_path: Path):
    def run(directory: str, resume: Any = None, **arguments: Any) -> tuple[Any, ...]:
        arguments |= {"seed": 3 if resume else 0, "resume": resume, **EVALUATES}
        if resume is True:
            arguments["restore_callback_states_from_checkpoint"] = True  # not of this one
        with trained(kind, tmp_path / directory, **arguments) as (trainer, callback):
            assert [c for c in trainer.callback_handler.callbacks if c is callback] == [callback]
            live, average = full_weights(kind, trainer), averages(callback)
            evaluated = [losses(e) for e in trainer.state.log_history if "eval_first_loss" in e]
            steps = (callback.ema.step, callback.ema.num_updates)
            return {name: average[name] for name in live}, live, evaluated, steps

    wanted = run("two", **SAVES)
    assert wanted[-1] == (4, 4)
    with trainer_of(kind, tmp_path) as trainer:
        trainer.train()
        same(full_weights(kind, trainer), wanted[1])  # as without an average and evaluations
    two = tmp_path / "two"
    if rank() == 0:
        (two / "checkpoint-2").rename(tmp_path / "elsewhere")
        assert (two / "checkpoint-4" / "ema" / "manifest.json").exists()
    barrier()
    # From a directory outside of that of the run, and then from the last one inside.
    found = run("three", str(tmp_path / "elsewhere"), eval_on_start=True)
    at_start = found[2].pop(2)
    assert at_start == found[2][1]  # of the step that was saved
    same(found, wanted)
    if kind == "alone":  # which one is the last does not depend on the engine
        shutil.rmtree(two / "checkpoint-4")
        (tmp_path / "elsewhere").rename(two / "checkpoint-2")
        same(run("two", True), wanted)


@every_kind
def test_the_best_average_is_what_is_left_and_what_is_exported(kind: str, tmp_path: Path):
    options = {"ema": {"export": tmp_path / "best"}, "save_total_limit": 1, **KEEPS_BEST}
    with attached(kind, tmp_path / "run", **options) as (trainer, callback):
        with pytest.warns(UserWarning, match="model holds the raw weights of that checkpoint"):
            trainer.train()
        best = trainer.state.best_global_step
        assert (best, callback.ema.step) == (1, 1)
        found = losses(trainer.evaluate())
        assert found["eval_first_loss"] == trainer.state.best_metric
        assert callback.ema.drift() > 0
        kept = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert "checkpoint-1" in kept and not {"checkpoint-2", "checkpoint-3"} & set(kept), kept
        state = averages(callback)
    assert found == losses_of_plain(kind, state, tmp_path)
    exported = reloaded(tmp_path / "best")
    same(exported, state)


@every_kind
def test_the_model_is_the_average_at_the_end_if_asked(kind: str, tmp_path: Path):
    with trained(kind, tmp_path / "run", ema={"copy_at_end": True}) as (trainer, callback):
        state = averages(callback)
        live = full_weights(kind, trainer)
        same(live, {name: state[name] for name in live})
        assert not torch.equal(live["lm_head.weight"], callback.weights[-1]["lm_head.weight"])
        trainer.save_model(str(tmp_path / "saved"))
        barrier()
    saved = reloaded(tmp_path / "saved")  # out here: inside, transformers would cut it for ZeRO-3
    dtype = torch.bfloat16 if kind.startswith("zero") else torch.float32
    wanted = {name: tensor.to(dtype).to(saved[name].dtype) for name, tensor in state.items()}
    same(saved, wanted)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("kind", ["ddp", "ddp_fused", "zero2", "zero3"])
def test_a_step_that_overflows_is_no_update(kind: str, tmp_path: Path):
    from transformers import Trainer

    if kind.startswith("zero"):
        skip_without_overflow_checks(int(kind[-1]))

    class Overflows(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.inf if self.state.global_step == 1 else loss

    options = {"trainer_class": Overflows}
    options["optim"] = "adamw_torch_fused" if kind == "ddp_fused" else "adamw_torch"
    with attached(kind.removesuffix("_fused"), tmp_path, **options) as (trainer, callback):
        if kind.startswith("ddp"):  # as it is for fp16 on a GPU
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        trainer.train()
        assert trainer.state.global_step == 4
        assert (callback.ema.step, callback.ema.num_updates) == (3, 3)
        assert all(tensor.isfinite().all() for tensor in averages(callback).values())


@pytest.mark.ranks(2)
def test_a_checkpoint_without_the_average_is_refused_or_started_from(tmp_path: Path):
    with trainer_of("ddp", tmp_path, **SAVES) as trainer:
        trainer.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with attached("ddp", tmp_path, seed=1) as (trainer, _):
        with pytest.raises(CheckpointError, match=r"has no average; with missing='restart'"):
            trainer.train(resume_from_checkpoint=checkpoint)
    with attached("ddp", tmp_path, seed=1, ema={"missing": "restart"}) as (trainer, callback):
        with pytest.warns(UserWarning, match="no average; .* it starts again"):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert callback.ema.step == 2
        assert_average_is_right(callback)


@pytest.mark.ranks(0)
@pytest.mark.parametrize("how", ["passes on", "resumes itself", "behind"])
def test_a_trainer_with_a_train_of_its_own_resumes_the_average(how: str, tmp_path: Path):
    from transformers import Trainer

    source = str(tmp_path / "checkpoint-2")

    class PassesOn(Trainer):
        def train(self, **kwargs: Any) -> Any:
            return super().train(**kwargs)

    class ResumesItself(Trainer):
        def train(self) -> Any:
            return super().train(resume_from_checkpoint=source)

    class Behind(Trainer):
        def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
            super()._load_optimizer_and_scheduler(source)

        def _init_training_state(self, *args: Any) -> Any:
            return super()._init_training_state(*args[:3], source, args[-1])

    with trained("alone", tmp_path, **SAVES):
        (tmp_path / "checkpoint-4").rename(tmp_path / "later")
    own = {"passes on": PassesOn, "resumes itself": ResumesItself, "behind": Behind}[how]
    again, goes_on = {"trainer_class": own}, "goes on from step 2, .*"
    with attached("alone", tmp_path, **again) as (trainer, callback):
        is_warned = pytest.warns(
            UserWarning, match=f"{goes_on} average is loaded from this directory"
        )
        with is_warned if how == "behind" else nullcontext():
            trainer.train(**{"resume_from_checkpoint": True} if how == "passes on" else {})
        assert (callback.ema.step, trainer.state.global_step) == (4, 4)
    if how != "behind":
        return
    shutil.rmtree(tmp_path / "checkpoint-2" / "ema")
    with attached("alone", tmp_path, **again) as (trainer, callback):
        with pytest.raises(CheckpointError, match=f"{goes_on} has no average"):
            trainer.train()
    with attached("alone", tmp_path, ema={"missing": "restart"}, **again) as (trainer, callback):
        with pytest.warns(UserWarning, match=f"{goes_on} it starts again"):
            trainer.train()
        assert callback.ema.step == 2


@pytest.mark.ranks(0)
@pytest.mark.parametrize("missing", ["raise", "restart"])
def test_a_best_checkpoint_without_the_average_leaves_the_last_one_and_says_so(
    missing: str, tmp_path: Path
):
    from transformers import TrainerCallback

    class Loses(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                shutil.rmtree(tmp_path / "run" / "checkpoint-1" / "ema")

    best = tmp_path / "best"
    ema = {"export": best, "copy_at_end": True, "missing": missing}
    with attached("alone", tmp_path / "run", ema=ema, **KEEPS_BEST) as (trainer, callback):
        trainer.add_callback(Loses())
        match = r"the best checkpoint has no average.* of step 4\. .*copy_at_end has not replaced"
        expects = pytest.raises if missing == "raise" else pytest.warns
        with expects(CheckpointError if missing == "raise" else UserWarning, match=match):
            trainer.train()
        assert (trainer.state.best_global_step, callback.ema.step) == (1, 4)
        assert_average_is_right(callback)
        state = averages(callback)
        same(full_weights("alone", trainer), callback.weights[1])
    same(reloaded(best), state)


@pytest.mark.ranks(0)
def test_an_evaluation_before_training_says_once_that_there_is_no_average(tmp_path: Path):
    match = r"no average yet, train\(\) makes it"
    with attached("alone", tmp_path) as (trainer, callback):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", match)
            with callback.raw_weights():
                trainer.evaluate()
        with pytest.warns(UserWarning, match=match) as told:
            trainer.evaluate(EVALUATED["first"])
            trainer.predict(EVALUATED["first"])
        mine = [warning for warning in told if "no average yet" in str(warning.message)]
        assert [warning.filename for warning in mine] == [__file__]


@pytest.mark.ranks(0)
@pytest.mark.parametrize("export", ["file", "file/averaged"])
def test_an_export_at_a_file_is_refused_before_the_first_step(export: str, tmp_path: Path):
    (tmp_path / "file").write_text("the user's")
    ema = {"export": tmp_path / export}
    with attached("alone", tmp_path / "run", ema=ema) as (trainer, _):
        with pytest.raises(FileExistsError, match=r"export=.*file.* is a file; name a dir"):
            trainer.train()
        assert trainer.state.global_step == 0


@pytest.mark.ranks(0)
def test_a_second_training_builds_the_average_anew_and_another_model_is_told_of(tmp_path: Path):
    with trained("alone", tmp_path) as (trainer, callback):
        first = callback.ema
        trainer.train()
        assert callback.ema is not first and callback.ema.step == 4
        assert_average_is_right(callback)
        trainer.evaluate()
        trainer.model = trainer.model_wrapped = copy.deepcopy(trainer.model)
        with pytest.warns(UserWarning, match="trainer.model is not the model that was trained"):
            trainer.evaluate()


@pytest.mark.ranks(0)
def test_a_metric_may_evaluate_and_an_error_in_it_leaves_the_weights(tmp_path: Path):
    asked: list[Any] = []

    def metrics(predictions: Any) -> dict[str, float]:
        asked.append(predictions)
        if len(asked) == 1:
            trainer.evaluate(EVALUATED["second"])
        if len(asked) == 3:
            raise RuntimeError("a metric of the user's")
        return {}

    with trained("alone", tmp_path, compute_metrics=metrics, zeros=True) as (trainer, callback):
        live = full_weights("alone", trainer)
        with pytest.raises(RuntimeError, match="a metric of the user's"):
            trainer.evaluate()
        same(full_weights("alone", trainer), live)
        assert not any(tensor.any() for tensor in averages(callback).values())


@pytest.mark.ranks(0)
def test_an_evaluation_in_bf16_after_training_leaves_the_average_as_it_is(tmp_path: Path):
    with trained("alone", tmp_path, bf16_full_eval=True) as (trainer, callback):
        live, state = full_weights("alone", trainer), averages(callback)
        found = losses(trainer.evaluate())
        assert found == losses(trainer.evaluate())
        # The Trainer leaves the model in bf16.
        rounded = {name: weight.to(torch.bfloat16) for name, weight in live.items()}
        same(full_weights("alone", trainer), rounded)
        same(averages(callback), state)
    with trainer_of("alone", tmp_path, model=with_weights(state), bf16_full_eval=True) as trainer:
        assert found == losses(trainer.evaluate())


@pytest.mark.ranks(0)
def test_of_several_averages_one_or_none_is_evaluated_and_all_or_none_are_logged(tmp_path: Path):
    decays, metrics = {"short": 0.5, "long": 0.99}, {}
    logs = {"logging_strategy": "steps", "logging_steps": 1, **SAVES}
    names = {f"ema/{name}/{what}" for name in decays for what in ("decay", "drift")}
    for evaluate, log in (("short", True), ("long", True), (False, False)):
        options = {"decay": decays, "ema": {"evaluate": evaluate, "log": log}, **logs}
        with trained("alone", tmp_path, **options) as (trainer, callback):
            name = evaluate or None
            state = callback.ema.gather_state_dict(name) if name else trainer.model.state_dict()
            metrics[evaluate] = losses(trainer.evaluate())
            logged = {key for line in trainer.state.log_history for key in line if "ema/" in key}
        assert metrics[evaluate] == losses_of_plain("alone", state, tmp_path)
        assert logged == (names | {"ema/updates"} if log else set())
    assert len({tuple(values.values()) for values in metrics.values()}) == 3


@pytest.mark.ranks(0)
def test_a_callback_that_is_not_attached_or_twice_says_so(tmp_path: Path):
    with trainer_of("alone", tmp_path) as trainer:
        callback = ema_callback(DECAY)
        trainer.add_callback(callback)
        with pytest.raises(RuntimeError, match=r"call ema.attach\(trainer\) before"):
            trainer.train()
        assert callback.attach(trainer) is callback
        assert trainer.callback_handler.callbacks.count(callback) == 1
        with pytest.raises(ValueError, match="attached to a Trainer already"):
            callback.attach(trainer)
        with pytest.raises(ValueError, match="has an EMACallback already; several averages are"):
            ema_callback(0.99).attach(trainer)
        trainer.train()
        assert callback.ema.step == 4
        trainer.add_callback(callback)  # transformers adds it once more
        with pytest.raises(RuntimeError, match="2 times among the Trainer's callbacks"):
            trainer.train()


@pytest.mark.ranks(0)
def test_a_callback_that_is_removed_shows_nothing_more(tmp_path: Path):
    with trained("alone", tmp_path, zeros=True) as (trainer, first):
        of_zeros = losses(trainer.evaluate())
        with first.raw_weights():
            raw = losses(trainer.evaluate())
        assert raw != of_zeros
        trainer.remove_callback(first)
        assert losses(trainer.evaluate()) == raw
        second = ema_callback(0.0).attach(trainer)  # copies
        trainer.train()
        assert first.ema.step == second.ema.step == 4
        averaged = losses(trainer.evaluate())
        with second.raw_weights():
            assert losses(trainer.evaluate()) == averaged != of_zeros
