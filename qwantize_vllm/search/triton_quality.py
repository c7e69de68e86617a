"""What `signal_and_noise` measures, in Triton: one pass over weight and codes, that no dense copy is made for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.search.triton_tiles import to_float32
from qwantize_vllm.triton_format import decode_e2m1, decode_e4m3
from qwantize_vllm.triton_launch import Launch, launch_now

_TILE = 2048  # bytes of codes a program
_INTERPRETER_TILE = 2**16


def signal_and_noise_triton(
    weight: torch.Tensor, q: Nvfp4Tensor, launch: Launch = launch_now
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum w^2, sum (w - q)^2) of a contiguous (N, K) weight, float64 scalars.

    In float32 over the elements of a program, some thousands, and in float64 over programs. launch: what else to do
    with the kernel than to run it.
    """
    count = q.codes.numel()
    tile = _INTERPRETER_TILE if weight.device.type == "cpu" else _TILE
    programs = triton.cdiv(count, tile)
    sums = torch.empty(2, programs, dtype=torch.float64, device=weight.device)
    launch(
        _quality_kernel,
        (programs,),
        weight,
        q.codes.contiguous(),
        q.block_scales.contiguous().view(torch.uint8),
        q.global_scale,
        sums,
        count,
        BLOCK_BYTES=q.block_size // 2,
        TILE=tile,
        num_warps=8,
    )
    signal, noise = sums.sum(1)
    return signal, noise


@triton.jit
def _quality_kernel(
    weight_ptr,
    codes_ptr,
    scales_ptr,
    global_scale_ptr,
    sums_ptr,
    count,
    BLOCK_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """count: bytes of codes, two weights each."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there, nibble = index < count, tl.arange(0, 2)[None, :]
    codes = tl.load(codes_ptr + index, mask=there, other=0).to(tl.int32)
    scale = decode_e4m3(tl.load(scales_ptr + index // BLOCK_BYTES, mask=there, other=0))
    weight = to_float32(tl.load(weight_ptr + index[:, None] * 2 + nibble, mask=there[:, None], other=0.0))
    value = decode_e2m1(codes[:, None] >> (4 * nibble)) * scale[:, None]
    error = weight - value * tl.load(global_scale_ptr)
    signal, noise = tl.sum(tl.sum(weight * weight, 1), 0), tl.sum(tl.sum(error * error, 1), 0)
    tl.store(sums_ptr + tl.program_id(0), signal.to(tl.float64))
    tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), noise.to(tl.float64))
