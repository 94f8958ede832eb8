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
from tests.scripts import ACCELERATE, BIN, CPU, ROOT, run, run_on, under_accelerate

RECIPES = (ROOT / "examples/README.md").read_text()
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def numbers(pattern: str, printed: str) -> list[float]:
    """The groups of the first match."""
    match = re.search(pattern, printed)
    assert match, printed
    return [float(number) for number in match.groups()]


def assert_averaged_is_better(printed: str) -> None:
    raw, averaged = numbers(r"raw (\d\.\d+), averaged (\d\.\d+)", printed)
    assert averaged < raw, printed


def test_the_gallery_has_every_example_and_each_is_short():
    names = {path.name for path in SCRIPTS} - {"plotting.py"}
    assert names == {*re.findall(r"^\| \[(\w+\.py)\]", RECIPES, re.M)}
    limits = {"spirals_diffusion": 340, "pipeline": 120, "torchtitan_like": 110}
    limits |= {"push_to_inference": 140}
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) <= limits.get(script.stem, 80), script


def test_fsdp2(tmp_path: Path):
    assert_averaged_is_better(run_on(2, "examples/fsdp2.py", tmp_path))
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert "ema" in run([str(BIN / "dist-ema"), "verify", str(tmp_path / "ema")])


def test_fsdp2_with_tensor_parallelism(tmp_path: Path):
    printed = run_on(4, "examples/fsdp2_tp.py", tmp_path / "ema")
    assert_averaged_is_better(printed)
    weights, held = numbers(r"(\d+) weights; .* hold (\d+) bytes", printed)
    assert 4 * weights <= held <= 4 * weights + 64  # once, and some padding


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
    averaged, loaded = numbers(r"averaged (\d\.\d+)\nloaded again: (\d\.\d+)", printed)
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
    printed = run_on(2, "examples/teacher.py")
    assert min(numbers(r"student (\d\.\d+), teacher (\d\.\d+)", printed)) > 0.9


@pytest.mark.skipif(
    "inference_mode" not in inspect.signature(PeftModel.set_adapter).parameters,
    reason="this peft cannot activate an adapter without training it",
)
def test_adapter_teacher():
    printed = run_on(2, "examples/adapter_teacher.py")
    assert min(numbers(r"student (\d\.\d+), teacher (\d\.\d+)", printed)) > 0.9


def test_reference_policy():
    printed = run_on(2, "examples/reference_policy.py")
    assert min(numbers(r"rewarded: policy (\d\.\d+), reference (\d\.\d+)", printed)) > 0.9


def test_an_inference_engine_holds_the_average_that_was_pushed():
    printed = run_on(2, "examples/push_to_inference.py")
    sent = re.findall(r"^(\d) in (tensors|bucket) (\w{16})$", printed, re.M)
    averages = re.findall(r"the average is (\w{16})", printed)
    assert len(set(averages)) == 2
    for way in ("tensors", "bucket"):
        assert sum(int(number) for number, kind, _ in sent if kind == way) == 6
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


def test_the_launch_scripts_parse():
    for script in (*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")):
        subprocess.run(["bash", "-n", script], check=True)


# Slurm's two commands stand in for two nodes on this host; torchrun meets its other half.
STAND_INS = {
    "scontrol": "echo localhost; echo other",
    "srun": 'shift 2; "$@" & first=$!; "$@" && wait "$first"',
}
LAUNCHES = {
    "one node of several": (["bash", "launch/multi_node.sh"], 2),
    "two nodes under Slurm": (["bash", "launch/slurm.sbatch"], 4),
    "accelerate": ([*ACCELERATE, "launch/accelerate/cpu-2.yaml"], 2),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launcher_starts_all_ranks_of_one_run(launch: str, tmp_path: Path):
    command, num_ranks = LAUNCHES[launch]
    # With no more in PATH than is needed, so without the command that lists GPUs.
    for name in ("bash", "dirname", "wc"):
        (tmp_path / name).symlink_to(shutil.which(name))
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    # In one piece: workers do not buffer, and print() writes the end of a line by itself.
    (tmp_path / "ranks.py").write_text(
        "import os, sys\nsys.stdout.write('rank {RANK} of {WORLD_SIZE}\\n'.format(**os.environ))\n"
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    printed = run(
        [*command, str(tmp_path / "ranks.py")],
        PATH=str(tmp_path),
        TORCHRUN=str(BIN / "torchrun"),
        **{"NODES": "1", "HEAD": "localhost", "PORT": str(port)},
        **{"SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": str(port % 10000), "SLURM_NNODES": "2"},
        **{"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2"},
        **CPU,
    )
    wanted = [f"rank {rank} of {num_ranks}" for rank in range(num_ranks)]
    assert sorted(re.findall(r"rank \d of \d", printed)) == wanted, printed


@pytest.mark.parametrize("lora", [False, True])
def test_finetuning_a_language_model(lora: bool, tmp_path: Path):
    config = f"zero{3 if lora else 2}-cpu"
    arguments = ["--out", tmp_path, *(["--lora"] if lora else [])]
    printed = under_accelerate(config, "examples/finetune_lm.py", *arguments)
    [percent] = numbers(r"from 5: .* (\d+)% of the numbers counted by three are right", printed)
    assert percent >= 80, printed
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    assert (tmp_path / "ema" / file).exists()
