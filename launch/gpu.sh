#!/usr/bin/env bash
# Run what needs a GPU, on a machine with one, in parts of less than 10 minutes each:
#     bash launch/gpu.sh                  all parts
#     bash launch/gpu.sh tests            tests/test_gpu.py: fences, memory, precision, engines, files
#     bash launch/gpu.sh bench            update and swap, with the share of the memory's bandwidth
#     bash launch/gpu.sh trace            does an update hide behind the next forward pass?
#     bash launch/gpu.sh --dry-run        the same code on the CPU, in small; nothing is kept
# Results go to tests/benchmarks/results/DEVICE, or to $OUT.
#
# Takes the system's python3 with torch (2.8 or newer) and pytest, installs nothing into it and asks
# no registry. What is missing (safetensors, xxhash; deepspeed, without which its rows are left out) is
# unpacked from the wheels in the folder $WHEELS, ./wheels by default, to ./build. On a machine with
# a registry:
#     pip wheel --no-deps -w wheels safetensors xxhash
#     DS_BUILD_OPS=0 pip wheel --no-deps --no-build-isolation -w wheels deepspeed einops hjson msgpack
#         ninja py-cpuinfo psutil pydantic pydantic-core annotated-types typing-inspection tqdm
#
#   PYTHON   the interpreter (python3)
#   DEVICE   cpu: as --dry-run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} wheels=${WHEELS:-wheels} device=${DEVICE:-} parts=()
for argument in "$@"; do
    case $argument in
        --dry-run) device=cpu ;;
        tests | bench | trace) parts+=("$argument") ;;
        *) echo "$argument is none of tests, bench, trace, --dry-run" >&2; exit 2 ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || parts=(tests bench trace)

packages=$PWD/build/gpu-packages
export PYTHONPATH=$PWD:$packages${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
if compgen -G "$wheels/*.whl" > /dev/null; then
    # Those that the interpreter lacks, so that its own torch and numpy stay the ones that count.
    "$python" - "$wheels" "$packages" <<'PYTHON'
import pathlib, sys, zipfile
from importlib import metadata

wheels, packages = map(pathlib.Path, sys.argv[1:])
for wheel in sorted(wheels.glob("*.whl")):
    name = wheel.name.split("-")[0]
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        print(f"unpacking {wheel.name}", file=sys.stderr)
        zipfile.ZipFile(wheel).extractall(packages)
PYTHON
fi
"$python" - <<'PYTHON'
import importlib.util, sys

needed = "torch", "numpy", "pytest", "safetensors", "xxhash"
lacking = [name for name in needed if not importlib.util.find_spec(name)]
if lacking:
    sys.exit(f"{sys.executable} lacks {', '.join(lacking)}: put wheels into the folder $WHEELS")
PYTHON
if [ "$device" != cpu ]; then
    device=$("$python" -c 'import torch
print(torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "")')
    [ -n "$device" ] || { echo "no GPU: $python sees none; --dry-run takes the CPU" >&2; exit 1; }
fi

if [ "$device" = cpu ]; then
    marks="not gpu" sizes=(--check)
    out=${OUT:-$(mktemp -d)}
    [ -n "${OUT:-}" ] || trap 'rm -rf "$out"' EXIT
else
    marks=gpu sizes=()
    out=${OUT:-$("$python" -c "from tests.benchmarks import report
print(report.directory_for('$device'))")}
fi
mkdir -p "$out"

status=0
for part in "${parts[@]}"; do
    echo "== $part on $device, results in $out" >&2
    case $part in
        tests) run=("$python" -m pytest -p no:cacheprovider -m "$marks" -rs --durations=10
                    --tb=short tests/test_gpu.py) ;;
        bench) run=("$python" -m tests.benchmarks update swap --device "$device" --out "$out"
                    "${sizes[@]}") ;;
        trace) run=("$python" -m tests.benchmarks trace --device "$device" --out "$out"
                    "${sizes[@]}") ;;
    esac
    timeout 590 "${run[@]}" 2>&1 | tee "$out/$part.txt" || status=$?
done
exit $status
