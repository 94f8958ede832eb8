"""How large the benchmarks are: the real thing, and one that only shows that they run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.benchmarks.models import Shapes

SIDE = 2048  # of a large tensor
CPU_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a decoder in the manner of Llama; by default those of its 70-billion model."""

    layers: int = 80
    width: int = 8192
    hidden: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    update: tuple[Shapes, ...]
    peers: tuple[Shapes, ...]
    whole: Shapes  # on 1, 2 and 4 ranks
    num_ranks: tuple[int, ...]
    swapped: Shapes
    heavy: Shapes  # of an average of 2 GB
    traced: tuple[int, int, int]  # width, depth and batch of the model that is trained
    stored: Shapes
    rounds: int
    slow_rounds: int  # of what takes seconds
    decoder: Config  # that is simulated
    layers: int  # of its layers, where what a save and a gather tell rank 0 is
    num_shards: int  # of the simulated meshes, with 1 and `num_replicas` replicas
    num_replicas: int
    max_ranks: int = CPU_RANKS  # of suites that need some

    def ranks_of(self, device: str) -> int:
        """As many ranks as a suite gets that needs several: all GPUs up to the maximum, or so."""
        if device == "cuda":
            return max(1, min(self.max_ranks, torch.cuda.device_count()))
        return self.max_ranks


def _large(count: int, side: int = SIDE, dtype: torch.dtype = torch.float32) -> Shapes:
    name = f"{count} of {side} x {side}" + (" bf16" if dtype == torch.bfloat16 else "")
    return Shapes(name=name, count=count, shapes=((side, side),), dtype=dtype)


SMALL = Shapes(name="384 of 3,000", count=384, shapes=((60, 50),), per_unit=24)
TINY = Shapes(name="384 of 10 x 10", count=384, shapes=((10, 10),), per_unit=24)
BLOCK = ((64,), (64,), (256, 64), (256,))  # a LayerNorm and a Linear
BLOCKS = Shapes(name="96 blocks", count=4 * 96, shapes=BLOCK, per_unit=4)
BF16 = torch.bfloat16

REAL = Sizes(
    update=(
        _large(12),
        SMALL,
        TINY,
        BLOCKS,
        _large(12, dtype=BF16),
        replace(SMALL, name="384 of 3,000 bf16", dtype=BF16),
    ),
    peers=(_large(8), SMALL, TINY),
    whole=_large(8),
    num_ranks=(1, 2, 4),
    swapped=_large(16, 2 * SIDE),
    heavy=_large(32, 2 * SIDE),
    traced=(2 * SIDE, 16, 8 * SIDE),
    stored=_large(16),
    rounds=15,
    slow_rounds=3,
    decoder=Config(),
    layers=8,
    num_shards=1024,
    num_replicas=8,
)
CHECK = Sizes(
    update=(_large(2, 16), replace(TINY, count=6, per_unit=3), _large(2, 16, BF16)),
    peers=(_large(2, 16), replace(TINY, count=6, per_unit=3)),
    whole=_large(2, 32),
    num_ranks=(1, 2),
    swapped=_large(2, 32),
    heavy=_large(2, 512),
    traced=(32, 2, 8),
    stored=_large(2, 32),
    rounds=2,
    slow_rounds=1,
    decoder=Config(layers=2, width=64, hidden=96, heads=8, kv_heads=2, vocabulary=100),
    layers=1,
    num_shards=8,
    num_replicas=2,
)
