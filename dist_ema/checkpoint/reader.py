"""Reads a checkpoint into the boxes that this rank holds, however it was cut when written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_ema.checkpoint.manifest import SavedAverage, SavedTensor
from dist_ema.core.safetensors import DTYPES

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
