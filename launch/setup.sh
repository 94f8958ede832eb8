# Sourced from the repository root: `setup EXTRA...` gives a .venv with this project and the named
# extras of pyproject.toml, at the versions of launch/constraints.txt. What is installed is noted in
# .venv, so that a second run installs nothing until one of the two files changes.
#
#   PYTHON   the interpreter that makes .venv (python3; 3.10 or newer)

setup() {
    local python=${PYTHON:-python3} state extra missing=()
    if ! [ -x .venv/bin/pip ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "$python is no Python 3.10 or newer: set PYTHON to one that is" >&2
            return 1
        }
        echo "making .venv" >&2
        "$python" -m venv .venv || return
    fi

    # The path is part of it: an editable install points to the folder that it was made in.
    state=$(pwd; cat pyproject.toml launch/constraints.txt)
    state=$(printf %s "$state" | .venv/bin/python -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') || return
    for extra in "$@"; do
        [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$state" ] || missing+=("$extra")
    done
    [ ${#missing[@]} -gt 0 ] || return 0

    echo "installing into .venv: ${missing[*]}" >&2
    _pip torch setuptools wheel || return
    case " ${missing[*]} " in *" deepspeed "*)
        # Its build imports torch, so it can not be built apart from this environment.
        _pip ninja py-cpuinfo || return
        _pip --no-build-isolation deepspeed || return
    esac
    _pip --no-build-isolation -e ".[$(IFS=,; echo "${missing[*]}")]" || return
    for extra in "${missing[@]}"; do
        echo "$state" > ".venv/installed-$extra"
    done
}

_pip() {
    # Errors only: setuptools warns at length of every editable install.
    .venv/bin/python -m pip install -qq --disable-pip-version-check \
        -c launch/constraints.txt "$@"
}
