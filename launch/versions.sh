#!/usr/bin/env bash
# Run a sample of the tests with other versions of torch, DeepSpeed and the frameworks:
#     bash launch/versions.sh                    all of launch/versions.txt
#     bash launch/versions.sh 2.8.0 2.15.0       these versions of torch
#     bash launch/versions.sh --sample 3         three cases of each test function instead of one
#     bash launch/versions.sh --all 2.11.0       the whole suite
# Prints a table with the last result of each version, and writes it to tests/versions.md if none is
# missing. Exits with 1 if a test of these failed for a reason of ours. An environment takes 7 GB.
#
#   VERSIONS  the folder of the environments (.versions)
#   PYTHON    the interpreter that makes them (python3; 3.10 to 3.13)
#   RUN       a command to put before each run of tests, `nice` say
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

VERSIONS=${VERSIONS:-.versions}
MAIN=$(sed -n 's/^torch==//p' launch/constraints.txt)

environment() {  # TORCH: makes or mends its environment, and sets `python`
    local names pins extras=dev,accelerate,deepspeed,transformers,diffusers,lightning,examples
    if [ "$1" = "$MAIN" ]; then
        setup ${extras//,/ }
        python=.venv/bin/python
        return
    fi
    python=$VERSIONS/torch-$1/bin/python
    names=$(grep '^torch ' launch/versions.txt)
    pins=$(grep "^$1 " launch/versions.txt) || {
        echo "no torch $1 in launch/versions.txt" >&2
        return 1
    }
    pins=$(paste -d' ' <(tr -s ' ' '\n' <<<"$names") <(tr -s ' ' '\n' <<<"$pins") | sed 's/ /==/')
    [ "$(cat "$VERSIONS/torch-$1/pins" 2>/dev/null)" = "$(pwd) $pins" ] && return
    echo "making the environment of torch $1" >&2
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv "$VERSIONS/torch-$1"
    echo "$pins" > "$VERSIONS/torch-$1/constraints.txt"
    # A constraint of this machine on torch must not stand against ours.
    local pip=(env PIP_CONSTRAINT="$VERSIONS/torch-$1/constraints.txt" DS_BUILD_OPS=0
        "$python" -m pip install -qq --disable-pip-version-check)
    "${pip[@]}" torch numpy "setuptools>=77,<82" wheel ninja py-cpuinfo
    "${pip[@]}" --no-build-isolation deepspeed  # its build imports torch
    "${pip[@]}" --no-build-isolation -e ".[$extras]"
    echo "$(pwd) $pins" > "$VERSIONS/torch-$1/pins"
}

sample=(--sample 1) torches=()
while [ $# -gt 0 ]; do
    case $1 in
        --all) sample=() ;;
        --sample) sample=(--sample "$2"); shift ;;
        *) torches+=("$1") ;;
    esac
    shift
done
[ ${#torches[@]} -gt 0 ] || mapfile -t torches < <(awk '/^[0-9]/ { print $1 }' launch/versions.txt)

for torch in "${torches[@]}"; do
    environment "$torch"
    ${RUN:-} "$python" -m tests.versions run "$VERSIONS/results/$torch.json" -n2 "${sample[@]}" ||
        echo "torch $torch: some tests failed" >&2
done
exec "$python" -m tests.versions table "$VERSIONS"/results/*.json
