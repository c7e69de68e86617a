"""Block Hessians on disk: a safetensors file, one tensor per layer name, its metadata what they were measured on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# The only key of the metadata, its value JSON: safetensors writes several keys in an order of chance.
_KEY = "qwantize-block-hessian-v1"


class HessianInfo(pydantic.BaseModel):
    """What a Hessian file was measured on. Empty or 0 where whoever wrote it did not say."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    block_size: Annotated[int, pydantic.Field(description="16 or 32.")]
    model: Annotated[str, pydantic.Field(description="Name or directory of the model.")] = ""
    fingerprint: Annotated[str, pydantic.Field(description="Of its config; a file for another one is refused.")] = ""
    tokens: Annotated[int, pydantic.Field(description="Over which the Hessians are sums.")] = 0
    dtype: Annotated[str, pydantic.Field(description="Of the activations.")] = ""
    package: Annotated[str, pydantic.Field(description="Version of this package.")] = ""


def save_hessians(
    path: str | Path, hessians: Mapping[str, torch.Tensor], block_size: int, info: HessianInfo | None = None
) -> None:
    """Write one float32 (K/block_size, block_size, block_size) tensor per layer name.

    The file appears whole or not at all, and has the same bytes for the same input.

    Raises:
        ValueError: a tensor has another dtype or shape, or info another block size.
    """
    info = info or HessianInfo(block_size=block_size)
    if info.block_size != block_size:
        raise ValueError(f"block_size is {block_size}, info says {info.block_size}")
    for name, hessian in hessians.items():
        if hessian.dtype != torch.float32 or hessian.dim() != 3 or hessian.shape[1:] != (block_size, block_size):
            raise ValueError(
                f"Hessian of {name} must be float32 (K/{block_size}, {block_size}, {block_size}), "
                f"got {hessian.dtype} {tuple(hessian.shape)}"
            )
    tensors = {name: hessian.contiguous() for name, hessian in hessians.items()}
    unfinished = Path(f"{path}.{os.getpid()}.unfinished")
    try:
        save_file(tensors, unfinished, metadata={_KEY: info.model_dump_json()})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def merge_hessians(paths: Sequence[str | Path], out: str | Path) -> HessianInfo:
    """Write the sums of several files of one model: what measuring on all their texts together gives.

    Raises:
        ValueError: the files differ in model, block size, layers or shapes.
    """
    files = [HessianFile(path) for path in paths]
    first = files[0]
    for file in files[1:]:
        for key in ("block_size", "fingerprint", "dtype"):
            one, other = getattr(first.info, key), getattr(file.info, key)
            if one != other:
                raise ValueError(f"{first.path} has {key} {one!r}, {file.path} has {other!r}; they do not add up")
        if difference := sorted(first.names ^ file.names):
            raise ValueError(f"{first.path} and {file.path} do not have the same layers: {', '.join(difference[:5])}")
    hessians = {name: first.read_all(name) for name in sorted(first.names)}
    for file in files[1:]:
        for name, total in hessians.items():
            hessian = file.read_all(name)
            if hessian.shape != total.shape:
                raise ValueError(
                    f"layer {name!r} is {tuple(total.shape)} in {first.path}, {tuple(hessian.shape)} in {file.path}"
                )
            total += hessian
    info = first.info.model_copy(update={"tokens": sum(file.info.tokens for file in files)})
    save_hessians(out, hessians, info.block_size, info)
    return info


class HessianFile:
    """A Hessian file opened for lazy reading, one layer's slice at a time.

    Attributes:
        info: what it was measured on.
        names: of its layers.

    Raises:
        ValueError: not a safetensors file, not a Hessian file, or measured with another block size than the one given.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | Path, block_size: int | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"Hessian file {self.path} does not exist")
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata, self.names = file.metadata() or {}, frozenset(file.keys())
        except SafetensorError as error:
            raise ValueError(f"Hessian file {self.path} is not a readable safetensors file: {error}") from error
        if _KEY not in metadata:
            raise ValueError(f"{self.path} is not a Hessian file: its metadata has no key {_KEY!r}")
        try:
            self.info = HessianInfo.model_validate_json(metadata[_KEY])
        except pydantic.ValidationError as error:
            raise ValueError(f"Hessian file {self.path}: its metadata cannot be read: {error}") from error
        if block_size not in (None, self.info.block_size):
            raise ValueError(
                f"Hessian file {self.path} was measured with block_size {self.info.block_size}, "
                f"the settings ask for {block_size}"
            )

    def check_model(self, fingerprint: str) -> None:
        """Raise ValueError where the file says that it was measured on a model with another config."""
        if self.info.fingerprint and self.info.fingerprint != fingerprint:
            raise ValueError(
                f"Hessian file {self.path} was measured on another model: {self.info.model!r} with config "
                f"{self.info.fingerprint}, this one has {fingerprint}; run `qwantize calibrate` on this model"
            )

    def has(self, names: Sequence[str]) -> bool:
        """Whether it has any of a layer's names."""
        return not self.names.isdisjoint(names)

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

    def read_all(self, name: str) -> torch.Tensor:
        """All blocks of a layer, as `read` gives them."""
        with safe_open(self.path, framework="pt") as file:
            blocks = file.get_slice(name).get_shape()[0]
        return self.read(name, 0, blocks)
