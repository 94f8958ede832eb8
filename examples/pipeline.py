"""A language model in pipeline stages, each under FSDP2: one average, one checkpoint, one export.

    torchrun --standalone --nproc_per_node 4 examples/pipeline.py 2       # stages
    torchrun --standalone --nproc_per_node 4 examples/pipeline.py 4 2     # two on each rank
    python examples/pipeline.py 1

Each goes on where the one before it stopped. Ranks with equal stages shard them. The schedule is
1F1B, interleaved where a rank has several stages.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from dist_ema import HalfLife, ShardedEMA

VOCAB, WIDTH, LAYERS = 16, 32, 4
CPU = torch.device("cpu")


class Decoder(nn.Module):
    """Some layers of a language model. A ModuleDict keeps the names that they have in the whole."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH) if 0 in layers else nn.Identity()
        self.layers = nn.ModuleDict()
        for i in layers:
            self.layers[str(i)] = nn.TransformerEncoderLayer(WIDTH, 2, 64, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False) if LAYERS - 1 in layers else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        for layer in self.layers.values():
            x = layer(x, mask, is_causal=True)
        return self.head(x)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


class Pipeline:
    """The parts of the model on this rank, and the schedule that runs all parts."""

    def __init__(self, num_stages: int, per_rank: int = 1) -> None:
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0}
        dist.init_process_group("gloo", **alone, world_size=int(os.environ.get("WORLD_SIZE", 1)))
        shape = num_stages // per_rank, dist.get_world_size() * per_rank // num_stages
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
        group, size = mesh.get_group("pp"), LAYERS // num_stages
        self.parts, stages = [], []
        for i in range(dist.get_rank(group), num_stages, shape[0]):
            torch.manual_seed(i)
            part = Decoder(range(i * size, (i + 1) * size))
            self.parts.append(fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False))
            stages.append(PipelineStage(part, i, num_stages, CPU, group=group))
        self.seed, self.is_first = mesh.get_local_rank("dp"), stages[0].is_first
        self.is_last = stages[-1].is_last
        one = Schedule1F1B(stages[0], 4, loss_fn=loss_of) if per_rank == 1 else None
        self.schedule = one or ScheduleInterleaved1F1B(stages, 4, loss_fn=loss_of)

    def run(self, seed: int, size: int = 32, *, train: bool = True) -> float | None:
        """A forward pass, and a backward pass if `train`. Ranks with the last stage get the loss.

        The task: 5x + 3 follows x, in four of five cases.
        """
        generator = torch.Generator().manual_seed(64 * seed + self.seed * train)
        x = torch.randint(VOCAB, (size, 13), generator=generator)
        follows = torch.rand(x.shape, generator=generator) < 0.8
        for i in range(12):
            x[:, i + 1] = torch.where(follows[:, i], (5 * x[:, i] + 3) % VOCAB, x[:, i + 1])
        run, losses = self.schedule.step if train else self.schedule.eval, []
        target = {"target": x[:, 1:], "losses": losses} if self.is_last else {}
        run(*[x[:, :-1].contiguous()][: self.is_first], **target)
        return torch.stack(losses).mean().item() if losses else None


def main(num_stages: str, per_rank: str = "1", directory: str = "runs/pipeline") -> None:
    pipeline = Pipeline(int(num_stages), int(per_rank))
    parts = pipeline.parts
    weights = {name: value for part in parts for name, value in part.state_dict().items()}
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=0.5)
    ema = ShardedEMA(parts, HalfLife(steps=10))  # of the whole model, of which all ranks hold parts

    if saved := sorted(Path(directory).glob("step-*")):
        dcp.load({"model": weights}, checkpoint_id=saved[-1] / "weights")
        ema.load(saved[-1] / "ema")
    start = ema.step
    for step in range(start, start + 30):
        pipeline.run(step)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    raw = pipeline.run(10**6, 512, train=False)
    with ema.average_parameters():
        averaged = pipeline.run(10**6, 512, train=False)
    here = Path(directory, f"step-{ema.step:06}")
    dcp.save({"model": weights}, checkpoint_id=here / "weights")
    ema.save(here / "ema")
    ema.export(here / "model")  # model.safetensors: the whole average, for one process
    if dist.get_rank() == dist.get_world_size() - 1:
        print(f"{num_stages} stages, steps {start} to {ema.step}, ", end="")
        print(f"test loss: raw {raw:.4f}, averaged {averaged:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["1"])
