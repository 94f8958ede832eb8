"""Train a small diffusion model on two processes and judge it by its averaged weights.

The data are the 1,797 handwritten digits of 8x8 pixels that scikit-learn ships: no download.
The model is a diffusers `UNet2DModel` that predicts the noise of a DDPM schedule. The run ends with

- the loss of the raw and of the averaged weights on digits that were held out of training,
- an export of the average, loaded in a fresh process by `from_pretrained` and compared bit by bit,
- `digits.png`: samples of both, drawn from the same noise.

Any engine that accelerate can launch will do (DDP, DeepSpeed, FSDP2 on GPUs). On CPU:

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch \\
        --config_file launch/accelerate/cpu-2.yaml examples/digits_diffusion.py

FSDP2, or FSDP1 with `--fsdp1`, with torch alone, on CPU or GPUs:

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/digits_diffusion.py --fsdp2
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from dist_ema import ShardedEMA

NOISE = DDPMScheduler(num_train_timesteps=1000)


@dataclass(frozen=True, slots=True)
class Run:
    """What differs from one engine to another, and nothing else."""

    model: Any  # as the engine returned it
    optimizer: Any
    loader: Iterable[Tensor]  # this rank's batches, one a step
    backward: Callable[[Tensor], None]
    stepped: Callable[[], bool]  # did the last `optimizer.step()` change the weights?
    device: torch.device
    rank: int
    world_size: int

    def predict(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The model's guess of the noise, in fp32 whatever dtype the engine computes in."""
        dtype = next(self.model.parameters()).dtype
        inputs = noisy.to(self.device, dtype), timesteps.to(self.device)
        return self.model(*inputs).sample.float()


def main() -> None:
    args = parse_args()
    if args.fingerprint:
        loaded = UNet2DModel.from_pretrained(args.fingerprint)
        print(json.dumps(fingerprint(loaded.state_dict())))
        return

    train_set, held_out = digits()
    torch.manual_seed(args.seed)  # the same first weights on every rank
    run = start_torch(train_set, args) if args.engine else start_accelerate(train_set, args)
    ema = ShardedEMA(run.model, decay=args.decay)
    seconds = train(run, ema, args)

    raw = held_out_loss(run, held_out), sample(run, args.samples)
    with ema.average_parameters():
        averaged = held_out_loss(run, held_out), sample(run, args.samples)
    ema.export(args.out / "ema")
    gathered = ema.gather_state_dict()  # full on rank 0, empty on the others

    if run.rank == 0:
        engine = type(run.model).__name__
        print(f"{args.steps} steps of {engine} on {run.world_size} processes: {seconds:.0f} s")
        print(f"loss on {len(held_out)} held-out digits:")
        print(f"    raw weights      {raw[0]:.4f}")
        print(f"    averaged weights {averaged[0]:.4f}")
        check_export(args.out / "ema", fingerprint(gathered))
        print(f"{args.out}/ema: bit-equal in a fresh process, all {len(gathered)} tensors")
        draw(args.out / "digits.png", {"raw weights": raw, "averaged weights": averaged})
        print(f"{args.out}/digits.png: samples of both")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def parse_args() -> argparse.Namespace:
    """The learning rate and the decay were chosen on a part of the training digits."""
    parser = argparse.ArgumentParser(description="Averaged weights of a small diffusion model")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="per process")
    parser.add_argument("--lr", type=float, default=4e-3, help="constant over the run")
    parser.add_argument("--decay", type=float, default=0.99, help="of the average, per step")
    parser.add_argument("--samples", type=int, default=32, help="digits drawn; a multiple of 8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="stop if another number came up")
    for engine in ("fsdp1", "fsdp2"):
        parser.add_argument(
            f"--{engine}",
            action="store_const",
            dest="engine",
            const=engine,
            help="with torch alone, under torchrun",
        )
    parser.add_argument("--fingerprint", type=Path, help="only print the checksums of an export")
    return parser.parse_args()


def digits() -> tuple[Tensor, Tensor]:
    """(training, held-out) images in [-1, 1], (number, 1, 8, 8); every fifth is held out."""
    images = torch.from_numpy(load_digits().images).float().div(8).sub(1).unsqueeze(1)
    is_held_out = torch.arange(len(images)) % 5 == 4
    return images[~is_held_out], images[is_held_out]


def build_model() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def batches(train_set: Tensor, size: int, number: int, seed: int) -> DataLoader[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(
        train_set, replacement=True, num_samples=size * number, generator=generator
    )
    return DataLoader(train_set, batch_size=size, sampler=sampler)


def start_accelerate(train_set: Tensor, args: argparse.Namespace) -> Run:
    """Whatever engine `accelerate launch` was told to use."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    require_processes(args.processes, found=int(os.environ.get("WORLD_SIZE", "1")))
    # On CPU, unless told the backend, accelerate takes every rank of DeepSpeed's for rank 0 of 1.
    on_gpu = torch.accelerator.is_available()
    handlers = [] if on_gpu else [InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(kwargs_handlers=handlers)
    model = build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    # accelerate deals the batches out to the ranks, so there must be enough for all.
    loader = batches(train_set, args.batch, args.steps * accelerator.num_processes, args.seed)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return Run(
        model=model,
        optimizer=optimizer,
        loader=loader,
        backward=accelerator.backward,
        stepped=lambda: accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def start_torch(train_set: Tensor, args: argparse.Namespace) -> Run:
    """FSDP2 or FSDP1 with torch alone: every block cut over all ranks, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    require_processes(args.processes, found=world_size)
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = torch.accelerator.current_accelerator()
    mesh = init_device_mesh(device.type, (world_size,))
    model = cut(build_model().to(device), mesh, args.engine)
    return Run(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=args.lr),
        loader=batches(train_set, args.batch, args.steps, args.seed + mesh.get_rank()),
        backward=Tensor.backward,
        stepped=lambda: True,
        device=device,
        rank=mesh.get_rank(),
        world_size=world_size,
    )


def cut(model: UNet2DModel, mesh: Any, engine: str) -> Any:
    blocks = (*model.down_blocks, model.mid_block, *model.up_blocks)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for block in blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(block) for block in blocks})
    return FullyShardedDataParallel(
        model,
        device_mesh=mesh,
        auto_wrap_policy=policy,
        use_orig_params=True,
        device_id=mesh.device_type,
    )


def require_processes(wanted: int, *, found: int) -> None:
    if found != wanted:
        raise SystemExit(
            f"{found} process(es) came up where {wanted} were wanted. On CPU, `accelerate launch "
            "--cpu` starts one process whatever its --num_processes says; instead run\n"
            "    ACCELERATE_USE_CPU=true accelerate launch "
            f"--multi_gpu --num_processes {wanted} examples/digits_diffusion.py\n"
            f"    torchrun --nproc_per_node {wanted} examples/digits_diffusion.py --fsdp2\n"
            f"or pass --processes {found} if {found} is what you want."
        )


def train(run: Run, ema: ShardedEMA, args: argparse.Namespace) -> float:
    """Train for `args.steps` steps, averaging after each; returns the seconds that took."""
    generator = torch.Generator().manual_seed(args.seed + 1000 * (1 + run.rank))
    start = time.perf_counter()
    run.model.train()
    for images in tqdm(run.loader, total=args.steps, desc="training", disable=run.rank != 0):
        train_step(run, images, generator)
        if run.stepped():
            ema.update()
    return time.perf_counter() - start


def train_step(run: Run, images: Tensor, generator: torch.Generator) -> None:
    """One step of the optimizer, on these images with noise from this generator."""
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.randint(len(NOISE.betas), images.shape[:1], generator=generator)
    noisy = NOISE.add_noise(images.cpu(), noise, timesteps)
    run.backward(F.mse_loss(run.predict(noisy, timesteps), noise.to(run.device)))
    run.optimizer.step()
    run.optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(run: Run, images: Tensor, rounds: int = 16) -> float:
    """Mean squared error of the predicted noise, every call on the same noise and timesteps.

    Each rank takes its part of every round, so all make the same number of forward passes.
    """
    run.model.eval()
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(2, dtype=torch.float64)
    for _ in range(rounds):
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(len(NOISE.betas), images.shape[:1], generator=generator)
        noisy = NOISE.add_noise(images, noise, timesteps)
        mine = slice(run.rank, None, run.world_size)
        error = run.predict(noisy[mine], timesteps[mine]).cpu() - noise[mine]
        total += torch.tensor([error.square().sum(), error.numel()])
    if dist.is_initialized():
        total = total.to(run.device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def sample(run: Run, number: int, num_steps: int = 50) -> Tensor:
    """`number` images, every call from the same noise. All ranks draw all of them."""
    run.model.eval()
    sampler = DDIMScheduler.from_config(NOISE.config)
    sampler.set_timesteps(num_steps)
    images = torch.randn((number, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    for timestep in tqdm(sampler.timesteps, desc="sampling", disable=run.rank != 0):
        noise = run.predict(images, timestep.expand(number)).cpu()
        images = sampler.step(noise, timestep, images).prev_sample
    return images


def fingerprint(state: dict[str, Tensor]) -> dict[str, str]:
    """dtype, shape and sha256 of each tensor."""

    def describe(tensor: Tensor) -> str:
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"

    return {name: describe(tensor) for name, tensor in state.items()}


def check_export(path: Path, expected: dict[str, str]) -> None:
    """Load the export in a new Python process and compare all that it holds."""
    command = [sys.executable, __file__, "--fingerprint", str(path)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    loaded = json.loads(output.splitlines()[-1])
    different = {k for k in expected | loaded if expected.get(k) != loaded.get(k)}
    if different or not loaded:
        raise SystemExit(f"{path}: loads as something else than the average: {sorted(different)}")


def draw(path: Path, panels: dict[str, tuple[float, Tensor]]) -> None:
    """One panel for each (loss, images), side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 2.8))
    for ax, (title, (loss, images)) in zip(axes, panels.items(), strict=True):
        tiles = F.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=-1).reshape(-1, 8, 10, 10)
        ax.imshow(tiles.transpose(1, 2).flatten(2).flatten(0, 1), cmap="gray_r", vmin=-1, vmax=1)
        ax.set_title(f"{title}: held-out loss {loss:.4f}", fontsize=10)
        ax.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
