#!/usr/bin/env bash
# The training of demo.sh on two CPU processes without accelerate; results in runs/spirals-ENGINE:
#     bash launch/spirals_torchrun.sh fsdp2    (or fsdp1; further arguments go to the example)
# Needs Python 3.10 or newer; the first run makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup accelerate diffusers examples

engine=${1:-fsdp2}
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
exec .venv/bin/torchrun --standalone --nproc_per_node 2 \
    examples/spirals_diffusion.py --torch "$engine" --out "runs/spirals-$engine" "${@:2}"
