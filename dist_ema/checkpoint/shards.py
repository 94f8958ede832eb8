"""The bytes of a checkpoint's files: how they are named, and a tensor block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dist_ema.checkpoint.manifest import BLOCK_BYTES
from dist_ema.core.accelerator import is_accelerator
from dist_ema.core.layout import Box, flat_boxes


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
