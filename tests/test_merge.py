"""Averages of checkpoints of all formats, against numpy in float64; forged ones are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_ema import EqualWeight, ShardedEMA, cli, merge
from dist_ema.checkpoint import directory
from dist_ema.checkpoint.manifest import dump, parse
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.checkpoint.writer import save
from dist_ema.core.errors import CheckpointError
from dist_ema.core.group import Group
from dist_ema.posthoc.merge import coefficients, expand
from tests.cuts import (
    CUTS,
    SEVERAL_BLOCKS,
    TENSORS,
    PeakMemory,
    first_ranks,
    full,
    infos,
    parts_of,
    state_of,
)
from tests.models import build
from tests.read_exports import contents, written
from tests.worlds import mesh, rank

ROOT = Path(__file__).parents[1]
FILE = "model.safetensors"
NUM_FORGED = int(os.environ.get("FORGED", "200"))
State = dict[str, Tensor]


def random_state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    state = full(infos(dtype=dtype), seed)
    return state | {
        "step": torch.tensor(seed),
        "mask": torch.arange(5) % (seed + 2) == 0,
        "table": torch.arange(6, dtype=torch.int32).view(2, 3) + seed,
    }


def numpy_sum(states: Sequence[State], weights: Sequence[float]) -> dict[str, np.ndarray]:
    """Sums of floating-point tensors, the last of the others; in float64."""
    result = {}
    for fqn, last in states[-1].items():
        values = [state[fqn].double().numpy() for state in states]
        is_real = last.dtype.is_floating_point
        terms = [w * v for w, v in zip(weights, values, strict=True)] if is_real else values[-1:]
        result[fqn] = np.sum(np.stack(terms), axis=0)
    return result


def assert_close(found: State, wanted: dict[str, np.ndarray]) -> None:
    """Every element is within one unit in the last place of its dtype."""
    assert found.keys() == wanted.keys()
    for fqn, tensor in found.items():
        exact = torch.from_numpy(np.asarray(wanted[fqn]))
        if not tensor.dtype.is_floating_point:
            assert torch.equal(tensor.double(), exact), fqn
            continue
        nearest = exact.to(tensor.dtype)
        limit = torch.nextafter(nearest.abs(), torch.full_like(nearest, math.inf)) - nearest.abs()
        if tensor.dtype == torch.float64:  # the order of numpy's sum is another one
            limit = limit * 8 + 1e-15
        assert ((tensor - nearest).abs() <= limit).all(), fqn


def write_plain(path: Path, state: State, *, files: int = 1) -> Path:
    """A safetensors file, or a directory of several with an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        save_file(state, path)
        return path
    path.mkdir()
    names = [f"model-{i}-of-{files}.safetensors" if files > 1 else FILE for i in range(files)]
    for i, name in enumerate(names):
        save_file(dict(list(state.items())[i::files]), path / name)
    if files > 1:
        index = {fqn: names[i % files] for i, fqn in enumerate(state)}
        (path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def write_dcp(path: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


# Weights.

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_weights_emulate_the_decay_of_a_learning_rate(n: int):
    """Step i is in all checkpoints from the i-th on, so their weights add up to its decay."""
    for name, curve in CURVES.items():
        found = coefficients(name, n)
        assert math.fsum(found) == pytest.approx(1, abs=1e-12)
        for i in range(n):
            assert math.fsum(found[i:]) == pytest.approx(curve(i / n), abs=1e-12)
    assert coefficients("uniform", n) == pytest.approx(coefficients("linear", n))
    assert coefficients("1-sqrt", n) == sorted(coefficients("1-sqrt", n), reverse=True)
    rng = random.Random(n)
    values = [rng.random() for _ in range(n)]
    average = reduce(lambda average, value: 0.9 * average + 0.1 * value, values)
    assert np.dot(coefficients("ema:0.9", n), values) == pytest.approx(average)


def test_numbers_are_weights_and_what_is_none_is_refused():
    assert coefficients("0.2, 0.3,0.5", 3) == coefficients([0.2, 0.3, 0.5], 3) == [0.2, 0.3, 0.5]
    assert coefficients("-0.5,1.5", 2) == [-0.5, 1.5]
    assert coefficients([1, 2, 1], 3, normalize=True) == [0.25, 0.5, 0.25]
    for weights, message in {
        "0.2,0.3": "add up to 0.5",
        "0.2,0.3,0.5": "or 2 numbers",
        "minus-sqrt": "what other tools call minus-sqrt is 1-sqrt here",
        "ema:1": "a decay in",
        "ema:x": "a decay in",
        "nan,1": "numbers",
        "": "numbers",
    }.items():
        with pytest.raises(ValueError, match=message):
            coefficients(weights, 2)
    with pytest.raises(ValueError, match="add up to 0"):
        coefficients([1, -1], 2, normalize=True)


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path):
    for step in (900, 1000, 10_000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    ordered = [tmp_path / f"checkpoint-{step}" for step in (900, 1000, 10_000)]
    assert expand([tmp_path / "checkpoint-*"]) == ordered
    assert expand(f"{tmp_path}/checkpoint-*", [0.2, 0.3, 0.5]) == ordered
    assert expand(sorted(ordered), "1-sqrt") == ordered  # as a shell sorts them
    assert expand(["w/step-5", "main/step-3", "main/step-1"]) == [
        Path("w/step-5"), Path("main/step-1"), Path("main/step-3"),
    ]  # fmt: skip
    backwards = [*reversed(ordered)]
    assert expand(backwards, [0.5, 0.3, 0.2]) == backwards
    with pytest.raises(ValueError, match="alphabetical order, checkpoint-1000 first"):
        expand(sorted(ordered), "0.2,0.3,0.5")
    with pytest.raises(ValueError, match="no checkpoints"):
        expand([])


# Values.


@pytest.mark.ranks(4)
@pytest.mark.timeout_s(240)
def test_every_cut_and_format_at_once(tmp_path: Path):
    """Averages of each cut on one to four ranks, plain files and one of torch."""
    tensors = infos({**SEVERAL_BLOCKS, "scale": (), "empty": (0, 3), "cube": (3, 2, 5)})
    states = [full(tensors, seed) for seed in range(len(CUTS) + 3)]
    paths = []
    for i, cut in enumerate(CUTS):
        path = tmp_path / f"checkpoint-{i}"
        of_cut = tensors[2:] if cut == "crumbs" else tensors
        group = first_ranks((4, 3, 2, 1)[i % 4])
        if group is not None and cut != "crumbs":
            parts = parts_of(cut, of_cut, states[i], group)
            save(path, {"ema": parts}, tensors, state_of(step=i), group)
        elif group is not None and group.rank == 0:
            write_plain(path, states[i], files=2)
        paths.append(path)
    dist.barrier()
    if rank() == 0:
        paths.append(write_plain(tmp_path / "checkpoint-6", states[-3], files=3))
        paths.append(write_plain(tmp_path / "checkpoint-7.safetensors", states[-2]))
        paths.append(write_dcp(tmp_path / "checkpoint-8", {"model": states[-1]}))
        weights = [0.4, -0.3, 0.2, 0.1, 0.3, -0.1, 0.2, 0.1, 0.1]
        for order in (range(9), (8, 1, 0, 2, 3, 4, 5, 6, 7)):
            of = [weights[i] for i in order]
            merge([paths[i] for i in order], tmp_path / "out", weights=of)
            wanted = numpy_sum([states[i] for i in order], of)
            assert_close(load_file(tmp_path / "out" / FILE), wanted)
    dist.barrier()


class Mlp(nn.Module):
    """Sizes that no number of ranks divides, and a head that may be tied."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 22), nn.Linear(22, 7)
        self.emb, self.norm = nn.Embedding(13, 6), nn.LayerNorm(7)
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.ranks(4)
@pytest.mark.timeout_s(240)
def test_layouts_of_torch_distributed_checkpoint(tmp_path: Path):
    """FSDP2 with tensor parallelism, in the layouts of accelerate, torchtitan, Lightning, OLMo."""
    grid, states, paths = mesh((2, 2), ("dp", "tp")), [], []

    def sharded(seed: int, *, tp: bool) -> nn.Module:
        torch.manual_seed(seed)
        module = Mlp()
        module.count += seed
        states.append({k: v.clone() for k, v in module.state_dict().items()})
        if tp:
            parallelize_module(
                module, grid["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
            )
        return fully_shard(module, mesh=grid["dp"] if tp else mesh((4,), ("shard",)))

    layouts: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
        "accelerate/pytorch_model_fsdp_0": lambda model, opt: {"model": model},
        "titan": lambda model, opt: {**model, "optimizer": opt, "train_state": {"step": 3}},
        "lightning": lambda model, opt: {"state_dict": model, "optimizer_0": opt, "epoch": 1},
        "olmo/model_and_optim": lambda model, opt: {"model": model, "optim": opt},
        "app": lambda model, opt: {"app": {"model": model, "optim": opt}},
    }
    for i, (name, layout) in enumerate(layouts.items()):
        module = sharded(i, tp=i % 2 == 0)
        optimizer = torch.optim.AdamW(module.parameters())
        # Not `full_tensor()`, which is wrong for uneven shards before torch 2.9.
        whole = Mlp()
        whole.load_state_dict(states[-1])
        for each in (module, whole):
            for parameter in each.parameters():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        torch.optim.AdamW(whole.parameters()).step()
        states[-1] = {k: v.clone() for k, v in whole.state_dict().items()}
        moments = {k: s["exp_avg"] for k, s in enumerate(optimizer.state.values())}
        moments = {f"state.{k}.exp_avg": value for k, value in moments.items()}
        dcp.save(layout(get_model_state_dict(module), moments), checkpoint_id=tmp_path / name)
        paths.append(tmp_path / name.split("/")[0])
    module = sharded(9, tp=True)
    ShardedEMA(module, 0.5, buffers="average").save(tmp_path / "ours")
    ema = ShardedEMA(module, 0.5)
    dcp.save({"model": module, "ema": ema}, checkpoint_id=tmp_path / "both")
    if rank() == 0:
        states = [{k: v.clone() for k, v in s.items()} for s in states]
        write_plain(tmp_path / "base", states[-1])
        paths.append(tmp_path / "ours")
        found = merge(paths, tmp_path / "out", weights="1-sqrt", base=tmp_path / "base")
        wanted = numpy_sum(states, list(found.weights.values()))
        assert_close(load_file(tmp_path / "out" / FILE), wanted)
        merge([tmp_path / "both"], tmp_path / "one", prefix="ema.averages.ema.*")
        merge([tmp_path / "both"], tmp_path / "two")
        for name, tensor in written(tmp_path / "one").items():
            assert torch.equal(tensor, written(tmp_path / "two")[name]), name
        assert set(written(tmp_path / "two")) - {"count"} == set(written(tmp_path / "one"))
        with pytest.raises(CheckpointError, match=r"no tensor with the prefix 'x\.'"):
            merge([tmp_path / "both"], tmp_path / "three", prefix="x.")
    dist.barrier()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(dtype: torch.dtype, tmp_path: Path):
    states = [random_state(seed, dtype) for seed in range(20)]
    paths = [write_plain(tmp_path / f"{i}", state) for i, state in enumerate(states)]
    paths[3] = write_dcp(tmp_path / "d", states[3])
    steps: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[int], object]]:
        steps.append(-total)
        yield steps.append

    result = merge(paths, tmp_path / "out", weights="cosine", progress=progress)
    assert steps[0] < 0 and sum(steps) == 0
    wanted = numpy_sum(states, list(result.weights.values()))
    assert_close(written(tmp_path / "out"), wanted)
    for other in (torch.float32, torch.bfloat16):
        merge(paths, tmp_path / "out", weights="cosine", dtype=other)
        found = written(tmp_path / "out")
        assert found["cube"].dtype == other and found["table"].dtype == torch.int32
        assert_close(found, wanted)


def test_memory_does_not_grow_with_the_model_or_the_number(tmp_path: Path):
    paths = []
    for i in range(6):
        state = {"w": torch.full((4096, 2048), float(i)), "v": torch.full((1 << 20,), float(i))}
        save = write_dcp if i % 2 else write_plain
        paths.append(save(tmp_path / f"{i}", state))
    merge(paths[:2], tmp_path / "out")  # loads code
    with PeakMemory() as peak:
        merge(paths, tmp_path / "out", max_shard_size="8MB")
    assert peak() < 60e6
    assert (written(tmp_path / "out")["w"] == 2.5).all()


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(directory, "_MAX_OPEN", 12)
    states = [random_state(seed) for seed in range(6)]
    paths = [write_plain(tmp_path / f"{i}", state, files=5) for i, state in enumerate(states)]
    before = len(os.listdir("/proc/self/fd"))

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[int], object]]:
        assert len(os.listdir("/proc/self/fd")) - before < 2 * 12  # a directory is a file too
        yield lambda nbytes: None

    merge(paths, tmp_path / "out", progress=progress)
    assert_close(written(tmp_path / "out"), numpy_sum(states, [1 / 6] * 6))


# Files.


def test_configurations_and_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    state = random_state(1, torch.bfloat16)
    write_dcp(tmp_path / "step-9", state)
    write_plain(tmp_path / "step-10", state, files=2)
    for name, text in {
        "config.json": '{"model_type": "x", "dtype": "float16", "text_config": {"dtype": "a"}}',
        "generation_config.json": '{"top_k": 3}',
        "tokenizer_config.json": "{}",
        "training_args.json": "{}",
    }.items():
        (tmp_path / "step-10" / name).write_text(text)
    (tmp_path / "step-10" / "tokenizer.model").write_bytes(bytes(range(256)))
    out = tmp_path / "out"
    arguments = ["merge", str(out), f"{tmp_path}/step-*", "--weights", "ema:0.75"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"+0.750000  {tmp_path}/step-9\n  +0.250000  {tmp_path}/step-10\n" in printed
    files = {"config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"}
    assert {path.name for path in out.iterdir()} == files | {FILE}
    assert (out / "tokenizer.model").read_bytes() == bytes(range(256))
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    with safe_open(out / FILE, "pt") as file:
        origin = json.loads(file.metadata()["merged"])
    assert [each["weight"] for each in origin["checkpoints"]] == [0.75, 0.25]
    assert origin["versions"]["torch"] == torch.__version__
    assert cli.main([*arguments, "--last", "1", "--dtype", "fp32", "--max-shard-size", "300"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    found = written(out)
    assert all(torch.equal(found[k].double(), v.double()) for k, v in state.items())
    assert cli.main([*arguments, "--last", "3"]) == 2
    config["quantization_config"] = {"quant_method": "x"}
    (tmp_path / "step-10" / "config.json").write_text(json.dumps(config))
    assert cli.main(arguments) == 1
    assert "quantization_config" in capsys.readouterr().err


def test_libraries_read_the_result_in_a_fresh_process(tmp_path: Path):
    """As `from_pretrained` and `PeftModel` read an export; of directories and torch's files."""
    for name in ("gpt2", "bert", "unet", "dit", "lora"):
        model = build(name)
        states: list[State] = []
        for i in range(3):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(tmp_path / "runs" / f"{name}-{i}")
            states.append(written(tmp_path / "runs" / f"{name}-{i}"))
        paths = [tmp_path / "runs" / f"{name}-{i}" for i in range(3)]
        if name != "lora":  # with the tied head, which the files above leave out
            paths[1] = write_dcp(tmp_path / "runs" / f"{name}-dcp", {"model": model.state_dict()})
            states[1] = states[2]
        for dtype in (torch.float32, torch.bfloat16):
            out = tmp_path / "out" / f"{name}-{str(dtype).removeprefix('torch.')}"
            merge(paths, out, weights=[0.5, 0.3, 0.2], dtype=dtype, max_shard_size="2KB")
            wanted = {
                key: torch.from_numpy(value).to(dtype)
                for key, value in numpy_sum(states, [0.5, 0.3, 0.2]).items()
            }
            found = written(out)
            assert found.keys() == wanted.keys(), name
            torch.testing.assert_close(found, wanted, atol=0, rtol=torch.finfo(dtype).eps)
            loaded = {k: v.clone() for k, v in found.items()}
            if name == "gpt2":
                loaded["lm_head.weight"] = found["transformer.wte.weight"].clone()
            if name == "lora":
                loaded = {adapter_name(key): value for key, value in loaded.items()}
            save_file(loaded, out.with_suffix(".wanted"))
    command = [sys.executable, "-m", "tests.read_exports", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("10 exports are good\n")


def adapter_name(key: str) -> str:
    for part in ("lora_A", "lora_B"):
        key = key.replace(f"{part}.weight", f"{part}.default.weight")
    return key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


# What does not fit.


def test_tied_weights_that_some_leave_out(tmp_path: Path):
    shared = [torch.randn(13, 6) for _ in range(3)]
    other = [torch.randn(13, 6) for _ in range(3)]
    states = [{"emb": s, "head": s.clone(), "w": o} for s, o in zip(shared, other, strict=True)]
    paths = [write_plain(tmp_path / "0", {"emb": shared[0], "w": other[0]})]
    paths += [write_plain(tmp_path / f"{i}", states[i]) for i in (1, 2)]
    merge(paths, tmp_path / "out")
    found = written(tmp_path / "out")
    assert found.keys() == {"emb", "w"}
    assert_close(found, numpy_sum([{"emb": s, "w": o} for s, o in zip(shared, other, strict=True)],
                                  [1 / 3] * 3))  # fmt: skip
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        assert file.metadata()["head"] == "emb"
    merge([paths[0]], tmp_path / "out", base=paths[1])  # nor is a tied one taken from the base
    assert written(tmp_path / "out").keys() == {"emb", "w"}
    merge(paths, tmp_path / "out", base=write_plain(tmp_path / "base", states[2]))
    assert written(tmp_path / "out").keys() == {"emb", "w"}
    states[2]["head"][3, 3] += 1
    write_plain(tmp_path / "2.safetensors", states[2])
    with pytest.raises(CheckpointError, match=r"0: head is missing, .*1 has it"):
        merge([*paths[:2], tmp_path / "2.safetensors"], tmp_path / "out")
    merge([paths[1], tmp_path / "2.safetensors"], tmp_path / "out")  # untied in one
    assert_close(written(tmp_path / "out"), numpy_sum(states[1:], [0.5, 0.5]))


def test_tensors_of_an_optimizer_are_not_those_of_a_model(tmp_path: Path):
    """Whose names have no level of their own in a `torch.distributed.checkpoint`."""
    model = {
        "model.w": torch.randn(3),
        "ema.b": torch.randn(2),
        "head.optim.state.c": torch.ones(1),
    }
    state = {f"optimizer.state.{fqn}.exp_avg": t + 1 for fqn, t in model.items()}
    paths = [write_dcp(tmp_path / "flat", {**model, **state})]
    merge(paths, tmp_path / "out")
    assert_close(written(tmp_path / "out"), model)
    nested = write_dcp(tmp_path / "nested", {"model": {"w": model["model.w"]}, "model_2": {"v": 1}})
    for prefix in ("model", "model."):
        merge([nested], tmp_path / "out", prefix=prefix)
        assert_close(written(tmp_path / "out"), {"w": model["model.w"]})
    with pytest.raises(CheckpointError, match=r"prefix 'modal', but \['model\.w'\]"):
        merge([nested], tmp_path / "out", prefix="modal")


def test_ties_of_an_average(tmp_path: Path):
    states = [full(TENSORS, seed) for seed in range(2)]
    group = Group.alone()
    parts = parts_of("flat", TENSORS, states[0], group)
    save(tmp_path / "0", {"a": parts, "b": parts}, TENSORS, state_of("ab"), group)
    head = torch.randn(13, 6)
    write_plain(tmp_path / "1", states[1])
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out", name="b")
    assert_close(written(tmp_path / "out"), numpy_sum(states, [0.5, 0.5]))
    write_plain(tmp_path / "2", states[1] | {"head.weight": head})
    merge([tmp_path / "0", tmp_path / "2"], tmp_path / "out", name="a")
    states[0]["head.weight"], states[1]["head.weight"] = states[0]["emb.weight"], head
    assert_close(written(tmp_path / "out"), numpy_sum(states, [0.5, 0.5]))
    with pytest.raises(ValueError, match="several averages"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "out")


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path):
    good = random_state(0)
    first = write_plain(tmp_path / "first", good)
    base = write_plain(tmp_path / "base", random_state(7))
    (tmp_path / "out").mkdir()
    merge([first], tmp_path / "out")
    before = contents(tmp_path / "out")

    def refused(path: Path, match: str, kind: type[Exception] = CheckpointError, **options: Any):
        with pytest.raises(kind, match=match) as caught:
            merge([first, path], tmp_path / "out", **options)
        assert contents(tmp_path / "out") == before
        assert cli.main(["merge", str(tmp_path / "out"), str(first), str(path)]) in (1, 2)
        assert contents(tmp_path / "out") == before
        return str(caught.value)

    fewer = {k: v for k, v in good.items() if k not in ("cube", "bias")}
    path = write_plain(tmp_path / "fewer", fewer)
    assert "bias is missing" in refused(path, "cube is missing.*--base")
    merge([first, path], tmp_path / "filled", base=base)
    wanted = numpy_sum([good, fewer | {k: random_state(7)[k] for k in ("cube", "bias")}], [0.5] * 2)
    assert_close(written(tmp_path / "filled"), wanted)
    path = write_plain(tmp_path / "more", good | {"extra": torch.zeros(2), "x2": torch.zeros(1)})
    assert "x2" in refused(path, r"first: extra is missing, .*more has it")
    path = write_plain(tmp_path / "shape", good | {"cube": torch.zeros(3, 2, 6)})
    reason = refused(path, r"shape: cube has shape \(3, 2, 6\), in .*first it has \(3, 2, 5\)")
    assert "--base" not in reason
    path = write_plain(tmp_path / "kind", good | {"cube": torch.zeros(3, 2, 5).int()})
    refused(path, r"cube is of torch.int32, in .* of torch.float32")
    path = write_plain(tmp_path / "fp8", good | {"cube": good["cube"].to(torch.float8_e4m3fn)})
    refused(path, "cube is quantized")
    for value in (math.nan, math.inf):
        broken = good | {"cube": good["cube"].index_fill(0, torch.tensor(1), value)}
        refused(write_plain(tmp_path / f"{value}", broken), "NaN or Inf.* cube;", ValueError)
    path = write_plain(tmp_path / "short", good)
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-3])
    refused(path, r"short/model.safetensors: is no safetensors file, or cut short")
    path = write_dcp(tmp_path / "dcp", good)
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-3])
    refused(path, "it is cut short")
    refused(first, "is the same checkpoint as", ValueError)
    refused(first / FILE, "is the same checkpoint as", ValueError)
    with pytest.raises(ValueError, match="dtype is 'int64', wanted a floating one"):
        merge([first, base], tmp_path / "out", dtype=torch.int64)
    os.symlink(first, tmp_path / "again")
    refused(tmp_path / "again", "is the same checkpoint as", ValueError)
    refused(tmp_path / "out", "would be written over", ValueError)
    refused(tmp_path / "absent", "No such file")
    (tmp_path / "zero").mkdir()
    torch.save({}, tmp_path / "zero" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refused(tmp_path / "zero", r"zero_to_fp32\.py")
    refused(tmp_path / "zero" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "pickle")
    writer = dcp.FileSystemWriter(
        tmp_path / "st", serialization_format=dcp.filesystem.SerializationFormat.SAFETENSORS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"cube": good["cube"]}}, storage_writer=writer, no_dist=True)
    refused(tmp_path / "st", r"SerializationFormat\.SAFETENSORS is not read")
    refused(write_dcp(tmp_path / "ab", {"a": good, "b": good}), "does not show .*pass prefix")
    refused(write_dcp(tmp_path / "t", {"model": {"cube": good["cube"].mT}}), "row-major")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_an_average_without_frozen_weights_takes_them_from_the_base(tmp_path: Path):
    torch.manual_seed(0)
    states: list[State] = []
    for i in range(2):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        model[0].bias.requires_grad_(False)
        ShardedEMA(model).save(tmp_path / f"{i}")
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    paths = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(CheckpointError, match=r"0\.bias is missing; 1\.running_mean is .*--base"):
        merge(paths, tmp_path / "out")
    write_plain(tmp_path / "base", states[0] | {"unknown": torch.zeros(1)})
    merge(paths, tmp_path / "out", base=tmp_path / "base")
    wanted = numpy_sum(states, [0.5, 0.5])
    for name in ("0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"):
        wanted[name] = states[0][name].double().numpy()
    assert_close(written(tmp_path / "out"), wanted)


# Malice.


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_nothing_in_a_pickle_is_executed(tmp_path: Path):
    path, marker = write_dcp(tmp_path / "a", {"w": torch.ones(3)}), tmp_path / "marker"
    good = pickle.loads((path / ".metadata").read_bytes())
    forged = [pickle.dumps(Hostile(marker), 4), pickle.dumps([Hostile(marker)], 0)]
    for place in ("planner_data", "storage_meta", "storage_data", "state_dict_metadata"):
        value = getattr(good, place)
        hostile = {**value, "x": Hostile(marker)} if isinstance(value, dict) else Hostile(marker)
        forged.append(pickle.dumps(dataclasses.replace(good, **{place: hostile}), 4))
    calls = [
        f"{module}\n{name}\n(Vx\ntR."
        for module in ("__builtin__", "builtins")
        for name in ("eval", "getattr", "__import__", "exec")
    ]
    calls += [f"posix\nsystem\n(Vtouch {marker}\ntR.", f"io\nopen\n(V{marker}\nVw\ntR."]
    calls += [f"torch\nload\n(V{marker}\ntR."]
    forged += [b"\x80\x04c" + call.encode() for call in calls]
    for data in forged:
        (path / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match="none of the classes"):
            Checkpoint(path)
        assert cli.main(["merge", str(tmp_path / "out"), str(path)]) == 1
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a"]
    (path / ".metadata").write_bytes(pickle.dumps(good))
    slices = next(path.glob("*.distcp"))
    torch.save(Hostile(marker), slices)
    size = slices.stat().st_size
    for info in good.storage_data.values():
        info.offset, info.length = 0, size
    (path / ".metadata").write_bytes(pickle.dumps(good))
    with pytest.raises(CheckpointError, match=r"posix\.system.* none of the classes"):
        Checkpoint(path)
    assert not marker.exists()


def altered(data: bytes, rng: random.Random) -> bytes:
    """Bytes of which a few are changed, removed, doubled or moved."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(data)), rng.choice((1, 1, 4, 8, 64))
        part = {
            0: bytes(rng.randrange(256) for _ in range(n)),
            1: b"",
            2: data[at : at + n] * 2,
            3: rng.choice((b"\0", b"\xff", b"9", b"-")) * n,
        }[rng.randrange(4)]
        data = data[:at] + part + data[at + n :]
    return data


@pytest.mark.parametrize("format", ["plain", "index", "metadata", "slices", "manifest"])
def test_forged_files_are_refused_or_harmless(format: str, tmp_path: Path, capsys):
    state = random_state(0)
    path, pattern = tmp_path / "a", "*"
    if format in ("plain", "index"):
        write_plain(path, state, files=1 if format == "plain" else 2)
        pattern = FILE if format == "plain" else "*.index.json"
    elif format == "manifest":
        group = Group.alone()
        save(path, {"a": parts_of("rows", TENSORS, full(TENSORS), group)}, TENSORS,
             state_of("a"), group)  # fmt: skip
        pattern = "manifest.json"
    else:
        write_dcp(path, {"model": state, "optimizer": {"x": torch.ones(3)}})
        pattern = ".metadata" if format == "metadata" else "*.distcp"
    (file,) = path.glob(pattern)
    good, rng, refusals = file.read_bytes(), random.Random(1), 0
    header = int.from_bytes(good[:8], "little") + 8 if format == "plain" else len(good)
    for _ in range(20 * NUM_FORGED):
        data = altered(good[:header], rng) + good[header:]
        if format == "manifest":  # with a good checksum
            try:
                body = json.loads(data.split(b"\n", 1)[1])
                manifest = parse(good)
                manifest.state.update(body["state"])  # type: ignore[attr-defined]
                data = dump(manifest) if rng.random() < 0.5 else data
            except (ValueError, LookupError, TypeError):
                pass
        file.write_bytes(data)
        status = cli.main(["merge", str(tmp_path / "out"), str(path)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        entries = sorted(entry.name for entry in tmp_path.iterdir())
        if status:
            assert printed.err.startswith("dist-ema: ") and len(printed.err) < 4000
            assert entries == ["a"], (status, printed.err)
            refusals += 1
        else:
            assert entries == ["a", "out"]
            for each in (tmp_path / "out").iterdir():
                each.unlink()
            (tmp_path / "out").rmdir()
        if refusals == NUM_FORGED:
            break
    assert refusals == NUM_FORGED


# In training.


def window(start: int, stop: int) -> Callable[[int, int], float]:
    """A schedule: the mean of the weights after steps start + 1 to stop, kept from there on."""
    mean = EqualWeight()
    return lambda t, delta: 0.0 if t <= start else 1.0 if t > stop else mean(t - start, delta)


def test_means_over_windows_need_no_files(tmp_path: Path):
    """As OLMo-core's ModelMergeCallback: several windows at once, resumed within them."""
    torch.manual_seed(0)
    windows = {"a": (2, 7), "b": (5, 9), "c": (0, 10)}
    model = nn.Linear(3, 2)
    weights: list[np.ndarray] = []

    def build() -> ShardedEMA:
        return ShardedEMA(model, {name: window(*ends) for name, ends in windows.items()})

    ema = build()
    for step in range(1, 13):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        weights.append(model.weight.detach().double().numpy().copy())
        ema.update()
        if step == 6:
            ema.save(tmp_path / "ema")
            ema = build()
            ema.load(tmp_path / "ema")
    for name, (start, stop) in windows.items():
        mean = np.mean(weights[start:stop], axis=0)
        found = ema.gather_state_dict(name)["weight"]
        np.testing.assert_allclose(found.double().numpy(), mean, rtol=1e-6, atol=1e-6)
