"""A weighted average of checkpoints in place of the decay of the learning rate (WSM, 2507.17634).

    python examples/merge_for_decay.py

The spirals of spirals_diffusion.py, trained at a constant learning rate, with a checkpoint now and
then. `merge(weights="1-sqrt")` of the last 10 is compared with runs that go back to the first of
these and decay the learning rate by 1 - sqrt(x) over the same batches (`merge_for_decay.png`). The
command line does the same: dist-ema merge OUT "runs/merge/checkpoint-*" --last 10 --weights 1-sqrt
"""

import copy
import sys
from pathlib import Path

import torch
from plotting import new_figure, save
from safetensors.torch import load_file
from spirals_diffusion import Denoiser, Run, batches, held_out_loss, train_step

from dist_ema import merge

NUM_CHECKPOINTS, MERGED, DECAYS = 40, 10, 3  # DECAYS: runs with decay, which end at equal distances


def main(directory: str, num_steps: int) -> None:
    out, every = Path(directory), num_steps // NUM_CHECKPOINTS
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    model, loader = Denoiser().to(device), list(batches(256, num_steps, seed=0))
    optimizer = torch.optim.Adam(model.parameters())
    run = Run(model, optimizer, loader, torch.Tensor.backward, device)

    def train(first: int, last: int, *, decays: bool) -> None:
        model.train()
        for step in range(first, last):
            x = (step - first) / (last - first) if decays else 0.0
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * (1 - x**0.5)
            train_step(run, loader[step], torch.Generator().manual_seed(step))

    def loss_of(state: dict[str, torch.Tensor]) -> float:
        live = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        loss = held_out_loss(run, rounds=4)
        model.load_state_dict(live)
        return loss

    curves, paths, states = {"constant": {}, "merged": {}}, [], []
    for last in range(every, every * NUM_CHECKPOINTS + 1, every):
        train(last - every, last, decays=False)
        paths.append(out / f"checkpoint-{last}")
        model.save_pretrained(paths[-1])
        states.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        curves["constant"][last] = loss_of(model.state_dict())
        if len(paths) >= MERGED:
            merge(paths[-MERGED:], out / "merged", weights="1-sqrt")
            merged = load_file(out / "merged" / "diffusion_pytorch_model.safetensors")
            curves["merged"][last] = loss_of(merged)
    for i in range(1, DECAYS + 1):
        end = NUM_CHECKPOINTS * i // DECAYS - 1
        first, last = (every * (j + 1) for j in (end - MERGED + 1, end))
        model.load_state_dict(states[end - MERGED + 1][0])
        optimizer.load_state_dict(copy.deepcopy(states[end - MERGED + 1][1]))
        train(first, last, decays=True)
        curves.setdefault("decayed", {})[last] = loss_of(model.state_dict())

    figure, axes = new_figure(5, 3.6)
    for name, curve in curves.items():
        style = {"linestyle": "", "markersize": 9} if name == "decayed" else {"markevery": 3}
        axes.plot(list(curve), list(curve.values()), label=name, **style)
        print(name, *(f"{step}: {loss:.4f}" for step, loss in curve.items()), sep=", ")
    axes.set(xlabel="step", ylabel="held-out loss", ylim=(None, max(curves["merged"].values())))
    axes.legend()
    save(figure, out / "merge_for_decay.png")


main(*sys.argv[1:2] or ["runs/merge"], int((sys.argv[2:] or [1600])[0]))
