"""`qwantize export` by the code that would serve: vLLM says which tensors make up which layer, the plugin quantizes.

The model is built on the meta device, where the plugin decides layer by layer as it does in an engine.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from qwantize_vllm import __version__
from qwantize_vllm.checkpoint import LAYOUTS, Checkpoint
from qwantize_vllm.checkpoint.export import ExportJob, check_out, export
from qwantize_vllm.plugin.engine_process import in_own_process
from qwantize_vllm.plugin.export_plan import plan_export
from qwantize_vllm.plugin.inspection import MetaModel, one_rank


@dataclasses.dataclass(frozen=True)
class Exported:
    """What became of a checkpoint.

    Attributes:
        quantized: names of the layers, as vLLM has them.
        left: of linear layers and experts that are not, with the reason.
        by_optimal: of the quantized ones, which `optimal` searched although `hessian` was asked for, with the reason.
        unused: patterns of `ignore` that name no layer.
        bytes_read, bytes_written: of safetensors files.
    """

    quantized: list[str]
    left: dict[str, str]
    by_optimal: dict[str, str]
    unused: list[str]
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
        _check(resolved, layout)
        source = Checkpoint(_directory(built.config))
        plan = plan_export(built, source, LAYOUTS[layout])
        by_optimal = _by_optimal(built, plan.quantized)
        job = ExportJob(
            source=source,
            out=out,
            layout=LAYOUTS[layout],
            layers=plan.weights,
            dtype=built.config.model_config.dtype,
            block_size=resolved.block_size,
            ignore=plan.ignore,
            settings=_noted(resolved) | ({"by_optimal": by_optimal} if by_optimal else {}),
            shard_bytes=shard_bytes,
        )
        device = torch.device(built.config.device_config.device)
        with set_current_vllm_config(built.config):
            export(job, lambda planned, weight: plan.quantize[planned.name](weight.to(device)))
    written = Checkpoint(out)
    return Exported(
        quantized=plan.quantized,
        left=plan.left,
        by_optimal=by_optimal,
        unused=built.unused,
        bytes_read=sum((source.directory / file).stat().st_size for file in source.files),
        bytes_written=sum((out / file).stat().st_size for file in written.files),
    )


def _check(settings: Any, layout: str) -> None:
    """Raise ValueError where a layout cannot say what the settings make."""
    if settings.global_scale == "amax_per_member" and not LAYOUTS[layout].any_blocks:
        raise ValueError(
            f"global_scale: amax_per_member cannot be written as {layout}: vLLM takes the largest of its global scales "
            "for all members of a fused layer, of experts the first; set global_scale: amax, or --format qwantize"
        )


def _by_optimal(built: MetaModel, quantized: list[str]) -> dict[str, str]:
    methods = [layer.quant_method for layer in (built.layers | built.experts).values() if built.reason(layer) is None]
    return {each.name: each.why_optimal for each in methods if each.name in quantized and each.why_optimal is not None}


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
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "*.md", "LICENSE*"]
    cache, revision = config.load_config.download_dir, config.model_config.revision
    for pattern in patterns:
        directory: str = download_weights_from_hf(name, cache, [pattern], revision)
    return directory
