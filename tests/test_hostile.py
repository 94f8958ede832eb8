"""Damage and malice are met with a `CheckpointError` on every rank, and nothing has changed."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import random
import resource
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dist_ema.checkpoint import directory as files
from dist_ema.checkpoint import manifest, reader
from dist_ema.checkpoint.reader import Checkpoint, load, problems
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.core.layout import Fragment, collector_paused
from tests.cuts import (
    SEVERAL_BLOCKS,
    TENSORS,
    PeakMemory,
    beside,
    blank,
    differing,
    full,
    infos,
    parts_of,
    seed_at,
    small_disk,
    write,
)
from tests.worlds import barrier, rank

NUM_ALTERATIONS = int(os.environ.get("ALTERATIONS", "200"))
NUM_FUZZED = int(os.environ.get("FUZZED", "200"))


def refused(path: Path, match: str = "") -> str:
    """Loading must raise, on every rank the same, and leave the average as it was."""
    ranks = Group()
    parts = blank("columns", TENSORS, ranks)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(path, {"ema": parts}, TENSORS, ranks)
    assert not differing(parts, blank("columns", TENSORS, ranks))
    assert len(set(ranks.all_gather(str(caught.value)))) == 1
    return str(caught.value)


def loaded(path: Path) -> list[Fragment] | None:
    """What a load gives, or None if it raised and left the average as it was."""
    parts = blank("columns", TENSORS, Group.alone())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(path, {"ema": parts}, TENSORS, Group.alone())
    except CheckpointError:
        assert not differing(parts, blank("columns", TENSORS, Group.alone()))
        return None
    return parts


def verified(path: Path) -> list[str]:
    try:
        with Checkpoint(path) as checkpoint:
            return list(problems(checkpoint))
    except CheckpointError as error:
        return [str(error)]


@contextlib.contextmanager
def replaced(file: Path, make: Callable[[], object]) -> Iterator[None]:
    """While rank 0 has put something else in the place of a file. Collective."""
    aside = file.parent.parent / "aside"
    barrier()
    if rank() == 0:
        file.rename(aside)
        make()
    barrier()
    yield
    barrier()
    if rank() == 0:
        if file.is_dir():
            file.rmdir()
        aside.replace(file)
    barrier()


# Damage.


@pytest.mark.ranks(0)
def test_every_altered_byte_is_found(tmp_path: Path):
    """The full number, 1000, is run by ALTERATIONS=1000."""
    ranks, path, rng = Group(), tmp_path / "a", random.Random(0)
    write(path, names="ab")
    written = sorted(file for file in path.rglob("*") if file.is_file())
    assert verified(path) == []
    for _ in range(NUM_ALTERATIONS):
        file = rng.choice(written)
        good = file.read_bytes()
        at, change = rng.randrange(len(good)), rng.randrange(1, 256)
        file.write_bytes(good[:at] + bytes([good[at] ^ change]) + good[at + 1 :])
        assert any(file.name in problem for problem in verified(path)), (file, at)
        targets = {name: blank("columns", TENSORS, ranks) for name in "ab"}
        with pytest.raises(CheckpointError, match=file.name):
            load(path, targets, TENSORS, ranks)
        for target in targets.values():
            assert not differing(target, blank("columns", TENSORS, ranks))
        file.write_bytes(good)
    assert verified(path) == []


@pytest.mark.ranks(2)
def test_damage_names_the_file_and_the_tensor_on_every_rank(tmp_path: Path):
    path = tmp_path / "a"
    write(path)
    file = path / "shard-00002-model-00001-of-00002.safetensors"
    average = body_of(path)["averages"]["ema"]
    boxes = average["tensors"]["norm.weight"]["boxes"]
    start = boxes["starts"][boxes["files"].index(list(average["files"]).index(file.name))]
    good = file.read_bytes()
    for data, message in (
        (good[:start] + bytes([good[start] ^ 1]) + good[start + 1 :], r"norm\.weight is altered"),
        (good[: start + 2], r"has .* cut short, in or before tensor norm\.weight"),
        (good + b"\0", "has .* it is another file"),
        (b"", "has 0 bytes"),
        (good[:9] + b"!" + good[10:], "the header is altered"),
        (None, "No such file"),
    ):
        with replaced(file, lambda data=data: data is None or file.write_bytes(data)):
            refused(path, rf"{file.name}: .*{message}")
    for make in (os.mkfifo, os.mkdir, lambda name: os.symlink(name, name)):
        with replaced(file, lambda make=make: make(file)):
            refused(path, file.name)
            assert any(file.name in problem for problem in verified(path))
    assert seed_at(path) == 0


def test_a_file_that_the_manifest_does_not_know_is_found(tmp_path: Path):
    path = tmp_path / "a"
    write(path, Group.alone())
    shutil.copy(next(path.glob("shard-*")), path / "stray.safetensors")
    (path / "notes.txt").write_text("mine")
    assert [p for p in verified(path) if "stray.safetensors: is not in the manifest" in p]
    assert len(verified(path)) == 1


@pytest.mark.ranks(2)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    ranks = Group()
    if ranks.rank == 0:
        for name in ("empty", "torch", "manifest", "nothing"):
            (tmp_path / name).mkdir()
        torch.save({"a": torch.zeros(3)}, tmp_path / "torch" / "model.pt")
        (tmp_path / "text.safetensors").write_text("hello, this is no tensor at all")
        (tmp_path / "manifest" / "manifest.json").write_text('{"name": "a web app"}\n')
        (tmp_path / "nothing" / "manifest.json").write_text("")
    dist.barrier()
    for name, message in {
        "absent": "absent: No such file or directory",
        "empty": "is not a checkpoint; it has no manifest.json .* nothing",
        "torch": r"is not a checkpoint; .*\['model.pt'\]",
        "text.safetensors": "is no safetensors file",
        "torch/model.pt": "is no safetensors file",
        "manifest": "not the manifest of a dist_ema checkpoint",
        "nothing": "not the manifest of a dist_ema checkpoint",
    }.items():
        refused(tmp_path / name, message)
    write(tmp_path / "a")
    with replaced(tmp_path / "a" / "manifest.json", lambda: None):
        refused(tmp_path / "a", "pieces of tensors, and there is no manifest.json")


@pytest.mark.ranks(2)
def test_what_changes_under_a_load_is_noticed(tmp_path: Path):
    ranks, path = Group(), tmp_path / "a"
    write(path, seed=1)
    fill = reader._fill

    def alter() -> None:
        for file in path.glob("shard-*"):
            with open(file, "r+b") as opened:
                opened.seek(-1, os.SEEK_END)
                opened.write(b"\x55")

    def disturbed_by(change: Callable[[], object]) -> Any:
        """While rank 0 changes the files between verifying and copying."""

        def disturbed(*args: Any) -> None:
            fill(*args)
            if args[-1] is None:  # values are only verified
                dist.barrier()
                if ranks.rank == 0:
                    change()
                dist.barrier()

        return mock.patch.object(reader, "_fill", disturbed)

    with disturbed_by(lambda: write(path, Group.alone(), seed=2)):
        assert seed_at(path) == 1  # the open files are those of the checkpoint opened
    assert seed_at(path) == 2
    with disturbed_by(alter):
        with pytest.raises(CheckpointError, match=r"is altered .* in part: load again"):
            seed_at(path)


# Disks that ranks do not share, or that are full.


@pytest.mark.ranks(2)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_that_not_all_ranks_see_is_refused(tmp_path: Path, asynchronous: bool):
    """The same path leads each rank to a directory of its own, as local disks do."""
    ranks, before = Group(), Path.cwd()
    own = tmp_path / str(ranks.rank)
    own.mkdir()
    path = Path("/proc/self/cwd/a")
    os.chdir(own)
    try:
        with mock.patch.object(files, "VISIBLE_WITHIN_S", 0.2):
            with pytest.raises(CheckpointError, match=r"rank 1: .* does not see .*/\.a\.tmp-"):
                write(path, asynchronous=asynchronous)
            assert list(own.iterdir()) == []
            if ranks.rank == 0:
                write(path, Group.alone(), seed=1)
            refused(path, r"rank 1: /proc/self/cwd/a: No such file")
            if ranks.rank == 1:
                write(path, Group.alone(), seed=1)
            refused(path, "ranks see different checkpoints")
    finally:
        os.chdir(before)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("limit", ["of the disk", "of rank 1"])
def test_a_failed_write_stops_all_ranks_and_the_last_checkpoint_stays(tmp_path: Path, limit: str):
    ranks, path, is_full = Group(), tmp_path / "disk" / "a", limit == "of the disk"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    error = "No space left on device" if is_full else r"rank 1: .*shard-00002.*: File too large"
    with small_disk(path.parent, "1m") if is_full else contextlib.nullcontext():
        write(path, seed=1)
        if not is_full and ranks.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(CheckpointError, match=rf"{error} \(writing tensor"):
                write(path, cut="rows", tensors=infos(SEVERAL_BLOCKS))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        dist.barrier()
        assert beside(path) == []
        assert seed_at(path) == 1
        write(path, seed=2)
        assert seed_at(path) == 2


# Malice.


def signed(body: bytes, save_id: str = "0" * 32) -> bytes:
    return manifest.head(save_id, "xxh3_64", body) + body


def body_of(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((path / "manifest.json").read_bytes().split(b"\n", 1)[1])
    return body | {"id": "0" * 32}


def forge(path: Path, body: dict[str, Any]) -> None:
    (path / "manifest.json").write_bytes(signed(json.dumps(body).encode()))


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every container below a node, with each of its keys."""
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places(node[key])


NASTY = [
    -1, 0, 1, 3, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, -(10**400), 1.5, 1e308,
    True, None, [], {}, [[]], [1 << 62, 1 << 62], [-1], {"a": 1}, ["x"] * 3, [0] * 100,
]  # fmt: skip
NASTY_NAMES = [
    "", "x", "..", "../../etc/passwd", "/etc/passwd", "a/b", "\x00", "\ud800", "F32", "F64",
    "9" * 5000, "manifest.json",
]  # fmt: skip


def mutated(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The body with one to three of its nodes replaced, removed, doubled or moved."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        parent, key = rng.choice(list(places(body)))
        how = rng.random()
        if how < 0.6:
            parent[key] = copy.deepcopy(rng.choice(NASTY + NASTY_NAMES))
        elif how < 0.7:
            del parent[key]
        elif how < 0.8 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif how < 0.9 and isinstance(parent[key], int):
            parent[key] += rng.choice([-4, -1, 1, 4, 1 << 32])
        elif isinstance(parent, dict):
            parent[rng.choice(NASTY_NAMES)] = parent.pop(key)
    return body


@pytest.mark.ranks(0)
def test_forged_manifests_are_refused_or_harmless(tmp_path: Path):
    """Whatever a signed manifest says, it is refused, or what is loaded is what was saved."""
    path, rng = tmp_path / "a", random.Random(1)
    write(path, seed=3)
    good = body_of(path)
    expected = parts_of("columns", TENSORS, full(TENSORS, 3), Group())
    refusals = harmless = 0
    with PeakMemory() as peak:
        while refusals < NUM_FUZZED:
            if rng.random() < 0.8:
                forge(path, mutated(good, rng))
            else:
                text = bytearray(json.dumps(good).encode())
                for _ in range(rng.choice([1, 2, 50])):
                    text[rng.randrange(len(text))] = rng.choice(b'0123456789-"[]{}:,.eE\\u \xff\0')
                (path / "manifest.json").write_bytes(signed(bytes(text[: rng.choice([None, 99])])))
            parts = loaded(path)
            refusals, harmless = refusals + (parts is None), harmless + (parts is not None)
            assert parts is None or not differing(parts, expected)
            verified(path)
    assert harmless < refusals
    assert peak() < 48e6, f"{peak() / 1e6:.0f} MB"


# By a statement that changes the body of a manifest, a part of the error.
COLUMNS = r"'cube': columns of \d boxes do not fit"
EDITS = {
    "files['../x'] = files.pop(next(iter(files)))": r"'\.\./x' is not a plain name",
    "body['state']['note'] = float('nan')": r"is not a manifest",
    "files['/etc/passwd'] = file": r"'/etc/passwd' is not a plain name",
    "files['.hidden'] = file": r"'\.hidden' is not a plain name",
    "average['directory'] = '..'": r"'\.\.' is not a plain name",
    "average['directory'] = 'a/b'": r"'a/b' is not a plain name",
    "boxes['files'][0] = 7": COLUMNS,
    "boxes['files'].append(0)": COLUMNS,
    "boxes['files'][0] = 'x'": r"'cube'.*'files' is",
    "boxes['starts'][0] = -8": r"'cube'.*'starts' is \[-8",
    "boxes['starts'][0] = 1 << 62": "overlaps|leaves a gap",
    "boxes['starts'][0] += 4": "overlaps|leaves a gap",
    "boxes['starts'] *= 2": COLUMNS,
    "boxes['sizes'][0] = 1 << 50": r"'cube': \d+ blocks with checksums",
    "boxes['sizes'] = [1, 1, 1]": r"'cube'.*boxes hold 1 of 30",
    "boxes['sizes'] = [3, 10]": COLUMNS,
    "boxes['offsets'][0] = 1": r"'cube'.*is not within shape",
    "boxes['offsets'][0] = True": r"'cube'.*'offsets' is",
    "boxes['offsets'][0] = 1 << 63": r"'cube'.*'offsets' is",
    "boxes['checksums'] *= 2": r"'cube': 1 blocks with checksums",
    "boxes['checksums'] = [1]": r"'cube'.*checksums",
    "boxes.update((key, []) for key in boxes)": r"'cube': boxes hold 0 of 30",
    "boxes.update((key, boxes[key] * 2) for key in boxes)": r"'cube': boxes at .* overlap",
    "tensor['shape'] = [1 << 62, 1 << 62, 1 << 62]": r"'cube': shape",
    "tensor['shape'] = [0] * 100": r"'cube': shape",
    "tensor['dtype'] = 'F1024'": r"'cube': unknown dtype",
    "tensor['dtype'] = 'F64'": "overlaps|leaves a gap|accounted for",
    "file['header_bytes'] = 1 << 40": "overlaps",
    "file['nbytes'] = 1 << 40": "are accounted for",
    "body['block_bytes'] = 1 << 40": "block_bytes is",
    "body['block_bytes'] = 0": "block_bytes is",
    "body['version'] = 1": "format version 1, this library reads 2",
    "body['averages'] = {}": "has no averages",
    "body['averages']['b'] = average": "state is of",
    "body['state']['step'] = '1'": "'step' is '1'",
    "body['id'] = '1' * 32": "another id",
    "body['algorithm'] = 'crc32'": "another id or algorithm",
}


@pytest.mark.ranks(2)
def test_each_absurdity_is_named(tmp_path: Path):
    path = tmp_path / "a"
    write(path)
    for edit, message in EDITS.items():
        body = body_of(path)
        average = body["averages"]["ema"]
        tensor, file = average["tensors"]["cube"], next(iter(average["files"].values()))
        names = {"body": body, "average": average, "files": average["files"], "file": file}
        exec(edit, names | {"tensor": tensor, "boxes": tensor["boxes"]})
        with replaced(path / "manifest.json", lambda body=body: forge(path, body)):
            try:
                assert "manifest.json" in refused(path, message)
            except BaseException as error:
                raise AssertionError(edit) from error
    assert seed_at(path) == 0


def test_texts_that_are_no_manifest_are_refused():
    for body in (
        b"",
        b"[]",
        b"{",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": "dist_ema", "version": 1' + b"1" * 5000 + b"}",
        b'{"format": "dist_ema", "version": NaN}',
        b'{"format": "dist_ema", "version": 1e999}',
        b"\xff\xfe",
        b"\x00" * 1000,
    ):
        with pytest.raises(CheckpointError, match=r"manifest|cut short|version"):
            manifest.parse(signed(body))
    for first_line in (b"", b"\n", b"{}\n{}", b"[]", b"{" * 9999, b"\xff", b"7\n"):
        with pytest.raises(CheckpointError, match=r"manifest|cut short|version"):
            manifest.parse(first_line)
    line = {"format": "dist_ema", "id": "0" * 32, "algorithm": "md5", "checksum": "", "bytes": 2}
    with pytest.raises(CheckpointError, match="unknown checksum 'md5'; this version knows"):
        manifest.parse(json.dumps(line).encode() + b"\n{}")


@pytest.mark.ranks(0)
def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path):
    path = tmp_path / "a"
    path.mkdir()
    with open(path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with PeakMemory() as peak:
        refused(path, "is 1099511627776 bytes long, more than any manifest")
    assert peak() < 16e6
    write(path.with_name("b"))
    os.truncate(path.with_name("b") / "manifest.json", 900 << 20)
    with PeakMemory() as peak:
        refused(path.with_name("b"), r"943718400 bytes, \d+ were written")
    assert peak() < 16e6


# Plain safetensors.


def with_header(header: bytes, data: bytes = b"", nbytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if nbytes is None else nbytes) + header + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> bytes:
    fields = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps({"a": fields}).encode()


EIGHT = bytes(8)
HEADERS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "no header": with_header(b""),
    "endless header": with_header(b"{}", nbytes=1 << 63),
    "header beyond the end": with_header(b"{}", nbytes=3),
    "no JSON": with_header(b"{]"),
    "no mapping": with_header(b"[]"),
    "deep": with_header(b'{"a":' * 50_000),
    "no entry": with_header(b'{"a": 3}'),
    "no dtype": with_header(entry(dtype=None), EIGHT),
    "a strange dtype": with_header(entry(dtype="F1"), EIGHT),
    "negative shape": with_header(entry(shape=[-2]), EIGHT),
    "huge shape": with_header(entry(shape=[1 << 62, 1 << 62]), EIGHT),
    "another shape": with_header(entry(shape=[3]), EIGHT),
    "a fraction": with_header(entry(shape=[2.0]), EIGHT),
    "three offsets": with_header(entry(offsets=[0, 4, 8]), EIGHT),
    "backwards": with_header(entry(offsets=[8, 0]), EIGHT),
    "beyond the end": with_header(entry(offsets=[8, 16]), EIGHT),
    "cut short": with_header(entry(), bytes(7)),
    "too long": with_header(entry(), bytes(9)),
    "strange metadata": with_header(b'{"__metadata__": 3}'),
}


@pytest.mark.ranks(0)
def test_plain_files_that_are_no_good_are_refused(tmp_path: Path):
    for name, data in HEADERS.items():
        (tmp_path / "x.safetensors").write_bytes(data)
        try:
            refused(tmp_path / "x.safetensors", r"x\.safetensors")
        except BaseException as error:
            raise AssertionError(name) from error


@pytest.mark.ranks(0)
def test_forged_headers_are_refused_or_harmless(tmp_path: Path):
    path, rng = tmp_path / "x.safetensors", random.Random(2)
    save_file(full(TENSORS, 3), path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    good, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    refusals = 0
    while refusals < NUM_FUZZED:
        header = json.dumps(mutated(good, rng)).encode()
        path.write_bytes(with_header(header + b" " * (-len(header) % 8), rest))
        parts = loaded(path)
        refusals += parts is None
        assert parts is None or not {p.meta.fqn for p in parts} - set(json.loads(header))


@pytest.mark.ranks(0)
def test_a_plain_file_that_is_replaced_while_it_is_read_is_not_mixed_with_the_new_one(
    tmp_path: Path,
):
    save_file({"x": torch.zeros(3)}, tmp_path / "b.safetensors")
    for max_open in (2, 1):
        save_file(full(TENSORS), tmp_path / "a.safetensors")
        with mock.patch("dist_ema.checkpoint.directory._MAX_OPEN", max_open):
            checkpoint = Checkpoint(tmp_path)
        with checkpoint:
            average, out = checkpoint.averages[""], torch.zeros(30)
            save_file(full(TENSORS, 1), tmp_path / "c.safetensors")
            (tmp_path / "c.safetensors").replace(tmp_path / "a.safetensors")
            if max_open == 2:  # the file is still open
                checkpoint.read(average, "cube", 0, out)
                assert torch.equal(out, full(TENSORS)["cube"].view(-1))
            else:
                with pytest.raises(CheckpointError, match=r"a\.safetensors: was replaced"):
                    checkpoint.read(average, "cube", 0, out)


@pytest.mark.ranks(0)
def test_plain_directories_that_are_ambiguous_are_refused(tmp_path: Path):
    values = full(TENSORS)
    save_file(values, tmp_path / "a.safetensors")
    save_file({"cube": values["cube"]}, tmp_path / "b.safetensors")
    refused(tmp_path, "'cube' is in a.safetensors and in b.safetensors")
    for text, message in {
        "{": "is no index",
        "[]": "is no index",
        '{"weight_map": {"cube": 3}}': "is no index|not a plain name",
        '{"weight_map": {"cube": "../a.safetensors"}}': "not a plain name",
        '{"weight_map": {"cube": "c.safetensors"}}': r"c\.safetensors: No such file",
        '{"weight_map": {"other": "a.safetensors"}}': "'other' is not in a.safetensors",
        '{"weight_map": {}}': "missing: emb.weight",
    }.items():
        (tmp_path / "m.safetensors.index.json").write_text(text)
        refused(tmp_path, message)
    (tmp_path / "n.safetensors.index.json").write_text("{}")
    refused(tmp_path, "has several indices")


def test_the_collector_is_left_as_it_was():
    was_on = gc.isenabled()
    try:
        for set_collector in (gc.enable, gc.disable):
            set_collector()
            is_on = gc.isenabled()
            with pytest.raises(CheckpointError):
                manifest.parse(signed(b"{}"))
            assert gc.isenabled() == is_on
            with collector_paused(), collector_paused():
                assert not gc.isenabled()
            assert gc.isenabled() == is_on
    finally:
        (gc.enable if was_on else gc.disable)()
