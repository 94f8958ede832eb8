"""The oldest versions of torch and DeepSpeed that this library runs with, and their check."""

from __future__ import annotations

import importlib
import re

# As in pyproject.toml, which pip reads; an environment may have been changed since.
MINIMUM = {"torch": "2.8", "deepspeed": "0.16.4"}


def require(package: str) -> None:
    """Raise ImportError if the package is older than supported. Local."""
    found, wanted = str(importlib.import_module(package).__version__), MINIMUM[package]
    if _numbers(found) < _numbers(wanted):
        raise ImportError(
            f"dist_ema needs {package} {wanted} or newer, and this environment has {package} "
            f"{found}: upgrade it, with pip install '{package}>={wanted}' say"
        )


def _numbers(version: str) -> list[int]:
    """The release of a version as numbers: "2.9.1+cu128" is [2, 9, 1]."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in match[0].split(".")] if match else []
