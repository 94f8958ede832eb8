"""Checksums by name: the fastest one that is installed writes, the one that is named reads."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from types import ModuleType

Checksum = Callable[[bytes | memoryview], str]

FAST, ALWAYS = "xxh3_64", "crc32"  # 32 and 6 GB/s a core; every disk is slower than both
NAMES = (FAST, ALWAYS)


def _xxhash() -> ModuleType | None:
    try:
        return importlib.import_module("xxhash")
    except ImportError:
        return None


def is_available(name: str) -> bool:
    return name == ALWAYS or (name == FAST and _xxhash() is not None)


def checksum(name: str) -> Checksum:
    """The function of this name, from bytes to hexadecimal digits.

    Raises:
        LookupError: there is no such algorithm, or the package that has it is not installed.
    """
    if name == ALWAYS:
        return lambda data: f"{zlib.crc32(data):08x}"
    if name != FAST:
        raise LookupError(f"unknown checksum {name!r}; this version knows {', '.join(NAMES)}")
    module = _xxhash()
    if module is None:
        raise LookupError(f"{name} needs the package xxhash, which is not here: pip install xxhash")
    digest: Checksum = module.xxh3_64_hexdigest
    return digest
