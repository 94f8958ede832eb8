"""The command line, `dist-ema` or `python -m dist_ema`: checkpoints without a model or ranks.

`inspect`, `verify` and `--help` import no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_ema.checkpoint import reader
from dist_ema.checkpoint.manifest import SavedAverage
from dist_ema.checkpoint.reader import Checkpoint
from dist_ema.core.environment import describe, environment
from dist_ema.core.errors import CheckpointError

_COLUMNS = 80
_EXIT_CODES = """
exit codes:
  0  success
  1  a checkpoint is damaged, does not fit, or cannot be read or written
  2  invalid arguments"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _warn(str(message))
            status = run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _warn("interrupted")
        return 130
    except (CheckpointError, OSError) as error:
        _warn(str(error))
        return 1
    except ValueError as error:  # an argument is out of range
        _warn(str(error))
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-ema",
        description="Checkpoints of averaged weights. For a command: dist-ema COMMAND --help",
        epilog="""examples:
  dist-ema inspect run/ema-001000
  dist-ema export run/ema-001000 out --dtype bf16
"""
        + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int], name: str, summary: str, *examples: str
    ) -> argparse.ArgumentParser:
        listed = "".join(f"  dist-ema {name} {example}\n" for example in examples)
        added = commands.add_parser(
            name,
            help=summary.partition(".")[0].lower(),
            description=summary,
            epilog=f"examples:\n{listed}{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="write JSON, for programs")
        added.set_defaults(run=run)
        return added

    add = command(
        _inspect, "inspect", "Show what a checkpoint holds.", "run/ema-001000", "out --json"
    ).add_argument
    add("path", type=Path, help="a checkpoint, or plain safetensors")

    add = command(
        _verify, "verify", "Read a checkpoint and compare every checksum.", "run/ema-001000"
    ).add_argument
    add("path", type=Path, help="a checkpoint")

    add = command(
        _export,
        "export",
        "Write a consolidated checkpoint.\nPlain safetensors in the layout of the model's library, "
        "for from_pretrained.",
        "run/ema-001000 out --dtype bf16",
        "run/ema-001000 out --base pretrained --max-shard-size 2GB",
    ).add_argument
    add("path", type=Path, help="a checkpoint")
    add("out", type=Path, help="directory to be written; older files of an export are replaced")
    add("--name", help="the average, where there are several")
    add("--dtype", help="of floating tensors: fp32, bf16, fp16, ...; else fp32")
    add("--max-shard-size", default="5GB", help="of a file (default: 5GB)")
    add("--weights-name", help="of the weights file; else the library's own")
    base = "of a model: frozen weights and buffers; its config.json if the checkpoint has none"
    add("--base", type=Path, metavar="DIR", help=base)

    parsed = command(
        _synthesize,
        "synthesize",
        "Make power-function averages of other widths.\nFrom checkpoints of one run that hold "
        "averages of some widths, usually two\n(arXiv 2312.02696).",
        "run/ema-* --sigma-rel 0.07 --out run/ema-0.07",
        "run/ema-* --sweep 0.05:0.25:0.05 --out swept --plot a.png",
    )
    add, width = parsed.add_argument, parsed.add_mutually_exclusive_group(required=True)
    add("paths", type=Path, nargs="+", help="checkpoints of the run", metavar="PATH")
    add("--out", type=Path, required=True, help="checkpoint to be written")
    width.add_argument("--gamma", type=float, metavar="G", help="exponent of the profile")
    deviation = "relative standard deviation of the profile"
    width.add_argument("--sigma-rel", type=float, metavar="S", help=deviation)
    sweep = "several sigma_rel, each written to sigma_rel-S in the directory --out"
    width.add_argument("--sweep", metavar="FROM:TO:BY", help=sweep)
    add("--step", type=int, help="at which they are wanted; the last if left out")
    add("--plot", type=Path, metavar="FILE", help="plot the profiles (needs matplotlib)")

    add = command(
        _merge,
        "merge",
        "Average checkpoints.\nOf ShardedEMA, safetensors and torch.distributed.checkpoint, in any "
        "mixture;\nwritten in the layout of the model's library, for from_pretrained.",
        "out run/checkpoint-*",
        "out run/checkpoint-* --last 10 --weights 1-sqrt --dtype bf16",
    ).add_argument
    add("out", type=Path, help="directory to be written")
    add("paths", nargs="+", metavar="PATH", help="checkpoints, oldest first (sorted by number)")
    weights = "uniform, linear, 1-sqrt, cosine, ema:DECAY, or as --weights=-0.2,0.5,0.7"
    add("--weights", default="uniform", metavar="W", help=weights)
    add("--normalize", action="store_true", help="divide weights by their sum")
    add("--last", type=int, metavar="K", help="average the last K only")
    add("--dtype", help="of floating tensors: fp32, bf16, ...; else their own")
    add("--max-shard-size", default="5GB", help="of a file (default: 5GB)")
    add("--name", help="the average, in checkpoints that hold several")
    add("--prefix", help="of the model's names in checkpoints of torch")
    add("--base", type=Path, metavar="DIR", help="a checkpoint that has what the others lack")
    add("--plot", type=Path, metavar="FILE", help="plot the weights (needs matplotlib)")

    command(
        _env, "env", "Show versions, engines and devices.\nWhat an issue report needs.", "--json"
    )
    return parser


# inspect


def _inspect(options: argparse.Namespace) -> int:
    with Checkpoint(options.path) as checkpoint:
        summary, inside = _summary(checkpoint), checkpoint.averages_inside()
    if inside:
        _warn(f"{options.path}: its own weights are shown, but {inside}")
    if options.json:
        return _write_json(summary)
    written = summary["written"]
    _say(f"{summary['path']}: {_size(summary['nbytes'])} in {summary['num_files']} files")
    if written:
        _say(f"written by {written.get('world_size')} ranks, {written.get('time')}")
        _say(f"dist_ema {written.get('dist_ema')}, torch {written.get('torch')}")
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
            ("tensor", "shape", "dtype", "parts", "size"),
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
    """Aligned columns: the first three to the left, numbers to the right. A name that would make
    lines too long has a line of its own."""
    printable = [head, *(tuple(map(_printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*printable, strict=True)]
    room = _COLUMNS - sum(widths[1:]) - 2 * len(widths)
    widths[0] = max([len(row[0]) for row in printable if len(row[0]) <= room] or [0])
    for name, *cells in printable:
        if len(name) > widths[0]:
            _say(f"  {name}")
            name = ""
        left = [cell.ljust(width) for cell, width in zip((name, *cells[:2]), widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[3:], strict=True)]
        _say(f"  {'  '.join([*left, *right])}".rstrip())


# verify


def _verify(options: argparse.Namespace) -> int:
    with Checkpoint(options.path) as checkpoint:
        manifest = checkpoint.manifest
        if not manifest.algorithm:
            inside = checkpoint.averages_inside()
            raise CheckpointError(
                f"{options.path}: has no manifest.json, so there are no checksums to compare"
                + f"; {inside}" * bool(inside)
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
    summary = {
        "path": str(checkpoint.directory),
        "problems": problems,
        "num_boxes": len(boxes),
        "nbytes": nbytes,
        "checksum": manifest.algorithm,
    }
    if options.json:
        _write_json(summary)
        return 1 if problems else 0
    for problem in problems:
        _say(problem)
    if problems:
        _say(f"{checkpoint.directory}: damaged, {len(problems)} problems")
        return 1
    _say(f"{checkpoint.directory}: good; {len(boxes)} parts, {_size(nbytes)}, {manifest.algorithm}")
    return 0


# Commands that write. Their modules import torch.


def _export(options: argparse.Namespace) -> int:
    from dist_ema.export import offline

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
    if options.json:
        return _write_json({"path": str(options.out), **result})
    _say(
        f"{options.out}: {_size(result['nbytes'])} in the layout of {result['library']}, "
        f"{', '.join(result['files'])}"
    )
    return 0


def _synthesize(options: argparse.Namespace) -> int:
    from dist_ema.posthoc import synthesize as posthoc
    from dist_ema.posthoc.plots import Plot

    plot = Plot(options.plot) if options.plot else None
    wanted = posthoc.parse_widths(options.out, options.gamma, options.sigma_rel, options.sweep)
    results = posthoc.sweep(options.paths, wanted, step=options.step, progress=_progress)
    if options.json:
        _write_json([result.summary() for result in results])
    for result in results:
        if not options.json:
            _say(str(result))
        if result.problem:
            _warn(result.problem)
    if plot is not None:
        plot.profiles([(result.schedule, result.residual) for result in results])
    return 0


def _merge(options: argparse.Namespace) -> int:
    from dist_ema.posthoc import merge as posthoc
    from dist_ema.posthoc.plots import Plot

    plot = Plot(options.plot) if options.plot else None
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
    if plot is not None:
        plot.weights(result.weights)
    if options.json:
        return _write_json(dataclasses.asdict(result) | {"path": str(result.path)})
    for line in str(result).splitlines():
        _say(line)
    return 0


def _env(options: argparse.Namespace) -> int:
    if options.json:
        return _write_json(environment())
    for line in describe(environment()):
        _say(line)
    return 0


# Output.


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, if tqdm is installed."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        yield lambda nbytes: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        yield bar.update


def _write_json(value: object) -> int:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    return 0


def _warn(text: str) -> None:
    sys.stderr.write(f"dist-ema: {_printable(text)}\n")


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
