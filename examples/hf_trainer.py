"""Hugging Face Trainer: one line averages, evaluates with the average, saves, resumes, exports it.

    torchrun --standalone --nproc_per_node 2 examples/hf_trainer.py

A tiny language model learns to count by threes where one token in four is noise. Under DeepSpeed
or FSDP, which `TrainingArguments` choose, the line is the same.
"""

import sys

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from dist_ema import HalfLife
from dist_ema.integrations.transformers import EMACallback

VOCABULARY, LENGTH = 31, 16


def counts(size: int, seed: int, noise: float) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (size, 1), generator=generator)
    tokens = (first + 3 * torch.arange(LENGTH)) % VOCABULARY
    wrong = torch.rand(size, LENGTH, generator=generator) < noise
    tokens[wrong] = torch.randint(VOCABULARY, (int(wrong.sum()),), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )


def main(directory: str) -> None:
    args = TrainingArguments(
        directory,
        max_steps=200,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        per_device_eval_batch_size=64,
        save_steps=100,
        save_total_limit=1,
        use_cpu=not torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=[],
    )
    set_seed(0)
    trainer = Trainer(
        tiny_model(),
        args,
        train_dataset=counts(8192, seed=1, noise=0.25),
        eval_dataset=counts(512, seed=2, noise=0.0),
    )
    ema = EMACallback(HalfLife(steps=20), export=f"{directory}/averaged").attach(trainer)
    trainer.train()  # or trainer.train(resume_from_checkpoint=True)

    averaged = trainer.evaluate()["eval_loss"]
    with ema.raw_weights():
        raw = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"{ema.ema.step} steps; test loss: raw {raw:.4f}, averaged {averaged:.4f}")
        loaded = LlamaForCausalLM.from_pretrained(f"{directory}/averaged")
        tokens = loaded.generate(torch.tensor([[1, 4, 7]]), max_length=8, do_sample=False)
        print(f"the exported average counts {tokens[0].tolist()}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/trainer"])
