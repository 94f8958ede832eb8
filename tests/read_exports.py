"""A fresh process that reads exports with their libraries.

    python -m tests.read_exports DIRECTORY

The directory has one for each export, MODEL-DTYPE, and beside it MODEL-DTYPE.wanted, a safetensors
file of the state dict that the library must find. Exits with 0 if it does, for all of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.models import load


def contents(path: Path) -> dict[str, bytes]:
    """The files of a directory."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def written(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export; no name is in two files."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & state.keys()
        state |= part
    return state


def check(path: Path) -> None:
    name, dtype_name = path.name.split("-")
    dtype = getattr(torch, dtype_name)
    wanted = load_file(path.with_suffix(".wanted"))
    model = load(name, str(path), dtype)
    state = model.state_dict()
    if name == "lora":  # the base is what it was before training
        state = {fqn: tensor for fqn, tensor in state.items() if fqn in wanted}
    assert state.keys() == wanted.keys(), (path, state.keys() ^ wanted.keys())
    for fqn, tensor in wanted.items():
        assert torch.equal(state[fqn].to(tensor.dtype), tensor), (path, fqn)
        if name != "lora" and tensor.is_floating_point():
            assert state[fqn].dtype == dtype, (path, fqn, state[fqn].dtype)


def check_all(directory: Path) -> str:
    paths = sorted(path for path in directory.iterdir() if path.is_dir())
    assert paths
    for path in paths:
        check(path)
    return f"{len(paths)} exports are good"


if __name__ == "__main__":
    print(check_all(Path(sys.argv[1])))
