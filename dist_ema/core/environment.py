"""Versions, engines and devices of this environment, for bug reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dist_ema.core.errors import MINIMUM, is_older

_LIBRARIES = (
    "torch", "numpy", "safetensors", "xxhash", "deepspeed", "accelerate", "transformers",
    "diffusers", "peft", "lightning", "pytorch-lightning", "torchao", "tqdm", "matplotlib",
)  # fmt: skip
_ENGINES = {  # and the package of each
    "one process, DDP": "torch",
    "FSDP2, HSDP, tensor parallel (DTensor)": "torch",
    "FSDP1": "torch",
    "DeepSpeed ZeRO": "deepspeed",
}


def environment() -> dict[str, Any]:
    """Versions of what is installed, engines that can be used, and devices. Imports only torch."""
    libraries = {name: installed for name in _LIBRARIES if (installed := _version(name))}
    engines = {}
    for engine, package in _ENGINES.items():
        needed = f"needs {package} {MINIMUM[package]} or newer"
        if package not in libraries:
            engines[engine] = f"no: {needed}, which is not installed"
        elif is_older(libraries[package], MINIMUM[package]):
            engines[engine] = f"no: {needed}, and {libraries[package]} is installed"
        else:
            engines[engine] = "yes"
    return {
        "dist_ema": _version("dist-ema") or "not installed, run from a checkout",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        **_devices(),
        "engines": engines,
        "libraries": libraries,
    }


def describe(environment: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a text about an environment."""
    for key, value in environment.items():
        if isinstance(value, dict):
            yield f"{key}:"
            width = max(map(len, value), default=0)
            yield from (f"  {name.ljust(width)}  {each}" for name, each in value.items())
        else:
            yield f"{key}: {', '.join(value) if isinstance(value, list) else value}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """The accelerators that torch sees, and the backends for collectives."""
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # a library of a driver may be missing
        return {"devices": [], "problem": f"torch cannot be imported: {error}"}
    accelerator = torch.accelerator.current_accelerator()
    devices = []
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        devices = [
            f"{accelerator.type}:{i} {getattr(module, 'get_device_name', str)(i)}"
            for i in range(torch.accelerator.device_count())
        ]
    names = ("gloo", "nccl", "xccl", "mpi") if dist.is_available() else ()
    return {
        "devices": devices or ["CPU only"],
        "cuda": torch.version.cuda,
        "backends": [name for name in names if getattr(dist, f"is_{name}_available")()],
    }
