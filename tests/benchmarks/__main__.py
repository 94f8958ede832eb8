"""Runs benchmarks and writes what they found.

    python -m tests.benchmarks [update] [peers] [ranks] [swap] [scale] [trace]
                               [memory] [plots] [readme]

All of them if none is named, but for `trace`, which needs a GPU, and `memory`, which takes 4 GB.
Each writes SUITE.json and SUITE.md into a folder of tests/benchmarks/results named after the
device; `plots` draws them into examples/, and `readme` writes them into README.md and
tests/benchmarks/README.md.

    python -m tests.benchmarks --check-against COMMIT_OR_update.json

prints which updates became slower by more than 15 %, and fails if any did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import against, peers, plots, readme, report, scale, swap, trace, update
from tests.benchmarks.report import Table
from tests.benchmarks.sizes import CHECK, REAL, Sizes

SUITES: dict[str, Callable[[str, Sizes], list[Table]]] = {
    "update": update.run,
    "peers": peers.run,
    "ranks": update.run_ranks,
    "swap": swap.run,
    "scale": scale.run,
}
FURTHER = {"memory": swap.run_memory}  # only if named
TRACE = "trace"
TOLD = ("plots", "readme")  # of what the suites found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "suites", nargs="*", metavar="suite", help=", ".join([*SUITES, TRACE, *FURTHER, *TOLD])
    )
    parser.add_argument("--check", action="store_true", help="sizes that only show that they run")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is any")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--plots", type=Path, default=report.ROOT / "examples")
    parser.add_argument("--readme", type=Path, default=report.ROOT, help="folder of the pages")
    parser.add_argument("--check-against", metavar="COMMIT_OR_JSON", help="slower updates")
    options = parser.parse_args(arguments)
    suites = options.suites or [*SUITES, *TOLD]
    known = [*SUITES, TRACE, *FURTHER, *TOLD]
    unknown = sorted(set(suites) - set(known))
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(known)}")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    directory = options.out or report.directory_for(device)
    sizes = CHECK if options.check else REAL
    if options.check_against:
        same = ["--device", device, *["--check"] * options.check]
        lines = against.compare(options.check_against, same)
        sys.exit("slower by more than 15 %:\n" + "\n".join(lines) if lines else 0)
    command = " ".join(["bash launch/bench.sh", *arguments])
    for suite in suites:
        if suite not in TOLD:
            about = report.environment(device)
            if suite == TRACE:
                tables = trace.run(device, sizes, directory)
            else:
                tables = (SUITES | FURTHER)[suite](device, sizes)
            report.write(directory, suite, tables, about, command)
    if "plots" in suites:
        for path in plots.draw(directory, options.plots):
            print(f"drew {path}")
    if "readme" in suites:
        readme.write(directory, options.readme)


if __name__ == "__main__":
    main(sys.argv[1:])
