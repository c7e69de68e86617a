"""What is asked of the tensors of a checkpoint that holds NVFP4 already, of linear layers and of experts alike."""

from __future__ import annotations

import torch

from qwantize_vllm.checkpoint import Layout
from qwantize_vllm.plugin.packed_format import Packed


def input_scales(packed: Packed) -> list[str]:
    """What a checkpoint has for activations of four bits: read, because it is there, and forgotten."""
    if not packed.activations:
        return []
    return ["input_scale"] if packed.layout.name == "modelopt" else ["input_global_scale"]


def check_dtype(layer: str, name: str, layout: Layout, param: torch.Tensor, loaded: torch.Tensor) -> None:
    """Raise ValueError where a tensor of the checkpoint is not what its layout has; scalars may be of any dtype."""
    if loaded.dtype != param.dtype and param.dtype != torch.float32:
        raise ValueError(
            f"qwantize: {layer}: tensor {name} is {loaded.dtype} in the checkpoint, "
            f"{layout.name} has {param.dtype} there"
        )


def check_scales(layer: str, layout: Layout, block_scales: torch.Tensor, factors: torch.Tensor) -> None:
    """Raise ValueError where scales are none of NVFP4; factors: global scales to multiply by."""
    wrong = int((block_scales.view(torch.uint8) > 126).sum())  # NaN, or negative
    if wrong:
        raise ValueError(
            f"qwantize: {layer}: {layout.block_scales} holds {wrong} block scales that are NaN or negative; "
            "the checkpoint is damaged, or is not NVFP4"
        )
    bad = ~(factors.isfinite() & (factors > 0))
    if bool(bad.any()):
        raise ValueError(
            f"qwantize: {layer}: {layout.global_scale} gives the global scales {factors[bad].tolist()}, "
            "which must be positive and finite; the checkpoint is damaged, or is not NVFP4"
        )


def without_zero_scales(codes: torch.Tensor, block_scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same weights, their blocks of scale 0 with codes of 0 and scale 1: swizzled scales have no 0.

    codes: uint8 (..., K/2). block_scales: float8_e4m3fn (..., K/block_size). ModelOpt writes such scales where a block
    is tiny beside the largest weight.
    """
    zero = block_scales.view(torch.uint8) == 0
    if not bool(zero.any()):
        return codes, block_scales
    codes = codes.unflatten(-1, (block_scales.shape[-1], -1)).masked_fill(zero[..., None], 0).flatten(-2)
    one = torch.ones((), dtype=block_scales.dtype).view(torch.uint8).item()
    return codes, block_scales.view(torch.uint8).masked_fill(zero, one).view(block_scales.dtype)


def members_kept(layer: str, whose: str, members: int, before: int) -> int:
    """How many global scales a layer keeps whose weights, loaded now, have `members`; before: it kept so many, or 0.

    Raises:
        ValueError: more than before. Where weights are reloaded the tensor of scales stays where it is, in its size.
    """
    if members > before > 0:
        raise ValueError(
            f"qwantize: {layer}: {whose} have different global scales in the weights that are loaded now, and had the "
            "same one before; start the server anew with these weights"
        )
    return max(members, before)
