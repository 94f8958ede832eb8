"""Fine-tune a language model, whole or by LoRA, and let a fresh process generate with the average.

    accelerate launch --config_file launch/accelerate/zero3-gpu.yaml examples/finetune_lm.py --lora

The model is a tiny Llama that can count by one; it is taught to count by three. Runs under any
configuration of accelerate. With --lora only the adapters train, and only they are averaged and
exported.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dist_ema import ShardedEMA

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=16, num_hidden_layers=2, eos_token_id=None, **SIZES)
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def counting(by: int, size: int) -> DataLoader:
    """Batches of rows that count up from anywhere, modulo 16."""
    rows = (torch.randint(16, (32 * size, 1)) + by * torch.arange(12)) % 16
    return DataLoader(rows, batch_size=32)


def train(model, optimizer, loader, backward, after_step=lambda: None) -> None:
    for tokens in loader:
        backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def read_and_generate(out: Path, lora: bool) -> None:
    """What a user does with the export: no distributed training, no dist_ema."""
    model = AutoModelForCausalLM.from_pretrained(out / ("base" if lora else "ema"))
    if lora:
        model = PeftModel.from_pretrained(model, out / "ema")
    starts = torch.arange(16)[:, None]
    told = model.generate(input_ids=starts, max_length=10, do_sample=False, pad_token_id=0)
    right = (told == (starts + 3 * torch.arange(10)) % 16)[:, 1:].float().mean().item()
    print(f"from 5: {told[5].tolist()}; {right:.0%} of the numbers counted by three are right")


def main(out: Path, lora: bool) -> None:
    kwargs = [] if torch.accelerator.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=kwargs)
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    train(model, optimizer, counting(1, 100), torch.Tensor.backward)
    if accelerator.is_main_process:
        model.save_pretrained(out / "base")
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=TARGETS))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, counting(3, 400))
    ema = ShardedEMA(model, decay=0.95)
    train(model, optimizer, loader, accelerator.backward, ema.update)
    ema.export(out / "ema")
    if accelerator.is_main_process:
        subprocess.run([sys.executable, *sys.argv, "--read"], check=True)
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_lm"))
    parser.add_argument("--read", action="store_true", help="only generate, from an earlier run")
    options = parser.parse_args()
    (read_and_generate if options.read else main)(options.out, options.lora)
