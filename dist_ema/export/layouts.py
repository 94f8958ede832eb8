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
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from dist_ema.core.engine import Weight
from dist_ema.core.group import Group
from dist_ema.core.layout import TensorMeta
from dist_ema.core.names import (
    Models,
    Registration,
    class_of,
    ddp_modules,
    is_in_parts,
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
_DTYPE = "dist_ema: dtype"  # in configurations, in place of the dtype of the export
_WRAPPER_LEVELS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class ModelLayout:
    """What a library expects of a directory of weights. A checkpoint keeps it as JSON."""

    library: str  # transformers, diffusers, peft or plain
    texts: Mapping[str, str] = field(default_factory=dict)  # file name -> configuration
    names: Mapping[str, str] | None = None  # fqn -> name in the file; None: all, by their fqns
    ignored: Sequence[str] = ()  # fqns that the library does not write

    @property
    def weights_name(self) -> str:
        """The name of the library's weights file."""
        return _WEIGHTS_NAMES[self.library]

    def name_of(self, fqns: Iterable[str]) -> str | None:
        """The name under which a tensor of these names is written; None if it is left out."""
        if self.names is not None:
            return next((self.names[fqn] for fqn in fqns if fqn in self.names), None)
        return next((fqn for fqn in fqns if fqn not in self.ignored), None)

    def config_files(self, dtype: torch.dtype) -> dict[str, str]:
        """The contents of the configurations, with the dtype of the averaged weights."""
        name = str(dtype).removeprefix("torch.")
        return {file: text.replace(_DTYPE, name) for file, text in self.texts.items()}


def layout_from_json(value: Any) -> ModelLayout:
    """A layout that a checkpoint holds.

    Raises:
        ValueError: it is malformed, or has files that no library reads.
    """
    try:
        fields = dict(value)
        # Version 0.1 kept this name, and the paths of the dtypes in configurations.
        weights_name = fields.pop("weights_name", None)
        for name, paths in fields.pop("dtype_at", {}).items():
            config = json.loads(fields["texts"][name])
            for *outer, last in paths:
                reduce(getitem, outer, config)[last] = _DTYPE
            fields["texts"] = {**fields["texts"], name: _json_text(config)}
        layout = ModelLayout(**fields)
        names = {} if layout.names is None else layout.names
        items = [*layout.texts.items(), *names.items(), layout.ignored]
        is_valid = (
            weights_name in (None, _WEIGHTS_NAMES.get(layout.library))
            and layout.library in _WEIGHTS_NAMES
            and set(layout.texts) <= set(_CONFIGS)
            and isinstance(layout.ignored, list | tuple)
            and all(isinstance(text, str) and text for item in items for text in item)
            and all(isinstance(json.loads(text), dict) for text in layout.texts.values())
        )
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
    paths = [directory / name for name in _CONFIGS] if directory is not None else []
    configs = {path.name: read_config(path) for path in paths if path.is_file()}
    config = configs.get("config.json", {})
    is_transformer = "model_type" in config or "architectures" in config
    library = "diffusers" if "_class_name" in config else "transformers"
    if "_class_name" not in config and not is_transformer:
        is_adapter = "peft_type" in configs.get("adapter_config.json", {})
        library, configs = ("peft", configs) if is_adapter else ("plain", {})
    for part in (config, *config.values()):
        if isinstance(part, dict) and (
            {"dtype", "torch_dtype"} & part.keys() or (part is config and library == "transformers")
        ):
            part.pop("torch_dtype", None)  # read only where the newer key is absent
            part["dtype"] = _DTYPE
    return ModelLayout(library, {name: _json_text(config) for name, config in configs.items()})


def model_state(model: nn.Module, others: Iterable[Weight], group: Group) -> dict[str, Any]:
    """What an export from a checkpoint must know of the model, as JSON; incomplete off rank 0.

    Collective: every rank calls it. An error of a library is stored in the result.

    Args:
        others: weights and buffers that are not averaged.
    """
    try:
        layouts = model_layouts(model, group)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}
    described = {
        w.fqn: {
            "shape": list(w.shape),
            "dtype": dtype_name(w.tensor.dtype) or str(w.tensor.dtype),
            "aliases": list(w.aliases),
        }
        for w in others
        if w.persistent
    }
    if is_in_parts(model):
        described = {fqn: d for of_rank in group.gather(described) for fqn, d in of_rank.items()}
    cards = {name: asdict(layout) for name, layout in layouts.items()}
    named = {"card": cards[""]} if "" in cards else {"cards": cards}
    return named | {"others": described}


def model_layouts(model: nn.Module, group: Group) -> dict[str, ModelLayout]:
    """The layout of each model in memory by its name, "" for a single one; {} off rank 0.

    Collective: every rank calls it, as a sharded module may gather or reshard in `state_dict()`.
    Without network.

    Raises:
        ValueError: a library's files cannot hold the model, or its parts are of several libraries.
            On every rank.
    """
    named = model.named() if isinstance(model, Models) else [("", model)]
    with group.together():
        is_wanted = group.rank == 0 or is_in_parts(model)
        own = [(prefix.removesuffix("."), _layout_of(part, is_wanted)) for prefix, part in named]
        layouts = [(name, layout) for name, layout in own if layout is not None]
    if is_in_parts(model):
        reports = group.gather([layout for _, layout in layouts])
        layouts = []
        with group.together():
            if reports:
                layouts = [("", _merged([layout for report in reports for layout in report]))]
    return dict(layouts)


def _merged(layouts: Sequence[ModelLayout]) -> ModelLayout:
    """The layout of a model from those of its parts."""
    if len(libraries := {layout.library for layout in layouts}) > 1:
        raise ValueError(f"the parts of the model are of several libraries, {sorted(libraries)}")
    names = {fqn: name for layout in layouts for fqn, name in (layout.names or {}).items()}
    ignored = sorted({fqn for layout in layouts for fqn in layout.ignored})
    has_names = layouts[0].names is not None
    return replace(layouts[0], names=names if has_names else None, ignored=ignored)


def _layout_of(model: nn.Module, is_wanted: bool) -> ModelLayout | None:
    """The layout of a module in memory; None unless `is_wanted`.

    Loaders accept missing and unknown names without an error, so `state_dict()` must have the names
    of the tensors.
    """
    extra, missing = _differing_names(model)
    if not is_wanted:
        return None
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
            f"what is exported: only in state_dict() {unknown}, only in modules {missing}; "
            "use gather_state_dict() and write it as the model does"
        )
    return layout


def _differing_names(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """Where `state_dict()` of the unwrapped model and its registered tensors differ.

    Returns the entries of the state dict that are not registered tensors, such as the state of a
    quantization, and the names of registered tensors that the state dict does not have.
    """
    if isinstance(model, Models):
        extras: dict[str, Any] = {}
        for prefix, part in model.named():
            extras |= {prefix + key: value for key, value in _differing_names(part)[0].items()}
        return extras, []
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
) -> dict[str, Any]:
    """What `state_dict()` has that no module registers: CPU copies of tensors, and extra state.

    Collective: every rank calls it.

    Args:
        call: the public call, for error messages.
        averaged: fqns of averaged weights.
        dtype: in which tensors that are not averaged are gathered.

    Raises:
        ValueError: a tensor may have been computed from an averaged weight; or it describes a
            quantization whose bits are kept in another floating dtype. On every rank.
        RuntimeError: ranks hold different ones.
    """
    result: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    with group.together(call, hashes):  # compares what the block puts into `hashes`
        extra = _differing_names(model)[0]
        every = registrations(unwrap(model))
        _refuse_changed_bits(every, extra, dtype)
        registered = {r.fqn: r.tensor for r in every} if extra else {}
        ids = {id(tensor) for tensor in registered.values()}
        changing = {id(tensor) for fqn, tensor in registered.items() if fqn in averaged}
        for key, value in extra.items():
            if id(value) in ids:
                continue  # a registered tensor under another name
            if not isinstance(value, torch.Tensor):
                result[key] = value
                continue
            if is_in_parts(model):
                raise ValueError(
                    f"state_dict() of a part has {key}, which no module holds as a parameter or "
                    "buffer; gather each part by its own state_dict() in average_parameters()"
                )
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
            result[key] = tensor = value.detach().to("cpu", copy=True).contiguous()
            digest = xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data)
            hashes[f"state_dict()[{key!r}]"] = f"{tensor.dtype} {tuple(tensor.shape)} {digest}"
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
    return ModelLayout("plain")


def _transformers_layout(module: Any) -> ModelLayout:
    config = copy.deepcopy(module.config)
    config.architectures = [_own_class(module).__name__]
    top = json.loads(config.to_json_string())
    dtype_key = "dtype" if hasattr(config, "dtype") else "torch_dtype"  # before transformers 4.56
    for part in (top, *(top.get(key) for key in config.sub_configs)):
        if isinstance(part, dict):
            part[dtype_key] = _DTYPE
    texts = {"config.json": _json_text(top)}
    if module.can_generate() and module.generation_config is not None:
        # Not by save_pretrained(), which refuses a config that only causes a warning when used.
        generation_config = copy.copy(module.generation_config)
        generation_config.compile_config = None  # not JSON, and not written
        texts["generation_config.json"] = generation_config.to_json_string()
    return ModelLayout("transformers", texts, ignored=sorted(module._keys_to_ignore_on_save or ()))


def _diffusers_layout(module: Any) -> ModelLayout:
    names: dict[int, str] = {}
    for registration in registrations(module):
        first = names.setdefault(id(registration.tensor), registration.fqn)
        if registration.persistent and first != registration.fqn:
            raise ValueError(
                f"{registration.fqn} is tied to {first}, and diffusers neither writes nor reads "
                "tied weights; use gather_state_dict()"
            )
    config = json.loads(module.to_json_string()) | {"_class_name": _own_class(module).__name__}
    return ModelLayout("diffusers", {"config.json": _json_text(config)})


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
        texts = {file.name: file.read_text() for file in Path(directory).iterdir()}
    return ModelLayout("peft", texts, names)


def _adapter_names(module: Any, adapter: str, extra: Iterable[str]) -> dict[str, str]:
    """The names that peft gives to the tensors of an adapter in its file, by fqn."""
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
    try:  # peft compares the vocabulary with the base model's, and would ask the hub for that
        module.peft_config[adapter] = copy.copy(config)
        module.peft_config[adapter].base_model_name_or_path = _local(config.base_model_name_or_path)
        named = sys.modules["peft"].get_peft_model_state_dict(
            module, state_dict=dict(stand_ins), adapter_name=adapter
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


def _local(model_id: str | None) -> str | None:
    """The directory of a model's configuration: its own, or in the hub's cache; None if absent."""
    if not model_id or (Path(model_id) / "config.json").is_file():
        return model_id
    file = None
    with suppress(ValueError):  # not the name of a model but a path, which has no configuration
        file = sys.modules["huggingface_hub"].try_to_load_from_cache(model_id, "config.json")
    return str(Path(file).parent) if isinstance(file, str) else None


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
