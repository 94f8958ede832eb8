"""Hugging Face Trainers of a tiny language model, on the workers of the pool."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.models import VOCABULARY, tiny_llama
from tests.pool import NO_GROUP
from tests.worlds_accelerate import ENGINES as ACCELERATED
from tests.worlds_accelerate import several_devices_named_cpu
from tests.worlds_deepspeed import configuration, library

ENGINES = {kind: engine for kind, engine in ACCELERATED.items() if kind != "fsdp1"}
every_kind = pytest.mark.parametrize(
    ("kind", "num_ranks"), [pytest.param(k, NO_GROUP if k == "alone" else 2, id=k) for k in ENGINES]
)
LENGTH = 6


def texts(seed: int, number: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (number, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


EVALUATED = {"first": texts(1, 8), "second": texts(2, 8)}


@contextmanager
def trainer_of(
    kind: str,
    directory: Path,
    *,
    model: nn.Module | None = None,
    trainer_class: type | None = None,
    eval_dataset: Any = None,
    compute_metrics: Any = None,
    seed: int = 0,
    **arguments: Any,
) -> Iterator[Any]:
    """A Trainer, and as if accelerate had never been used once it ends.

    Args:
        arguments: of `TrainingArguments`.
    """
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with mock.patch.dict(os.environ), ExitStack() as stack:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # what another test's engine may have left in this process
        # Without an index, which torch.load refuses; older versions would number it.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            if kind.startswith("zero"):
                library()
                auto = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
                zero = {"stage3_gather_16bit_weights_on_model_save": True}
                bf16 = {"enabled": "auto", "check_grad_overflow": True}
                options = {"batch_size": "auto", "zero": zero, "bf16": bf16, **auto}
                arguments |= {"deepspeed": configuration(int(kind[-1]), **options), "bf16": True}
            elif kind == "fsdp2":
                stack.enter_context(several_devices_named_cpu())
                # accelerate reads these; transformers before 5 reads no "version".
                os.environ["FSDP_VERSION"] = "2"
                os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
                os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"
                os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer"
                config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
                arguments |= {"fsdp": True, "fsdp_config": config}
            args = TrainingArguments(
                str(directory),
                use_cpu=kind != "fsdp2",
                report_to=[],
                disable_tqdm=True,
                per_device_train_batch_size=2,
                per_device_eval_batch_size=2,
                learning_rate=1e-2,
                **{"max_steps": 4, "save_strategy": "no", "logging_strategy": "no", **arguments},
            )
            yield (trainer_class or Trainer)(
                model=with_weights(None, seed) if model is None else model,
                args=args,
                train_dataset=texts(0, 64),
                eval_dataset=EVALUATED if eval_dataset is None else eval_dataset,
                compute_metrics=compute_metrics,
            )
        finally:
            unset_hf_deepspeed_config()
            AcceleratorState._reset_state(reset_partial_state=True)


def full_weights(kind: str, trainer: Any) -> dict[str, Tensor]:
    """Copies of all parameters, whole, as the engine itself reads them. Collective."""
    model, optimizer = trainer.model_wrapped, trainer.optimizer
    training = SimpleNamespace(net=trainer.model, model=model, optimizer=optimizer)
    return ENGINES[kind].full_weights(training)


def with_weights(state: Mapping[str, Tensor] | None, seed: int = 0) -> nn.Module:
    """A Llama of about two thousand parameters, with these weights or with weights of its own."""
    torch.manual_seed(seed)
    model = tiny_llama()
    if state is not None:
        model.load_state_dict(state)
    return model


def losses_of_plain(kind: str, state: Mapping[str, Tensor], directory: Path) -> dict[str, float]:
    """The losses of a plain model that has this state, computing as the kind does."""
    model = with_weights(state)
    if kind.startswith("zero"):
        model.to(torch.bfloat16)
    plain = "alone" if kind == "alone" else "ddp"
    with trainer_of(plain, directory, model=model) as trainer:
        return losses(trainer.evaluate())


def losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of evaluations and predictions."""
    return {n: v for n, v in metrics.items() if n.endswith("_loss") and n != "train_loss"}
