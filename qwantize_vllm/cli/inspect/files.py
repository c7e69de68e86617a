"""Whether a directory is a checkpoint with all of its files, before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path

_INDEX = "model.safetensors.index.json"


def check_files(model: str) -> None:
    """Of a directory; a name is left to vLLM, which downloads what belongs to it.

    vLLM reads the files that are there: one that only the index names would be missed in silence.

    Raises:
        ValueError: config.json or weights are missing, or it is a path and there is nothing.
    """
    directory = Path(model)
    if not directory.is_dir():
        if directory.is_absolute() or model.startswith(".") or model.count("/") > 1:
            raise ValueError(f"there is no directory {model}")
        return
    if not (directory / "config.json").is_file():
        raise ValueError(f"{model} is not a checkpoint: it has no config.json")
    index = directory / _INDEX
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        if missing := sorted(name for name in named if not (directory / name).is_file()):
            raise ValueError(f"{index} names {len(missing)} files that are not there: {', '.join(missing[:5])}")
    elif not any(directory.glob("*.safetensors")):
        raise ValueError(f"{model} has no .safetensors file, and others are not read")
