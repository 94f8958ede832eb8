"""Opens checkpoints of `save`, of torch and plain safetensors, and reads boxes of their tensors.

Reading a manifest or verifying checksums needs no torch.
"""

from __future__ import annotations

import bisect
import json
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError, safe_open

from dist_ema.checkpoint import dcp_reader
from dist_ema.checkpoint.directory import MANIFEST, find
from dist_ema.checkpoint.manifest import (
    MAX_HEAD,
    MAX_HEADER_BYTES,
    PLAIN_NAME,
    Manifest,
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
    check_size,
    checksum,
    parse,
    short,
)
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box, flat_boxes, flat_ends, overlap, whole
from dist_ema.core.safetensors import ITEMSIZE, torch_dtype

if TYPE_CHECKING:
    import torch

PLAIN = ""  # name of the average in plain safetensors files
_SUFFIX, _INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
_MAX_INDEX_BYTES = 100_000_000
_MAX_OPEN = 256  # files at a time; the limit of a process is often 1024
_NUM_SAMPLES = 256  # of a plain file, for its identity
_PLAIN_BLOCK = 1 << 20  # bytes that are read from a plain file at a time

Target = tuple[Box, "torch.Tensor"]  # a box of a tensor, and the tensor to fill
Put = Callable[["torch.Tensor", "torch.Tensor"], None]


def _copy(out: torch.Tensor, values: torch.Tensor) -> None:
    out.copy_(values)


class Files:
    """The files of one directory, kept open while they are read.

    If the directory is replaced meanwhile, the files of the old one are read: names are looked up
    in the directory that was opened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.max_open = _MAX_OPEN
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{directory}: {error.strerror}; a checkpoint is a directory that every rank sees"
            ) from error
        self._open: OrderedDict[str, int] = OrderedDict()
        self._inodes: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        for fd in (self._fd, *self._open.values()):
            os.close(fd)

    def names(self, below: str = "") -> list[str]:
        """Names in the directory, or in one below it, sorted; [] if it does not exist."""
        try:
            fd = os.open(below or ".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._fd)
        except OSError:
            return []
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def has(self, name: str) -> bool:
        """Whether there is a regular file of this name."""
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self._fd).st_mode)
        except OSError:
            return False

    def size(self, name: str) -> int:
        return self.status(name).st_size

    def status(self, name: str) -> os.stat_result:
        """The status of a file, which is kept open: no other file can get its inode number."""
        return os.fstat(self._file(name))

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes of a file from `start` on."""
        fd, done = self._file(name), 0
        while done < len(buffer):
            try:
                n = os.preadv(fd, [buffer[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.directory / name}: {error.strerror}") from error
            if n == 0:
                raise CheckpointError(
                    f"{self.directory / name}: ends at byte {start + done}, wanted "
                    f"{start + len(buffer)}; the file is cut short"
                )
            done += n

    def read_bytes(self, name: str, start: int, nbytes: int) -> bytes:
        """A part of a file; `nbytes` must be validated by the caller."""
        buffer = bytearray(nbytes)
        self.read(name, start, memoryview(buffer))
        return bytes(buffer)

    def _file(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        try:
            # Opening a pipe without O_NONBLOCK would wait for its other end.
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise CheckpointError(f"{self.directory / name}: {error.strerror}") from error
        status = os.fstat(fd)
        inode = status.st_dev, status.st_ino
        problem = None if stat.S_ISREG(status.st_mode) else "is no regular file"
        if self._inodes.setdefault(name, inode) != inode:
            problem = "was replaced while it was read; load again"
        if problem is not None:
            os.close(fd)
            raise CheckpointError(f"{self.directory / name}: {problem}")
        while len(self._open) >= self.max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = fd
        return fd


class Checkpoint:
    """An open checkpoint: a directory of `save`, or files of others as one average.

    Files of others have no checksums and no counters: `state` is empty, and aliases are those that
    `safetensors.torch.save_model` notes. Memory: one block.
    """

    def __init__(self, path: Path, prefix: str | None = None) -> None:
        """
        Args:
            path: a directory with a manifest; a safetensors file; a directory of safetensors files,
                with or without an index; or a directory of `torch.distributed.checkpoint`.
            prefix: of the names of the model's tensors in the latter; see `dcp_reader.describe`.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        path = find(path)
        self.directory, only = (path.parent, path.name) if path.is_file() else (path, None)
        self.files = Files(self.directory)
        try:
            self.is_plain = not (only in (None, MANIFEST) and self.files.has(MANIFEST))
            if not self.is_plain:
                self.manifest = self._read_manifest()
            elif only in (None, dcp_reader.METADATA) and self.files.has(dcp_reader.METADATA):
                average = dcp_reader.describe(self.files, prefix)
                self.manifest = Manifest("", "", _PLAIN_BLOCK, {}, {}, {PLAIN: average})
            else:
                self.manifest = self._describe_plain(only)
        except BaseException:
            self.close()
            raise
        self._buffer: bytearray | None = None
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

    def identity(self) -> str:
        """Equal for ranks that see the same files: the id, or a hash of samples of plain files."""
        if not self.is_plain:
            return self.manifest.id
        digest = xxhash.xxh3_128(repr(sorted(self.averages[PLAIN].tensors.items())).encode())
        for name, file in self.averages[PLAIN].files.items():
            for i in range(_NUM_SAMPLES):
                start = file.nbytes * i // _NUM_SAMPLES
                digest.update(self.files.read_bytes(name, start, min(64, file.nbytes - start)))
        return digest.hexdigest()

    # Describing.

    def _read_manifest(self) -> Manifest:
        try:
            nbytes = self.files.size(MANIFEST)
            check_size(self.files.read_bytes(MANIFEST, 0, min(nbytes, MAX_HEAD)), nbytes)
            return parse(self.files.read_bytes(MANIFEST, 0, nbytes))
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / MANIFEST}: {error}") from error

    def _describe_plain(self, only: str | None) -> Manifest:
        tensors: dict[str, SavedTensor] = {}
        files: dict[str, SavedFile] = {}
        for name, listed in self._plain_files_in(only).items():
            described = self._describe_plain_file(name)
            files[name] = SavedFile(self.files.size(name), 0, "")
            missing = [fqn for fqn in listed if fqn not in described]
            if missing:
                raise CheckpointError(
                    f"{self.directory}: {short(missing[0])} is not in {name}, in which the index "
                    "lists it"
                )
            for fqn, tensor in described.items():
                if fqn in tensors:
                    raise CheckpointError(
                        f"{self.directory}: {short(fqn)} is in {tensors[fqn].boxes[0].file} and in "
                        f"{name}; give the path of one file"
                    )
                tensors[fqn] = tensor
        average = SavedAverage("", files, tensors)
        return Manifest("", "", _PLAIN_BLOCK, {}, {}, {PLAIN: average})

    def _plain_files_in(self, only: str | None) -> dict[str, list[str]]:
        """The files to read, each with the tensors that an index lists in it."""
        if only is not None:
            return {only: []}
        names = [name for name in self.files.names() if self.files.has(name)]
        indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
        if len(indices) > 1:
            raise CheckpointError(f"{self.directory}: has several indices, {', '.join(indices)}")
        if indices:
            return self._indexed_files(indices[0])
        weights = [name for name in names if name.endswith(_SUFFIX)]
        if not weights:
            raise CheckpointError(
                f"{self.directory}: is not a checkpoint; it has no manifest.json and no "
                f"safetensors file, but {short(names[:8]) if names else 'nothing'}"
            )
        return {name: [] for name in weights}

    def _indexed_files(self, index: str) -> dict[str, list[str]]:
        where = self.directory / index
        nbytes = self.files.size(index)
        if nbytes > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{where}: is {nbytes} bytes long, more than any index")
        try:
            weight_map = json.loads(self.files.read_bytes(index, 0, nbytes))["weight_map"]
            listed: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: is no index of safetensors files") from error
        for name in listed:
            if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
                raise CheckpointError(f"{where}: file {short(name)} is not a plain name")
        for fqn, name in weight_map.items():
            listed[name].append(fqn)
        return listed

    def _describe_plain_file(self, name: str) -> dict[str, SavedTensor]:
        path = self.directory / name
        status = self.files.status(name)
        with _as_checkpoint_error(path):
            with safe_open(path, framework="np") as file:  # validates the header
                metadata, keys = file.metadata() or {}, list(file.keys())
            if not os.path.samestat(status, os.stat(path)):
                raise CheckpointError(f"{path}: was replaced while it was read; load again")
            nbytes = int.from_bytes(self.files.read_bytes(name, 0, 8), "little")
            header = self.files.read_bytes(name, 8, min(nbytes, MAX_HEADER_BYTES))
            described = json.loads(header)
            entries = {fqn: described[fqn] for fqn in keys}
            shapes = {fqn: tuple(map(int, entry["shape"])) for fqn, entry in entries.items()}
            dtypes = {fqn: str(entry["dtype"]) for fqn, entry in entries.items()}
            starts = {fqn: 8 + nbytes + entry["data_offsets"][0] for fqn, entry in entries.items()}
        if "DCP_SHARDING_INFO" in metadata:
            raise CheckpointError(
                f"{path}: holds pieces of tensors, and there is no manifest.json that describes "
                "them; the save was not completed, or the manifest was lost"
            )
        unknown = [
            f"{short(fqn)} ({dtype})" for fqn, dtype in dtypes.items() if dtype not in ITEMSIZE
        ]
        if unknown:
            raise CheckpointError(f"{path}: unknown dtypes: {', '.join(unknown)}")
        aliases: dict[str, list[str]] = {}
        for alias, fqn in metadata.items():  # as `safetensors.torch.save_model` notes tied weights
            if fqn in shapes and alias not in shapes:
                aliases.setdefault(fqn, []).append(alias)
        tensors = {}
        for fqn, shape in shapes.items():
            box, itemsize = whole(shape), ITEMSIZE[dtypes[fqn]]
            saved = SavedBox(box, name, starts[fqn], box.numel * itemsize, ())
            tensors[fqn] = SavedTensor(shape, dtypes[fqn], tuple(aliases.get(fqn, ())), (saved,))
        return tensors

    # Checking.

    def check_file(self, average: SavedAverage, name: str) -> None:
        """Raise if a file has another length or another header than was written."""
        path, saved = average.path_of(name), average.files[name]
        nbytes = self.files.size(path)
        if nbytes != saved.nbytes:
            reason = "it is another file"
            if nbytes < saved.nbytes:
                beyond = [
                    fqn
                    for fqn, tensor in average.tensors.items()
                    for box in tensor.boxes
                    if box.file == name and box.start + box.nbytes > nbytes
                ]
                reason = f"the file is cut short, in or before tensor {', '.join(beyond[:3])}"
            raise CheckpointError(
                f"{self.directory / path}: has {nbytes} bytes, {saved.nbytes} were written; "
                f"{reason}"
            )
        if not self.is_plain:
            header = self.files.read_bytes(path, 0, saved.header_bytes)
            if checksum(self.manifest.algorithm)(header) != saved.checksum:
                raise CheckpointError(f"{self.directory / path}: the header is altered")

    def check_header(self, average: SavedAverage, name: str) -> bytes:
        """Raise if a file's header differs from the manifest. Returns the header."""
        path, saved = average.path_of(name), average.files[name]
        expected: dict[str, Any] = {}
        offsets: dict[str, Any] = {}
        for fqn, tensor in average.tensors.items():
            for box in tensor.boxes:
                if box.file == name:
                    start = box.start - saved.header_bytes
                    expected[fqn] = {
                        "dtype": tensor.dtype,
                        "shape": list(box.box.sizes),
                        "data_offsets": [start, start + box.nbytes],
                    }
                    offsets[fqn] = {"saved_offsets": list(box.box.offsets)}
        header = self.files.read_bytes(path, 0, min(saved.header_bytes, MAX_HEADER_BYTES))
        try:
            entries = json.loads(header[8:])
            offsets_in_file = json.loads(entries.pop("__metadata__")["DCP_SHARDING_INFO"])
        except (LookupError, TypeError, ValueError, RecursionError, AttributeError):
            entries = offsets_in_file = None
        length = int.from_bytes(header[:8], "little") + 8
        if (length, entries, offsets_in_file) != (saved.header_bytes, expected, offsets):
            raise CheckpointError(f"{self.directory / path}: the header differs from the manifest")
        return header

    def block(self, average: SavedAverage, fqn: str, saved: SavedBox, number: int) -> memoryview:
        """The verified bytes of a block, valid until the next call.

        Raises:
            CheckpointError: they are not what was written, or cannot be read.
        """
        buffer = self.buffer
        start = number * self.manifest.block_bytes
        view = memoryview(buffer)[: min(self.manifest.block_bytes, saved.nbytes - start)]
        path = average.path_of(saved.file)
        self.files.read(path, saved.start + start, view)
        if self.is_plain:
            return view
        if checksum(self.manifest.algorithm)(view) != saved.checksums[number]:
            first = saved.start + start
            raise CheckpointError(
                f"{self.directory / path}: tensor {fqn} is altered between bytes {first} and "
                f"{first + len(view)}"
            )
        return view

    @property
    def buffer(self) -> bytearray:
        """Holds a block."""
        if self._buffer is None:
            self._buffer = bytearray(self.manifest.block_bytes)
        return self._buffer

    def share_buffer(self, buffer: bytearray) -> None:
        """Use a buffer that other checkpoints use too, at least as long as a block."""
        self._buffer = buffer

    # Reading.

    def read(self, average: SavedAverage, fqn: str, start: int, out: torch.Tensor) -> None:
        """Fill a 1-D tensor of the saved dtype with elements from `start` on, row-major."""
        shape, at = average.tensors[fqn].shape, 0
        targets = []
        for box in flat_boxes(shape, start, start + out.numel()):
            targets.append((box, out[at : at + box.numel].view(box.sizes)))
            at += box.numel
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
        tensor = average.tensors[fqn]
        import torch

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
                    put(_indexed(out, inner, box), run[inner.within(outer)])


def _indexed(out: torch.Tensor, box: Box, outer: Box) -> torch.Tensor:
    index: Any = (..., *box.within(outer))
    view: torch.Tensor = out[index]
    return view


@contextmanager
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: is no safetensors file, or cut short ({error})") from error


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
    """The boxes of elements [start, stop) of a box, each with its first element in the range."""
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
        absent = set()
        for name in average.files:
            try:
                checkpoint.check_file(average, name)
                checkpoint.check_header(average, name)
            except CheckpointError as error:
                yield str(error)
                if not files.has(average.path_of(name)):
                    absent.add(name)
        boxes = [(fqn, saved) for fqn, t in average.tensors.items() for saved in t.boxes]
        for fqn, saved in sorted(boxes, key=lambda entry: (entry[1].file, entry[1].start)):
            for start in range(0, saved.nbytes if saved.file not in absent else 0, block_bytes):
                try:
                    checkpoint.block(average, fqn, saved, start // block_bytes)
                except CheckpointError as error:
                    yield str(error)
                advance(min(block_bytes, saved.nbytes - start))
        for name in files.names(average.directory):
            if name.endswith(_SUFFIX) and name not in average.files:
                yield (
                    f"{files.directory / average.path_of(name)}: is not in the manifest; other "
                    "readers take it for a part"
                )
