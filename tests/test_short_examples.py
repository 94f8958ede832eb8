"""The short examples run as they stand, and what they print is what they promise."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import shutil
import socket
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.pipelining import Schedule1F1B

from dist_ema import HalfLife, ShardedEMA
from tests.readme import diffusion, one_side
from tests.scripts import BIN, ROOT, run, run_on, under_accelerate
from tests.test_examples import CPU

RECIPES = (ROOT / "examples/README.md").read_text()
LAUNCH = sorted((ROOT / "launch").glob("*.sh")) + sorted((ROOT / "launch").glob("*.sbatch"))


def assert_averaged_is_better(printed: str) -> None:
    found = re.search(r"raw (\d\.\d+), averaged (\d\.\d+)", printed)
    assert found, printed
    assert float(found[2]) < float(found[1]), printed


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_short(script: Path):
    limits = {"spirals_diffusion": 340, "pipeline": 120, "torchtitan_like": 110}
    limits |= {"push_to_inference": 140}
    assert len(script.read_text().splitlines()) <= limits.get(script.stem, 80)


def test_the_gallery_has_every_example():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"plotting.py"}
    assert scripts == {*re.findall(r"^\| \[(\w+\.py)\]", RECIPES, re.M)}


def test_fsdp2(tmp_path: Path):
    assert_averaged_is_better(run_on(2, "examples/fsdp2.py", tmp_path))
    assert (tmp_path / "model" / "model.safetensors").exists()
    inspected = run([str(BIN / "dist-ema"), "verify", str(tmp_path / "ema")])
    assert "ema" in inspected


def test_fsdp2_with_tensor_parallelism(tmp_path: Path):
    printed = run_on(4, "examples/fsdp2_tp.py", tmp_path / "ema")
    assert_averaged_is_better(printed)
    weights, held = re.search(r"(\d+) weights; .* hold (\d+) bytes", printed).groups()
    assert 4 * int(weights) <= int(held) <= 4 * int(weights) + 64  # once, and some padding


def test_deepspeed(tmp_path: Path):
    config = "launch/deepspeed/zero3.json"
    printed = run_on(2, "examples/deepspeed_native.py", config, tmp_path)
    assert_averaged_is_better(printed)
    assert "160 micro-batches, 80 optimizer steps; averaged are masters" in printed


def test_lightning(tmp_path: Path):
    printed = run_on(1, "examples/lightning_callback.py", tmp_path)
    assert_averaged_is_better(printed)
    assert "resumed at step 100, now 200" in printed


@pytest.mark.parametrize(("config", "steps"), [("cpu-2", 60), ("zero2-cpu", 240)])
def test_accelerate(config: str, steps: int, tmp_path: Path):
    without = CPU if config == "cpu-2" else {}
    printed = under_accelerate(config, "examples/accelerate_any.py", tmp_path, **without)
    assert_averaged_is_better(printed)
    assert f"240 batches on each of 2 processes\n{steps} steps" in printed
    averaged, loaded = re.search(r"averaged (\d\.\d+)\nloaded again: (\d\.\d+)", printed).groups()
    assert averaged == loaded
    assert (tmp_path / "state" / "ema" / "manifest.json").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_trainer(tmp_path: Path):
    printed = run_on(2, "examples/hf_trainer.py", tmp_path)
    assert_averaged_is_better(printed)
    assert "200 steps" in printed
    assert "the exported average counts [1, 4, 7, 10, 13, 16, 19, 22]" in printed
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-200"]


def test_resuming_elsewhere(tmp_path: Path):
    script = "examples/resume_elsewhere.py"
    printed = run_on(4, script, "fsdp2", tmp_path)
    printed += run_on(2, script, "ddp", tmp_path)
    printed += run_on(1, script, "plain", tmp_path)
    stops = re.findall(r"stops at (step \d+, average \w+)", printed)
    starts = re.findall(r"goes on from (step \d+, average \w+)", printed)
    assert len(set(stops)) == 3
    assert starts == stops[:2]


evaluates_pipelines = pytest.mark.skipif(
    not hasattr(Schedule1F1B, "eval"), reason="pipelines of this torch cannot evaluate"
)


@evaluates_pipelines
def test_pipeline(tmp_path: Path):
    printed = run_on(4, "examples/pipeline.py", 2, 1, tmp_path)
    printed += run_on(4, "examples/pipeline.py", 4, 2, tmp_path)
    last = run_on(1, "examples/pipeline.py", 1, 1, tmp_path)
    assert re.findall(r"(\d stages, steps \d+ to \d+)", printed + last) == [
        "2 stages, steps 0 to 30", "4 stages, steps 30 to 60", "1 stages, steps 60 to 90",
    ]  # fmt: skip
    assert_averaged_is_better(last)
    # The last average of the pipeline, in one process with the whole model.
    decoder = runpy.run_path(str(ROOT / "examples" / "pipeline.py"))["Decoder"](range(4))
    ema = ShardedEMA(decoder, HalfLife(steps=10))
    ema.load(tmp_path / "step-000060" / "ema")
    exported = load_file(tmp_path / "step-000060" / "model" / "model.safetensors")
    loaded = ema.gather_state_dict()
    assert loaded.keys() == exported.keys()
    assert all(torch.equal(loaded[name], exported[name]) for name in loaded)


@evaluates_pipelines
def test_torchtitan_like(tmp_path: Path):
    script = "examples/torchtitan_like.py"
    assert "steps 0 to 20, the average stands at 20" in run_on(4, script, 2, 1, tmp_path)
    printed = run_on(4, script, 4, 2, tmp_path)
    assert "steps 20 to 40, the average stands at 40" in printed
    assert_averaged_is_better(printed)
    saved = {path.name for path in tmp_path.glob("step-*")}
    assert saved == {f"step-{n}" for n in (10, 20, 30, 40)}


def test_teacher():
    student, teacher = re.search(
        r"student (\d\.\d+), teacher (\d\.\d+)", run_on(2, "examples/teacher.py")
    ).groups()
    assert min(float(student), float(teacher)) > 0.9


@pytest.mark.skipif(
    "inference_mode" not in inspect.signature(PeftModel.set_adapter).parameters,
    reason="this peft cannot activate an adapter without training it",
)
def test_adapter_teacher():
    printed = run_on(2, "examples/adapter_teacher.py")
    found = re.search(r"student (\d\.\d+), teacher (\d\.\d+)", printed)
    assert min(map(float, found.groups())) > 0.9, printed


def test_reference_policy():
    printed = run_on(2, "examples/reference_policy.py")
    found = re.search(r"rewarded: policy (\d\.\d+), reference (\d\.\d+)", printed)
    assert min(map(float, found.groups())) > 0.9, printed


def test_an_inference_engine_holds_the_average_that_was_pushed():
    printed = run_on(2, "examples/push_to_inference.py")
    sent = re.findall(r"^(\d) in (tensors|bucket) (\w{16})$", printed, re.M)
    averages = re.findall(r"the average is (\w{16})", printed)
    assert len(set(averages)) == 2
    assert [sum(int(n) for n, kind, _ in sent if kind == k) for k in ("tensors", "bucket")] == [
        6,
        6,
    ]
    assert len(sent) > 3  # more than one bucket
    assert [sent[0][2], sent[-1][2]] == averages


def sides_of_the_diffusers_recipe() -> list[str]:
    [diff] = re.findall(r"accelerate, diffusers -->\n```diff\n(.*?)^```", RECIPES, re.M | re.S)
    return [one_side(diff, sign) for sign in "-+"]


@pytest.mark.ranks(0)
def test_the_diffusers_recipe_keeps_the_numbers(tmp_path: Path):
    """In one process, the script before the change and after it: the same average, to fp32."""
    from accelerate.state import AcceleratorState

    states = []
    with mock.patch.dict(os.environ, CPU):
        for i, code in enumerate(sides_of_the_diffusers_recipe()):
            (tmp_path / str(i)).mkdir()
            os.chdir(tmp_path / str(i))
            exec(code, diffusion())
            states.append(load_file("run/pipeline/unet/diffusion_pytorch_model.safetensors"))
            AcceleratorState._reset_state(reset_partial_state=True)
    assert states[0].keys() == states[1].keys()
    for name, wanted in states[0].items():
        torch.testing.assert_close(states[1][name], wanted, rtol=1e-5, atol=1e-6)


def test_a_call_left_under_is_main_process_says_what_to_do(tmp_path: Path):
    """The recipe with a call that the user forgot to move out; the other rank goes on to train."""
    _, code = sides_of_the_diffusers_recipe()
    before, loop, after = code.partition("for global_step")
    program = f"""
import sys
from datetime import timedelta
from accelerate import Accelerator, InitProcessGroupKwargs
sys.path.insert(0, {str(ROOT)!r})
from tests.readme import diffusion
limit = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=10))
Accelerator(kwargs_handlers=[limit])
globals().update(diffusion())
{before}
accelerator.backward(diffusion_loss(unet, next(iter(train_dataloader))))
if accelerator.is_main_process:
    ema_unet.export("run/unet")
{loop}{after}"""
    (tmp_path / "train.py").write_text(program)
    with pytest.raises(AssertionError) as failed:
        under_accelerate("cpu-2", str(tmp_path / "train.py"), cwd=tmp_path, **CPU)
    wanted = r"RuntimeError: export\(\): ranks that have not arrived: 1; .*is_main_process"
    assert re.search(wanted, str(failed.value)), failed.value
    assert "EnforceNotMet" not in str(failed.value)


def test_a_width_chosen_after_the_run(tmp_path: Path):
    printed = run_on(2, "examples/posthoc_sweep.py", tmp_path)
    assert_averaged_is_better(printed)
    losses = dict(re.findall(r"sigma_rel (\d\.\d+): test loss (\d\.\d+)", printed))
    best = min(losses, key=lambda width: float(losses[width]))
    assert best not in ("0.05", "0.1"), "a width that was kept would not need this"
    (command,) = re.findall(r"now run: dist-ema (.*)", printed)
    assert f"/{best} " in command
    run([str(BIN / "dist-ema"), *command.split()])
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_merge_in_place_of_decay(tmp_path: Path):
    printed = run_on(1, "examples/merge_for_decay.py", tmp_path, 80)
    curves = {
        name: [float(loss) for loss in re.findall(r"\d+: (\d+\.\d+)", line)]
        for name, line in re.findall(r"^(\w+), (.*)$", printed, re.M)
    }
    assert {name: len(of) for name, of in curves.items()} == {
        "constant": 40, "merged": 31, "decayed": 3,
    }  # fmt: skip
    assert curves["merged"][-1] < curves["merged"][0]
    assert (tmp_path / "merge_for_decay.png").stat().st_size > 1000


def test_averages_over_training(tmp_path: Path):
    script = "examples/averages_over_training.py"
    printed = under_accelerate("cpu-2", script, tmp_path, 16, **CPU)
    assert len(list(tmp_path.glob("kept-*"))) == 16
    for name in ("over_training.png", "over_sigma_rel.png"):
        assert 1000 < (tmp_path / name).stat().st_size < 100_000

    def loss_at(curve: str, x: str) -> float:
        return float(re.search(rf"^{curve}, .*\b{re.escape(x)}: (\d\.\d+)", printed, re.M)[1])

    for width in ("0.05", "0.1", "0.15"):  # the last was kept and not saved
        assert abs(loss_at("made after the run", width) - loss_at("kept", width)) <= 2e-4
    assert loss_at("decay-0.995", "16") != loss_at("raw", "16") == loss_at("kept", "0")


@pytest.mark.parametrize("script", LAUNCH, ids=lambda path: path.name)
def test_a_launch_script_parses(script: Path):
    subprocess.run(["bash", "-n", script], check=True)


def test_one_node_of_several_without_gpus(tmp_path: Path):
    """With no more in PATH than the script needs, so without the command that lists GPUs."""
    for name in ("bash", "dirname", "wc"):
        (tmp_path / name).symlink_to(shutil.which(name))
    # In one piece: torchrun's workers do not buffer, and print() writes the end by itself.
    (tmp_path / "ranks.py").write_text(
        "import os, sys\nsys.stdout.write('rank ' + os.environ['RANK'] + '\\n')\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"PATH": str(tmp_path), "NODES": "1", "HEAD": "localhost", "PORT": str(port)}
    done = subprocess.run(
        ["bash", "launch/multi_node.sh", tmp_path / "ranks.py"],
        cwd=ROOT,
        env={**environment, "HOME": str(tmp_path), "TORCHRUN": str(BIN / "torchrun")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert sorted(re.findall(r"rank \d", done.stdout)) == ["rank 0", "rank 1"], done.stdout


def test_two_nodes_under_slurm(tmp_path: Path):
    """Slurm's two commands stand in for two nodes on this host; torchrun meets its other half."""
    commands = {
        "scontrol": "echo localhost; echo other",
        "srun": 'shift 2; "$@" & first=$!; "$@" && wait "$first"',
    }
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    printed = run(
        ["bash", "launch/slurm.sbatch", "examples/fsdp2.py", str(tmp_path / "run")],
        PATH=f"{tmp_path}:{BIN}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST="two",
        SLURM_JOB_ID=str(port % 10000),
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="2",
        SLURM_CPUS_PER_TASK="2",
        TORCHRUN=str(BIN / "torchrun"),
    )
    assert printed.count("test loss") == 1  # four ranks of one run, not two runs of two
    held = int(re.search(r"takes (\d+) bytes on rank 0", printed)[1])
    assert 4996 <= held <= 4996 + 64  # of 19,204 for the whole model, and some padding


@pytest.mark.parametrize("lora", [False, True])
def test_finetuning_a_language_model(lora: bool, tmp_path: Path):
    config = f"zero{3 if lora else 2}-cpu"
    arguments = ["--out", tmp_path, *(["--lora"] if lora else [])]
    printed = under_accelerate(config, "examples/finetune_lm.py", *arguments)
    found = re.search(r"from 5: .* (\d+)% of the numbers counted by three are right", printed)
    assert found and int(found[1]) >= 80, printed
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "ema" / file).exists()
