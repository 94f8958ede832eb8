"""The layout of a model's library as plain JSON, so that it can be kept in a checkpoint.

library       transformers, diffusers, peft or plain
weights_name  name of the library's weights file
texts         file name -> contents, of further files
dtype_at      file name -> paths of keys in it that take the dtype of the weights
names         fqn -> name in the file, and what is not named is left out; null: its own name
ignored       fqns that the library never writes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

Card = Mapping[str, Any]

WEIGHTS_NAMES = {
    "transformers": "model.safetensors",
    "diffusers": "diffusion_pytorch_model.safetensors",
    "peft": "adapter_model.safetensors",
    "plain": "model.safetensors",
}
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
_DTYPE_KEYS = ("dtype", "torch_dtype")


def make_card(
    library: str,
    configs: Mapping[str, Any],
    *,
    dtype_at: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    ignored: Iterable[str] = (),
) -> dict[str, Any]:
    """A card; `configs` are the JSON values of further files."""
    return {
        "library": library,
        "weights_name": WEIGHTS_NAMES[library],
        "texts": {name: json_text(config) for name, config in configs.items()},
        "dtype_at": dict(dtype_at or {}),
        "names": names if names is None else dict(names),
        "ignored": sorted(ignored),
    }


def json_text(config: object) -> str:
    """As the libraries write their configurations."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def name_in(card: Card, fqns: Iterable[str]) -> str | None:
    """The name under which a tensor of these names is written; None if it is left out."""
    names: Mapping[str, str] | None = card["names"]
    if names is not None:
        return next((names[fqn] for fqn in fqns if fqn in names), None)
    return next((fqn for fqn in fqns if fqn not in card["ignored"]), None)


def texts_of(card: Card, dtype: torch.dtype) -> dict[str, str]:
    """The further files, with the dtype of the averaged weights filled in."""
    texts = dict(card["texts"])
    for name, paths in card["dtype_at"].items():
        config = json.loads(texts[name])
        for path in paths:
            part = config
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = str(dtype).removeprefix("torch.")
        texts[name] = json_text(config)
    return texts


def with_config(card: Card, directory: Path) -> dict[str, Any]:
    """The card with the further files of a directory in place of its own.

    Raises:
        ValueError: there are none, or one is no JSON mapping.
    """
    found = {name: _read(directory / name) for name in _CONFIGS if (directory / name).is_file()}
    if not found:
        raise ValueError(f"{directory} holds no config.json and no adapter_config.json")
    dtype_at = dict(card["dtype_at"])
    config = found.get("config.json")
    if config is not None:
        told = {(): config} | {(k,): part for k, part in config.items() if isinstance(part, dict)}
        at = [[*path, "dtype"] for path, part in told.items() if _tells_dtype(part)]
        if card["library"] == "transformers" and ["dtype"] not in at:
            at.append(["dtype"])
        for part in told.values():
            if _tells_dtype(part):
                part.pop("torch_dtype", None)  # read only where the newer key is absent
        dtype_at["config.json"] = at
    texts = {name: json_text(value) for name, value in found.items()}
    return {**card, "texts": {**card["texts"], **texts}, "dtype_at": dtype_at}


def guessed_card(directory: Path | None) -> Card:
    """A card for a checkpoint that has none, by the configuration of a model's directory."""
    config: Mapping[str, Any] = {}
    if directory is not None and (directory / "config.json").is_file():
        config = _read(directory / "config.json")
    if "_class_name" in config:
        return make_card("diffusers", {})
    if "model_type" in config or "architectures" in config:
        return make_card("transformers", {})
    return make_card("plain", {})


def checked_card(told: object) -> Card:
    """A card that was read from a file.

    Raises:
        ValueError: it is none, or tells to write a file that no library reads.
    """
    card: Any = told
    try:
        good = (
            card["library"] in WEIGHTS_NAMES
            and card["weights_name"] == WEIGHTS_NAMES[card["library"]]
            and set(card["texts"]) <= set(_CONFIGS)
            and set(card["dtype_at"]) <= set(card["texts"])
            and all(isinstance(text, str) for text in card["texts"].values())
            and (card["names"] is None or _is_text_map(card["names"]))
            and all(isinstance(name, str) for name in card["ignored"])
        )
        texts_of(card, torch.float32)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError("the checkpoint's card of the model makes no sense")
    return dict(card)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, wanted a mapping")
    return config


def _tells_dtype(config: Mapping[str, Any]) -> bool:
    return any(key in config for key in _DTYPE_KEYS)


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) and text for item in value.items() for text in item
    )
