"""Reads a checkpoint into the boxes that this rank holds, however it was cut when written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dist_ema.checkpoint.blocks import Checker, Files
from dist_ema.checkpoint.manifest import Manifest, SavedAverage, SavedBox, SavedTensor
from dist_ema.export.format import DTYPES
from dist_ema.layout import Box, flat_boxes, overlap

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Source:
    """The saved tensor that a key of the state is read from."""

    average: SavedAverage
    fqn: str  # in the checkpoint
    tensor: SavedTensor

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.tensor.dtype]


@dataclass(frozen=True, slots=True)
class _Move:
    """A part of a block, and where in the region of a read item it belongs."""

    item: ReadItem
    region: Box  # of the item, in the saved box
    held: Box  # contiguous in the block, in the saved box
    start: int  # of `held` in the block, in elements
    common: Box  # of the two


class ShardReader(StorageReader):
    """Reads saved boxes block by block. Memory: one block.

    `check` reads and hashes all that `read_data` will need, and changes nothing. `read_data` hashes
    again what it copies.
    """

    def __init__(self, files: Files, about: Manifest, sources: Mapping[str, Source]) -> None:
        self._about = about
        self._sources = sources
        self._checker = Checker(files, about)
        self._saved: dict[MetadataIndex, tuple[Source, SavedBox]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The saved boxes under the keys of the state that is to be filled."""
        tensors: dict[str, Any] = {}
        found: dict[MetadataIndex, tuple[Source, SavedBox]] = {}
        for key, source in self._sources.items():
            full = [saved for saved in source.tensor.boxes if saved.nbytes]
            tensors[key] = TensorStorageMetadata(
                TensorProperties(dtype=source.dtype),
                torch.Size(source.tensor.shape),
                [
                    ChunkStorageMetadata(torch.Size(s.box.offsets), torch.Size(s.box.sizes))
                    for s in full
                ],
            )
            for saved in full:
                found[MetadataIndex(key, saved.box.offsets)] = (source, saved)
        return Metadata(tensors, storage_data=found)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._saved = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def check(self, plan: LoadPlan) -> None:
        """Read all that the plan needs once, and compare the checksums.

        Raises:
            CheckpointError: something cannot be read or is not what was written.
        """
        for source, saved, items in self._needed(plan):
            for number, _ in self._moves(source, saved, items):
                self._checker.block(source.average, source.fqn, saved, number)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        raw = torch.frombuffer(self._checker.buffer, dtype=torch.uint8)
        for source, saved, items in self._needed(plan):
            targets = {id(item): planner.resolve_tensor(item).detach() for item in items}
            for number, moves in self._moves(source, saved, items):
                block = self._checker.block(source.average, source.fqn, saved, number)
                values = raw[: len(block)].view(source.dtype)
                for move in moves:
                    run = values[move.start : move.start + move.held.numel]
                    part = run.view(move.held.sizes)[move.common.within(move.held)]
                    targets[id(move.item)][move.common.within(move.region)].copy_(part)
            for item in items:
                planner.commit_tensor(item, targets[id(item)])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _needed(self, plan: LoadPlan) -> Iterator[tuple[Source, SavedBox, list[ReadItem]]]:
        """The saved boxes that a plan reads, file by file from front to back, with their items."""
        items: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            items.setdefault(item.storage_index, []).append(item)

        def position(index: MetadataIndex) -> tuple[str, str, int]:
            source, saved = self._saved[index]
            return source.average.directory, saved.file, saved.start

        for index in sorted(items, key=position):
            source, saved = self._saved[index]
            yield source, saved, items[index]

    def _moves(
        self, source: Source, saved: SavedBox, items: list[ReadItem]
    ) -> Iterator[tuple[int, list[_Move]]]:
        """The blocks of a saved box that its items need a part of, with those parts."""
        regions = [(item, Box(tuple(item.storage_offsets), tuple(item.lengths))) for item in items]
        step = self._about.block_bytes // source.dtype.itemsize
        for number in range(self._about.blocks(saved)):
            moves, start = [], 0
            stop = min((number + 1) * step, saved.box.numel)
            for held in flat_boxes(saved.box.sizes, number * step, stop):
                for item, region in regions:
                    common = overlap(held, region)
                    if common is not None:
                        moves.append(_Move(item, region, held, start, common))
                start += held.numel
            if moves:
                yield number, moves
