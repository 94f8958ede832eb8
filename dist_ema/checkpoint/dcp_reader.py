"""Directories of `torch.distributed.checkpoint`: where the boxes of a model's tensors are.

[Note: reading pickles]
`.metadata` is a pickle, and so is the description in each slice of a `.distcp` file, a zip archive
that `torch.save` wrote. Nothing in them is executed: a class or function is read only if it is in
`_ALLOWED`, and then replaced by a new class without behavior that keeps what it was called with.
Python's own unpickler is used rather than the faster one in C, which allocates memory for any
number in a file. Values are never unpickled: a slice holds them as they are, so any part of them
can be read. Checked with files of torch 2.8 and 2.13; other versions write the same classes.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dist_ema.checkpoint.directory import Files
from dist_ema.checkpoint.manifest import (
    SavedAverage,
    SavedBox,
    SavedFile,
    SavedTensor,
    check_boxes,
    check_file_names,
    check_tensor,
    short,
)
from dist_ema.core.errors import CheckpointError
from dist_ema.core.layout import Box, Shape
from dist_ema.core.safetensors import ITEMSIZE, dtype_name

METADATA = ".metadata"
_MAX_BYTES = 1 << 30  # of `.metadata`
_MAX_RECORD_BYTES = 1 << 16  # of the description at the start of a slice
_MAX_NUMBER = 1 << 62
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64", "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16",
    "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": None,
}  # fmt: skip
_CHECKPOINT = (
    "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
    "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_ALLOWED: dict[str, Collection[str]] = {
    "torch": {"Size", *_STORAGES},  # and dtypes
    "torch.storage": {"UntypedStorage"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3"},
    "torch.distributed.checkpoint.metadata": _CHECKPOINT,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}
# Entries that hold no weights of the model, in checkpoints of accelerate, torchtitan, Lightning and
# OLMo-core.
_NOT_MODEL = re.compile(
    r"optim.*|lr_sched.*|sched.*|dataload.*|train.*|loops|callbacks|ema.*|rng.*"
)
_AVERAGE = re.compile(r"(.*?\.state\.).+(\.ema_params)")  # of torchtitan
_FLAT_OPTIMIZER = re.compile(r"optim\w*\.(?=(state|param_groups)\.)")  # start of a name
_STEP = "train_state.step"


def describe(
    files: Files, prefix: str | None = None, *, prefer_average: bool = False
) -> tuple[SavedAverage, dict[str, Any]]:
    """The tensors of a model in a directory of `torch.distributed.checkpoint`.

    Args:
        prefix: prefix of the saved names; the rest is the name of the tensor. In a pattern such
            as "ema_optimizer.state.*.ema_params", the part that matches "*" is the name. By default
            the model is the entry "model" or "state_dict", or else all entries that are not
            "optimizer" and the like.
        prefer_average: select torchtitan's average of the model if there is one. Not with a prefix.

    Returns:
        The tensors, and a dict, empty without `prefer_average`: "is_average" says whether they are
        torchtitan's average, "step" is its number of optimizer steps, or None.

    Raises:
        CheckpointError: the directory is damaged or incomplete, has values of other kinds than
            tensors of `torch.save`, or the model is not found in it.
    """
    where = f"{files.directory / METADATA}"
    nbytes = files.size(METADATA)
    if nbytes > _MAX_BYTES:
        raise CheckpointError(f"{where}: is {nbytes} bytes long, more than any metadata")
    try:
        top = _Unpickler(files.read_bytes(METADATA, 0, nbytes)).load()
        entries = dict(_field(top, "Metadata", "state_dict_metadata"))
        slices = {
            (_field(key, "MetadataIndex", "fqn"), _shape(_fields(key).get("offset") or ())): info
            for key, info in _field(top, "Metadata", "storage_data").items()
        }
        tensors = {
            str(fqn): entry
            for fqn, entry in entries.items()
            if type(entry).__name__ == "TensorStorageMetadata"
        }
        state: dict[str, Any] = {}
        if prefer_average:
            prefix = _average(tensors)
            state = {"step": _step(files, tensors, slices), "is_average": prefix is not None}
        paths = _fields(top).get("planner_data")
        names = _model_names(tensors, paths if isinstance(paths, dict) else {}, prefix)
        saved_tensors = {}
        for name, fqn in names.items():
            saved_tensors[name] = _tensor(files, fqn, tensors[fqn], slices)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except Exception as error:  # a malformed pickle raises many kinds
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{where}: is malformed or cut short ({short(reason)})") from error
    used = {saved.file for tensor in saved_tensors.values() for saved in tensor.boxes}
    sizes = {name: SavedFile(files.size(name), 0, "") for name in sorted(used)}
    return SavedAverage("", sizes, saved_tensors), state


def _average(tensors: Collection[str]) -> str | None:
    """The prefix of torchtitan's average of a model, whose entry was renamed in its versions."""
    for fqn in tensors:
        key, averages, _ = fqn.partition(".averages.")
        if averages and f"{key}.state" in tensors:
            raise CheckpointError(
                f"{key} is a ShardedEMA's state_dict(); load it with "
                f"torch.distributed.checkpoint.load({{{key!r}: ema}}, checkpoint_id=...)"
            )
    prefixes = {f"{m[1]}*{m[2]}" for fqn in tensors if (m := _AVERAGE.fullmatch(fqn))}
    if len(prefixes) > 1:
        raise CheckpointError(f"holds several averages, {short(sorted(prefixes))}")
    return next(iter(prefixes), None)


def _step(
    files: Files, tensors: Mapping[str, object], slices: Mapping[tuple[Any, Shape], object]
) -> int | None:
    """torchtitan's count of optimizer steps, a Python integer or, formerly, a tensor."""
    value = None
    if _STEP in tensors:
        tensor = _tensor(files, _STEP, tensors[_STEP], slices)
        if tensor.shape == () and tensor.dtype in ("I64", "I32"):
            box = tensor.boxes[0]
            data = files.read_bytes(box.file, box.start, box.nbytes)
            value = int.from_bytes(data, "little", signed=True)
    elif (_STEP, ()) in slices:
        value = _read_slice(files, _STEP, slices[_STEP, ()])[-1]
    return value if type(value) is int and 0 <= value < _MAX_NUMBER else None


def _model_names(
    tensors: Collection[str], paths: Mapping[Any, Any], prefix: str | None
) -> dict[str, str]:
    """The stored name of each tensor of the model, by its name in the model."""
    head, _, tail = ("" if prefix is None else prefix).partition("*")
    if prefix is None:
        holders = {fqn: _holder(fqn, paths.get(fqn)) for fqn in tensors}
        kept = {h for h in holders.values() if not any(map(_NOT_MODEL.fullmatch, h.split(".")))}
        named = {h for h in kept if h.split(".")[-2:-1] in (["model"], ["state_dict"])}
        heads = (paths and named) or kept
        if len(heads) != 1:
            raise CheckpointError(
                f"does not show which tensors are the model's; pass prefix, such as one of "
                f"{short(sorted({*holders.values()}))}"
            )
        (head,) = heads
        tensors = [fqn for fqn in tensors if holders[fqn] == head]
    elif not tail and any(fqn.startswith(f"{head}.") for fqn in tensors):
        head += "."
    names = {
        fqn[len(head) : len(fqn) - len(tail)]: fqn
        for fqn in tensors
        if fqn.startswith(head) and fqn.endswith(tail) and len(fqn) > len(head) + len(tail)
    }
    if not names:
        raise CheckpointError(f"has no tensor with the prefix {prefix!r}, but {short([*tensors])}")
    return names


def _holder(fqn: str, path: object) -> str:
    """What a name starts with: the entries that hold a tensor, each followed by a dot."""
    if isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path):
        if len(path) == 1 and (start := _FLAT_OPTIMIZER.match(fqn)):
            return start[0]
        return "".join(f"{part}." for part in path[:-1])
    head = fqn.split(".")[0]
    is_entry = head in ("model", "state_dict") or _NOT_MODEL.fullmatch(head)
    return f"{head}." if is_entry else ""


def _tensor(
    files: Files, fqn: str, entry: object, slices: Mapping[tuple[Any, Shape], object]
) -> SavedTensor:
    kind = "TensorStorageMetadata"
    shape = _shape(_field(entry, kind, "size"))
    properties = getattr(_field(entry, kind, "properties"), "state", None)
    if isinstance(properties, Mapping):  # of earlier versions
        properties = (properties["dtype"],)
    dtype = dtype_name(str(properties[0])) if isinstance(properties, tuple) else None
    if dtype is None:
        raise CheckpointError(f"{short(fqn)} has dtype {short(properties)}")
    check_tensor(short(fqn), shape, dtype)
    boxes = []
    for chunk in _field(entry, kind, "chunks"):
        box = Box(*(_shape(_field(chunk, "ChunkStorageMetadata", k)) for k in ("offsets", "sizes")))
        if box.numel:
            boxes.append(_locate(files, fqn, dtype, box, slices[fqn, box.offsets]))
    check_boxes(short(fqn), shape, [saved.box for saved in boxes])
    return SavedTensor(shape, dtype, (), tuple(boxes))


def _locate(files: Files, fqn: str, dtype: str, box: Box, info: object) -> SavedBox:
    """Where the values of a box are: in a slice of a file."""
    label, file, offset, length, records, tensor = _read_slice(files, fqn, info)
    key, first = _saved_tensor(tensor, dtype, box)
    record = records[f"data/{key}"]
    header = files.read_bytes(file, offset + record.header_offset, 30)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = record.header_offset + 30 + lengths + first * ITEMSIZE[dtype]
    nbytes = box.numel * ITEMSIZE[dtype]
    fits = first * ITEMSIZE[dtype] + nbytes <= record.file_size and start + nbytes <= length
    if record.compress_type != zipfile.ZIP_STORED or not fits:
        raise CheckpointError(f"{label}: has {record.file_size} bytes of values, wanted {nbytes}")
    return SavedBox(box, file, offset + start, nbytes, ())


def _read_slice(
    files: Files, fqn: str, info: object
) -> tuple[str, str, int, int, dict[str, zipfile.ZipInfo], Any]:
    """A slice of a file, which is a zip archive: what to call it in an error, its file, offset and
    length, its records, and the object that it describes."""
    file, offset, length = (
        _field(info, "_StorageInfo", key) for key in ("relative_path", "offset", "length")
    )
    offset, length = _shape((offset, length))
    check_file_names([file], short(fqn))
    label = f"{file}, bytes {offset} to {offset + length}, {short(fqn)}"
    if offset + length > files.size(file):
        raise CheckpointError(f"{label}: the file has {files.size(file)} bytes; it is cut short")
    if _fields(info).get("transform_descriptors"):
        raise CheckpointError(f"{label}: is compressed or transformed, which is not read")
    if length < 4 or files.read_bytes(file, offset, 4) != b"PK\3\4":
        raise CheckpointError(
            f"{label}: is not written by torch.save; SerializationFormat.SAFETENSORS is not read: "
            "load it with torch.distributed.checkpoint and save it in the default format"
        )
    with zipfile.ZipFile(io.BufferedReader(_Slice(files, file, offset, length))) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for name, limit in (("data.pkl", _MAX_RECORD_BYTES), ("byteorder", 16)):
            if name in records and records[name].file_size > limit:
                raise CheckpointError(f"{label}: {name} has {records[name].file_size} bytes")
        if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
            raise CheckpointError(f"{label}: was written on a machine with another byte order")
        described = _Unpickler(archive.read(records["data.pkl"])).load()
    return label, file, offset, length, records, described


def _saved_tensor(tensor: Any, dtype: str, box: Box) -> tuple[str, int]:
    """The name of a saved tensor's record, and its first element in it.

    Raises:
        CheckpointError: the tensor is not what the metadata describes.
    """
    if type(tensor).__name__ not in _ALLOWED["torch._utils"]:
        raise CheckpointError(f"a slice holds a {type(tensor).__name__}, wanted a plain tensor")
    (_, storage, key, *_), first, sizes, strides, *rest = tensor.args
    kind = _STORAGES[storage.__name__] or dtype_name(str(rest[2]))
    sizes, strides = _shape(sizes), _shape(strides)
    if (kind, sizes) != (dtype, box.sizes):
        raise CheckpointError(f"a slice has {kind} of {sizes}, wanted {dtype} of {box.sizes}")
    for d, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        if size > 1 and stride != math.prod(sizes[d + 1 :]):
            raise CheckpointError(
                f"a slice of sizes {sizes} has strides {strides}, wanted row-major ones; save "
                "contiguous tensors"
            )
    return str(key), *_shape((first,))  # type: ignore[return-value]


class _Object:
    """A stand-in for an object in a pickle. It keeps the constructor's arguments and the state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Object:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """See [Note: reading pickles]."""

    dispatch = {  # noqa: RUF012
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (pickle.BYTEARRAY8[0], pickle.EXT1[0], pickle.EXT2[0], pickle.EXT4[0])
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and dtype_name(name) is not None:
            return name
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(
                f"holds {short(f'{module}.{name}')}, which is none of the classes that a "
                "checkpoint of tensors needs; it is not read"
            )
        return tuple if name == "Size" else type(name, (_Object,), {})

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Slice(io.RawIOBase):
    """A range of bytes of a file, as a file to read."""

    def __init__(self, files: Files, name: str, start: int, length: int) -> None:
        self._files, self._name, self._start, self._length = files, name, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        n = max(0, min(len(buffer), self._length - self._at))
        self._files.read(self._name, self._start + self._at, memoryview(buffer)[:n])
        self._at += n
        return n


def _fields(value: object) -> Mapping[str, Any]:
    state = getattr(value, "state", None)
    if not isinstance(value, _Object) or not isinstance(state, dict):
        raise CheckpointError(f"has a {type(value).__name__} where a record is wanted")
    return state


def _field(value: object, kind: str, key: str) -> Any:
    """A field of an object of a class with this name."""
    if type(value).__name__ != kind:
        raise CheckpointError(f"has a {type(value).__name__} where a {kind} is wanted")
    return _fields(value)[key]


def _shape(value: object) -> Shape:
    """A tuple or list of whole numbers."""
    numbers: Iterator[Any] = iter(value if isinstance(value, tuple | list) else (None,))
    result = tuple(numbers)
    if any(type(n) is not int or not 0 <= n < _MAX_NUMBER for n in result):
        raise CheckpointError(f"has {short(value)} where offsets or sizes are wanted")
    return result
