"""The files of a checkpoint as a rank writes them: which box goes to which, and its bytes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from dist_ema.accelerator import is_accelerator
from dist_ema.checkpoint.manifest import BLOCK_BYTES
from dist_ema.checkpoint.planners import split_key
from dist_ema.export.format import TensorSpec, safetensors_header
from dist_ema.layout import Box, flat_boxes

SHARD = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written: its header, and the items that follow it, end to end."""

    number: int  # of the average
    name: str
    header: bytes
    items: list[tuple[int, WriteItem]]  # with their positions in the plan


def lay_out(plan: SavePlan, rank: int) -> Iterator[Shard]:
    """The files of a rank. A function of its plan alone, so that rank 0 knows them all."""
    seen: dict[str, int] = {}
    parts: dict[tuple[int, int], list[tuple[int, WriteItem]]] = {}
    for position, item in enumerate(plan.items):
        key = item.index.fqn
        part = seen[key] = seen.get(key, -1) + 1
        parts.setdefault((split_key(key)[0], part), []).append((position, item))
    for number, part in sorted(parts):
        items = parts[number, part]
        of = sum(other == number for other, _ in parts)
        specs, offsets = [], {}
        for _, item in items:
            fqn, data = split_key(item.index.fqn)[1], item.tensor_data
            assert data is not None
            specs.append(TensorSpec(fqn, tuple(data.chunk.sizes), data.properties.dtype))
            offsets[fqn] = {"saved_offsets": list(data.chunk.offsets)}
        metadata = {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps(offsets),
        }
        name = f"shard-{rank + 1:05d}-model-{part + 1:05d}-of-{of:05d}.safetensors"
        yield Shard(number, name, safetensors_header(specs, metadata), items)


def row_major(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, block by block; each is valid until the next."""
    itemsize = tensor.element_size()
    step = BLOCK_BYTES // itemsize
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        for start in range(0, len(data), BLOCK_BYTES):
            yield memoryview(data)[start : start + BLOCK_BYTES]
        return
    pinned, length = is_accelerator(tensor.device), min(step, tensor.numel())
    staging = torch.empty(length, dtype=tensor.dtype, pin_memory=pinned)
    sizes = tuple(tensor.shape)
    outer = Box((0,) * len(sizes), sizes)
    for start in range(0, tensor.numel(), step):
        stop, end = min(start + step, tensor.numel()), 0
        for box in flat_boxes(sizes, start, stop):
            staging[end : end + box.numel].view(box.sizes).copy_(tensor[box.within(outer)])
            end += box.numel
        yield staging[:end].view(torch.uint8).numpy().data


def nbytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
