#!/usr/bin/env bash
# Run the tests, two at a time. Needs Python 3.10 or newer; the first run makes .venv. Arguments go
# to pytest: `-n 0`, say, for one at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup dev accelerate deepspeed transformers diffusers lightning examples

exec .venv/bin/python -m pytest -n 2 "$@"
