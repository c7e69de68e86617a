"""Block Hessians on disk: a safetensors file, one tensor per layer name, the block size in its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def find(self, names: Sequence[str], blocks: int) -> str:
        """The first of a layer's names that the file has, once it is sure that it holds that many blocks.

        Raises:
            ValueError: the file has none of the names, or another number of blocks.
        """
        name = next((name for name in names if name in self.names), None)
        if name is None:
            raise ValueError(f"Hessian file {self.path} has no layer {' or '.join(map(repr, names))}")
        with safe_open(self.path, framework="pt") as file:
            found = file.get_slice(name).get_shape()[0]
        if found != blocks:
            raise ValueError(
                f"Hessian file {self.path}: layer {name!r} has {found} blocks, the model's has {blocks}; "
                "it was measured on another model"
            )
        return name

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Blocks start..stop of a layer: float32 (stop - start, block_size, block_size), on the CPU.

        Raises:
            ValueError: they hold NaN or infinities.
        """
        with safe_open(self.path, framework="pt") as file:
            hessian: torch.Tensor = file.get_slice(name)[start:stop]
        if not bool(hessian.isfinite().all()):
            count = int((~hessian.isfinite()).sum())
            raise ValueError(f"Hessian file {self.path}: layer {name!r} holds {count} non-finite elements")
        return hessian
