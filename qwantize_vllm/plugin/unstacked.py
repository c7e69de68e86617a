"""Names for experts that lie stacked in a checkpoint and are written one by one, and whether vLLM loads them by these.

Every loader of vLLM that takes NVFP4 experts takes them one by one, but not all know such names for a model, and some
not beside stacked ones. So the names are tried: on the model as the export would be served, without its bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts

from qwantize_vllm.checkpoint import Checkpoint, Layout
from qwantize_vllm.checkpoint.export import ExportLayer
from qwantize_vllm.plugin.inspection import MetaModel
from qwantize_vllm.plugin.noted_loads import Described, Load, noted_loads


@dataclasses.dataclass(frozen=True)
class Unstacked:
    """A matrix of an expert with a name that the checkpoint does not have.

    Attributes:
        name: under which it is written; `.weight` and so on follow.
        path: of the module that loads it.
        weight: w13 or w2.
        shard: vLLM's name for the part of it.
        expert: its number in the model.
    """

    name: str
    path: str
    weight: str
    shard: int | str | tuple[int, ...] | None
    expert: int | None


def unstacked_name(layer: RoutedExperts, layer_name: str, load: Load) -> str:
    """As checkpoints have it whose experts lie one by one: `model.layers.3.mlp.experts.17.gate_proj`.

    The stacked tensor's name begins alike; where it says nothing of experts, vLLM's name of the layer does.
    """
    parts = str(load.tensor).split(".")
    at = ".".join(parts[: parts.index("experts") + 1]) if "experts" in parts else layer_name
    projections = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
    return f"{at}.{load.expert}.{projections[str(load.shard)]}"


def why_not_unstacked(
    built: MetaModel,
    source: Checkpoint,
    layers: Sequence[ExportLayer],
    unstacked: Sequence[Unstacked],
    layout: Layout,
    quantization_config: dict[str, Any],
) -> str | None:
    """Why vLLM would not load each of `unstacked` where it belongs from an export of these layers; None if it does.

    Files and tensors come in an order of vLLM's own: tried are that of `written`, and its reverse.
    """
    block_size = built.quantization.settings.block_size
    tensors = written(source, layers, layout, block_size)
    wanted = {
        ((each.path, f"{each.weight}_{part}"), Load(f"{each.name}.{part}", None, each.shard, each.expert))
        for each in unstacked
        for part in layout.names
    }
    exported = built.exported(quantization_config)
    for order in (tensors, tensors[::-1]):
        try:
            loads = noted_loads(exported, order)
        except Exception as error:  # whatever a model's own loader raises: it is the reason that is asked for
            return f"vLLM does not load its experts one by one: {type(error).__name__}: {error}"
        missing = wanted - {(key, load) for key, each in loads.items() for load in each if load.expert is not None}
        if missing:
            name = min(str(load.tensor) for _, load in missing)
            return f"vLLM does not load its experts one by one: {name} would not arrive"
    return None


def written(source: Checkpoint, layers: Sequence[ExportLayer], layout: Layout, block_size: int) -> list[Described]:
    """The tensors of an export: first those that are copied."""
    taken = {member.tensor for layer in layers for member in layer.members}
    copied = [(name, info.dtype, info.shape) for name, info in source.tensors.items() if name not in taken]
    members = [member for layer in layers for member in layer.members]
    shapes = [member.shape(source) for member in members]
    described = [layout.described(each.name, n, k, block_size) for each, (n, k) in zip(members, shapes, strict=True)]
    return copied + [(name, *what) for each in described for name, what in each.items()]
