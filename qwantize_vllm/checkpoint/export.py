"""Writing a quantized checkpoint, shard by shard, such that it can be interrupted anywhere.

All work is in OUT.partial. A shard appears there whole or not at all, and once it is on the disk,
`qwantize-export.json` notes it with a digest of every tensor. config.json, without which nothing takes a directory for
a checkpoint, comes last, and then the directory gets its name. A second run finds the notes, reads the shards again
that they list, and goes on behind them; notes of another export are refused. What is held in memory is a shard and the
layer that is being quantized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwantize_vllm.checkpoint.files import INDEX, Checkpoint, digest, save_tensors, save_text, sync
from qwantize_vllm.checkpoint.layouts import Layout, split_rows
from qwantize_vllm.checkpoint.members import Member, read_members
from qwantize_vllm.format import Nvfp4Tensor

NOTES = "qwantize-export.json"
_LOCK = "export.lock"
_OF_SAFETENSORS = ".tmp"  # how the names of its own unfinished files begin
# Never copied: other forms of the weights, code of frameworks that unpickle, and what belongs to a download.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz"}
_FOLDERS = {"onnx", "openvino", "original", "coreml"}

# Of the members' dense weights, one below the other, the parts that share a global scale, quantized.
Quantize = Callable[["ExportLayer", torch.Tensor], Sequence[Nvfp4Tensor]]


@dataclasses.dataclass(frozen=True)
class ExportLayer:
    """A weight that is quantized at once: a linear layer's, or of one expert gate and up together, or down.

    Attributes:
        name: that of the serving model's layer; of an expert with its number and w13 or w2 behind it.
        members: the checkpoint's matrices that it is made of, each (rows, K), in the order of its rows.
    """

    name: str
    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What is exported where.

    Attributes:
        layers: those that are quantized; every other tensor is copied as it is.
        dtype: in which weights are quantized.
        ignore: names of modules that are left as they are, for the config.
        settings: how, for the notes; another run goes on only where they are the same.
        shard_bytes: after which a file ends.
    """

    source: Checkpoint
    out: Path
    layout: Layout
    layers: Sequence[ExportLayer]
    dtype: torch.dtype
    block_size: int
    ignore: Sequence[str]
    settings: Mapping[str, Any]
    shard_bytes: int

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")


def check_out(out: Path) -> None:
    """Raise ValueError where there is something already, or a name that cannot be given last."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; choose another --out, or remove it")
    if out.is_symlink():
        raise ValueError(f"{out} is a link, and is given its name last; choose what it leads to, {out.resolve()}")
    if out.is_mount():
        raise ValueError(f"{out} is where a file system is mounted, and is given its name last; choose a folder in it")


def export(job: ExportJob, quantize: Quantize) -> None:
    """Write the checkpoint, or what is missing of it.

    Raises:
        ValueError: the directory is there; OUT.partial is of another export, or another process writes it; the
            source cannot be read; quantize's own.
    """
    check_out(job.out)
    job.partial.mkdir(parents=True, exist_ok=True)
    with _only_one(job.partial):
        notes = _Notes(job)
        files = _shards(job)
        with tqdm(total=len(job.layers), unit="weight", desc="exporting", disable=None) as bar:
            for number, units in enumerate(files, 1):
                name = _file_name(number, len(files))
                if not notes.has(name):
                    tensors = _shard(job, units, quantize, bar)
                    save_tensors(job.partial / name, tensors, {"format": "pt"})
                    notes.add(name, tensors)
                    del tensors
                else:
                    bar.update(sum(isinstance(unit, ExportLayer) for unit in units))
        _finish(job, notes)


_Unit = ExportLayer | str  # a layer, or the name of a tensor that is copied


def _shards(job: ExportJob) -> list[list[_Unit]]:
    """What goes into which file: in the order of the source, a layer where its first member lies."""
    made_of: dict[str, list[_Unit]] = {}  # by tensor; those of a stacked one in the order of the job
    for layer in job.layers:
        for tensor in dict.fromkeys(member.tensor for member in layer.members):
            made_of.setdefault(tensor, []).append(layer)
    units = dict.fromkeys(unit for name in job.source.tensors for unit in made_of.get(name, [name]))
    shards: list[list[_Unit]] = [[]]
    size = 0
    for unit in units:
        nbytes = job.source.tensors[unit].nbytes if isinstance(unit, str) else _quantized_bytes(job, unit)
        if size and size + nbytes > job.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += nbytes
    return shards


def _quantized_bytes(job: ExportJob, layer: ExportLayer) -> int:
    shapes = [member.shape(job.source) for member in layer.members]
    described = [job.layout.described("", n, k, job.block_size) for n, k in shapes]
    return sum(math.prod(shape) * dtype.itemsize for each in described for dtype, shape in each.values())


def _shard(job: ExportJob, units: Sequence[_Unit], quantize: Quantize, bar: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for unit in units:
        if isinstance(unit, str):
            tensors[unit] = job.source.read(unit)
            continue
        matrices = [matrix.to(job.dtype) for matrix in read_members(job.source, unit.members)]
        rows = [matrix.shape[0] for matrix in matrices]
        weight = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        del matrices
        parts = split_rows(quantize(unit, weight), rows)
        for member, q in zip(unit.members, parts, strict=True):
            tensors |= job.layout.write(member.name, q)
        bar.update()
    return tensors


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


class _Notes:
    """qwantize-export.json: whose export this is, and which shards are on the disk, with digests of their tensors."""

    def __init__(self, job: ExportJob) -> None:
        """Raises ValueError where the directory has notes of another export, or files but no notes."""
        self._job, self._path = job, job.partial / NOTES
        identity = json.loads(json.dumps(_identity(job)))
        if self._path.is_file():
            self.content = json.loads(self._path.read_text("utf-8"))
            found = self.content["export"]
            if differences := [key for key in identity if found.get(key) != identity[key]]:
                raise ValueError(
                    f"{job.partial} is what is left of another export, with other {', '.join(differences)}; "
                    "remove it, choose another --out, or start that export again to finish it"
                )
        elif strangers := [path.name for path in job.partial.iterdir() if path.name != _LOCK]:
            if not all(name.endswith(".unfinished") or name.startswith(_OF_SAFETENSORS) for name in strangers):
                raise ValueError(f"{job.partial} has files ({strangers[0]}) but no {NOTES}; remove it, or move it away")
            self.content = {"export": identity, "shards": {}}
        else:
            self.content = {"export": identity, "shards": {}}
        for leftover in [*job.partial.glob("*.unfinished"), *job.partial.glob(f"{_OF_SAFETENSORS}*")]:
            leftover.unlink()
        self._save()

    def has(self, name: str) -> bool:
        """Whether a shard is there and is what was written; one that is not is forgotten."""
        noted = self.content["shards"].get(name)
        if noted is None:
            return False
        if (problems := different_tensors(self._job.partial / name, noted)) is None:
            return True
        tqdm.write(f"{problems}; it is written again")
        del self.content["shards"][name]
        return False

    def add(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.content["shards"][name] = {key: digest(tensor) for key, tensor in sorted(tensors.items())}
        self._save()

    def _save(self) -> None:
        self.content["shards"] = dict(sorted(self.content["shards"].items()))
        save_text(self._path, json.dumps(self.content, indent=1) + "\n")


def different_tensors(path: Path, noted: Mapping[str, str]) -> str | None:
    """The first thing in which a file differs from the digests of its tensors; None where it does not.

    Names the file and the tensor.
    """
    if not path.is_file():
        return f"{path} is not there"
    try:
        checkpoint = Checkpoint.of_file(path)
        for name in noted.keys() | checkpoint.tensors.keys():
            if name not in checkpoint.tensors:
                return f"{path} lacks tensor {name!r}"
            if name not in noted:
                return f"{path} has tensor {name!r}, which was not written to it"
        for name in sorted(noted):
            if digest(checkpoint.read(name)) != noted[name]:
                return f"{path}: the bytes of tensor {name!r} are not those that were written"
    except ValueError as error:
        return str(error)
    return None


def verify(directory: Path) -> int:
    """Compare every tensor of an export with the digests in its notes; returns how many there are.

    Raises:
        ValueError: one differs, a file is missing or cannot be read; names the file and the tensor.
    """
    path = directory / NOTES
    if not path.is_file():
        raise ValueError(f"{directory} has no {NOTES}: `qwantize export` did not write it")
    try:
        shards = json.loads(path.read_text("utf-8"))["shards"]
        noted = {str(file): dict(digests) for file, digests in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    for file, digests in noted.items():
        if (problem := different_tensors(directory / Path(file).name, digests)) is not None:
            raise ValueError(problem)
    return sum(map(len, noted.values()))


def _identity(job: ExportJob) -> dict[str, Any]:
    """What must be the same for a second run to go on."""
    files = {}
    for file in job.source.files:
        stat = (job.source.directory / file).stat()
        files[file] = [stat.st_size, stat.st_mtime_ns]
    return {
        "format": job.layout.name,
        "settings": dict(job.settings),
        "dtype": str(job.dtype).removeprefix("torch."),
        "shard_bytes": job.shard_bytes,
        "layers": hashlib.sha256(repr(list(job.layers)).encode()).hexdigest()[:16],
        "source": files,
    }


def _finish(job: ExportJob, notes: _Notes) -> None:
    """What belongs to the weights; then config.json; then the name."""
    files = notes.content["shards"]
    if len(files) > 1:
        total = sum((job.partial / file).stat().st_size for file in files)
        where = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        save_text(job.partial / INDEX, json.dumps(index, indent=1) + "\n")
    _copy_others(job.source.directory, job.partial, but=(job.partial, job.out))
    config = json.loads((job.source.directory / "config.json").read_text("utf-8"))
    config["quantization_config"] = job.layout.config(job.ignore, job.block_size)
    for name, content in job.layout.extra_files(config["quantization_config"]).items():
        save_text(job.partial / name, json.dumps(content, indent=1) + "\n")
    save_text(job.partial / "config.json", json.dumps(config, indent=1) + "\n")
    (job.partial / _LOCK).unlink(missing_ok=True)
    job.partial.rename(job.out)  # onto an empty directory, or nothing
    sync(job.out.absolute().parent)


def _copy_others(source: Path, target: Path, but: Sequence[Path]) -> None:
    """Tokenizer, chat template, generation config, licence: everything but weights, config.json and some folders."""
    modules = _modules(source)
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in ("config.json", INDEX, NOTES, "hf_quant_config.json"):
            continue
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name not in _FOLDERS and path.resolve() not in [each.resolve() for each in but]:
            (target / path.name).mkdir(exist_ok=True)
            weights = _WEIGHTS - ({".safetensors"} if path.name in modules else set())
            for file in path.iterdir():
                if file.is_file() and file.suffix not in weights:
                    shutil.copyfile(file, target / path.name / file.name)


def _modules(source: Path) -> set[str]:
    """Folders in which sentence-transformers keeps small layers."""
    path = source / "modules.json"
    return {str(module.get("path")) for module in json.loads(path.read_text("utf-8"))} if path.is_file() else set()


@contextlib.contextmanager
def _only_one(partial: Path) -> Iterator[None]:
    """Two exports never write one directory: the second is refused."""
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is exporting to {partial}; wait for it, or end it") from error
        yield
