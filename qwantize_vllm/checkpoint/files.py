"""The safetensors files of a checkpoint's directory, read one tensor at a time; and files that appear whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_LONGEST_HEADER = 100_000_000  # that safetensors accepts
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The tensors of a directory: those that its index names, or where it has none, all of its .safetensors files'.

    Attributes:
        directory: where they lie.
        tensors: by name, file after file, what the headers say.

    Raises:
        ValueError: there are none; a file cannot be read, or lacks what the index says it has; names the file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        named = self._index()
        files = sorted(set(named.values())) or sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{self.directory} has no .safetensors file, and others are not read")
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(self.directory / file).items():
                if named.get(name, file) != file:
                    continue  # an old copy: the index names another file
                if name in self.tensors:
                    raise ValueError(f"tensor {name!r} is in {self.tensors[name].file} and in {file} ({directory})")
                self.tensors[name] = info
        if missing := sorted(named.keys() - self.tensors.keys()):
            lacking = self.directory / named[missing[0]]
            raise ValueError(f"{lacking} lacks {len(missing)} tensors that {INDEX} names, {missing[0]!r} among them")

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """A single file."""
        found = cls.__new__(cls)
        found.directory = Path(path).parent
        found.tensors = read_header(path)
        return found

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(info.file for info in self.tensors.values()))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            ValueError: its file cannot be read; names both.
        """
        return self._read(name, lambda file: file.get_tensor(name))

    def read_slice(self, name: str, index: int) -> torch.Tensor:
        """tensor[index] of one tensor (E, ...), on the CPU; of the others nothing is read.

        Raises:
            ValueError: its file cannot be read; names both.
        """
        return self._read(name, lambda file: file.get_slice(name)[index])

    def _read(self, name: str, what: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        path = self.directory / self.tensors[name].file
        try:
            with safe_open(path, framework="pt") as file:
                return what(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from error

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        if not path.is_file():
            return {}
        try:
            named = json.loads(path.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an index of safetensors files: {error!r}") from error
        files = set(named.values())
        if outside := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{path} names {outside[0]!r}, which is not a file beside it")
        if missing := sorted(file for file in files if not (self.directory / file).is_file()):
            raise ValueError(f"{path} names {len(missing)} files that are not there: {', '.join(missing[:5])}")
        return dict(named)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file has, by name, in the order of its bytes.

    Raises:
        ValueError: it is none, it is truncated, or it has a dtype that is not known here; names it, and the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {}
            for name in file.offset_keys():
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise ValueError(f"{path}: tensor {name!r} has dtype {view.get_dtype()}, which is not known here")
                found[name] = TensorInfo(path.name, _DTYPES[view.get_dtype()], tuple(view.get_shape()))
            return found
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}{_cut_off(path)}") from error


def _cut_off(path: Path) -> str:
    """Which tensors a truncated file lacks, as the end of a message; empty where it is broken otherwise."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        have = path.stat().st_size - 8 - length
        lost = [name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][1] > have]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return ""
    return f"; it ends within or before {len(lost)} tensors, {lost[0]!r} the first" if lost else ""


def digest(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, which appears whole or not at all, whatever ends this process or the machine.

    Raises:
        OSError: it cannot be written; names it.
    """
    unfinished = _beside(path)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # that of new files; safetensors makes its own for the owner alone
        save_file(dict(tensors), unfinished, metadata=dict(metadata))
        unfinished.chmod(mode)
        _settle(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """As `save_tensors`, a file of text."""
    unfinished = _beside(path)
    try:
        unfinished.write_text(text, "utf-8")
        _settle(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file, or the entries of a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _beside(path: Path) -> Path:
    """Another name each time: in containers that share a directory processes have the same numbers."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.unfinished")


def _settle(unfinished: Path, path: Path) -> None:
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)
