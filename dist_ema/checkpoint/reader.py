"""Opens checkpoints of `save`, of torch and plain safetensors, and reads boxes of their tensors.

Reading a manifest or verifying checksums needs no torch.

[Note: a failed load changes nothing]
In `load`, every byte that a rank needs is read and verified once, and only when all ranks have
succeeded, the values are read again and copied. Each step that may fail on one rank ends with an
exchange, so that the same error is raised on every rank.
"""

from __future__ import annotations

import bisect
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dist_ema.checkpoint import dcp_reader, plain
from dist_ema.checkpoint.background import BackgroundSaves
from dist_ema.checkpoint.directory import MANIFEST, Files, becomes_visible, find
from dist_ema.checkpoint.manifest import (
    MAX_HEAD,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedTensor,
    checksum,
    parse,
    read_head,
    refuse_absent,
    short,
)
from dist_ema.core.errors import CheckpointError, listed
from dist_ema.core.layout import Box, Fragment, TensorMeta, flat_boxes, flat_ends, overlap, whole
from dist_ema.core.safetensors import torch_dtype
from dist_ema.schedule import averages_of, uncorrected

if TYPE_CHECKING:
    import torch

    from dist_ema.core.group import Group

PLAIN = ""  # name of the average in plain safetensors files
_NUM_SAMPLES = 256  # blocks of a plain file that are hashed to identify it
_PLAIN_BLOCK = 1 << 20  # bytes that are read from a plain file at a time

Target = tuple[Box, "torch.Tensor"]  # a box of a tensor, and the tensor to fill
Put = Callable[["torch.Tensor", "torch.Tensor"], None]
Source = tuple[SavedAverage, dict[str, str]]  # an average, and the saved name of each tensor


def _copy(out: torch.Tensor, values: torch.Tensor) -> None:
    out.copy_(values)


class Checkpoint:
    """An open checkpoint: a directory of `save`, or other files as one average.

    Other files have no checksums and no counters: `state` is empty, or what `dcp_reader.describe`
    knows, and aliases are those that `safetensors.torch.save_model` notes. Memory: one block.
    """

    def __init__(
        self, path: Path, prefix: str | None = None, *, to_load: bool = False, num: int = 1
    ) -> None:
        """
        Args:
            path: a directory with a manifest; a safetensors file; a directory of safetensors files,
                with or without an index; or a directory of `torch.distributed.checkpoint`.
            prefix: of the tensors of the latter; see `dcp_reader.describe`.
            to_load: read what only `load` does: the average in the latter, if torchtitan has saved
                one; a directory of directories, of one model each.
            num: number of checkpoints that are open at a time. They share the limit of open files.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        path = find(path)
        self.directory, only = (path.parent, path.name) if os.path.isfile(path) else (path, None)
        self.files = Files(self.directory, num)

        def has(name: str) -> bool:
            return only in (None, name) and self.files.has(name)

        self.is_plain, self.is_directory = not has(MANIFEST), only is None
        try:
            if not self.is_plain:
                self.manifest = self._read_manifest()
            else:
                average, state = (
                    dcp_reader.describe(self.files, prefix, prefer_average=to_load)
                    if has(dcp_reader.METADATA)
                    else (plain.describe(self.files, only, has_models=to_load), {})
                )
                self.manifest = Manifest("", "", _PLAIN_BLOCK, {}, state, {PLAIN: average})
        except BaseException:
            self.close()
            raise
        self.buffer = bytearray()  # for a block; several checkpoints may share one
        self._boxes: tuple[SavedTensor | None, _BoxIndex] = (None, _BoxIndex(()))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        self.files.close()

    @property
    def averages(self) -> Mapping[str, SavedAverage]:
        return self.manifest.averages

    @property
    def state(self) -> Mapping[str, Any]:
        return self.manifest.state

    def averages_inside(self) -> str:
        """A message that names the averages in subdirectories of plain files, as in a checkpoint of
        accelerate or the Trainer; "" if there are none."""
        inside = self.files.checkpoints() if self.is_plain and self.is_directory else []
        return f"averages are in {short(inside[:8])}: give the path of one" if inside else ""

    def identity(self) -> str:
        """Equal for ranks that see the same files: the id, or a hash of samples of plain files."""
        if not self.is_plain:
            return self.manifest.id
        tensors = sorted(self.averages[PLAIN].tensors.items())
        digest = xxhash.xxh3_128(repr((tensors, self.state)).encode())
        for name, file in self.averages[PLAIN].files.items():
            for i in range(_NUM_SAMPLES):
                start = file.nbytes * i // _NUM_SAMPLES
                digest.update(self.files.read_bytes(name, start, min(64, file.nbytes - start)))
        return digest.hexdigest()

    def _read_manifest(self) -> Manifest:
        try:
            nbytes = self.files.size(MANIFEST)
            read_head(self.files.read_bytes(MANIFEST, 0, min(nbytes, MAX_HEAD)), nbytes)
            return parse(self.files.read_bytes(MANIFEST, 0, nbytes))
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / MANIFEST}: {error}") from error

    # Checking.

    def check_file(self, average: SavedAverage, name: str) -> bytes:
        """Raise if the length or header of a file is not the one in the manifest.

        Returns the header; for plain files, which have no manifest, an empty one.
        """
        path, file, boxes = average.path_of(name), average.files[name], average.contents[name]
        where, nbytes = self.directory / path, self.files.size(path)
        if nbytes != file.nbytes:
            reason = "it is another file"
            if nbytes < file.nbytes:
                beyond = [fqn for fqn, saved in boxes if saved.start + saved.nbytes > nbytes]
                reason = f"the file is cut short, in or before tensor {', '.join(beyond[:3])}"
            raise CheckpointError(
                f"{where}: has {nbytes} bytes, {file.nbytes} were written; {reason}"
            )
        if self.is_plain:
            return b""
        header = self.files.read_bytes(path, 0, file.header_bytes)
        if checksum(self.manifest.algorithm)(header) != file.checksum:
            raise CheckpointError(f"{where}: the header is altered")
        return header

    def block(self, average: SavedAverage, fqn: str, saved: SavedBox, number: int) -> memoryview:
        """The bytes of a block, valid until the next call. Verified, unless the file is plain.

        Raises:
            CheckpointError: they are not what was written, or cannot be read.
        """
        block_bytes = self.manifest.block_bytes
        if len(self.buffer) < block_bytes:
            self.buffer = bytearray(block_bytes)
        start = number * block_bytes
        view = memoryview(self.buffer)[: min(block_bytes, saved.nbytes - start)]
        path, first = average.path_of(saved.file), saved.start + start
        self.files.read(path, first, view)
        if saved.checksums and checksum(self.manifest.algorithm)(view) != saved.checksums[number]:
            raise CheckpointError(
                f"{self.directory / path}: tensor {fqn} is altered between bytes {first} and "
                f"{first + len(view)}"
            )
        return view

    # Reading.

    def read(self, average: SavedAverage, fqn: str, start: int, out: torch.Tensor) -> None:
        """Fill a 1-D tensor of the saved dtype with elements from `start` on, row-major."""
        outer = whole(average.tensors[fqn].shape)
        targets = [
            (box, out[at : at + box.numel].view(box.sizes))
            for at, box in boxes_within(outer, start, start + out.numel())
        ]
        self.fill(average, fqn, targets)

    def fill(
        self,
        average: SavedAverage,
        fqn: str,
        targets: Sequence[Target],
        put: Put | None = _copy,
    ) -> None:
        """Fill boxes of one tensor. Each block is read once, and verified before it is used.

        Args:
            put: called with a part of a target and its saved values; None only verifies.
        """
        if self.is_plain and put is None:
            return
        import torch

        tensor = average.tensors[fqn]
        if tensor is not self._boxes[0]:
            self._boxes = tensor, _BoxIndex(tensor.boxes)
        parts: dict[Box, tuple[SavedBox, list[tuple[Box, Target]]]] = {}
        for target in targets:
            for saved in self._boxes[1].overlapping(target[0]):
                common = overlap(target[0], saved.box)
                assert common is not None
                parts.setdefault(saved.box, (saved, []))[1].append((common, target))
        dtype = torch_dtype(tensor.dtype)
        block = self.manifest.block_bytes // dtype.itemsize
        for saved, wanted in sorted(parts.values(), key=lambda p: (p[0].file, p[0].start)):
            ends = [flat_ends(common, saved.box) for common, _ in wanted]
            first, last = min(a for a, _ in ends) // block, max(b for _, b in ends) // block
            for number in range(first, last + 1):
                stop = min((number + 1) * block, saved.box.numel)
                moves = [
                    (at, outer, inner, target)
                    for at, outer in boxes_within(saved.box, number * block, stop)
                    for common, target in wanted
                    if (inner := overlap(outer, common)) is not None
                ]
                if not moves:
                    continue
                view = self.block(average, fqn, saved, number)
                if put is None:
                    continue
                values = torch.frombuffer(view, dtype=dtype)
                for at, outer, inner, (box, out) in moves:
                    run = values[at : at + outer.numel].view(outer.sizes)
                    index: Any = (..., *inner.within(box))
                    put(out[index], run[inner.within(outer)])


class _BoxIndex:
    """Finds the boxes of a tensor that overlap another."""

    def __init__(self, boxes: Sequence[SavedBox]) -> None:
        self._exact = {saved.box: saved for saved in boxes if saved.nbytes}
        self._sorted = sorted(self._exact.values(), key=lambda saved: saved.box.offsets)
        self._starts = [saved.box.offsets[:1] for saved in self._sorted]
        self._longest = max((saved.box.sizes[:1] for saved in self._sorted), default=())

    def overlapping(self, box: Box) -> list[SavedBox]:
        if box in self._exact:  # boxes partition the tensor: no other one overlaps
            return [self._exact[box]]
        candidates = self._sorted
        if box.offsets and candidates:
            first = bisect.bisect_right(self._starts, (box.offsets[0] - self._longest[0],))
            last = bisect.bisect_left(self._starts, (box.offsets[0] + box.sizes[0],))
            candidates = self._sorted[first:last]
        return [saved for saved in candidates if overlap(saved.box, box) is not None]


def boxes_within(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Elements [start, stop) of a box, as boxes, each with its offset in that range."""
    at = 0
    for part in flat_boxes(box.sizes, start, stop):
        offsets = tuple(base + o for base, o in zip(box.offsets, part.offsets, strict=True))
        yield at, Box(offsets, part.sizes)
        at += part.numel


def problems(
    checkpoint: Checkpoint, advance: Callable[[int], object] = lambda nbytes: None
) -> Iterator[str]:
    """Read all of a checkpoint once and describe each problem. Memory: one block.

    Args:
        advance: called with the number of bytes read since the last call.
    """
    files, block_bytes = checkpoint.files, checkpoint.manifest.block_bytes
    for average in checkpoint.averages.values():
        for name, boxes in average.contents.items():
            is_there = True
            try:
                checkpoint.check_file(average, name)
            except CheckpointError as error:
                yield str(error)
                is_there = files.has(average.path_of(name))
            for fqn, saved in boxes if is_there else ():
                for number in range(len(saved.checksums)):
                    try:
                        checkpoint.block(average, fqn, saved, number)
                    except CheckpointError as error:
                        yield str(error)
                    advance(min(block_bytes, saved.nbytes - number * block_bytes))
        for name in files.names(average.directory):
            if name.endswith(".safetensors") and name not in average.files:
                yield (
                    f"{files.directory / average.path_of(name)}: is not in the manifest; other "
                    "readers take it for a part"
                )


def load(
    path: Path,
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    group: Group,
    *,
    strict: bool = True,
    others: Collection[str] = (),
    background: BackgroundSaves | None = None,
    copying: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Fill averages from a checkpoint, however their tensors were sharded when it was saved.

    Collective: every rank calls it. All fragments are filled, whether or not this rank owns them.
    Memory: one block.

    A safetensors file, a directory of them with or without an index, or the average or model in a
    directory of `torch.distributed.checkpoint` is loaded as the average too; its names are those of
    the model. It has no checksums and no counters: the returned state has at most "step".

    Args:
        strict: refuse missing and unexpected tensors, instead of warning of them.
        others: names that such files may have beside the averaged ones.
        copying: called when everything is verified, before the first value is copied.

    Returns:
        The saved state.

    Raises:
        CheckpointError: the checkpoint is damaged or there is none; an average or a tensor is
            missing or does not fit; ranks see different files. On every rank, and nothing has
            changed.
    """
    from dist_ema.checkpoint.writer import tensors_of_all_ranks  # imports torch

    with group.together(error=CheckpointError):
        (background or BackgroundSaves()).wait()
    if not group.equal(sorted(others)):
        others = set().union(*group.all_gather(set(others)))
    every = tensors_of_all_ranks(tensors, group)
    while True:
        try:
            return _load(path, averages, every, group, strict, others, copying)
        except CheckpointError:
            # A network file system may show the files to some ranks later than to others.
            if not _becomes_visible_to_all(path, group):
                raise


def _becomes_visible_to_all(path: Path, group: Group) -> bool:
    """Wait until every rank sees the same files. Collective.

    Returns False if all ranks saw the same from the start, or if some still do not.
    """
    if group.size == 1:
        return False

    def names() -> set[str]:
        place = find(path)
        seen = {str(place)} if os.path.lexists(place) else set()
        for parent, directories, files in os.walk(place):
            seen.update(os.path.join(parent, name) for name in (*directories, *files))
            if Path(parent) != place:
                directories.clear()  # `path` may be any directory; a checkpoint has two levels
        return seen

    own = names()
    every: set[str] = set().union(*group.all_gather(own))
    if not group.any(own != every):
        return False
    is_visible = becomes_visible(lambda: names().issuperset(every))
    return not group.any(not is_visible)


def _load(
    path: Path,
    averages: Mapping[str, Sequence[Fragment]],
    tensors: Sequence[TensorMeta],
    group: Group,
    strict: bool,
    others: Collection[str],
    copying: Callable[[], object],
) -> dict[str, Any]:
    with ExitStack() as opened:
        with group.together(error=CheckpointError):
            checkpoint = opened.enter_context(Checkpoint(path, to_load=True))
            identity = checkpoint.identity()
        if not group.equal(identity):
            every = group.all_gather(identity)
            raise CheckpointError(f"{path}: ranks see different checkpoints: {', '.join(every)}")
        with group.together(error=CheckpointError):
            try:
                sources, notes = _match(checkpoint, list(averages), tensors, others, strict)
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from None
            files = [(average, name) for average, _ in sources.values() for name in average.files]
            for average, name in files[group.rank :: group.size]:
                checkpoint.check_file(average, name)
        with group.together(error=CheckpointError):
            _fill(checkpoint, sources, averages, None)
        with group.together(error=CheckpointError):
            copying()
            try:
                _fill(checkpoint, sources, averages, _copy)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{error}; the checkpoint changed while it was read, and the average is "
                    "overwritten in part: load again"
                ) from error
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=5)
    return dict(checkpoint.state)


def _fill(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    averages: Mapping[str, Sequence[Fragment]],
    put: Put | None,
) -> None:
    """Read and verify every block that this rank needs; for `put` see `Checkpoint.fill`. Local."""
    import torch

    for name, (average, saved_names) in sources.items():
        targets: dict[str, list[Target]] = {}
        for fragment in averages[name]:
            if fragment.meta.numel:
                target = (fragment.meta.box, fragment.tensor)
                targets.setdefault(fragment.meta.fqn, []).append(target)
        with torch.no_grad():
            for fqn, saved_name in saved_names.items():
                checkpoint.fill(average, saved_name, targets.get(fqn, ()), put)


def _match(
    checkpoint: Checkpoint,
    names: Sequence[str],
    tensors: Sequence[TensorMeta],
    others: Collection[str],
    strict: bool,
) -> tuple[dict[str, Source], list[str]]:
    """Where to read each average (see `Source`), and warnings.

    Raises:
        CheckpointError: an average or a tensor is missing or does not fit; all of them are listed.
    """
    saved, allowed, notes = checkpoint.averages, set[str](), list[str]()
    if checkpoint.state.get("is_average") is False:
        notes.append("it has no average, so the weights of the model are loaded as one")
    if inside := checkpoint.averages_inside():
        notes.append(f"its own weights are loaded, but {inside}")
    if checkpoint.is_plain:
        if len(names) != 1:
            raise CheckpointError(
                f"holds one average without a name, and {', '.join(names)} are wanted; build "
                "ShardedEMA with one decay to load it"
            )
        saved = {names[0]: saved[PLAIN]}
        allowed = set(others) | {alias for t in tensors for alias in t.aliases}
    refuse_absent(names, saved)
    ignored = [n for n in averages_of(saved) if not {n, *uncorrected(n)}.intersection(names)]
    if ignored:
        notes.append(f"its averages {', '.join(map(repr, ignored))} are not loaded")
    sources = {}
    for name in names:
        saved_names, more = _match_one(saved[name], tensors, allowed, strict)
        sources[name] = saved[name], saved_names
        notes += more
    return sources, notes


def _match_one(
    average: SavedAverage, tensors: Sequence[TensorMeta], allowed: Collection[str], strict: bool
) -> tuple[dict[str, str], list[str]]:
    import torch

    known, saved_names = average.names(), dict[str, str]()
    unfit, missing, rounded = list[str](), list[str](), list[str]()
    for meta in tensors:
        fqn = next((known[n] for n in (meta.fqn, *meta.aliases) if n in known), None)
        if fqn is None:
            missing.append(meta.fqn)
            continue
        saved_names[meta.fqn] = fqn
        shape, dtype = average.tensors[fqn].shape, torch_dtype(average.tensors[fqn].dtype)
        is_number = dtype.is_complex or dtype.is_floating_point
        if shape != meta.shape:
            unfit.append(f"{meta.fqn}: the checkpoint has shape {shape}, the model {meta.shape}")
        elif dtype.is_complex != meta.dtype.is_complex or not is_number:
            unfit.append(f"{meta.fqn}: the checkpoint has {dtype}, the average {meta.dtype}")
        elif torch.promote_types(dtype, meta.dtype) != meta.dtype:
            rounded.append(meta.fqn)
    used = set(saved_names.values())
    unexpected = [n for n in average.tensors if n not in used and n not in allowed]
    notes = [
        *_listed("does not fit", unfit),
        *_listed("missing", missing),
        *_listed("unexpected", unexpected),
    ]
    if unfit or (strict and notes):
        raise CheckpointError("; ".join(notes) + " (strict=False loads the rest)" * (not unfit))
    return saved_names, notes + _listed("rounded to a narrower dtype", rounded)


def _listed(kind: str, names: Sequence[str]) -> list[str]:
    return [f"{kind}: {listed(names, separator=', ')}"] if names else []
