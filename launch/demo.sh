#!/usr/bin/env bash
# Train the digits example on two CPU processes with accelerate; results in runs/digits.
# Needs Python 3.10 or newer; the first run makes .venv. Arguments go to the example.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup accelerate diffusers examples

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
exec .venv/bin/accelerate launch --config_file launch/accelerate/cpu-2.yaml \
    examples/digits_diffusion.py --out runs/digits "$@"
