"""Which checkpoints hold NVFP4 already, by what their quantization_config says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwantize_vllm.checkpoint import LAYOUTS, Layout

_MODELOPT_ALGORITHMS = {"NVFP4": True, "W4A16_NVFP4": False}  # whether activations are quantized too


@dataclasses.dataclass(frozen=True)
class Packed:
    """What a quantization_config says that a checkpoint holds.

    Attributes:
        activations: whether it asks for activations of four bits too.
    """

    layout: Layout
    block_size: int
    activations: bool


def packed_of(config: Mapping[str, Any]) -> Packed:
    """Of a checkpoint's quantization_config.

    Raises:
        ValueError: it is quantized otherwise; names the method.
    """
    method = str(config.get("quant_method", "modelopt" if "quantization" in config else "")).lower()
    if method == "qwantize" and config.get("packed"):
        return Packed(LAYOUTS["qwantize"], int(config.get("block_size", 16)), False)
    if method == "compressed-tensors":
        if transforms := _online_transforms(config):
            raise _refusal(f"compressed-tensors with transforms of activations ({', '.join(transforms)})")
        groups = [group for group in dict(config.get("config_groups") or {}).values() if not _of_attention(group)]
        kinds = {_kind(group.get("weights")) for group in groups}
        if kinds == {"NVFP4"}:
            activations = any(group.get("input_activations") for group in groups)
            return Packed(LAYOUTS["compressed-tensors"], 16, activations)
        raise _refusal(f"compressed-tensors with {' and '.join(sorted(kinds)) or 'no'} weights")
    if method.startswith("modelopt"):
        algorithm = str(config.get("quantization", config).get("quant_algo", "")).upper()
        if algorithm in _MODELOPT_ALGORITHMS:
            return Packed(LAYOUTS["modelopt"], 16, _MODELOPT_ALGORITHMS[algorithm] and not _weight_only(config))
        raise _refusal(f"ModelOpt {algorithm or 'without a quant_algo'}")
    raise _refusal(method or "a method that is not named")


def _online_transforms(config: Mapping[str, Any]) -> list[str]:
    """Where activations are to be multiplied by matrices that weights were multiplied by, as in QuIP and SpinQuant."""
    schemes = dict((config.get("transform_config") or {}).get("config_groups") or {}).values()
    locations = {str(each.get("location")) for scheme in schemes for each in scheme.get("apply") or ()}
    return sorted(locations - {"weight_input", "weight_output"})


def _of_attention(group: Mapping[str, Any]) -> bool:
    """Whether a group says how attention is computed, not what weights are; vLLM drops it too."""
    targets = list(group.get("targets") or ())
    return len(targets) == 1 and str(targets[0]).endswith("Attention")


def _kind(weights: Mapping[str, Any] | None) -> str:
    if not weights:
        return "unquantized"
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"), weights.get("group_size"))
    if kind == (4, "float", "tensor_group", 16) and weights.get("symmetric", True):
        return "NVFP4"
    return "{1}{0} ({2})".format(*kind)


def _weight_only(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups")
    return bool(groups) and all(group.get("input_activations") is None for group in dict(groups or {}).values())


def _refusal(method: str) -> ValueError:
    return ValueError(
        "--quantization qwantize takes unquantized checkpoints, and NVFP4 ones of compressed-tensors and ModelOpt; "
        f"this one is quantized already, by {method}. Leave --quantization out to have vLLM serve it, or take the "
        "unquantized checkpoint"
    )
