"""`qwantize export` by the code that would serve: vLLM says which tensors make up which layer, the plugin quantizes.

The model is built on the meta device, where the plugin decides layer by layer as it does in an engine. Then vLLM's own
loading code is given the checkpoint's tensors, on the meta device too, and what it would load where is written down:
that tells what is fused from what for every architecture, without a table of names. A layer whose weight vLLM does not
load as it lies in the checkpoint, but transposes or cuts out of another tensor, stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.utils.torch_utils import set_default_torch_dtype

from qwantize_vllm import __version__
from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import ExportJob, ExportLayer, check_out, export
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.plugin.engine_process import in_own_process
from qwantize_vllm.plugin.inspection import MetaModel, one_rank
from qwantize_vllm.plugin.linear import QwantizeLinearMethod

logger = init_logger(f"vllm.{__name__}")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What became of a checkpoint.

    Attributes:
        quantized: names of the layers, as vLLM has them.
        left: of linear layers that are not, with the reason.
        bytes_read, bytes_written: of safetensors files.
    """

    quantized: list[str]
    left: dict[str, str]
    bytes_read: int
    bytes_written: int


def export_model(
    model: str, out: Path, settings: dict[str, Any], layout: str, dtype: str = "auto", shard_bytes: int = 2**30
) -> Exported:
    """Quantize a checkpoint as serving it with these settings would, and write what that holds.

    Args:
        model: name or directory, as `vllm serve` takes it; its weights must be safetensors.
        settings: of the plugin. layout: one of LAYOUTS. dtype: as `vllm serve --dtype`.

    Raises:
        ValueError: the model, the settings or out cannot be used; see `checkpoint.export`.
    """
    check_out(out)
    return in_own_process(_export, model, out, settings, layout, dtype, shard_bytes)


def _export(model: str, out: Path, settings: dict[str, Any], layout: str, dtype: str, shard_bytes: int) -> Exported:
    with one_rank():
        built = MetaModel(model, settings, dtype)
        resolved = built.quantization.settings
        if built.experts:
            raise ValueError(
                f"{model} has experts ({next(iter(built.experts))} and others), which exports cannot hold yet; serve "
                "it with --quantization qwantize, which quantizes experts while loading"
            )
        layers = {path: layer for path, layer in built.layers.items() if built.reason(layer) is None}
        source = Checkpoint(_directory(built.config))
        loaded = _loads(built, source)
        plan, changed = _plan(layers, loaded, source)
        left = {
            built.name(path): str(built.reason(layer)) for path, layer in built.layers.items() if path not in layers
        }
        job = ExportJob(
            source=source,
            out=out,
            layout=LAYOUTS[layout],
            layers=plan,
            dtype=built.config.model_config.dtype,
            block_size=resolved.block_size,
            ignore=_ignore(plan, source),
            settings=_noted(resolved),
            shard_bytes=shard_bytes,
        )
        _check(resolved, layout)
        device = torch.device(built.config.device_config.device)
        by_name = {layer.quant_method.name: layer for layer in layers.values()}
        with set_current_vllm_config(built.config):
            export(job, functools.partial(_quantize, by_name, device))
    written = Checkpoint(out)
    return Exported(
        quantized=[layer.name for layer in plan],
        left=left | changed,
        bytes_read=sum((source.directory / file).stat().st_size for file in source.files),
        bytes_written=sum((out / file).stat().st_size for file in written.files),
    )


def _check(settings: Any, layout: str) -> None:
    """Raise ValueError where a layout cannot say what the settings make."""
    if settings.global_scale == "amax_per_member" and not LAYOUTS[layout].any_blocks:
        raise ValueError(
            f"global_scale: amax_per_member cannot be written as {layout}: vLLM takes the largest of its global scales "
            "for all members of a fused layer; set global_scale: amax, or --format qwantize"
        )


def _quantize(
    layers: dict[str, LinearBase], device: torch.device, planned: ExportLayer, weight: torch.Tensor
) -> list[Nvfp4Tensor]:
    layer = layers[planned.name]
    method: QwantizeLinearMethod = layer.quant_method
    return [q for _, q in method.quantized_parts(layer, weight.to(device))]


def _noted(settings: Any) -> dict[str, Any]:
    """Of the settings, what the result follows from, and no paths: it is published with the checkpoint."""
    values = settings.model_dump(mode="json", exclude={"cache_dir", "backend", "strict"})
    return {"version": __version__, **values, "hessian": _file(settings.hessian)}


def _file(path: Path | None) -> list[Any] | None:
    """A file by its name and what changes when its content does."""
    return None if path is None else [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def _directory(config: Any) -> str:
    """Where the checkpoint lies; downloads one that is a name."""
    name = config.model_config.model
    if Path(name).is_dir():
        return str(name)
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    cache, revision = config.load_config.download_dir, config.model_config.revision
    for pattern in patterns:
        directory: str = download_weights_from_hf(name, cache, [pattern], revision)
    return directory


@dataclasses.dataclass(frozen=True)
class _Load:
    """A call of a weight loader: which tensor of the checkpoint goes to which part of a parameter, if it is whole."""

    tensor: str | None
    part: int | str | None


def _loads(built: MetaModel, source: Checkpoint) -> dict[tuple[str, str], list[_Load]]:
    """By module and parameter, what vLLM loads into it."""
    found: dict[tuple[str, str], list[_Load]] = {}
    handed_out: dict[int, tuple[str, torch.Tensor]] = {}

    def note(key: tuple[str, str], param: Any, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name, tensor = handed_out.get(id(loaded), (None, None))
        part = args[0] if args else next(iter(kwargs.values()), None)
        found.setdefault(key, []).append(_Load(name if tensor is loaded else None, part))
        return True  # loaders of experts say whether they have loaded

    for path, module in built.model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            param.weight_loader = functools.partial(note, (path, name))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in source.tensors.items():
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            handed_out[id(tensor)] = name, tensor  # which keeps it, so that its id stays its own
            yield name, tensor

    with set_default_torch_dtype(built.config.model_config.dtype), set_current_vllm_config(built.config):
        built.model.load_weights(tensors())
    return found


def _plan(
    layers: dict[str, LinearBase], loaded: dict[tuple[str, str], list[_Load]], source: Checkpoint
) -> tuple[list[ExportLayer], dict[str, str]]:
    """The layers that can be exported, and why others cannot."""
    plan, left = [], {}
    taken: set[str] = set()
    for path, layer in layers.items():
        name = layer.quant_method.name
        loads = sorted(loaded.get((path, "weight"), []), key=lambda load: _order(load.part))
        names = tuple(load.tensor for load in loads if load.tensor is not None)
        shapes = [source.tensors[each].shape for each in names]
        if len(names) == len(loads) and sum(shape[0] for shape in shapes) < layer.weight.shape[0]:
            raise ValueError(
                f"the checkpoint lacks weights of {name}: of its {layer.weight.shape[0]} rows it has those of "
                f"{', '.join(names) or 'none'}; is it that of another model?"
            )
        if len(names) < len(loads) or not _fits(layer, shapes):
            left[name] = "vLLM does not load its weight as it lies in the checkpoint"
        elif not all(each.endswith(".weight") for each in names) or not taken.isdisjoint(names):
            left[name] = "its tensors are called otherwise than .weight, or are another layer's too"
        else:
            taken.update(names)
            plan.append(ExportLayer(name, names))
    for name, reason in left.items():
        logger.warning("qwantize: %s is left unquantized: %s", name, reason)
    return plan, left


def _order(part: int | str | None) -> int:
    return {"q": 0, "k": 1, "v": 2}[part] if isinstance(part, str) else part or 0


def _fits(layer: LinearBase, shapes: list[tuple[int, ...]]) -> bool:
    weight = layer.weight
    whole = all(len(shape) == 2 and shape[1] == weight.shape[1] for shape in shapes)
    return whole and sum(shape[0] for shape in shapes) == weight.shape[0]


def _ignore(plan: list[ExportLayer], source: Checkpoint) -> list[str]:
    """Modules with a matrix for a weight that are not quantized, by the checkpoint's names; a tied head too."""
    quantized = {weight for layer in plan for weight in layer.weights}
    left = [
        name.removesuffix(".weight")
        for name, info in source.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in quantized
    ]
    return list(dict.fromkeys(["lm_head", *left]))
