"""Train a small diffusion model on two processes and judge it by its averaged weights.

The data are points on two spirals, made here. The model is a diffusers `ModelMixin` that predicts
the noise, trained at a constant learning rate. `launch/demo.sh` runs the three actions:

    train     trains and averages; prints the losses at each third of the run; writes `spirals.png`
              (samples of both, from the same noise), an export, and a checkpoint of everything
    read      loads the export with `from_pretrained`, in one process
    resume    goes on from the checkpoint, on any number of processes (`--processes`)

The last two stop unless every bit of the average is what it was at the end of `train`.

The task was chosen while looking at seed 0; seeds 1, 2 and 3, drawn once afterwards, show the same:
samples of the raw weights lie beside the spirals or leave out parts of them, others at each look;
those of the average follow them from end to end. Both leave strays between the arms.

Any engine that accelerate can launch will do (resuming on another number: DDP). On CPU:

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch \\
        --config_file launch/accelerate/cpu-2.yaml examples/spirals_diffusion.py

FSDP2, or FSDP1, with torch alone, on CPU or GPUs, without `resume`:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/spirals_diffusion.py --torch fsdp2
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from plotting import new_figure, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from dist_ema import ShardedEMA

NOISE = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
Look = tuple[float, Tensor]  # held-out loss and samples


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.time = nn.Linear(width, width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + self.outer(F.silu(self.inner(self.norm(hidden)) + self.time(time)))


class Denoiser(ModelMixin, ConfigMixin):
    """The noise in points of the plane, (number, 2), at timesteps, (number,)."""

    @register_to_config
    def __init__(self, width: int = 128, num_blocks: int = 3):
        super().__init__()
        self.first = nn.Linear(2 + 2 * 2 * 3, width)
        self.time = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.last = nn.Linear(width, 2)

    def forward(self, points: Tensor, timesteps: Tensor) -> Tensor:
        angles = torch.cat([points * math.pi * 2 ** (k / 2) for k in range(3)], dim=1)
        hidden = self.first(torch.cat([points, angles.sin(), angles.cos()], dim=1))
        time = F.silu(self.time(get_timestep_embedding(timesteps, 64).to(points.dtype)))
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.last(hidden)


@dataclass(frozen=True, slots=True)
class Run:
    """What differs from one engine to another, and nothing else."""

    model: Any  # as the engine returned it
    optimizer: Any
    loader: Iterable[Tensor]  # this rank's batches, one a step
    backward: Callable[[Tensor], None]
    device: torch.device
    rank: int = 0
    world_size: int = 1
    accelerator: Any = None  # where accelerate started the engine

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The model's guess of the noise, in fp32 whatever dtype the engine computes in."""
        dtype = next(self.model.parameters()).dtype
        return self.model(noisy.to(self.device, dtype), timesteps.to(self.device)).float()


def main() -> None:
    args = parse_args()
    if args.action == "read":
        return read(args.out)
    torch.manual_seed(args.seed)  # the same first weights on every rank
    run = start_torch(args) if args.torch else start_accelerate(args)
    ema = ShardedEMA(run.model, decay=args.decay)
    if run.accelerator:
        from dist_ema.integrations.accelerate import register

        register(run.accelerator, ema)  # count real steps only; be part of its checkpoints
    if args.action == "resume":
        run.accelerator.load_state(args.out / "state")
        digest = digest_of(ema.gather_state_dict())
        if run.rank == 0:
            print(f"    resumed at step {ema.step} on {run.world_size} process(es)")
            compare(digest, args.out)
    start = time.perf_counter()
    looks = train(run, ema, args)
    if run.rank == 0:
        seconds = time.perf_counter() - start
        print(f"    {args.steps} steps on {run.world_size} process(es): {seconds:.0f} s")
    if args.action == "train":
        state = ema.gather_state_dict()  # full on rank 0, empty on the others
        ema.export(args.out / "ema")
        if run.accelerator:
            run.accelerator.save_state(args.out / "state")
        if run.rank == 0:
            (args.out / "sha256").write_text(digest_of(state))
            print(f"    the average, {len(state)} tensors: sha256 {digest_of(state)[:16]}")
            draw(args.out / "spirals.png", looks)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Averaged weights of a small diffusion model")
    parser.add_argument("action", nargs="?", default="train", choices=("train", "read", "resume"))
    parser.add_argument("--out", type=Path, default=Path("runs/spirals"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128, help="per process")
    parser.add_argument("--lr", type=float, default=4e-3, help="constant over the run")
    parser.add_argument("--decay", type=float, default=0.998, help="of the average, per step")
    parser.add_argument("--samples", type=int, default=4000, help="points drawn for the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="stop if another number came up")
    parser.add_argument("--torch", choices=("fsdp1", "fsdp2"), help="without accelerate")
    args = parser.parse_args()
    if args.torch and args.action == "resume":
        parser.error("resume is for engines that accelerate starts; see resume_elsewhere.py")
    return args


def spirals() -> tuple[Tensor, Tensor]:
    """Training and held-out points of two noisy spirals in [-1, 1], (number, 2)."""
    generator = torch.Generator().manual_seed(0)
    angle = (1.4 + 42 * torch.rand(20_000, 1, generator=generator)).sqrt()
    arm = torch.randint(2, angle.shape, generator=generator) * 2 - 1
    points = arm * angle / 7 * torch.cat([angle.cos(), angle.sin()], dim=1)
    points += 0.015 * torch.randn(points.shape, generator=generator)
    return points[4000:], points[:4000]


def batches(size: int, number: int, seed: int) -> DataLoader[Tensor]:
    """Batches of training points, drawn with replacement."""
    generator, points = torch.Generator().manual_seed(seed), spirals()[0]
    sampler = RandomSampler(points, True, num_samples=size * number, generator=generator)
    return DataLoader(points, batch_size=size, sampler=sampler)


def start_accelerate(args: argparse.Namespace) -> Run:
    """Whatever engine `accelerate launch` was told to use."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    require_processes(args.processes, found=world_size)
    # On CPU, unless told the backend, accelerate takes every rank of DeepSpeed's for rank 0 of 1.
    needs_backend = world_size > 1 and not torch.accelerator.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if needs_backend else []
    accelerator = Accelerator(kwargs_handlers=handlers)
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    # accelerate deals the batches out to the ranks, so there must be enough for all.
    loader = batches(args.batch, args.steps * accelerator.num_processes, args.seed)
    prepared = accelerator.prepare(model, optimizer, loader)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    return Run(*prepared, accelerator.backward, accelerator.device, rank, world_size, accelerator)


def start_torch(args: argparse.Namespace) -> Run:
    """FSDP2 or FSDP1 with torch alone: every block cut over all ranks, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    require_processes(args.processes, found=world_size)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = torch.accelerator.current_accelerator()
    mesh = init_device_mesh(device.type, (world_size,))
    model = Denoiser().to(device)
    if args.torch == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        options = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "device_id": mesh.device_type}
        model = FullyShardedDataParallel(model, device_mesh=mesh, use_orig_params=True, **options)
    optimizer, rank = torch.optim.Adam(model.parameters(), lr=args.lr), mesh.get_rank()
    loader = batches(args.batch, args.steps, args.seed + rank)
    return Run(model, optimizer, loader, Tensor.backward, device, rank, world_size)


def require_processes(wanted: int, *, found: int) -> None:
    if found != wanted:
        raise SystemExit(
            f"{found} process(es) came up where {wanted} were wanted. On CPU, `accelerate launch "
            "--cpu` starts one process whatever its --num_processes says; instead set\n"
            "ACCELERATE_USE_CPU=true and pass `--config_file launch/accelerate/cpu-2.yaml`, "
            f"or pass --processes {found} to this script."
        )


def train(run: Run, ema: ShardedEMA, args: argparse.Namespace) -> dict[int, dict[str, Look]]:
    """Train for `args.steps` steps, averaging after each, and look at both at each third."""
    generator = torch.Generator().manual_seed(args.seed + 1000 * (1 + run.rank))
    looks = {}
    no_bar = True if run.rank else None  # None: none unless the output is a terminal
    bar = tqdm(run.loader, total=args.steps, desc="training", disable=no_bar, leave=False)
    for step, points in enumerate(bar, 1):
        run.model.train()
        train_step(run, points, generator)
        ema.update()
        if step in (args.steps // 3, args.steps * 2 // 3, args.steps):
            look = looks[ema.step] = {"raw": (held_out_loss(run), sample(run, args.samples))}
            with ema.average_parameters():
                look["averaged"] = held_out_loss(run), sample(run, args.samples)
            if run.rank == 0:
                losses = ", ".join(f"{name} {loss:.4f}" for name, (loss, _) in look.items())
                print(f"    step {ema.step}, held-out loss: {losses}", flush=True)
    return looks


def train_step(run: Run, points: Tensor, generator: torch.Generator) -> None:
    """One step of the optimizer, on these points with noise from this generator."""
    noise = torch.randn(points.shape, generator=generator)
    timesteps = torch.randint(len(NOISE.betas), points.shape[:1], generator=generator)
    noisy = NOISE.add_noise(points.cpu(), noise, timesteps)
    run.backward(F.mse_loss(run.predict(noisy, timesteps), noise.to(run.device)))
    run.optimizer.step()
    run.optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(run: Run, rounds: int = 16) -> float:
    """Mean squared error of the predicted noise, every call on the same noise and timesteps.

    Each rank takes its part of every round, so all make the same number of forward passes.
    """
    run.model.eval()
    generator, points = torch.Generator().manual_seed(1), spirals()[1]
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(rounds):
        noise = torch.randn(points.shape, generator=generator)
        timesteps = torch.randint(len(NOISE.betas), points.shape[:1], generator=generator)
        noisy = NOISE.add_noise(points, noise, timesteps)
        part = slice(run.rank, None, run.world_size)
        error = run.predict(noisy[part], timesteps[part]).cpu() - noise[part]
        total += torch.tensor([error.square().sum(), error.numel()])
    if dist.is_initialized():
        total = total.to(run.device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def sample(run: Run, number: int, num_steps: int = 50) -> Tensor:
    """`number` points, every call from the same noise. All ranks draw all of them."""
    run.model.eval()
    sampler = DDIMScheduler.from_config(NOISE.config)
    sampler.set_timesteps(num_steps)
    points = torch.randn((number, 2), generator=torch.Generator().manual_seed(2))
    for timestep in sampler.timesteps:
        noise = run.predict(points, timestep.expand(number)).cpu()
        points = sampler.step(noise, timestep, points).prev_sample
    return points


def digest_of(state: dict[str, Tensor]) -> str:
    """One sha256 of the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compare(digest: str, out: Path) -> None:
    expected = (out / "sha256").read_text()
    if digest != expected:
        raise SystemExit(
            f"the average has sha256 {digest[:16]}, and had at the end of the training "
            f"{expected[:16]}: train again, or look for what has changed {out}"
        )
    print(f"    the average: sha256 {digest[:16]}, every bit as at the end of the training")


def read(out: Path) -> None:
    """What anyone does with the export: diffusers reads it, without a word about averages."""
    model = Denoiser.from_pretrained(out / "ema")
    compare(digest_of(model.state_dict()), out)
    run = Run(model, None, [], Tensor.backward, torch.device("cpu"))
    print(f"    from_pretrained: held-out loss {held_out_loss(run):.4f}")


def draw(path: Path, looks: dict[int, dict[str, Look]]) -> None:
    """Samples of the raw weights above those of the averaged ones, the data in a light colour."""
    figure, axes = new_figure(8, 5.9, rows=2, columns=len(looks))
    for column, (step, look) in zip(axes.T, looks.items(), strict=True):
        for panel, (name, (loss, points)) in zip(column, look.items(), strict=True):
            panel.scatter(*spirals()[1].T, s=14, linewidths=0, color="#ffd28a")
            panel.scatter(*points.T, s=2, linewidths=0, color="#0b3d6b")
            panel.set(aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[])
            panel.set(title=f"{name}, step {step}", xlabel=f"held-out loss {loss:.4f}")
            panel.spines[:].set_visible(False)
    save(figure, path)


if __name__ == "__main__":
    main()
