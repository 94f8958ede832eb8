"""The command line: checkpoints without a process group, an engine or a model.

    dist-ema inspect PATH [--json]      show what a checkpoint holds
    dist-ema verify PATH                read all of it and compare every checksum
    dist-ema export PATH OUT [--dtype bf16] [--base DIR]
                                        a consolidated checkpoint, for from_pretrained
    dist-ema synthesize PATH... --out DIR (--gamma G | --sigma-rel S | --sweep FROM:TO:BY)
                                        averages of other widths, from those kept in a run
    dist-ema merge OUT PATH... [--weights W] [--last K] [--dtype bf16] [--base DIR]
                                        a weighted average of checkpoints, for from_pretrained

Exit status: 0 for success, 1 if the checkpoint is damaged, 2 for invalid arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_ema.checkpoint import reader
from dist_ema.checkpoint.manifest import SavedAverage
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.core.errors import CheckpointError

_PROGRESS_EVERY_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        status = run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"dist-ema: {_printable(str(error))}\n")
        return 1
    except ValueError as error:  # an argument is out of range
        sys.stderr.write(f"dist-ema: {_printable(str(error))}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-ema", description="Checkpoints of averaged weights")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show what a checkpoint holds")
    inspect.add_argument("path", type=Path, help="a checkpoint, or plain safetensors")
    inspect.add_argument("--json", action="store_true", help="write JSON, for programs")
    inspect.set_defaults(run=_inspect)

    check = commands.add_parser("verify", help="read a checkpoint and compare every checksum")
    check.add_argument("path", type=Path, help="a checkpoint")
    check.set_defaults(run=_verify)

    write = commands.add_parser(
        "export",
        help="write a consolidated checkpoint",
        description="Write an average as plain safetensors in the layout of the model's library, "
        "as ShardedEMA.export does.",
    )
    write.add_argument("path", type=Path, help="a checkpoint")
    write.add_argument("out", type=Path, help="directory to be written, or replaced")
    write.add_argument("--name", help="the average, where there are several")
    write.add_argument("--dtype", help="of floating tensors: fp32, bf16, fp16, ...; else fp32")
    write.add_argument("--max-shard-size", default="5GB", help="of a file (default: 5GB)")
    write.add_argument("--weights-name", help="of the weights file; else the library's own")
    write.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="of a model: frozen weights and buffers; its config.json if the checkpoint has none",
    )
    write.set_defaults(run=_export)

    make = commands.add_parser(
        "synthesize",
        help="make power-function averages of other widths",
        description="Make the power-function average of another width from checkpoints of one run "
        "that hold averages of some widths, two as a rule (arXiv 2312.02696).",
    )
    make.add_argument("paths", type=Path, nargs="+", help="checkpoints of the run", metavar="PATH")
    make.add_argument("--out", type=Path, required=True, help="checkpoint to be written")
    width = make.add_mutually_exclusive_group(required=True)
    width.add_argument("--gamma", type=float, help="exponent of the profile")
    width.add_argument("--sigma-rel", type=float, help="its relative standard deviation")
    width.add_argument(
        "--sweep", metavar="FROM:TO:BY", help="several sigma_rel, each DIR/sigma_rel-S of --out DIR"
    )
    make.add_argument("--step", type=int, help="at which they are wanted; the last if left out")
    make.set_defaults(run=_synthesize)

    average = commands.add_parser(
        "merge",
        help="average checkpoints",
        description="Write the weighted average of checkpoints of ShardedEMA, safetensors, and "
        "torch.distributed.checkpoint, in the layout of the model's library.",
    )
    average.add_argument("out", type=Path, help="directory to be written")
    average.add_argument(
        "paths", nargs="+", metavar="PATH", help="checkpoints, oldest first; by their numbers"
    )
    average.add_argument(
        "--weights",
        default="uniform",
        metavar="W",
        help="uniform, linear, 1-sqrt, cosine, ema:DECAY, or as --weights=-0.2,0.5,0.7",
    )
    average.add_argument("--normalize", action="store_true", help="divide weights by their sum")
    average.add_argument("--last", type=int, metavar="K", help="average the last K only")
    average.add_argument("--dtype", help="of floating tensors: fp32, bf16, ...; else their own")
    average.add_argument("--max-shard-size", default="5GB", help="of a file (default: 5GB)")
    average.add_argument("--name", help="the average, in checkpoints that hold several")
    average.add_argument("--prefix", help="of the model's names in checkpoints of torch")
    average.add_argument(
        "--base", type=Path, metavar="DIR", help="a checkpoint that has what the others lack"
    )
    average.set_defaults(run=_merge)
    return parser


# inspect


def _inspect(options: argparse.Namespace) -> int:
    with Checkpoint(options.path) as checkpoint:
        summary = _summary(checkpoint)
    if options.json:
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")
        return 0
    written = summary["written"]
    _say(f"{summary['path']}: {_size(summary['nbytes'])} in {summary['num_files']} files")
    if written:
        _say(
            f"written by {written.get('world_size')} ranks, {written.get('time')}, "
            f"dist_ema {written.get('dist_ema')}, torch {written.get('torch')}"
        )
    if state := summary["state"]:
        _say(f"step {state['step']}, {state['num_updates']} updates")
    for name, average in summary["averages"].items():
        _say("")
        _say(
            f"average {name or '(without a name)'}: {len(average['tensors'])} tensors, "
            f"{average['num_elements']:,} elements, {_size(average['nbytes'])}"
        )
        if "schedule" in average:
            _say(f"schedule {_schedule(average['schedule'])}, last decay {average.get('decay')}")
        _table(
            ("tensor", "shape", "dtype", "boxes", "size"),
            [
                (
                    " = ".join([fqn, *tensor["aliases"]]),
                    " x ".join(map(str, tensor["shape"])) or "scalar",
                    tensor["dtype"],
                    str(tensor["num_boxes"]),
                    _size(tensor["nbytes"]),
                )
                for fqn, tensor in average["tensors"].items()
            ],
        )
    return 0


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest = checkpoint.manifest
    states = manifest.state.get("averages", {})
    averages = manifest.averages
    return {
        "path": str(checkpoint.directory),
        "id": manifest.id,
        "checksum": manifest.algorithm,
        "nbytes": sum(f.nbytes for a in averages.values() for f in a.files.values()),
        "num_files": sum(len(a.files) for a in averages.values()),
        "written": dict(manifest.written),
        "state": dict(manifest.state),
        "averages": {n: states.get(n, {}) | _average_summary(a) for n, a in averages.items()},
    }


def _average_summary(average: SavedAverage) -> dict[str, Any]:
    tensors = average.tensors
    return {
        "directory": average.directory,
        "num_elements": sum(s.box.numel for t in tensors.values() for s in t.boxes),
        "nbytes": sum(t.nbytes for t in tensors.values()),
        "tensors": {
            fqn: {
                "shape": list(t.shape),
                "dtype": t.dtype,
                "aliases": list(t.aliases),
                "num_boxes": len(t.boxes),
                "nbytes": t.nbytes,
            }
            for fqn, t in tensors.items()
        },
    }


def _schedule(schedule: Mapping[str, Any]) -> str:
    fields = ", ".join(f"{key}={value}" for key, value in schedule.items() if key != "kind")
    return f"{schedule.get('kind')}({fields})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Aligned columns: the first three to the left, numbers to the right."""
    printable = [head, *(tuple(map(_printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*printable, strict=True)]
    for row in printable:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        _say(f"  {'  '.join(cells)}".rstrip())


# verify


def _verify(options: argparse.Namespace) -> int:
    with Checkpoint(options.path) as checkpoint:
        manifest = checkpoint.manifest
        if not manifest.algorithm:
            raise CheckpointError(
                f"{options.path}: has no manifest.json, so there are no checksums to compare"
            )
        boxes = [
            saved
            for a in manifest.averages.values()
            for t in a.tensors.values()
            for saved in t.boxes
        ]
        nbytes = sum(saved.nbytes for saved in boxes)
        with _progress(nbytes) as advance:
            problems = list(reader.problems(checkpoint, advance))
    for problem in problems:
        _say(problem)
    if problems:
        _say(f"{checkpoint.directory}: damaged, {len(problems)} problems")
        return 1
    _say(f"{checkpoint.directory}: good; {len(boxes)} boxes, {_size(nbytes)}, {manifest.algorithm}")
    return 0


# export


def _export(options: argparse.Namespace) -> int:
    from dist_ema.export import offline  # imports torch

    result = offline.export(
        options.path,
        options.out,
        name=options.name,
        dtype=offline.dtype_named(options.dtype),
        max_shard_size=options.max_shard_size,
        weights_name=options.weights_name,
        base=options.base,
        progress=_progress,
    )
    _say(
        f"{options.out}: {_size(result['nbytes'])} in the layout of {result['library']}, "
        f"{', '.join(result['files'])}"
    )
    return 0


# synthesize


def _synthesize(options: argparse.Namespace) -> int:
    from dist_ema.posthoc import synthesize as posthoc  # imports torch

    wanted = posthoc.parse_widths(options.out, options.gamma, options.sigma_rel, options.sweep)
    results = posthoc.sweep(options.paths, wanted, step=options.step, progress=_progress)
    for result in results:
        _say(str(result))
        if result.problem:
            sys.stderr.write(f"dist-ema: {_printable(result.problem)}\n")
    return 0


# merge


def _merge(options: argparse.Namespace) -> int:
    from dist_ema.posthoc import merge as posthoc  # imports torch

    paths = posthoc.expand(options.paths, options.weights)
    if options.last is not None and not 1 <= options.last <= len(paths):
        raise ValueError(f"--last is {options.last}, wanted 1 to {len(paths)}")
    result = posthoc.merge(
        paths[-(options.last or 0) :],
        options.out,
        weights=options.weights,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        normalize=options.normalize,
        name=options.name,
        prefix=options.prefix,
        base=options.base,
        progress=_progress,
    )
    for line in str(result).splitlines():
        _say(line)
    return 0


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar of tqdm on a terminal, or a percentage where tqdm is not installed."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        done, printed = 0, 0.0

        def advance(nbytes: int) -> None:
            nonlocal done, printed
            done += nbytes
            if time.monotonic() - printed > _PROGRESS_EVERY_S:
                printed = time.monotonic()
                sys.stderr.write(f"\r{done * 100 // max(total, 1)} %")
                sys.stderr.flush()

        yield advance
        sys.stderr.write("\r")
        return
    with tqdm(total=total, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


def _say(text: str) -> None:
    sys.stdout.write(_printable(text) + "\n")


def _printable(text: str) -> str:
    """The text without control characters: names come from a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _size(nbytes: int) -> str:
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.3g} {unit}"
