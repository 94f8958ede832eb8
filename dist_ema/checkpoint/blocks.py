"""Bytes of a checkpoint, read by position and checked against the manifest. No torch, no ranks."""

from __future__ import annotations

import json
import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any

from dist_ema.checkpoint import manifest, parsing
from dist_ema.checkpoint.checksums import checksum
from dist_ema.checkpoint.manifest import CheckpointError, Manifest, SavedAverage, SavedBox

_MAX_OPEN = 256  # files at a time; a process may commonly have 1024


class Files:
    """The files of one directory, kept open while they are read.

    A directory that is replaced meanwhile does not change under a reader: the names are looked up
    in the directory that was opened, and files that are open stay what they were.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.max_open = _MAX_OPEN  # less where many directories are read side by side
        try:
            self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{directory}: {error.strerror}; a checkpoint is a directory that every rank sees"
            ) from error
        self._open: OrderedDict[str, int] = OrderedDict()

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in (self._fd, *self._open.values()):
            os.close(fd)
        self._open.clear()

    def names(self, directory: str = "") -> list[str]:
        """What is in the directory, or in one below it."""
        if not directory:
            return sorted(os.listdir(self._fd))
        try:
            return sorted(os.listdir(self.directory / directory))
        except OSError as error:
            raise CheckpointError(f"{self.directory / directory}: {error.strerror}") from error

    def has(self, name: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self._fd).st_mode)
        except OSError:
            return False

    def size(self, name: str) -> int:
        return os.fstat(self._file(name)).st_size

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
        """A part of a file; take care that `nbytes` is no stranger's word."""
        buffer = bytearray(nbytes)
        self.read(name, start, memoryview(buffer))
        return bytes(buffer)

    def _file(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        try:
            # Opening a pipe would wait for its other end.
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise CheckpointError(f"{self.directory / name}: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CheckpointError(f"{self.directory / name}: is no regular file")
        while len(self._open) >= self.max_open:
            os.close(self._open.popitem(last=False)[1])
        self._open[name] = fd
        return fd


def read_manifest(files: Files) -> Manifest:
    """Read and check the manifest. What it says of the files is not checked."""
    where = str(files.directory / manifest.FILE)
    nbytes = files.size(manifest.FILE)
    start = files.read_bytes(manifest.FILE, 0, min(nbytes, parsing.MAX_HEAD))
    parsing.check_size(start, nbytes, where)
    return parsing.parse(files.read_bytes(manifest.FILE, 0, nbytes), where)


def path_in(average: SavedAverage, file: str) -> str:
    """A shard file's name below the checkpoint's directory."""
    return f"{average.directory}/{file}" if average.directory else file


def check_file(files: Files, about: Manifest, average: SavedAverage, name: str) -> None:
    """Refuse a file that is not as long as it was, or whose header is altered. Reads the header."""
    path, told = path_in(average, name), average.files[name]
    found = files.size(path)
    if found != told.nbytes:
        why = "it is another file"
        if found < told.nbytes:
            beyond = [
                fqn
                for fqn, tensor in average.tensors.items()
                for saved in tensor.boxes
                if saved.file == name and saved.start + saved.nbytes > found
            ]
            why = f"the file is cut short, in or before tensor {', '.join(beyond[:3])}"
        raise CheckpointError(
            f"{files.directory / path}: has {found} bytes, {told.nbytes} were written; {why}"
        )
    if about.algorithm:
        header = files.read_bytes(path, 0, told.header_bytes)
        if checksum(about.algorithm)(header) != told.checksum:
            raise CheckpointError(f"{files.directory / path}: the header is altered")


def check_names(files: Files, average: SavedAverage, name: str) -> None:
    """Refuse a file whose header tells other things than the manifest. Reads the header."""
    path, told = path_in(average, name), average.files[name]
    header, header_bytes = read_header(files, path)
    expected: dict[str, Any] = {}
    offsets: dict[str, Any] = {}
    for fqn, tensor in average.tensors.items():
        for saved in tensor.boxes:
            if saved.file == name:
                start = saved.start - told.header_bytes
                expected[fqn] = {
                    "dtype": tensor.dtype,
                    "shape": list(saved.box.sizes),
                    "data_offsets": [start, start + saved.nbytes],
                }
                offsets[fqn] = {"saved_offsets": list(saved.box.offsets)}
    metadata = header.pop("__metadata__", {})
    try:
        found = json.loads(metadata["DCP_SHARDING_INFO"])
    except (LookupError, TypeError, ValueError, RecursionError):
        found = None
    if header_bytes != told.header_bytes or header != expected or found != offsets:
        raise CheckpointError(f"{files.directory / path}: the header differs from the manifest")


def read_header(files: Files, path: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and its length with the eight bytes before it.

    Raises:
        CheckpointError: there is none. Its entries are not looked at.
    """
    where = files.directory / path
    size = files.size(path)
    nbytes = int.from_bytes(files.read_bytes(path, 0, 8), "little") if size >= 8 else size
    if not 2 <= nbytes <= min(size - 8, parsing.MAX_HEADER_BYTES):
        raise CheckpointError(f"{where}: is no safetensors file, or cut short")
    try:
        header = json.loads(files.read_bytes(path, 8, nbytes))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is no safetensors file; its header is no JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: is no safetensors file; its header is no mapping")
    return header, nbytes + 8


class Checker:
    """Reads blocks of boxes into one buffer and checks each against its checksum."""

    def __init__(self, files: Files, about: Manifest) -> None:
        self._files = files
        self._block_bytes = about.block_bytes
        self._hash = checksum(about.algorithm) if about.algorithm else None
        self.buffer = bytearray(about.block_bytes)

    def block(self, average: SavedAverage, fqn: str, saved: SavedBox, number: int) -> memoryview:
        """The bytes of a block, valid until the next call.

        Raises:
            CheckpointError: they are not what was written, or cannot be read.
        """
        start = number * self._block_bytes
        view = memoryview(self.buffer)[: min(self._block_bytes, saved.nbytes - start)]
        path = path_in(average, saved.file)
        self._files.read(path, saved.start + start, view)
        if self._hash is not None and self._hash(view) != saved.checksums[number]:
            first = saved.start + start
            raise CheckpointError(
                f"{self._files.directory / path}: tensor {fqn} is altered between bytes {first} "
                f"and {first + len(view)}"
            )
        return view
