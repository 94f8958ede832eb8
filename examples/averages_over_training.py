"""Held-out loss of several averages over one training run, and of every width after it.

    ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 accelerate launch \\
        --config_file launch/accelerate/cpu-2.yaml examples/averages_over_training.py

On the spirals of spirals_diffusion.py: raw weights beside three averages (`over_training.png`), and
averages of many widths, made afterwards of what two saved (`over_sigma_rel.png`, arXiv 2312.02696).
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from plotting import new_figure, save
from spirals_diffusion import Run, held_out_loss, start_accelerate, train_step

from dist_ema import EqualWeight, PowerFunction, ShardedEMA, synthesize

AVERAGES = {"decay-0.95": 0.95, "decay-0.995": 0.995, "equal-weights": EqualWeight()}
SAVED = {f"{x}": PowerFunction(sigma_rel=x) for x in (0.05, 0.1)}
CHECK = {"0.15": PowerFunction(sigma_rel=0.15)}  # kept in the run as well, but not saved
WIDTHS = [0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25]


def losses(run: Run, ema: ShardedEMA) -> dict[str, float]:
    found = {}
    for name in ema.names:
        with ema.average_parameters(name):
            found[name] = held_out_loss(run, rounds=4)
    return found


def draw(path: Path, label: str, curves: dict[str, dict[float, float]]) -> None:
    figure, axes = new_figure(5, 3.6)
    for name, curve in curves.items():
        style = {} if len(curve) > 4 else {"linestyle": "", "markersize": 9, "fillstyle": "none"}
        axes.plot(list(curve), list(curve.values()), label=name, **style)
        print(name, *(f"{x:.4g}: {loss:.4f}" for x, loss in curve.items()), sep=", ")
    axes.set(xlabel=label, ylabel="held-out loss")
    axes.legend()
    save(figure, path)


def main(directory: str, num_steps: int) -> None:
    out, args = Path(directory), Namespace(steps=num_steps, batch=128, lr=4e-3, seed=0, processes=2)
    torch.manual_seed(args.seed)
    run = start_accelerate(args)
    ema = ShardedEMA(run.model, AVERAGES, start_step=num_steps // 16)
    kept, check = ShardedEMA(run.model, SAVED), ShardedEMA(run.model, CHECK)
    generator = torch.Generator().manual_seed(1000 * (1 + run.rank))
    curves, saved = {}, []
    for step, images in enumerate(run.loader, 1):
        run.model.train()
        train_step(run, images, generator)
        for average in (ema, kept, check):
            average.update()
        if step % (num_steps // 16) == 0:
            saved.append(out / f"kept-{step:06}")
            kept.save(saved[-1])
            raw = held_out_loss(run, rounds=4)
            for name, loss in {"raw": raw, **losses(run, ema)}.items():
                curves.setdefault(name, {})[step] = loss
    known, made = {"0": raw} | losses(run, kept) | losses(run, check), {}
    for width in WIDTHS:
        if run.rank == 0:
            print(synthesize(saved, sigma_rel=width, out=out / "made"))
        dist.barrier()  # synthesize() is the work of one process
        average = ShardedEMA(run.model, PowerFunction(sigma_rel=width))
        average.load(out / "made")
        (made[width],) = losses(run, average).values()
    if run.rank == 0:
        draw(out / "over_training.png", "step", curves)
        curves = {"made after the run": made, "kept": {float(x): y for x, y in known.items()}}
        draw(out / "over_sigma_rel.png", "sigma_rel (0: raw weights)", curves)
    dist.destroy_process_group()


main(*sys.argv[1:2] or ["runs/averages"], int((sys.argv[2:] or [1600])[0]))
