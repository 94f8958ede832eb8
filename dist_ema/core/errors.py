"""Errors of this library, and of versions of others that it does not run with."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence

# As in pyproject.toml. Checked here too: other packages may be installed after this one.
MINIMUM = {"torch": "2.8", "deepspeed": "0.16.4"}
CHECKED = {"torch": "2.8 to 2.15", "deepspeed": "0.16.4 to 0.19.8"}  # private names that are read


class CheckpointError(Exception):
    """A checkpoint could not be written or read. The message names the file and the tensor."""


def listed(texts: Sequence[str], most: int = 8, separator: str = "; ") -> str:
    """The first `most` texts and the number of the others, joined for a message."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])


def require(package: str) -> None:
    """Raise ImportError if the package is older than supported. Local."""
    installed, wanted = str(importlib.import_module(package).__version__), MINIMUM[package]
    if is_older(installed, wanted):
        raise ImportError(
            f"dist_ema needs {package} {wanted} or newer, and this environment has {package} "
            f"{installed}; upgrade it with pip install '{package}>={wanted}'"
        )


def require_names(owner: object, names: str, package: str) -> None:
    """Raise RuntimeError if an object lacks attributes that are private to its library. Local.

    Args:
        owner: an object or a class. For a class, annotated attributes count as present.
        names: the attributes, separated by spaces.
        package: the library, "torch" or "deepspeed".
    """
    declared = getattr(owner, "__annotations__", ()) if isinstance(owner, type) else ()
    missing = [n for n in names.split() if not hasattr(owner, n) and n not in declared]
    if missing:
        installed = importlib.import_module(package).__version__
        where = getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(
            f"dist_ema reads {', '.join(missing)} of {where}, which {package} {installed} does not "
            f"have; install {package} {CHECKED[package]}, or a newer dist_ema"
        )


def is_older(version: str, wanted: str) -> bool:
    """Whether a version is older than another."""
    return _numbers(version) < _numbers(wanted)


def _numbers(version: str) -> list[int]:
    """The release of a version as numbers: "2.9.1+cu128" is [2, 9, 1]."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in match[0].split(".")] if match else []
