"""What launch/versions.sh measures: the suite on several versions of torch, and the table of it.

python -m tests.versions run RESULT.json ARGUMENTS...    pytest, in the environment of one version
python -m tests.versions table RESULT.json...            the table; also to tests/versions.md
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests/versions.md"
VERSIONS = ROOT / "launch/versions.txt"
PACKAGES = (
    *("torch", "deepspeed", "accelerate", "transformers", "diffusers", "peft", "lightning"),
    "numpy",
)
COUNTS = ("passed", "failed", "skipped")
TIMEOUT_S = 5400

# Failures that are not ours: versions of torch and DeepSpeed, a pattern of the test's name and the
# text of its failure, the cause.
KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"deepspeed 0\.1[678]\.",
        r"^tests\.test_short_examples::test_deepspeed\n",
        "DeepSpeed's own: stage 3 with overlap_comm trains to NaN on the CPU, with no average too",
    ),
    (
        r"torch 2\.11\..*deepspeed 0\.18\.",
        r"Output 0 of SplitBackward0 is a view",
        "DeepSpeed's own: stages 1 and 2 gather in a way that gloo refuses, with no average too",
    ),
    (
        r"deepspeed 0\.1[678]\.",
        r"_partition_param_sec[^\0]*start out of range",
        "DeepSpeed's own: hpZ on 4 ranks cannot cut a parameter of one element in initialize()",
    ),
    (
        r"deepspeed 0\.17\.",
        r"z3_autocast[^\0]*p\.ds_id for p in params_in_bucket",
        "DeepSpeed's own: stage 3 with torch_autocast fails in training, with no swap too",
    ),
    (
        r"deepspeed 0\.18\.",
        r"engine\.py[^\n]* in offload_states\n[^\0]*Found no NVIDIA driver",
        "DeepSpeed's own: offload_states() pins memory, for which a CUDA build needs a driver",
    ),
    (
        r"deepspeed 0\.1[78]\.",
        r"has no attribute 'ds_grads_remaining'",
        "DeepSpeed's own: stage 3 trains modules_to_save of PEFT only after a pass without grad",
    ),
)


def main(command: str, *arguments: str) -> int:
    if command == "run":
        return run(Path(arguments[0]), arguments[1:])
    return table([json.loads(Path(path).read_text()) for path in arguments])


def run(path: Path, arguments: tuple[str, ...]) -> int:
    """Run pytest and write what came of it, with the versions that are installed here."""
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *arguments]
        started = time.monotonic()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=TIMEOUT_S).returncode
        except subprocess.TimeoutExpired:
            status = 124
        seconds = time.monotonic() - started
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    failures = {_name(case): _text(case) for case in cases if _text(case)}
    passed = len(cases) - len(failures)
    if status not in (0, 1):  # so that a run that came to no end is no success
        failures["pytest"] = f"Error: it ended with status {status}"
    skipped = {_name(c): str(s.get("message")) for c in cases for s in c.iter("skipped")}
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("diff", "HEAD") else ""),
        "arguments": [a for a in arguments if a != "-n2"],
        "versions": {package: _version(package) for package in PACKAGES},
        "passed": passed - len(skipped),
        "failed": len(failures),
        "skipped": len(skipped),
        "seconds": round(seconds),
        "failures": failures,
        "reasons": skipped,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    return status


def table(results: list[dict[str, Any]]) -> int:
    """Print the table; write it if it is complete. Returns 1 if a failure is ours, else 0."""
    results.sort(key=lambda r: [int(n) for n in re.findall(r"\d+", _torch(r))[:3]])
    head = [*PACKAGES, *COUNTS, "seconds", "pytest", "date (UTC)", "commit"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        cells = [*(r["versions"][p] for p in PACKAGES), *(r[c] for c in (*COUNTS, "seconds"))]
        cells += [" ".join(r["arguments"]) or "all", r["date"], r["commit"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    known, ours = [], []
    for r in results:
        for name, text in r["failures"].items():
            cause = _cause(r["versions"], f"{name}\n{text}")
            line = f"- torch {_torch(r)}, `{name}`: {cause or _last_line(text)}"
            (known if cause else ours).append(line)
    reasons: dict[str, list[str]] = {}
    for r in results:
        for reason in r["reasons"].values():
            where = reasons.setdefault(reason, [])
            if _torch(r) not in where:
                where.append(_torch(r))
    some = [
        f"- torch {', '.join(where)}: {reason}"
        for reason, where in sorted(reasons.items())
        if len(where) < len(results)
    ]
    print("\n".join(lines))
    text = [
        "# The suite on other versions",
        "",
        "Written by `bash launch/versions.sh`; CPU, gloo. `--sample K` runs at most K cases of",
        "each test function, in other worlds for other functions (`tests/conftest.py`).",
        "",
        *lines,
    ]
    for title, entries in (
        ("Failures of torch or DeepSpeed", known),
        ("Other failures", ours),
        ("Skipped on some of these versions only", some),
    ):
        text += ["", f"## {title}", "", *(entries or ["None."])]
    every = re.findall(r"^[\d.]+", VERSIONS.read_text(), re.M)
    if {_torch(r).split("+")[0] for r in results} >= set(every):
        TABLE.write_text("\n".join(text) + "\n")
    for line in known + ours:
        print(line)
    return int(bool(ours))


def _torch(result: dict[str, Any]) -> str:
    return str(result["versions"]["torch"])


def _cause(versions: dict[str, str], failure: str) -> str | None:
    """Why a failure, told by name and text, is not ours; None if it is ours."""
    here = f"torch {versions['torch']}, deepspeed {versions['deepspeed']}"
    for where, pattern, cause in KNOWN:
        if re.search(where, here) and re.search(pattern, failure):
            return cause
    return None


def _name(case: ET.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _text(case: ET.Element) -> str:
    """The failures of a case, of its body or its fixtures; empty if it has none."""
    return "\n".join(e.text or e.get("message", "?") for e in case if e.tag in ("failure", "error"))


def _last_line(text: str) -> str:
    """The first line of the last error that is told."""
    errors = re.findall(r"^(?:E +)?([\w.]*(?:Error|Exception|Failure|Interrupt)\b.*)$", text, re.M)
    return (errors or text.strip().splitlines() or ["?"])[-1][:300]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
