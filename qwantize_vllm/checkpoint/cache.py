"""Quantized layers kept from one start to the next, a file each, under a key of everything that they follow from.

The key holds the weight itself, so a changed weight is another key; a file is written whole or not at all, so that
starts at the same time and crashes do no harm; its tensors have digests, so that a damaged file is noticed. Nothing is
ever removed: the directory is the user's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwantize_vllm.checkpoint.files import digest, save_tensors
from qwantize_vllm.format import Nvfp4Tensor

_FORMAT = 1  # with another search, or another order of bytes here, the next number
_NOTE = "qwantize-layer"


class LayerCache:
    """The files of a directory, which is made where it is not there."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def key(self, settings: Mapping[str, Any], tensors: Sequence[torch.Tensor | None]) -> str:
        """Of what a layer is quantized by and from: the weight, global scales, a Hessian. Reads all of them once."""
        parts = [json.dumps({"format": _FORMAT, **settings}, sort_keys=True)]
        parts += ["none" if tensor is None else digest(tensor) for tensor in tensors]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def load(self, key: str, shapes: Sequence[tuple[int, ...]], block_size: int) -> list[Nvfp4Tensor] | None:
        """The parts, (..., N, K) each, on the CPU; None where there is no such file.

        Raises:
            ValueError: there is one, but it is not what was saved; names it.
        """
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            with safe_open(path, framework="pt") as file:
                digests = json.loads((file.metadata() or {})[_NOTE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            if {name: digest(tensor) for name, tensor in tensors.items()} != digests:
                raise ValueError("its tensors are not those that were saved")
            names = ("codes", "block_scales", "global_scale")
            named = [{name: tensors[f"{i}.{name}"] for name in names} for i in range(len(shapes))]
            parts = [Nvfp4Tensor(**each, block_size=block_size) for each in named]
            if [tuple(q.shape) for q in parts] != [tuple(shape) for shape in shapes]:
                raise ValueError(f"its shapes are {[tuple(q.shape) for q in parts]}, not {list(shapes)}")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
        return parts

    def save(self, key: str, parts: Sequence[Nvfp4Tensor]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for i, q in enumerate(parts):
            named = {"codes": q.codes, "block_scales": q.block_scales, "global_scale": q.global_scale}
            tensors |= {f"{i}.{name}": tensor.cpu().contiguous().clone() for name, tensor in named.items()}
        digests = {name: digest(tensor) for name, tensor in tensors.items()}
        save_tensors(self._path(key), tensors, {_NOTE: json.dumps(digests, sort_keys=True)})

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"
