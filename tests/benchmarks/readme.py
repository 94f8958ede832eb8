"""Writes results into `README.md` and into the page of the benchmarks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.report import Row

BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->"
PAGE = Path("tests/benchmarks/README.md")
ENGINES = {
    "plain": "one process",
    "ddp": "DDP",
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
SUITES = ("update", "peers", "ranks", "swap", "scale")
FILES = ("save", "load", "gather_state_dict", "export rank0", "export direct")

Tables = Mapping[str, list[Row]]


def write(results: Path, root: Path) -> None:
    """Write the results into the two pages of a folder: `README.md` and `PAGE`."""
    found = read(results)
    about = report.about(results, "update")
    backend = "NCCL" if about["device"] == "cuda" else "gloo"
    where = f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, {backend}"
    _put(root / "README.md", summary(found, where))
    _put(root / PAGE, tables(found, where))


def read(results: Path) -> Tables:
    """The tables of all suites as "suite/table"."""
    found: dict[str, list[Row]] = {}
    for suite in SUITES:
        read = report.read(results, suite)
        if read is None:
            raise SystemExit(f"{results}: no {suite}.json; run bash launch/bench.sh {suite}")
        found |= {f"{suite}/{name}": rows for name, rows in read.items()}
    return found


def _put(page: Path, text: str) -> None:
    """Replace what is between the two marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def summary(found: Tables, where: str) -> str:
    """One small table: of each engine, what an update costs."""
    largest = {row["engine"]: row for row in reversed(found["update/update"])}
    most = {row["engine"]: row for row in found["ranks/ranks"]}  # on most ranks: the last rows
    lines = [
        [
            name,
            largest.get(engine, {}).get("update/floor", "not measured"),
            *(most[engine][column] for column in ("bytes", "time")),
        ]
        for engine, name in ENGINES.items()
    ]
    parts = [
        _text(
            f"On {where}. *Update*: time of an update, all ranks at once, divided by that of "
            "`torch._foreach_lerp_` on the same bytes. *Bytes* and *time*: of the average and its "
            "update on each of four ranks, divided by those of one process."
        ),
        _table(["engine", "update", "bytes", "time"], lines),
        "![Time of an update of each library](examples/bench-peers.png)",
    ]
    return "\n\n".join(parts) + "\n"


def tables(found: Tables, where: str) -> str:
    """All that is measured."""
    parts = [
        f"Machine: {where}.",
        "## Update",
        _text(
            "Time of an update over `torch._foreach_lerp_` of the rank's weights and clones of "
            "them, all ranks at once. For bf16 weights the reference reads and writes the same "
            "number of bytes in fp32 tensors. *hot / cold*: one call after the other, and after a "
            "matrix product and a pause, as in a training step."
        ),
        _update(found["update/update"]),
        _text(
            "*Compiled*: time of one pass from bf16 that `torch.compile` makes, over the same "
            "reference. *Two averages*: time of an update of two averages over one. Both in one "
            "process."
        ),
        _variants(found["update/update"]),
        "## Other libraries",
        "Time of an update of another library over an update of `dist_ema`, in one process:",
        _peers(found["peers/plain"]),
        "The same on FSDP2 with two ranks:",
        _peers([row for row in found["peers/engines"] if row["engine"] == "fsdp2"]),
        "![Time of an update of each library](../../examples/bench-peers.png)",
        "## More ranks",
        _text(
            "Bytes of the average and time of an update on each of four ranks, over one fp32 copy "
            "of the model and `torch._foreach_lerp_` of it in one process:"
        ),
        _group(found["ranks/ranks"]),
        "![Bytes and time of an update on 1, 2 and 4 ranks](../../examples/bench-ranks.png)",
        "## Swap",
        _text(
            "Time to enter and to leave `average_parameters()` with 1 GB of fp32 weights, over a "
            "copy of what the rank averages. *MB*: resident memory in the block beyond the memory "
            "before. *First*: the same in the first block, which includes what libraries set up "
            "once. Where ranks share the weights, also over an all-gather of as many bytes: by "
            "torch's operator, and as messages between the ranks, both as *in / out*."
        ),
        _swap(found["swap/swap"]),
        "## Files",
        _text(
            "Time over a plain write and sync of the same bytes (268 MB), by one process or by all "
            "ranks at once, whichever is faster:"
        ),
        _files(found["swap/files"]),
        "## 1,024 ranks, simulated",
        _text(
            "A model of 70.6 billion parameters. One rank runs `ShardedEMA(model)` on one core; "
            "the network is not counted."
        ),
        _scale(found["scale/construction"]),
    ]
    return "\n\n".join(parts) + "\n"


def _text(words: str) -> str:
    return textwrap.fill(words, 100, break_on_hyphens=False)


def _update(rows: Sequence[Row]) -> str:
    engines, lines = _kinds(rows, "engine"), []
    for kind in _kinds(rows, "weights"):
        by = {row["engine"]: row for row in rows if row["weights"] == kind}
        lines.append(
            [kind, *(_hot_and_cold(by.get(engine, {}), "update/floor") for engine in engines)]
        )
    return _table(["weights of a rank", *(ENGINES[engine] for engine in engines)], lines)


def _variants(rows: Sequence[Row]) -> str:
    plain = [row for row in rows if row["engine"] == "plain"]
    lines = [[row["weights"], _hot_and_cold(row, "compiled"), row["two"]] for row in plain]
    return _table(["weights", "compiled", "two averages"], lines)


def _peers(rows: Sequence[Row]) -> str:
    kinds = _kinds(rows, "weights")
    others = [way for way in _kinds(rows, "way") if way != "dist_ema"]
    lines = [[way, *(_beside(rows, way, kind) for kind in kinds)] for way in others]
    return _table(["library", *kinds], lines)


def _beside(rows: Iterable[Row], way: str, kind: str) -> Any:
    row = next((row for row in rows if row["way"] == way and row["weights"] == kind), {})
    if row.get("fails with"):
        return "fails: " + textwrap.shorten(row["fails with"], 40, placeholder=" ...")
    return _hot_and_cold(row, "over dist_ema")


def _hot_and_cold(row: Row, column: str) -> str:
    """Both figures; the hot one alone where the results have no other."""
    return _pair(row, column, f"{column} cold")


def _pair(row: Row, *columns: str) -> str:
    return " / ".join(_shown(row[column]) for column in columns if column in row)


def _group(rows: Sequence[Row]) -> str:
    lines = [[ENGINES[r["engine"]], r["bytes"], r["time"]] for r in rows if r["ranks"] == 4]
    return _table(["engine", "bytes", "time"], lines)


def _swap(rows: Sequence[Row]) -> str:
    columns = {"ranks": "ranks", "in/copy": "in", "out/copy": "out"}
    columns |= {"extra MB": "MB", "extra MB, first": "first"}
    fp32 = [row for row in rows if "bf16" not in row["weights"]]
    lines = [
        [
            ENGINES[row["engine"]],
            *(row[column] for column in columns),
            *(_pair(row, f"in/{way}", f"out/{way}") for way in ("all-gather", "messages")),
        ]
        for row in fp32
    ]
    return _table(["engine", *columns.values(), "over all-gather", "over messages"], lines)


def _files(rows: Sequence[Row]) -> str:
    lines = []
    for engine in _kinds(rows, "engine"):
        by = {row["what"]: row for row in rows if row["engine"] == engine}
        times = [by[what].get("over write") for what in FILES]
        lines.append([ENGINES[engine], by["save"]["ranks"], *times])
    return _table(["engine", "ranks", "save", "load", "gather", "rank0", "direct"], lines)


def _scale(rows: Sequence[Row]) -> str:
    columns = ["mesh", "rank", "seconds", "plan MB", "sent MB", "received MB"]
    return _table(columns, [[row[c] for c in columns] for row in rows])


def _kinds(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _table(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    return report.grid(columns, (map(_shown, line) for line in lines))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return "" if value is None else str(value)
