"""The Lightning callback under every strategy that runs without a GPU."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from dist_ema import BEMA
from dist_ema.core.errors import CheckpointError
from dist_ema.integrations.lightning import EMACallback
from tests.net import loss_of
from tests.oracle import worst_relative_error
from tests.runs import DECAY, EXACT, MAX_RELATIVE_ERROR, same
from tests.worlds import barrier, from_rank_0, rank
from tests.worlds_lightning import NUM_BATCHES, Module, Record, Under, under

TP_TOLERANCE = {"rtol": 0, "atol": 1e-4}  # it sums in another order


class Interruption(Exception):
    pass


def fit(
    under: Under, path: Path, *callbacks: Callback, ema: Any = None, module: Any = None, **how: Any
) -> tuple[EMACallback, Trainer, Any, Record]:
    ema, record, module = ema or EMACallback(DECAY), Record(), module or under.module()
    batches = under.batches(how.pop("num_batches", NUM_BATCHES))
    trainer = under.trainer(path, ema, record, *callbacks, **how)
    trainer.fit(module, batches, under.validation())
    return ema, trainer, module, record


def assert_losses(under: Under, state: dict[str, Tensor], *results: Any) -> Tensor:
    """What was evaluated has the loss of a plain model with this state, which is returned."""
    wanted = under.plain_loss(state)
    for metrics in results:
        loss = metrics[0]["loss"] if isinstance(metrics, list) else metrics["loss"]
        torch.testing.assert_close(torch.as_tensor(loss), wanted, rtol=1e-6, atol=0)
    return wanted


def assert_average_of(ema: EMACallback, record: Record) -> None:
    """The average is the float64 one of the recorded weights."""
    found = from_rank_0(ema.ema.gather_state_dict())
    assert worst_relative_error(found, record.oracle(DECAY).average) < MAX_RELATIVE_ERROR


def saved(
    under: Under, path: Path, ema: EMACallback | None = None
) -> tuple[EMACallback, Trainer, Module]:
    """What a fit leaves that saves `path` at its end."""
    ema, trainer, module, _ = fit(under, path.parent, ema=ema)
    trainer.save_checkpoint(path)
    return ema, trainer, module


def assert_same_average(found: EMACallback, wanted: EMACallback) -> None:
    for name in wanted.ema.names:
        states = [callback.ema.gather_state_dict(name) for callback in (found, wanted)]
        for state in states:
            # Not averaged but read live, and on each rank another: a folder of shards has anyone's.
            state.pop("net.running", None)
        same(*states)
    assert (found.ema.step, found.ema.num_updates) == (wanted.ema.step, wanted.ema.num_updates)


class Logs(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("trained", loss := super().training_step(batch, batch_idx))
        return loss


@under()
def test_the_average_is_that_of_the_weights_after_each_step_is_logged_and_is_what_evaluates(
    under: Under, tmp_path: Path
):
    drifts = {}

    class Drifts(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            drifts[trainer.global_step] = ema.ema.drift()

    ema, record, module = EMACallback(DECAY), Record(), Logs(**under.net)
    keep = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    options = {"log_every_n_steps": 2, "val_check_interval": 8, "accumulate_grad_batches": 2}
    options |= {"logger": logger, "enable_checkpointing": True}
    trainer = under.trainer(tmp_path, ema, record, Drifts(), keep, **options)
    trainer.fit(module, under.batches(16), under.validation())
    assert_average_of(ema, record)
    assert ema.ema.step == len(record.weights) - 1 == 8
    if rank() == 0:
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        wanted = [(row["step"], row["step"] + 1, DECAY) for row in rows if "trained" in row]
        keys = ("step", "ema/updates", "ema/decay")
        found = [tuple(map(row.get, keys)) for row in rows if "ema/updates" in row]
        assert found == wanted and len(found) == 4
        drift = [row["ema/drift"] for row in rows if "ema/drift" in row]
        assert drift == [drifts[step] for step in (3, 4, 6, 8)]
        assert min(drift) > 0

    state, loader = from_rank_0(ema.ema.gather_state_dict()), under.validation()
    results = [dict(trainer.callback_metrics)]  # of the validation in fit
    results += [trainer.validate(module, loader, verbose=False)]
    results += [trainer.test(module, loader, verbose=False)]
    wanted_loss = assert_losses(under, state, *results)
    logits = trainer.predict(module, under.batches(1))[0]
    with torch.no_grad():
        plain = under.plain(state)(next(iter(under.batches(1))))
    tolerance = TP_TOLERANCE if under.name == "fsdp2_tp" else EXACT
    torch.testing.assert_close(logits, plain, **tolerance)
    same(module.full_weights(), record.weights[-1])
    live = under.plain_loss({**state, **record.weights[-1]})
    # Or nothing above would tell the two apart.
    assert (live - wanted_loss).abs() > 1e-3 * wanted_loss


@under()
def test_stopping_and_resuming_is_as_if_nothing_had_happened(under: Under, tmp_path: Path):
    whole, first, second = (EMACallback(DECAY, update_every=3, start_step=2) for _ in range(3))
    _, _, uninterrupted, _ = fit(under, tmp_path / "a", ema=whole, max_epochs=3, num_batches=4)
    keep = ModelCheckpoint(tmp_path / "b", "{epoch}", save_top_k=1, save_last="link")
    options = {"max_epochs": 2, "num_batches": 4, "enable_checkpointing": True}
    fit(under, tmp_path / "b", keep, ema=first, **options)
    there = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert there == ["epoch=1.ckpt", "last.ckpt"]  # what went before has been removed, whole
    barrier()
    if rank() == 0:
        (tmp_path / "b").rename(tmp_path / "moved")
    barrier()

    module = under.module(seed=1)
    trainer = under.trainer(tmp_path / "c", second, max_epochs=3)
    path = tmp_path / "moved" / "last.ckpt"
    trainer.fit(module, under.batches(4), under.validation(), ckpt_path=path)
    same(module.full_weights(), uninterrupted.full_weights())
    assert_same_average(second, whole)


@under("fsdp2", "fsdp2_tp")
def test_an_average_in_a_file_is_loaded_under_another_strategy(under: Under, tmp_path: Path):
    """A DDP run's file, read where the weights are sharded, without training."""
    ddp = Under(name="ddp", num_ranks=under.num_ranks, strategy="ddp", net=under.net)
    before, _, _ = saved(ddp, tmp_path / "x.ckpt")
    held = torch.load(tmp_path / "x.ckpt")["dist_ema"]["averages"]["ema"]
    wanted = from_rank_0(before.ema.gather_state_dict())
    same(held, {name: wanted[name] for name in held})

    after = EMACallback(DECAY)
    loader = under.validation()
    trainer = under.trainer(tmp_path, after)
    tested = trainer.test(under.module(seed=1), loader, tmp_path / "x.ckpt", verbose=False)
    assert_same_average(after, before)
    assert_losses(under, wanted, tested)


@under("alone", "fsdp2_full")
def test_a_bias_corrected_average_is_loaded_from_a_file(under: Under, tmp_path: Path):
    before, after = EMACallback(BEMA()), EMACallback(BEMA())
    saved(under, tmp_path / "x.ckpt", ema=before)
    again = under.trainer(tmp_path, after)
    again.test(under.module(seed=1), under.validation(), tmp_path / "x.ckpt", verbose=False)
    assert_same_average(after, before)


@under("alone", "ddp", "fsdp2")
def test_an_exception_in_an_evaluation_leaves_the_live_weights(under: Under, tmp_path: Path):
    class Fails(Callback):
        def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if not trainer.sanity_checking:
                raise Interruption

    ema, record, module = EMACallback(DECAY), Record(), under.module()
    with pytest.raises(Interruption):
        fit(under, tmp_path, record, Fails(), ema=ema, module=module)
    same(module.full_weights(), record.weights[-1])
    assert_average_of(ema, record)


@under("ddp", "fsdp2")
def test_a_checkpoint_in_an_evaluation_holds_live_weights(under: Under, tmp_path: Path):
    class Saves(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                self.shown = pl_module.full_weights()
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                same(pl_module.full_weights(), self.shown)

    ema, _, module, _ = fit(under, tmp_path, saves := Saves())
    assert not torch.equal(saves.shown["net.tiny"], module.full_weights()["net.tiny"])
    other, loaded = EMACallback(DECAY), under.module(seed=1)
    under.trainer(tmp_path, other).validate(loaded, under.validation(), tmp_path / "x.ckpt")
    same(loaded.full_weights(), module.full_weights())
    assert_same_average(other, ema)


@under("alone", "fsdp2")
def test_a_checkpoint_without_an_average_is_refused_or_starts_one(under: Under, tmp_path: Path):
    path = tmp_path / "x.ckpt"
    trainer = under.trainer(tmp_path)
    trainer.fit(under.module(), under.batches())
    trainer.save_checkpoint(path)
    again = {"train_dataloaders": under.batches(), "ckpt_path": path}
    with pytest.raises(CheckpointError, match="holds no average"):
        under.trainer(tmp_path, EMACallback(DECAY), max_epochs=2).fit(under.module(), **again)
    ema, record = EMACallback(DECAY, missing="restart"), Record()
    with pytest.warns(UserWarning, match="starts again, from the weights of the checkpoint"):
        under.trainer(tmp_path, ema, record, max_epochs=2).fit(under.module(), **again)
    assert_average_of(ema, record)
    assert ema.ema.step == 8


@under("fsdp2")
def test_a_folder_whose_average_is_of_another_step_is_refused(under: Under, tmp_path: Path):
    ema, trainer, _ = saved(under, tmp_path / "x.ckpt")
    ema.ema.update()
    ema.ema.save(tmp_path / "x.ckpt" / "dist_ema")
    with pytest.raises(CheckpointError, match="average is of step 9, its weights are of step 8"):
        again = under.trainer(tmp_path, EMACallback(DECAY), max_epochs=2)
        again.fit(under.module(), under.batches(), ckpt_path=tmp_path / "x.ckpt")
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)  # over it
    with pytest.raises(CheckpointError, match="holds no average"):
        again = under.trainer(tmp_path, EMACallback(DECAY))
        again.validate(under.module(), under.validation(), tmp_path / "x.ckpt")


@under("alone", "ddp")
def test_a_second_fit_goes_on_with_the_average(under: Under, tmp_path: Path):
    ema, trainer, module, record = fit(under, tmp_path)
    trainer.test(module, under.validation(), verbose=False)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, under.batches())
    same(record.weights.pop(9), record.weights[8])  # of its start
    assert_average_of(ema, record)
    assert ema.ema.step == 16 == len(record.weights) - 1


@under("alone")
def test_what_was_built_for_an_evaluation_can_be_trained_on(under: Under, tmp_path: Path):
    """Lightning evaluates in inference mode, whose tensors cannot be written to later."""
    _, _, module = saved(under, tmp_path / "x.ckpt")
    trainer = under.trainer(tmp_path, ema := EMACallback(DECAY))
    trainer.test(module, under.batches(2), tmp_path / "x.ckpt", verbose=False)
    trainer.fit(module, under.batches())
    assert ema.ema.step == 16


class Tunable(Module):
    """What the finders ask for: data of its own, a learning rate and a batch size to write to."""

    def __init__(self, under: Under, *, seed: int = 0) -> None:
        super().__init__(seed=seed, **under.net)
        self.lr, self.batch_size = 1e-2, 2
        self.train_dataloader = under.batches
        self.val_dataloader = self.test_dataloader = under.validation


FINDERS = {
    "lr": lambda: LearningRateFinder(num_training_steps=5),
    "batch": lambda: BatchSizeFinder(max_trials=1),
}


def placed(first: bool, finder: Callback, *others: Callback) -> list[Callback]:
    return [finder, *others] if first else [*others, finder]


@under("alone")
@pytest.mark.parametrize("kind", FINDERS)
@pytest.mark.parametrize("first", [True, False])
def test_a_finder_before_training_leaves_no_trace(
    under: Under, kind: str, first: bool, tmp_path: Path
):
    ema, record = EMACallback(DECAY), Record()
    under.trainer(tmp_path, *placed(first, FINDERS[kind](), ema, record)).fit(Tunable(under))
    assert_average_of(ema, record)
    assert ema.ema.step == 8 == len(record.weights) - 1


@under("alone", "fsdp2_full")
def test_a_finder_keeps_the_average_that_is_resumed_from(under: Under, tmp_path: Path):
    class AtStart(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert_same_average(ema, before)

    before, ema = EMACallback(DECAY), EMACallback(DECAY)
    trainer = under.trainer(tmp_path, before)
    trainer.fit(Tunable(under))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer = under.trainer(tmp_path, ema, AtStart(), FINDERS["lr"](), max_epochs=2)
    trainer.fit(Tunable(under, seed=1), ckpt_path=tmp_path / "x.ckpt")
    assert before.ema.step == 8 < ema.ema.step


@under("alone")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_finder_in_an_evaluation_keeps_the_average(
    under: Under, stage: str, first: bool, tmp_path: Path
):
    before, _, trained = saved(under, tmp_path / "x.ckpt")
    ema, module = EMACallback(DECAY), Tunable(under, seed=1)
    trainer = under.trainer(tmp_path, *placed(first, FINDERS["batch"](), ema))
    result = getattr(trainer, stage)(module, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert_losses(under, before.ema.gather_state_dict(), result)
    assert_same_average(ema, before)
    same(module.full_weights(), trained.full_weights())
    # No full copy is kept.
    assert not any(isinstance(kept, dict) and "averages" in kept for kept in vars(ema).values())


@under("alone")
def test_evaluating_another_model_keeps_the_average(under: Under, tmp_path: Path):
    ema, trainer, module, _ = fit(under, tmp_path)
    kept, wanted = ema.ema, ema.ema.gather_state_dict()
    baseline, loader = under.module(seed=1), under.validation()
    for evaluating in (under.trainer(tmp_path, EMACallback()), trainer):  # the first never trained
        with pytest.warns(UserWarning, match="no average of this model"):
            result = evaluating.validate(baseline, loader, verbose=False)
        assert_losses(under, baseline.state_dict(), result)
    trainer.save_checkpoint(tmp_path / "baseline.ckpt")
    assert "dist_ema" not in torch.load(tmp_path / "baseline.ckpt")
    assert ema.ema is kept
    same(ema.ema.gather_state_dict(), wanted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "EMACallback")
        result = trainer.validate(module, loader, verbose=False)
    assert_losses(under, wanted, result)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "dist_ema" in torch.load(tmp_path / "x.ckpt")


@under("alone", "ddp")
def test_an_average_with_nan_is_not_saved(under: Under, tmp_path: Path):
    ema, trainer, module = saved(under, tmp_path / "x.ckpt")
    size = (tmp_path / "x.ckpt").stat().st_size
    with torch.no_grad():
        module.net.emb.weight[0, 0] = torch.nan
    ema.ema.update()
    with pytest.raises(CheckpointError, match=r"NaN or Inf in net\.emb\.weight; nothing"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert (tmp_path / "x.ckpt").stat().st_size == size
    assert not torch.load(tmp_path / "x.ckpt")["state_dict"]["net.emb.weight"].isnan().any()


@under("alone")
def test_after_a_save_that_failed_an_evaluation_goes_on_with_the_average(
    under: Under, tmp_path: Path
):
    (tmp_path / "file").touch()

    class Fails(Callback):
        def on_test_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            shown = pl_module.full_weights()
            with pytest.raises(OSError):
                trainer.save_checkpoint(tmp_path / "file" / "x.ckpt")
            same(pl_module.full_weights(), shown)

    ema, trainer, module, record = fit(under, tmp_path, Fails())
    result = trainer.test(module, under.validation(), verbose=False)
    assert_losses(under, ema.ema.gather_state_dict(), result)
    same(module.full_weights(), record.weights[-1])


@under("alone")
def test_a_batch_without_a_loss_counts_as_global_step_counts_it(under: Under, tmp_path: Path):
    class Skips(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    ema, trainer, _, _ = fit(under, tmp_path, module=Skips(**under.net))
    assert ema.ema.step == trainer.global_step == 8


class TwoOptimizers(Module):
    """The second steps in every batch, the first in every other one."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(loss_of(self.net(batch)))
        if batch_idx % 2:
            first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        emb, rest = [self.net.emb.weight], [*self.net.blocks.parameters()]
        return [torch.optim.SGD(weights, lr=1e-2) for weights in (emb, rest)]


@under("alone")
def test_with_several_optimizers_a_batch_counts_once_or_by_one_of_them(
    under: Under, tmp_path: Path
):
    for optimizer, steps in ((None, 8), (0, 4), (1, 8)):
        ema = EMACallback(DECAY, optimizer=optimizer)
        fit(under, tmp_path, ema=ema, module=TwoOptimizers(**under.net))
        assert ema.ema.step == steps
    module = under.module()
    weights = module.full_weights()
    with pytest.raises(ValueError, match="optimizer is 1, but the module has 1, numbered from 0"):
        fit(under, tmp_path, ema=EMACallback(optimizer=1), module=module)
    same(module.full_weights(), weights)


@under("alone")
def test_steps_that_lightning_does_not_see_are_warned_of(under: Under, tmp_path: Path):
    class Bare(TwoOptimizers):
        def optimizers(self) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    with pytest.warns(UserWarning, match="saw no optimizer step"):
        fit(under, tmp_path, module=Bare(**under.net))


@under("alone")
def test_a_step_that_a_gradient_scaler_skips_does_not_count(under: Under, tmp_path: Path):
    class Overflows(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx in (2, 5) else loss

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    module = Overflows(**under.net)
    ema, trainer, _, record = fit(under, tmp_path, module=module, plugins=[precision])
    assert trainer.global_step == 8 and ema.ema.step == 6
    same(record.weights[3], record.weights[2])
    record.weights = [record.weights[i] for i in (0, 1, 2, 4, 5, 7, 8)]
    assert_average_of(ema, record)


@under("alone")
def test_a_trainer_of_the_other_package_takes_the_callback(under: Under, tmp_path: Path):
    import pytorch_lightning

    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = under.module().net

        training_step = Module.training_step
        validation_step = Module.validation_step
        configure_optimizers = Module.configure_optimizers

    ema = EMACallback(DECAY)
    trainer = pytorch_lightning.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, callbacks=[ema], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Other(), under.batches(), under.validation())
    assert_losses(under, ema.ema.gather_state_dict(), dict(trainer.callback_metrics))
