#!/usr/bin/env bash
# Run the tests. Needs Python 3.10 or newer; the first run makes .venv. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup dev accelerate deepspeed transformers diffusers lightning examples

exec .venv/bin/python -m pytest "$@"
