"""Everything that is wrong with a checkpoint on disk, found by reading all of it once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dist_ema.checkpoint.blocks import Checker, Files, check_file, check_names, path_in
from dist_ema.checkpoint.manifest import CheckpointError, Manifest, SavedAverage, SavedBox


def problems(
    files: Files, about: Manifest, advance: Callable[[int], object] = lambda nbytes: None
) -> Iterator[str]:
    """Tell each problem with its file and tensor. Memory: one block.

    Args:
        about: the manifest, parsed: so boxes cover each tensor and files are what they hold.
        advance: called with the bytes that were read since the last call.
    """
    checker = Checker(files, about)
    for average in about.averages.values():
        absent = set()
        for name in average.files:
            try:
                check_file(files, about, average, name)
                check_names(files, average, name)
            except CheckpointError as error:
                yield str(error)
                if not files.has(path_in(average, name)):
                    absent.add(name)
        for fqn, saved in _in_order(average):
            if saved.file not in absent:
                yield from _damage(checker, about, average, fqn, saved, advance)
        for name in files.names(average.directory):
            if name.endswith(".safetensors") and name not in average.files:
                yield (
                    f"{files.directory / path_in(average, name)}: is not in the manifest; other "
                    "readers take it for a part"
                )


def _in_order(average: SavedAverage) -> list[tuple[str, SavedBox]]:
    """The boxes as they lie on disk."""
    boxes = [(fqn, saved) for fqn, t in average.tensors.items() for saved in t.boxes]
    return sorted(boxes, key=lambda entry: (entry[1].file, entry[1].start))


def _damage(
    checker: Checker,
    about: Manifest,
    average: SavedAverage,
    fqn: str,
    saved: SavedBox,
    advance: Callable[[int], object],
) -> Iterator[str]:
    for number in range(about.blocks(saved)):
        try:
            checker.block(average, fqn, saved, number)
        except CheckpointError as error:
            yield str(error)
        advance(min(about.block_bytes, saved.nbytes - number * about.block_bytes))
