"""Tiny models of the libraries whose checkpoints are exported, built from configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 17


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def tiny_dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        norm_num_groups=2,
        sample_size=4,
        num_embeds_ada_norm=5,
    )


def tiny_gpt2() -> nn.Module:
    """A causal LM whose head is tied to its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=VOCABULARY, n_positions=16)
    return GPT2LMHeadModel(config)


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
        )
    )


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def tiny_lora() -> nn.Module:
    """Adapters on a Llama, and a layer that is trained whole beside them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.0
    )
    model = get_peft_model(tiny_llama(), config)
    with torch.no_grad():  # peft starts one of the two at zero
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model


BUILDERS = {
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "unet": tiny_unet,
    "dit": tiny_dit,
    "lora": tiny_lora,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]()


def loss_of(model: nn.Module, name: str, step: int, dtype: torch.dtype) -> Tensor:
    """The loss of a small batch in which every weight takes part, or nearly."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (2, 6), generator=generator)
    out: Any
    if name in ("gpt2", "lora"):
        out = model(input_ids=tokens, labels=tokens)
        return out.loss
    if name == "bert":
        out = model(input_ids=tokens)
        return out.pooler_output.float().square().mean() + out.last_hidden_state.float().mean()
    if name == "unet":
        images = torch.randn(2, 1, 8, 8, generator=generator).to(dtype)
        out = model(images, torch.tensor([3, 7]))
    else:
        images = torch.randn(2, 2, 4, 4, generator=generator).to(dtype)
        labels = torch.tensor([1, 2])
        out = model(images, timestep=torch.tensor([3, 7]), class_labels=labels)
    return out.sample.float().square().mean()


def load(name: str, path: str, dtype: torch.dtype) -> nn.Module:
    """What a user of the library gets from an export; raises unless every name is found."""
    options: dict[str, Any] = {"output_loading_info": True}
    if name == "lora":
        from peft import PeftModel

        torch.manual_seed(0)
        with_adapter = PeftModel.from_pretrained(tiny_llama(), path, autocast_adapter_dtype=False)
        return with_adapter
    if name in ("gpt2", "bert"):
        from transformers import AutoModel, AutoModelForCausalLM

        kind: Any = AutoModelForCausalLM if name == "gpt2" else AutoModel
        options["torch_dtype"] = "auto"  # the default since transformers 5
    else:
        from diffusers import DiTTransformer2DModel, UNet2DModel

        kind = UNet2DModel if name == "unet" else DiTTransformer2DModel
        options["torch_dtype"] = dtype
    model, info = kind.from_pretrained(path, **options)
    if any(info.values()):
        raise AssertionError(f"{path}: {info}")
    return model
