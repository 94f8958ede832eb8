"""What each library expects of a directory of weights, told of a model by its card.

    transformers   model.safetensors, config.json with the dtype that was written, generation config
    diffusers      diffusion_pytorch_model.safetensors, config.json
    peft           adapter_model.safetensors, adapter_config.json: of the active adapter only,
                   without its name in those of tensors; one file, since `PeftModel` reads no index
    otherwise      model.safetensors, aliases of tied weights in the metadata as `save_model` does

Checked with transformers 5.23, diffusers 0.42, peft 0.21, safetensors 0.8. transformers' names are
those of the model in memory, as `save_pretrained(save_original_format=False)` writes them; the code
of a custom model is not copied. `from_pretrained` casts in silence to the dtype in `config.json`,
so it is always written.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ema.core.names import class_of, ddp_modules, is_instance, registrations, unwrap
from dist_ema.export.card import Card, make_card

_WRAPPER_LEVELS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_TRANSFORMERS = ("transformers.modeling_utils", "PreTrainedModel")
_PLAIN = (torch.Tensor, nn.Parameter)
_DIFFUSERS = ("diffusers.models.modeling_utils", "ModelMixin")


def card_of(module: nn.Module, extra: Iterable[str] = ()) -> dict[str, Any]:
    """The card of an unwrapped module. Local, and without network.

    Args:
        extra: names that only `state_dict()` has.

    Raises:
        ValueError: no file of its library can hold the model as it is; it says what can.
    """
    if is_instance(module, "peft.peft_model", "PeftModel"):
        return _adapter_card(module, "", extra)
    if is_instance(module, "peft.mixed_model", "PeftMixedModel"):
        raise ValueError("peft cannot save mixed adapters; use gather_state_dict()")
    injected = getattr(module, "_hf_peft_config_loaded", False)
    if is_instance(module, *_TRANSFORMERS):
        return (
            _adapter_card(module, "base_model.model.", extra) if injected else _model_card(module)
        )
    if is_instance(module, *_DIFFUSERS):
        return _diffusers_card(module, injected)
    return make_card("plain", {})


def differing_names(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """What `state_dict()` of the unwrapped model has that no module holds, and the reverse.

    Quantized layers add the state of their quantization, for example. Every rank calls it: a
    sharded module may gather or reshard in `state_dict()`.
    """
    fsdp1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    module = unwrap(model)
    if ddp_modules(module) or any(is_instance(m, *fsdp1) for m in model.modules()):
        return {}, []  # FSDP1 answers by a gather, with names of its own
    state = {
        _without_wrappers(key): value for key, value in module.state_dict(keep_vars=True).items()
    }
    registered = {
        registration.fqn for registration in registrations(module) if registration.persistent
    }
    extra = {key: value for key, value in state.items() if key not in registered}
    return extra, sorted(registered - state.keys())


def refuse_differing_names(card: Card, extra: Mapping[str, Any], missing: Sequence[str]) -> None:
    """Refuse names of `state_dict()` that are to be written and are not those of the tensors.

    Loaders take wrong and missing names in silence, so nothing may be written under them.

    Raises:
        ValueError: names are missing, or are others; they are listed.
    """
    names = card["names"]
    if names is not None:  # only these are written
        extra, missing = {}, [fqn for fqn in missing if fqn in names]
    states = [key for key in extra if key.endswith("_extra_state")]
    if states:
        warnings.warn(
            f"state_dict() has {', '.join(states[:3])}, which is no tensor of the model; it is not "
            "exported",
            stacklevel=2,
        )
    more = sorted(extra.keys() - states)
    if more or missing:
        raise ValueError(
            "state_dict() names other tensors than the modules hold, so the library would not find "
            f"what is exported: only in state_dict() {more}, only in modules {list(missing)}; use "
            "gather_state_dict() and write it as the model does"
        )


def tensors_beside(
    module: nn.Module, extra: Mapping[str, Any], averaged: Set[str]
) -> dict[str, torch.Tensor]:
    """The tensors of `state_dict()` that no module holds and that go with frozen weights.

    Raises:
        ValueError: one goes with an averaged weight, and may have been computed from the live one.
    """
    found = {}
    held = (
        {registration.fqn: registration.tensor for registration in registrations(module)}
        if extra
        else {}
    )
    changing = {id(tensor) for fqn, tensor in held.items() if fqn in averaged}
    for key, value in extra.items():
        if not isinstance(value, torch.Tensor) or any(value is t for t in held.values()):
            continue  # extra state, or a registered tensor under another name
        tensor = max((fqn for fqn in held if key.startswith(f"{fqn}.")), key=len, default=None)
        owner = key.rpartition(".")[0]
        related = [tensor] if tensor else [f for f in held if f.rpartition(".")[0] == owner]
        if type(value) not in _PLAIN or any(id(held[f]) in changing for f in related):
            raise ValueError(
                f"state_dict() has {key}, which no module holds as a parameter or buffer; it may "
                "depend on averaged weights, or be sharded: call the model's own state_dict() "
                "inside average_parameters()"
            )
        found[key] = value.detach()
    return found


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_LEVELS)


def _model_card(module: Any) -> dict[str, Any]:
    config = copy.deepcopy(module.config)
    config.architectures = [_own_class(module).__name__]
    parts = {"": config} | {key: getattr(config, key, None) for key in config.sub_configs}
    dtype_key = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before transformers 4.56
    for part in parts.values():
        if part is not None:
            setattr(part, dtype_key, torch.float32)
    configs = {"config.json": json.loads(config.to_json_string())}
    if module.can_generate() and module.generation_config is not None:
        # Not by save_pretrained(), which refuses what warns at generation only.
        generation_config = copy.copy(module.generation_config)
        generation_config.compile_config = None  # no JSON value, and not written
        configs["generation_config.json"] = json.loads(generation_config.to_json_string())
    top = configs["config.json"]
    paths = [[dtype_key], *([key, dtype_key] for key in parts if isinstance(top.get(key), dict))]
    return make_card(
        "transformers",
        configs,
        dtype_at={"config.json": paths},
        ignored=module._keys_to_ignore_on_save or (),
    )


def _diffusers_card(module: Any, injected: bool) -> dict[str, Any]:
    if injected:
        raise ValueError(
            "from_pretrained() does not read a model that has adapters inside; write them with "
            "save_lora_adapter() inside average_parameters(), or use gather_state_dict()"
        )
    names: dict[int, str] = {}
    for registration in registrations(module):
        first = names.setdefault(id(registration.tensor), registration.fqn)
        if registration.persistent and first != registration.fqn:
            raise ValueError(
                f"{registration.fqn} is tied to {first}, and diffusers neither writes nor reads "
                "tied weights; use gather_state_dict()"
            )
    config = json.loads(module.to_json_string())
    config["_class_name"] = _own_class(module).__name__
    return make_card("diffusers", {"config.json": config})


def _adapter_card(module: Any, prefix: str, extra: Iterable[str]) -> dict[str, Any]:
    """The active adapter alone, under the names that peft itself gives."""
    active = module.active_adapters
    adapters: list[str] = active() if callable(active) else active
    if len(adapters) != 1:
        raise ValueError(f"the adapters {adapters} are active; activate the one to be exported")
    config = copy.deepcopy(module.peft_config[adapters[0]])
    if config.is_prompt_learning:
        raise ValueError(
            "a learned prompt is computed by the model when it is saved; use save_pretrained() "
            "inside average_parameters(), or gather_state_dict()"
        )
    config.inference_mode = True
    base = module if prefix else module.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    own = _own_class(base)
    task = {"base_model_class": own.__name__, "parent_library": own.__module__}
    save = functools.partial(
        config.save_pretrained, auto_mapping_dict=None if config.task_type or prefix else task
    )
    names = {fqn: prefix + name for fqn, name in _adapter_names(module, adapters[0], extra).items()}
    return make_card("peft", _saved(save), names=names)


def _adapter_names(module: Any, adapter: str, extra: Iterable[str]) -> dict[str, str]:
    """The tensors of an adapter, and what peft calls them in its file."""
    levels = {id(m): name for name, m in module.named_modules(remove_duplicate=False)}
    stand_ins = {name: torch.empty(0, device="meta") for name in extra}
    fqn_of: dict[int, str] = {}
    for registration in registrations(module):
        if registration.persistent:
            level = levels[id(registration.owner)]
            tensor = torch.empty(0, device="meta")
            # Wrapped modules have names in peft's own walk that state_dict() may not give.
            stand_ins[f"{level}.{registration.name}" if level else registration.name] = tensor
            fqn_of[id(tensor)] = registration.fqn
    config = module.peft_config[adapter]
    resized = _is_resized(module, config.base_model_name_or_path)
    try:  # with a base model's name in the configuration, peft would ask the hub about it
        module.peft_config[adapter] = copy.copy(config)
        module.peft_config[adapter].base_model_name_or_path = None
        named = sys.modules["peft"].get_peft_model_state_dict(
            module,
            state_dict=dict(stand_ins),
            adapter_name=adapter,
            save_embedding_layers=resized or "auto",
        )
    finally:
        module.peft_config[adapter] = config
    made = sorted(name for name, tensor in named.items() if id(tensor) not in fqn_of)
    if made:
        raise ValueError(
            f"peft saves {', '.join(made)} with adapter {adapter!r}, which no module holds as a "
            "parameter or buffer; export() writes only these: use gather_state_dict(), or "
            "save_pretrained() inside average_parameters()"
        )
    return {fqn_of[id(tensor)]: _without_wrappers(name) for name, tensor in named.items()}


def _is_resized(module: Any, model_id: str | None) -> bool:
    """Whether the vocabulary has another size than the base model's, as far as that is known here.

    The base's configuration is read from its directory or from the local cache of the hub.
    """
    config: Any = getattr(module, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    if not model_id or vocab_size is None:
        return False
    try:
        base: Any = type(config).from_pretrained(model_id, local_files_only=True)
    except Exception:  # of whatever kind: it is not here
        return False
    return bool(base.vocab_size != vocab_size)


def _saved(save_pretrained: Callable[[str], object]) -> dict[str, Any]:
    """The JSON files that a library's object writes."""
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(directory)
        return {
            file.name: json.loads(file.read_text())
            for file in sorted(Path(directory).glob("*.json"))
        }


def _own_class(module: nn.Module) -> type:
    """The class that the user wrote; `fully_shard` puts a subclass of it in its place."""
    fsdp2 = class_of("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")
    for cls in type(module).__mro__:
        if fsdp2 is None or not issubclass(cls, fsdp2):
            return cls
    raise AssertionError(type(module))
