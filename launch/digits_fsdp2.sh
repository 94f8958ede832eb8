#!/usr/bin/env bash
# The digits example with FSDP2 on two CPU processes, without accelerate; results in
# runs/digits-fsdp2. Needs Python 3.10 or newer; the first run makes .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup accelerate diffusers examples

export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
exec .venv/bin/torchrun --standalone --nproc_per_node 2 \
    examples/digits_diffusion.py --fsdp2 --out runs/digits-fsdp2 "$@"
