"""Block Hessians on disk: a safetensors file, one tensor per layer name, the block size in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_FORMAT = "qwantize-block-hessian-v1"


def save_hessians(path: str | Path, hessians: Mapping[str, torch.Tensor], block_size: int) -> None:
    """Write one float32 (K/block_size, block_size, block_size) tensor per layer name.

    Raises:
        ValueError: a tensor has another dtype or shape.
    """
    for name, hessian in hessians.items():
        if hessian.dtype != torch.float32 or hessian.dim() != 3 or hessian.shape[1:] != (block_size, block_size):
            raise ValueError(
                f"Hessian of {name} must be float32 (K/{block_size}, {block_size}, {block_size}), "
                f"got {hessian.dtype} {tuple(hessian.shape)}"
            )
    tensors = {name: hessian.contiguous() for name, hessian in hessians.items()}
    save_file(tensors, path, metadata={"format": _FORMAT, "block_size": str(block_size)})


class HessianFile:
    """A Hessian file opened for lazy reading, one layer's slice at a time.

    Raises:
        ValueError: not a safetensors file, not a Hessian file, or measured with another block size.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path, block_size: int) -> None:
        self.path, self.block_size = Path(path), block_size
        if not self.path.is_file():
            raise FileNotFoundError(f"Hessian file {self.path} does not exist")
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata, self.names = file.metadata() or {}, frozenset(file.keys())
        except SafetensorError as error:
            raise ValueError(f"Hessian file {self.path} is not a readable safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{self.path} is not a Hessian file: its metadata has no format {_FORMAT!r}")
        if metadata.get("block_size") != str(block_size):
            raise ValueError(
                f"Hessian file {self.path} was measured with block_size {metadata.get('block_size')}, "
                f"the settings ask for {block_size}"
            )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Blocks start..stop of a layer: float32 (stop - start, block_size, block_size), on the CPU.

        Raises:
            KeyError: the file has no such layer.
            ValueError: the layer has fewer blocks.
        """
        if name not in self.names:
            raise KeyError(f"Hessian file {self.path} has no layer {name!r}")
        with safe_open(self.path, framework="pt") as file:
            part = file.get_slice(name)
            if part.get_shape()[0] < stop:
                raise ValueError(
                    f"Hessian file {self.path}: layer {name!r} has {part.get_shape()[0]} blocks, needed {stop}"
                )
            return part[start:stop]
