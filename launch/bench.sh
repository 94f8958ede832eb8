#!/usr/bin/env bash
# Run benchmarks, on the GPUs if there are any, and write tables and plots:
#     bash launch/bench.sh                      all of them, about 10 minutes on two cores
#     bash launch/bench.sh update plots     some of: update peers ranks swap scale trace memory plots readme
#     bash launch/bench.sh --check-against HEAD~5    what became slower than there, by over 15 %
# Results go to tests/benchmarks/results/DEVICE, plots to examples, tables to README.md and to
# tests/benchmarks/README.md.
# Let nothing else run meanwhile.
# Needs Python 3.10 or newer; the first run makes .venv. Further arguments: --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup dev accelerate deepspeed diffusers examples

exec .venv/bin/python -m tests.benchmarks "$@"
