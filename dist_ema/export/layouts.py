"""Model layouts: which files each library reads, and the names of tensors in them.

    transformers   model.safetensors, config.json with the dtype that was written, generation config
    diffusers      diffusion_pytorch_model.safetensors, config.json
    peft           adapter_model.safetensors, adapter_config.json: of the active adapter only,
                   without its name in those of tensors; one file, since `PeftModel` reads no index
    plain          model.safetensors, aliases of tied weights in the metadata as `save_model` does

Checked with transformers 5.23, diffusers 0.42, peft 0.21, safetensors 0.8. Names of a transformers
model are those that `save_pretrained(save_original_format=False)` writes; the code of a custom
model is not copied. `from_pretrained` casts to the dtype in `config.json` without a warning, so the
dtype is always written.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from dist_ema.core.engine import Weight
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from dist_ema.core.names import (
    Registration,
    class_of,
    ddp_modules,
    is_instance,
    registrations,
    unwrap,
)
from dist_ema.core.safetensors import dtype_name

_WEIGHTS_NAMES = {
    "transformers": "model.safetensors",
    "diffusers": "diffusion_pytorch_model.safetensors",
    "peft": "adapter_model.safetensors",
    "plain": "model.safetensors",
}
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_WRAPPER_LEVELS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class ModelLayout:
    """What a library expects of a directory of weights. A checkpoint keeps it as JSON."""

    library: str  # transformers, diffusers, peft or plain
    weights_name: str  # of the library's weights file
    texts: Mapping[str, str]  # file name -> contents, of the configurations
    dtype_at: Mapping[str, Sequence[Sequence[str]]]  # file name -> paths of keys that hold a dtype
    names: Mapping[str, str] | None  # fqn -> name in the file; None: all tensors by their fqns
    ignored: Sequence[str]  # fqns that the library does not write

    def name_of(self, fqns: Iterable[str]) -> str | None:
        """The name under which a tensor of these names is written; None if it is left out."""
        if self.names is not None:
            return next((self.names[fqn] for fqn in fqns if fqn in self.names), None)
        return next((fqn for fqn in fqns if fqn not in self.ignored), None)

    def config_files(self, dtype: torch.dtype) -> dict[str, str]:
        """The contents of the configurations, with the dtype of the averaged weights."""
        texts = dict(self.texts)
        for name, paths in self.dtype_at.items():
            config = json.loads(texts[name])
            for *outer, last in paths:
                part = config
                for key in outer:
                    part = part[key]
                part[last] = str(dtype).removeprefix("torch.")
            texts[name] = _json_text(config)
        return texts


def _layout(
    library: str,
    configs: Mapping[str, Any],
    *,
    dtype_at: Mapping[str, Sequence[Sequence[str]]] | None = None,
    names: Mapping[str, str] | None = None,
    ignored: Iterable[str] = (),
) -> ModelLayout:
    texts = {name: _json_text(config) for name, config in configs.items()}
    weights_name = _WEIGHTS_NAMES[library]
    return ModelLayout(library, weights_name, texts, dtype_at or {}, names, sorted(ignored))


def layout_from_json(value: object) -> ModelLayout:
    """A layout that a checkpoint holds.

    Raises:
        ValueError: it is malformed, or has files that no library reads.
    """
    try:
        layout = ModelLayout(**value)  # type: ignore[arg-type]
        names = layout.names if layout.names is not None else {}
        is_valid = (
            layout.weights_name == _WEIGHTS_NAMES[layout.library]
            and set(layout.dtype_at) <= set(layout.texts) <= set(_CONFIGS)
            and all(isinstance(name, str) and name for item in names.items() for name in item)
            and all(isinstance(text, str) for text in (*layout.texts.values(), *layout.ignored))
        )
        layout.config_files(torch.float32)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        is_valid = False
    if not is_valid:
        raise ValueError("the layout of the model is malformed")
    return layout


def layout_from_directory(directory: Path | None) -> ModelLayout:
    """The layout of the model whose configurations are in a directory; plain if there are none.

    Raises:
        ValueError: a configuration is not a JSON mapping.
    """
    paths = (directory / name for name in _CONFIGS) if directory is not None else ()
    configs = {path.name: read_config(path) for path in paths if path.is_file()}
    config = configs.get("config.json", {})
    if "_class_name" in config:
        library = "diffusers"
    elif "model_type" in config or "architectures" in config:
        library = "transformers"
    else:
        return _layout("plain", {})
    dtype_paths = []
    for path, part in {"": config, **config}.items():
        if not isinstance(part, dict):
            continue
        if {"dtype", "torch_dtype"} & part.keys() or (library == "transformers" and not path):
            part.pop("torch_dtype", None)  # read only where the newer key is absent
            dtype_paths.append([path, "dtype"] if path else ["dtype"])
    return _layout(library, configs, dtype_at={"config.json": dtype_paths})


def model_state(model: nn.Module, others: Iterable[Weight], rank: int) -> dict[str, Any]:
    """What an export from a checkpoint must know of the model, as JSON; {} off rank 0.

    Every rank calls it. Does not raise: an error of a library is stored in the result.

    Args:
        others: weights and buffers that are not averaged.
    """
    try:
        extra, missing = differing_names(model)
        if rank != 0:
            return {}
        return {
            "card": asdict(layout_of(model, extra, missing)),
            "others": {
                w.fqn: {
                    "shape": list(w.shape),
                    "dtype": dtype_name(w.tensor.dtype) or str(w.tensor.dtype),
                    "aliases": list(w.aliases),
                }
                for w in others
                if w.persistent
            },
        }
    except Exception as problem:
        return {"problem": f"{type(problem).__name__}: {problem}"}


def layout_of(model: nn.Module, extra: Mapping[str, Any], missing: Sequence[str]) -> ModelLayout:
    """The layout of a model in memory. Local, without network.

    Args:
        extra, missing: the result of `differing_names`.

    Raises:
        ValueError: the library's files cannot hold the model. Loaders accept missing and unknown
            names without an error, so `state_dict()` must have the names of the tensors.
    """
    layout = _library_layout(unwrap(model), extra)
    if layout.names is not None:  # other names are not written
        extra, missing = {}, [fqn for fqn in missing if fqn in layout.names]
    states = [key for key in extra if key.endswith("_extra_state")]
    if states:
        warnings.warn(
            f"state_dict() has {', '.join(states[:3])}, which is no tensor of the model; it is not "
            "exported",
            stacklevel=2,
        )
    unknown = sorted(extra.keys() - states)
    if unknown or missing:
        raise ValueError(
            "state_dict() names other tensors than the modules hold, so the library would not find "
            f"what is exported: only in state_dict() {unknown}, only in modules {list(missing)}; "
            "use gather_state_dict() and write it as the model does"
        )
    return layout


def differing_names(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """What `state_dict()` of the unwrapped model has that no module registers, and the reverse.

    Quantized layers add the state of their quantization, for example. Every rank calls it: a
    sharded module may gather or reshard in `state_dict()`.
    """
    module = unwrap(model)
    if ddp_modules(module) or any(is_instance(m, *_FSDP1) for m in model.modules()):
        return {}, []  # FSDP1 gathers in state_dict(), and has names of its own
    items = module.state_dict(keep_vars=True).items()
    state = {_without_wrappers(key): value for key, value in items}
    registered = {r.fqn for r in registrations(module) if r.persistent}
    extra = {key: value for key, value in state.items() if key not in registered}
    return extra, sorted(registered - state.keys())


def unregistered_tensors(
    call: str,
    model: nn.Module,
    averaged: Collection[str],
    group: Group,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """CPU copies of the tensors of `state_dict()` that no module registers.

    Collective: every rank calls it.

    Args:
        call: the public call, for error messages.
        averaged: fqns of averaged weights.
        dtype: in which the others are gathered.

    Raises:
        ValueError: a tensor may have been computed from an averaged weight; or it describes a
            quantization whose bits are kept in another floating dtype. On every rank.
        RuntimeError: ranks hold different ones.
    """
    result: dict[str, torch.Tensor] = {}
    hashes: dict[str, str] = {}
    with group.together(call, hashes):  # compares what the block puts into `hashes`
        extra = differing_names(model)[0]
        every = registrations(unwrap(model))
        _refuse_changed_bits(every, extra, dtype)
        registered = {r.fqn: r.tensor for r in every} if extra else {}
        ids = {id(tensor) for tensor in registered.values()}
        changing = {id(tensor) for fqn, tensor in registered.items() if fqn in averaged}
        for key, value in extra.items():
            if not isinstance(value, torch.Tensor) or id(value) in ids:
                continue  # extra state, or a registered tensor under another name
            module = key.rpartition(".")[0]
            parents = [fqn for fqn in registered if key.startswith(f"{fqn}.")]
            siblings = [fqn for fqn in registered if fqn.rpartition(".")[0] == module]
            depends = any(id(registered[fqn]) in changing for fqn in parents or siblings)
            if depends or type(value) not in (torch.Tensor, nn.Parameter):
                raise ValueError(
                    f"state_dict() has {key}, which no module holds as a parameter or buffer; it "
                    "may depend on averaged weights, or be sharded: call the model's own "
                    "state_dict() inside average_parameters()"
                )
            tensor = value.detach().to("cpu", copy=True).contiguous()
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            label = f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_64_hexdigest(data)}"
            hashes[f"state_dict()[{key!r}]"] = label
            result[key] = tensor
    return result


def _refuse_changed_bits(
    registered: Sequence[Registration], extra: Collection[str], dtype: torch.dtype | None
) -> None:
    """Raise ValueError if a floating tensor holds the bits of a quantization, and would be cast.

    bitsandbytes does so with `quant_storage=torch.bfloat16`. It keeps a `quant_state` at the layer,
    and `state_dict()` has it under the weight's name, but not if the weight is sharded.
    """
    for r in registered:
        kept = r.tensor.dtype
        if TensorMeta(r.fqn, (), (), kept).dtype_as(dtype) == kept:
            continue
        at_layer = r.name == "weight" and getattr(r.owner, "quant_state", None) is not None
        if at_layer or any(key.startswith(f"{r.fqn}.") for key in extra):
            raise ValueError(
                f"{r.fqn} holds the bits of a quantization as {kept}, and another dtype would "
                f"change them; pass dtype={kept}, or quantize it with an integer storage"
            )


def _library_layout(module: nn.Module, extra: Iterable[str]) -> ModelLayout:
    if is_instance(module, "peft.peft_model", "PeftModel"):
        return _adapter_layout(module, "", extra)
    if is_instance(module, "peft.mixed_model", "PeftMixedModel"):
        raise ValueError("peft cannot save mixed adapters; use gather_state_dict()")
    has_adapters = getattr(module, "_hf_peft_config_loaded", False)
    if is_instance(module, "transformers.modeling_utils", "PreTrainedModel"):
        if has_adapters:
            return _adapter_layout(module, "base_model.model.", extra)
        return _transformers_layout(module)
    if is_instance(module, "diffusers.models.modeling_utils", "ModelMixin"):
        if has_adapters:
            raise ValueError(
                "from_pretrained() does not read a model that has adapters inside; write them with "
                "save_lora_adapter() inside average_parameters(), or use gather_state_dict()"
            )
        return _diffusers_layout(module)
    return _layout("plain", {})


def _transformers_layout(module: Any) -> ModelLayout:
    config = copy.deepcopy(module.config)
    config.architectures = [_own_class(module).__name__]
    parts = {"": config} | {key: getattr(config, key, None) for key in config.sub_configs}
    dtype_key = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before transformers 4.56
    for part in parts.values():
        if part is not None:
            setattr(part, dtype_key, torch.float32)
    configs = {"config.json": json.loads(config.to_json_string())}
    if module.can_generate() and module.generation_config is not None:
        # Not by save_pretrained(), which refuses a config that only causes a warning when used.
        generation_config = copy.copy(module.generation_config)
        generation_config.compile_config = None  # not JSON, and not written
        configs["generation_config.json"] = json.loads(generation_config.to_json_string())
    top = configs["config.json"]
    paths = [[dtype_key], *([key, dtype_key] for key in parts if isinstance(top.get(key), dict))]
    ignored = module._keys_to_ignore_on_save or ()
    return _layout("transformers", configs, dtype_at={"config.json": paths}, ignored=ignored)


def _diffusers_layout(module: Any) -> ModelLayout:
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
    return _layout("diffusers", {"config.json": config})


def _adapter_layout(module: Any, prefix: str, extra: Iterable[str]) -> ModelLayout:
    """The active adapter alone, under the names that peft writes."""
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
    names = {fqn: prefix + name for fqn, name in _adapter_names(module, adapters[0], extra).items()}
    config.inference_mode = True
    base = module if prefix else module.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    cls = _own_class(base)
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    with tempfile.TemporaryDirectory() as directory:
        is_known = config.task_type or prefix
        config.save_pretrained(directory, auto_mapping_dict=None if is_known else mapping)
        configs = {file.name: json.loads(file.read_text()) for file in Path(directory).iterdir()}
    return _layout("peft", configs, names=names)


def _adapter_names(module: Any, adapter: str, extra: Iterable[str]) -> dict[str, str]:
    """Names in peft's file of the tensors of an adapter, by fqn."""
    levels = {id(m): name for name, m in module.named_modules(remove_duplicate=False)}
    stand_ins = {name: torch.empty(0, device="meta") for name in extra}
    fqn_of: dict[int, str] = {}
    for registration in registrations(module):
        if registration.persistent:
            level = levels[id(registration.owner)]
            tensor = torch.empty(0, device="meta")
            # peft uses the names of named_modules(), where wrapped modules have a level more.
            stand_ins[f"{level}.{registration.name}" if level else registration.name] = tensor
            fqn_of[id(tensor)] = registration.fqn
    config = module.peft_config[adapter]
    is_resized = _is_resized(module, config.base_model_name_or_path)
    try:  # with a base model's name in the configuration, peft would ask the hub about it
        module.peft_config[adapter] = copy.copy(config)
        module.peft_config[adapter].base_model_name_or_path = None
        named = sys.modules["peft"].get_peft_model_state_dict(
            module,
            state_dict=dict(stand_ins),
            adapter_name=adapter,
            save_embedding_layers=is_resized or "auto",
        )
    finally:
        module.peft_config[adapter] = config
    unknown = sorted(name for name, tensor in named.items() if id(tensor) not in fqn_of)
    if unknown:
        raise ValueError(
            f"peft saves {', '.join(unknown)} with adapter {adapter!r}, which no module holds as a "
            "parameter or buffer; export() writes only these: use gather_state_dict(), or "
            "save_pretrained() inside average_parameters()"
        )
    return {fqn_of[id(tensor)]: _without_wrappers(name) for name, tensor in named.items()}


def _is_resized(module: Any, model_id: str | None) -> bool:
    """Whether the vocabulary differs from the base model's, if the base's configuration is local.

    It is read from the model's directory, or from the local cache of the hub.
    """
    config: Any = getattr(module, "config", None)
    vocab_size = getattr(config, "vocab_size", None)
    if not model_id or vocab_size is None:
        return False
    try:
        base: Any = type(config).from_pretrained(model_id, local_files_only=True)
    except Exception:  # not in the cache; libraries raise many kinds
        return False
    return bool(base.vocab_size != vocab_size)


def _own_class(module: nn.Module) -> type:
    """The class that the user wrote: `fully_shard` replaces a module's class by a subclass."""
    fsdp2 = class_of("torch.distributed.fsdp._fully_shard._fully_shard", "FSDPModule")
    return next(cls for cls in type(module).__mro__ if not fsdp2 or not issubclass(cls, fsdp2))


def _without_wrappers(key: str) -> str:
    return ".".join(level for level in key.split(".") if level not in _WRAPPER_LEVELS)


def _json_text(config: object) -> str:
    """As the libraries write their configurations."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def read_config(path: Path) -> dict[str, Any]:
    """A JSON mapping in a file; raises ValueError if the file holds something else."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, wanted a mapping")
    return config
