"""Canonical names: where a model registers tensors, with no level for wrappers.

Wrappers are recognized by type, never by name: a user's own submodule may be called `module`. The
class of a wrapper is looked up in `sys.modules`, so that no library is imported here.

FSDP1 without `use_orig_params` removes parameters from their modules, registers a flat one, and
leaves plain attributes. These attributes are listed here, the flat parameter is not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Modules = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]

# Type of the wrapper -> attribute of the module that it wraps.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", "module"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Registration:
    """Where a module registers a tensor; the name stays if the tensor is replaced."""

    fqn: str
    owner: nn.Module
    name: str
    is_buffer: bool
    persistent: bool  # in the model's state_dict()

    @property
    def registry(self) -> dict[str, torch.Tensor | None]:
        owner = self.owner
        if self.is_buffer:
            return owner._buffers
        return owner._parameters if self.name in owner._parameters else owner.__dict__  # type: ignore[return-value]

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.registry[self.name]
        if tensor is None:
            raise RuntimeError(f"{self.fqn}: was a tensor when the average was built, is None now")
        return tensor


class Models(nn.Module):
    """Several modules as one: models by name, or this rank's parts of one model.

    It takes no part in a forward pass, and does not change its modules. With a mapping, the names
    of tensors start with the name of their model; with a sequence of parts, no prefix is added.
    """

    def __init__(self, modules: Sequence[nn.Module] | Mapping[str, nn.Module]) -> None:
        """
        Raises:
            ValueError: there is no module, a name cannot be that of a directory, or two parts have
                tensors of one name.
        """
        super().__init__()
        self.are_named = isinstance(modules, Mapping)
        named = modules.items() if isinstance(modules, Mapping) else enumerate(modules)
        for name, module in named:
            if self.are_named and not can_name_model(name):
                raise ValueError(f"{name!r} cannot name a model; use letters, digits, _ and -")
            self._modules[str(name)] = module
        if not self._modules:
            raise ValueError("there is no module to average")
        tensors: dict[str, torch.Tensor] = {}
        for registration in registrations(self):
            tensor = registration.tensor
            if tensors.setdefault(registration.fqn, tensor) is not tensor:
                raise ValueError(
                    f"several parts have a tensor named {registration.fqn}; the tensors of a "
                    "part need their names in the whole model (keep layers in a ModuleDict); pass "
                    "different models as a mapping"
                )

    def named(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules, each with the prefix of the names of its tensors."""
        for name, module in self._modules.items():
            assert module is not None
            yield f"{name}." if self.are_named else "", module


def can_name_model(name: object) -> bool:
    """Whether a model of a mapping may have this name, which is also that of a directory."""
    return isinstance(name, str) and re.fullmatch(r"\w[\w-]*", name) is not None


def is_in_parts(model: nn.Module) -> bool:
    """Whether ranks may hold different parts of the model."""
    return isinstance(model, Models) and not model.are_named


def as_module(model: object) -> nn.Module:
    """A module, or a list or mapping of modules as one; TypeError for anything else."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Mapping | list | tuple):
        modules = model.values() if isinstance(model, Mapping) else model
        if all(isinstance(module, nn.Module) for module in modules):
            return Models(model)
    raise TypeError(f"{type(model).__name__} is not a module, nor a list or mapping of modules")


def class_of(module: str, name: str) -> type | None:
    """A class of a library, or None if the library was never imported."""
    cls: type | None = getattr(sys.modules.get(module), name, None)
    return cls


def is_instance(obj: object, module: str, name: str) -> bool:
    """`isinstance` for a class of a library that may never have been imported."""
    cls = class_of(module, name)
    return cls is not None and isinstance(obj, cls)


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper, or None if this is no wrapper."""
    for library, name, attribute in _WRAPPERS:
        if is_instance(module, library, name):
            return module._modules.get(attribute)
    return None


def ddp_modules(model: nn.Module) -> list[Any]:
    """The DistributedDataParallel wrappers in a model, including the model."""
    ddp = ("torch.nn.parallel.distributed", "DistributedDataParallel")
    return [module for module in model.modules() if is_instance(module, *ddp)]


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """The model, then what each wrapper wraps, down to the user's own outermost module."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        inner = wrapped(inner)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own outermost module."""
    *_, inner = layers(model)
    return inner


def named_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its canonical name, in the order of `state_dict()`.

    A module registered twice is listed twice; a wrapper and what it wraps have the same name.
    """
    if isinstance(model, Models):
        for prefix, module in model.named():
            yield from named_modules(module, prefix.removesuffix("."))
        return
    yield name, model
    inner = wrapped(model)
    for child_name, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, name if child is inner else _join(name, child_name))


def registrations(model: nn.Module) -> list[Registration]:
    """Every registered tensor, in the order of `state_dict()`, each name of a tied tensor."""
    result = []
    flattened = _flattened(model)
    for prefix, module in named_modules(model):
        names = [n for n, p in module._parameters.items() if p is not None and not _is_flat(p)]
        for name in (*names, *flattened.get(id(module), ())):
            result.append(Registration(_join(prefix, name), module, name, False, True))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                result.append(Registration(_join(prefix, name), module, name, True, persistent))
    return result


def _flattened(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters that FSDP1 removed from each module, by the module's id.

    Private names, checked in torch 2.8 to 2.15.
    """
    names: dict[int, list[str]] = {}
    flat: Any
    for flat in filter(_is_flat, model.parameters()):
        for info in (*flat._param_infos, *flat._shared_param_infos):
            names.setdefault(id(info.module), []).append(info.param_name)
    return names


def _is_flat(parameter: torch.Tensor) -> bool:
    return is_instance(parameter, "torch.distributed.fsdp._flat_param", "FlatParameter")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
