"""A tiny network that has what real ones trip an average with.

Odd sizes everywhere, a head tied to the embedding, a frozen layer, a parameter with fewer elements
than there are ranks, a scalar, float, integer and non-persistent buffers, modules without
parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

VOCABULARY = 13
WIDTH = 7


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(WIDTH, hidden)
        self.act = nn.ReLU()
        self.l2 = nn.Linear(hidden, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.l2(self.act(self.l1(x))))


class Bank(nn.Module):
    """A linear layer of each expert; a DTensor may cut its parameters between experts."""

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, num_outputs, num_inputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(num_experts, num_outputs) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            p.to_local() if isinstance(p, DTensor) else p for p in (self.weight, self.bias)
        )
        return x @ weight.mT[:, None] + bias[:, None, None]


class ExpertBlock(Block):
    """Every token passes every expert, with a share that depends on both."""

    def __init__(self, hidden: int, num_experts: int) -> None:
        super().__init__(hidden)
        self.l1, self.l2 = Bank(num_experts, WIDTH, hidden), Bank(num_experts, hidden, WIDTH)
        self.num_experts = num_experts
        self.mesh: DeviceMesh | None = None  # the ranks that hold different experts

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mixture(x))

    def mixture(self, x: Tensor) -> Tensor:
        phases = torch.arange(self.num_experts, dtype=x.dtype)[:, None, None]
        if self.mesh is None:
            return (self.shares(x, phases) * self.l2(self.act(self.l1(x)))).sum(0)
        # Each rank has a part of the sum, and of the gradient of its input.
        size = -(-self.num_experts // self.mesh.size())
        own = phases.split(size)[self.mesh.get_local_rank()]
        x = DTensor.from_local(x, self.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        y = (self.shares(x, own) * self.l2(self.act(self.l1(x)))).sum(0)
        y = DTensor.from_local(y, self.mesh, [Partial()]).redistribute(placements=[Replicate()])
        return y.to_local()

    def shares(self, x: Tensor, phases: Tensor) -> Tensor:
        return (x.mean(-1) + phases).sin()[..., None]


class Net(nn.Module):
    """`scalar_dims=0` gives a 0-d parameter, which the sharding engines refuse."""

    running: Tensor
    num_batches: Tensor
    mask: Tensor

    def __init__(
        self, *, hidden: int = 11, scalar_dims: int = 1, scalar_size: int = 1, num_experts: int = 0
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            ExpertBlock(hidden, num_experts) if num_experts else Block(hidden) for _ in range(2)
        )
        self.drop = nn.Dropout(0.0)
        self.skip = nn.Identity()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.tiny = nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.full((scalar_size,) * scalar_dims, 1.5))
        self.register_buffer("running", torch.zeros(WIDTH))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.linspace(0.5, 1.5, WIDTH), persistent=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.emb(tokens)
        for block in self.blocks:
            h = block(h)
        if self.training:
            with torch.no_grad():
                self.running.lerp_(h.detach().mean((0, 1)).to(self.running.dtype), 0.1)
                self.num_batches += 1
        h = self.skip(self.drop(h + self.frozen(h) * self.mask.to(h.dtype)))
        return self.head(h * self.scale.mean() + self.tiny.sum())


PARAMETERS = tuple(name for name, _ in Net().named_parameters())
FROZEN = ("frozen.weight", "frozen.bias")
TRAINABLE = tuple(name for name in PARAMETERS if name not in FROZEN)
ALIASES = {"head.weight": "emb.weight"}
BUFFERS = ("running", "num_batches")  # the persistent ones


def batch_of_tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (4, 5), generator=generator)


def loss_of(logits: Tensor) -> Tensor:
    return logits.float().pow(2).mean() + logits.float().sin().mean()
