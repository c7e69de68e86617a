"""Hessians on disk: a safetensors file, one tensor per layer name, its metadata what they were measured on.

A layer's tensor holds either the blocks on the diagonal of its Hessian, (K/block_size, block_size, block_size), or all
of it, (K, K), of which the blocks can be read just as well, of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pydantic
import torch
from safetensors import SafetensorError, safe_open

from qwantize_vllm.checkpoint.files import save_tensors

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
    full: Annotated[bool, pydantic.Field(description="Whether layers have all of their Hessians.")] = False
    behind: Annotated[str, pydantic.Field(description="Settings of the quantized model; empty: not quantized.")] = ""

    def shape(self, k: int) -> tuple[int, ...]:
        """Of the tensor of a layer with k inputs."""
        return (k, k) if self.full else (k // self.block_size, self.block_size, self.block_size)


def save_hessians(
    path: str | Path, hessians: Mapping[str, torch.Tensor], block_size: int, info: HessianInfo | None = None
) -> None:
    """Write one float32 (K/block_size, block_size, block_size) tensor per layer name, or (K, K) where info says full.

    The file appears whole or not at all, and has the same bytes for the same input.

    Raises:
        ValueError: a tensor has another dtype or shape, or info another block size.
    """
    info = info or HessianInfo(block_size=block_size)
    if info.block_size != block_size:
        raise ValueError(f"block_size is {block_size}, info says {info.block_size}")
    for name, hessian in hessians.items():
        inputs = hessian.shape[-1] if info.full else hessian.shape[0] * block_size
        if hessian.dtype != torch.float32 or tuple(hessian.shape) != info.shape(inputs):
            allowed = "(K, K)" if info.full else f"(K/{block_size}, {block_size}, {block_size})"
            raise ValueError(f"Hessian of {name} must be float32 {allowed}, got {hessian.dtype} {tuple(hessian.shape)}")
    tensors = {name: hessian.contiguous() for name, hessian in hessians.items()}
    save_tensors(Path(path), tensors, {_KEY: info.model_dump_json()})


def merge_hessians(paths: Sequence[str | Path], out: str | Path) -> HessianInfo:
    """Write the sums of several files of one model: what measuring on all their texts together gives.

    Raises:
        ValueError: the files differ in model, block size, layers or shapes.
    """
    files = [HessianFile(path) for path in paths]
    first = files[0]
    for file in files[1:]:
        for key in ("block_size", "full", "behind", "fingerprint", "dtype"):
            one, other = getattr(first.info, key), getattr(file.info, key)
            if one != other:
                raise ValueError(f"{first.path} has {key} {one!r}, {file.path} has {other!r}; they do not add up")
        if difference := sorted(first.names ^ file.names):
            raise ValueError(f"{first.path} and {file.path} do not have the same layers: {', '.join(difference[:5])}")
    hessians = {name: first.read_whole(name) for name in sorted(first.names)}
    for file in files[1:]:
        for name, total in hessians.items():
            hessian = file.read_whole(name)
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
        block_size: of the blocks that it gives: the one asked for, or else the one that it was measured with.

    Raises:
        ValueError: not a safetensors file, not a Hessian file, or one of blocks of another size than the one given.
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
        self.block_size = block_size or self.info.block_size
        if self.block_size != self.info.block_size and not self.info.full:
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

    def check_full(self) -> None:
        """Raise ValueError where the file has only the blocks on the diagonals."""
        if not self.info.full:
            raise ValueError(
                f"Hessian file {self.path} has the blocks of the Hessians only; refine: gptq needs all of them: "
                "run `qwantize calibrate --full`"
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
        self.check_blocks([name], blocks)
        return name

    def check_blocks(self, names: Sequence[str], blocks: int) -> None:
        """Raise ValueError where the file lacks one of the layers, or has another number of blocks of it."""
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                if name not in self.names:
                    raise ValueError(f"Hessian file {self.path} has no layer {name!r}")
                rows = file.get_slice(name).get_shape()[0]
                found = rows // self.block_size if self.info.full else rows
                if found != blocks:
                    raise ValueError(
                        f"Hessian file {self.path}: layer {name!r} has {found} blocks, the model's has {blocks}; "
                        "it was measured on another model"
                    )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Blocks start..stop of a layer: float32 (stop - start, block_size, block_size), on the CPU.

        Raises:
            ValueError: they hold NaN or infinities.
        """
        return self.read_each([name], start, stop)[0]

    def read_each(self, names: Sequence[str], start: int, stop: int) -> torch.Tensor:
        """As `read`, of several layers: float32 (len(names), stop - start, block_size, block_size)."""
        size = self.block_size
        parts = [slice(j * size, (j + 1) * size) for j in range(start, stop)]
        # A model that is being built has another default device, and its meta device holds no numbers.
        with torch.device("cpu"), safe_open(self.path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in names}
            if self.info.full:
                blocks = {name: torch.stack([s[part, part] for part in parts]) for name, s in slices.items()}
            else:
                blocks = {name: s[start:stop] for name, s in slices.items()}
        return torch.stack([self._finite(name, each) for name, each in blocks.items()])

    def read_all(self, name: str) -> torch.Tensor:
        """All blocks of a layer, as `read` gives them."""
        return self.read(name, 0, self._blocks(name))

    def read_full(self, name: str) -> torch.Tensor:
        """All of a layer's Hessian: float32 (K, K), on the CPU.

        Raises:
            ValueError: the file has only the blocks; the Hessian holds NaN or infinities.
        """
        self.check_full()
        return self.read_whole(name)

    def read_whole(self, name: str) -> torch.Tensor:
        """What the file has of a layer: all blocks, or the full Hessian."""
        with torch.device("cpu"), safe_open(self.path, framework="pt") as file:
            return self._finite(name, file.get_tensor(name))

    def _blocks(self, name: str) -> int:
        with safe_open(self.path, framework="pt") as file:
            rows: int = file.get_slice(name).get_shape()[0]
        return rows // self.block_size if self.info.full else rows

    def _finite(self, name: str, hessian: torch.Tensor) -> torch.Tensor:
        if not bool(hessian.isfinite().all()):
            count = int((~hessian.isfinite()).sum())
            raise ValueError(f"Hessian file {self.path}: layer {name!r} holds {count} non-finite elements")
        return hessian
