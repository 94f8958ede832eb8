"""Whether an update hides behind the forward pass that follows it: step times and a profiler trace.

A decoder-like stack of linear layers is trained with each way of updating. Device events tell the
time of a step; a trace of a few steps (chrome://tracing, perfetto.dev) tells on which stream each
kernel and copy ran, and so for how long work on side streams ran while the main stream was busy.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from dist_ema import ShardedEMA
from tests.benchmarks.launch import alone
from tests.benchmarks.measure import interleaved, medians
from tests.benchmarks.report import Row, Table
from tests.benchmarks.sizes import Sizes

WAYS: dict[str, dict[str, Any] | None] = {
    "no average": None,
    "resident": {},
    "overlap=True": {"overlap": True},
    'device="cpu"': {"device": "cpu"},
}
NOTE = """\
A training step of a stack of linear layers (bf16 autocast, fp32 weights, fused AdamW), in one
process. *Step*: median over interleaved rounds. *Added*: to the step without an average. *Main
stream*, *side streams*: time in which a kernel or copy ran there, a step. *Hidden*: the part of the
side streams' time in which the main stream was busy too. A CPU has no streams. The traces lie
beside this file."""
STEPS = 4  # that are traced
Span = tuple[float, float]  # start and end, in microseconds


def run(device: str, sizes: Sizes, directory: Path) -> list[Table]:
    directory.mkdir(parents=True, exist_ok=True)
    rows = alone(measure, device, sizes.traced, sizes.slow_rounds, directory)
    return [Table("trace", "An update behind the next forward pass", NOTE, rows)]


def measure(device: str, shape: tuple[int, int, int], rounds: int, directory: Path) -> list[Row]:
    """One row for each way; the traces go to the directory."""
    where = torch.device(device, 0) if device != "cpu" else torch.device("cpu")
    steps = {name: training_step(where, *shape, options) for name, options in WAYS.items()}
    # Many steps a sample: the end of the last update, on a side stream, is not timed.
    least_s = 0.5 if device != "cpu" else 0.0
    seconds = medians(interleaved(steps, where, rounds=rounds, least_s=least_s))
    rows = []
    for name, step in steps.items():
        path = directory / f"trace-{''.join(c for c in name if c.isalnum())}.json.gz"
        events = traced(step, where, path)
        main, side = by_stream(events)
        hidden = overlapping(side, main)
        rows.append(
            {
                "way": name,
                "step ms": seconds[name] * 1e3,
                "added ms": (seconds[name] - seconds["no average"]) * 1e3,
                "main stream ms": total(main) / 1e3 / STEPS,
                "side streams ms": total(side) / 1e3 / STEPS,
                "hidden": hidden / total(side) if side else "",
                "trace": path.name,
            }
        )
    return rows


def training_step(
    device: torch.device, width: int, depth: int, batch: int, options: dict[str, Any] | None
) -> Callable[[], None]:
    """A step, and the update that follows it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ema = None if options is None else ShardedEMA(model, **options)
    x = torch.randn(batch, width, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            with record_function("forward"):
                loss = model(x).float().square().mean()
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        if ema is not None:
            with record_function("update"):
                ema.update()

    return step


def traced(step: Callable[[], None], device: torch.device, path: Path) -> list[dict[str, Any]]:
    """The events of a few steps, which are written to a compressed file as well."""
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(getattr(ProfilerActivity, device.type.upper()))
        torch.accelerator.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(plain))
        text = plain.read_bytes()
    path.write_bytes(gzip.compress(text))
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


def by_stream(events: Iterable[dict[str, Any]]) -> tuple[list[Span], list[Span]]:
    """When the stream with the most kernels was busy, and when any other one was."""
    spans: dict[int, list[Span]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            stream = event["args"]["stream"]
            spans.setdefault(stream, []).append((event["ts"], event["ts"] + event["dur"]))
    kernels = {
        stream: sum(e.get("cat") == "kernel" and e["args"]["stream"] == stream for e in events)
        for stream in spans
    }
    main = max(kernels, key=lambda stream: kernels[stream], default=None)
    side = [span for stream, found in spans.items() if stream != main for span in found]
    return merged(spans.get(main, []) if main is not None else []), merged(side)


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same time as spans that do not overlap, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def overlapping(a: Sequence[Span], b: Sequence[Span]) -> float:
    """For how long both were busy; each is `merged`."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def total(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)
