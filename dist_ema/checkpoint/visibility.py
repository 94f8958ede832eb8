"""Files that a network file system shows to some hosts later than to others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dist_ema.checkpoint.directory import becomes_visible, find
from dist_ema.checkpoint.manifest import CheckpointError
from dist_ema.core.group import Group

T = TypeVar("T")


def retried_when_visible(path: Path, group: Group, read: Callable[[], T]) -> T:
    """Read a checkpoint, again where it fails and only some ranks see all of it. Collective.

    Costs nothing where reading succeeds or all ranks see the same names.

    Args:
        read: collective; raises `CheckpointError` on every rank or on none.
    """
    while True:
        try:
            return read()
        except CheckpointError:
            if not _becomes_visible_to_all(path, group):
                raise


def _becomes_visible_to_all(path: Path, group: Group) -> bool:
    """Whether a rank did not see what another one saw, and all see it now. Collective."""
    own = _names(path)
    names: list[str] = group.broadcast(sorted(set[str]().union(*group.gather(own))))
    if not group.any(not own.issuperset(names)):
        return False
    is_visible = becomes_visible(lambda: _names(path).issuperset(names))
    return not group.any(not is_visible)


def _names(path: Path) -> set[str]:
    place = find(path)
    return {str(each) for each in (place, *place.rglob("*")) if os.path.lexists(each)}
