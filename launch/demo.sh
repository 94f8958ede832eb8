#!/usr/bin/env bash
# What the project is for, on two CPU processes, in two minutes after the installation; results in
# runs/spirals. Needs Python 3.10 or newer; the first run makes .venv. Arguments go to the training:
#     bash launch/demo.sh --steps 30000    (a longer run; see examples/spirals_diffusion.py --help)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup accelerate diffusers examples

export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
example=(examples/spirals_diffusion.py --out runs/spirals)

echo "1. Two processes train a diffusion model under accelerate; dist_ema averages its weights. This"
echo "   takes about two minutes on two cores, and prints a line for each third of the steps."
.venv/bin/accelerate launch --config_file launch/accelerate/cpu-2.yaml "${example[@]}" "$@"

echo "2. diffusers loads the exported average in a new process."
.venv/bin/python "${example[@]}" read

echo "3. One process resumes what two have saved, and goes on for 300 steps."
.venv/bin/python "${example[@]}" resume --processes 1 --batch 256 --steps 300

echo "Done. Look at runs/spirals/spirals.png: raw weights above, averaged weights below."
