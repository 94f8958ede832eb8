"""What each library expects of a directory of weights, told by a card that is plain JSON.

    transformers   model.safetensors, config.json with the dtype that was written, generation config
    diffusers      diffusion_pytorch_model.safetensors, config.json
    peft           adapter_model.safetensors, adapter_config.json: of the active adapter only,
                   without its name in those of tensors; one file, since `PeftModel` reads no index
    otherwise      model.safetensors, aliases of tied weights in the metadata as `save_model` does

Checked with transformers 5.23, diffusers 0.42, peft 0.21, safetensors 0.8. transformers' names are
those of the model in memory, as `save_pretrained(save_original_format=False)` writes them.
`from_pretrained` casts to the dtype in `config.json` in silence, so it is always written.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ema.names import class_of, ddp_modules, is_instance, slots

Card = Mapping[str, Any]
"""library: transformers, diffusers, peft or plain.
weights_name: name of the library's weights file.
texts: file name -> contents, of further files.
dtype_at: file name -> paths of keys in it that take the dtype.
names: fqn -> name in the file; null where each tensor has its own name."""

_WEIGHTS_NAMES = {
    "transformers": "model.safetensors",
    "diffusers": "diffusion_pytorch_model.safetensors",
    "peft": "adapter_model.safetensors",
    "plain": "model.safetensors",
}
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_WRAPPER_LEVELS = ("_orig_mod", "_checkpoint_wrapped_module")


def card_of(module: nn.Module) -> dict[str, Any]:
    """The card of an unwrapped module. Local; for adapters peft may ask the hub for a config."""
    if _peft_model(module):
        return _adapter_card(module)
    if is_instance(module, "transformers.modeling_utils", "PreTrainedModel"):
        return _transformers_card(module)
    if is_instance(module, "diffusers.models.modeling_utils", "ModelMixin"):
        config = json.loads(module.to_json_string())  # type: ignore[operator]
        config["_class_name"] = _own_class(module).__name__
        return _card("diffusers", {"config.json": config})
    return _card("plain", {})


def texts_of(card: Card, dtype: torch.dtype) -> dict[str, str]:
    """The further files, with the dtype of the averaged weights filled in."""
    texts = dict(card["texts"])
    for name, paths in card["dtype_at"].items():
        config = json.loads(texts[name])
        for path in paths:
            part = config
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = str(dtype).removeprefix("torch.")
        texts[name] = _text(config)
    return texts


def with_config(card: Card, directory: Path) -> dict[str, Any]:
    """The card with the further files of a directory in place of its own."""
    found = {
        name: (directory / name).read_text() for name in _CONFIGS if (directory / name).is_file()
    }
    if not found:
        raise ValueError(f"{directory} holds no config.json and no adapter_config.json")
    dtype_at = dict(card["dtype_at"])
    config = json.loads(found.get("config.json", "{}"))
    old = [key for key in ("dtype", "torch_dtype") if key in config]
    if card["library"] == "transformers" or old:
        # Not at the old key, which is read only where the new one is absent.
        for key in old:
            del config[key]
        found["config.json"] = _text(config | {"dtype": None})
        dtype_at["config.json"] = [["dtype"]]
    return {**card, "texts": {**card["texts"], **found}, "dtype_at": dtype_at}


def checked_card(told: object) -> Card:
    """A card that was read from a file.

    Raises:
        ValueError: it is none, or tells to write a file that no library reads.
    """
    card: Any = told
    try:
        good = (
            card["library"] in _WEIGHTS_NAMES
            and card["weights_name"] == _WEIGHTS_NAMES[card["library"]]
            and set(card["texts"]) <= set(_CONFIGS)
            and set(card["dtype_at"]) <= set(card["texts"])
            and all(isinstance(text, str) for text in card["texts"].values())
            and (card["names"] is None or _is_text_map(card["names"]))
        )
        texts_of(card, torch.float32)
    except (LookupError, TypeError, AttributeError, ValueError):
        good = False
    if not good:
        raise ValueError("the checkpoint's card of the model makes no sense")
    return dict(card)


def guessed_card(directory: Path | None) -> Card:
    """A card for a checkpoint that has none, by the configuration of a model's directory."""
    config: Any = {}
    if directory is not None and (directory / "config.json").is_file():
        config = json.loads((directory / "config.json").read_text())
    if "_class_name" in config:
        return _card("diffusers", {})
    if "model_type" in config or "architectures" in config:
        return _card("transformers", {})
    return _card("plain", {})


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) for item in value.items() for text in item
    )


def check_names(module: nn.Module) -> None:
    """Refuse a module whose `state_dict()` has other names than its registered tensors.

    Loaders take wrong and missing names in silence, so nothing may be written under them. Every
    rank calls it: a sharded module may gather or reshard in `state_dict()`.

    Raises:
        ValueError: names are missing, or are others; they are listed.
    """
    fsdp1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    if ddp_modules(module) or any(is_instance(m, *fsdp1) for m in module.modules()):
        return  # FSDP1 answers by a gather, with names of its own
    state = module.state_dict(keep_vars=True)
    extra = [key for key in state if key.endswith("_extra_state")]
    if extra:
        warnings.warn(
            f"state_dict() has {', '.join(extra[:3])}, which is no tensor of the model; it is not "
            "exported",
            stacklevel=2,
        )
    told = {_without_wrappers(key) for key in state if key not in extra}
    registered = {slot.fqn for slot in slots(module) if slot.persistent}
    if told != registered:
        raise ValueError(
            "state_dict() names other tensors than the modules hold, so the library would not find "
            f"what is exported: only in state_dict() {sorted(told - registered)}, only in modules "
            f"{sorted(registered - told)}; use gather_state_dict() and write it as the model does"
        )


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_LEVELS)


def _card(
    library: str,
    configs: Mapping[str, Any],
    *,
    dtype_at: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "library": library,
        "weights_name": _WEIGHTS_NAMES[library],
        "texts": {name: _text(config) for name, config in configs.items()},
        "dtype_at": dict(dtype_at or {}),
        "names": names if names is None else dict(names),
    }


def _text(config: object) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _transformers_card(module: Any) -> dict[str, Any]:
    config = copy.deepcopy(module.config)
    config.architectures = [_own_class(module).__name__]
    parts = {"": config} | {key: getattr(config, key, None) for key in config.sub_configs}
    for part in parts.values():
        if part is not None:
            part.dtype = torch.float32
    configs = {"config.json": json.loads(config.to_json_string())}
    if module.can_generate() and module.generation_config is not None:
        configs |= _saved(module.generation_config.save_pretrained)
    top = configs["config.json"]
    paths = [["dtype"], *([key, "dtype"] for key in parts if isinstance(top.get(key), dict))]
    ignored = module._keys_to_ignore_on_save
    names = {s.fqn: s.fqn for s in slots(module) if s.fqn not in ignored} if ignored else None
    return _card(
        "transformers",
        configs,
        dtype_at={"config.json": paths},
        names=names,
    )


def _peft_model(module: nn.Module) -> bool:
    return is_instance(module, "peft.peft_model", "PeftModel")


def _adapter_card(module: Any) -> dict[str, Any]:
    """The active adapter alone, under the names that peft itself gives."""
    adapter = module.active_adapter
    stand_ins = {
        slot.fqn: torch.empty(0, device="meta") for slot in slots(module) if slot.persistent
    }
    named = sys.modules["peft"].get_peft_model_state_dict(
        module, state_dict=dict(stand_ins), adapter_name=adapter
    )
    fqn_of = {id(tensor): fqn for fqn, tensor in stand_ins.items()}
    made = sorted(name for name, tensor in named.items() if id(tensor) not in fqn_of)
    if made:
        raise ValueError(
            f"peft makes {', '.join(made)} of other tensors when it saves adapter {adapter!r}; "
            "export() writes tensors as they are: use gather_state_dict() and save_pretrained()"
        )
    config = copy.deepcopy(module.peft_config[adapter])
    config.inference_mode = True
    base = module.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    own = _own_class(base)
    task: dict[str, str] | None = {
        "base_model_class": own.__name__,
        "parent_library": own.__module__,
    }
    if config.task_type is not None:
        task = None
    return _card(
        "peft",
        _saved(
            functools.partial(
                config.save_pretrained, auto_mapping_dict=None if config.task_type else task
            )
        ),
        names={fqn_of[id(tensor)]: name for name, tensor in named.items()},
    )


def _saved(save_pretrained: Any) -> dict[str, Any]:
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


def name_in(card: Card, fqns: Iterable[str]) -> str | None:
    """The name under which a tensor of these names is written; None if it is left out."""
    names: Mapping[str, str] | None = card["names"]
    if names is None:
        return next(iter(fqns))
    return next((names[fqn] for fqn in fqns if fqn in names), None)
