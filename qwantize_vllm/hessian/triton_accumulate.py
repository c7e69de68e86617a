"""Block Hessians of a batch of activations, each read once, in its own dtype.

    H_j += sum over tokens of x_j x_j',    x_j the j-th block of a token's activations

A warp has one block, whose H stays in its registers: 16 tokens at a time are x' x on the tensor cores, products of
bfloat16 or float16 exact in float32. The tokens are taken in their order, so the sum does not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.triton_launch import launch_now

_TOKENS, _STAGES = 64, 4


def add_blocks(total: torch.Tensor, activations: torch.Tensor) -> None:
    """Add the block Hessians of activations (tokens, K), any float dtype, to total, float32 (K/size, size, size)."""
    blocks, size, _ = total.shape
    tokens = activations.shape[0]
    if tokens:
        strides = activations.stride()
        # Half formats go to the tensor cores as they are; the interpreter multiplies the bit patterns of bfloat16.
        exact = not (activations.is_cuda and activations.itemsize == 2)
        constants = {"SIZE": size, "TOKENS": _TOKENS, "STAGES": _STAGES, "FLOAT32": exact, "num_warps": 1}
        launch_now(_add_blocks_kernel, (blocks,), activations, total, tokens, *strides, **constants)


@triton.jit(do_not_specialize=["tokens"])
def _add_blocks_kernel(
    x_ptr,
    total_ptr,
    tokens,
    stride_m,
    stride_k,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    element = tl.arange(0, SIZE)
    token = tl.arange(0, TOKENS)
    block = tl.program_id(0)
    x_ptr += (block * SIZE + element)[None, :] * stride_k
    total_ptr += block.to(tl.int64) * SIZE * SIZE + element[:, None] * SIZE + element[None, :]
    total = tl.load(total_ptr)
    for start in tl.range(0, tokens, TOKENS, num_stages=STAGES):
        there = start + token < tokens
        x = tl.load(x_ptr + (start + token).to(tl.int64)[:, None] * stride_m, mask=there[:, None], other=0.0)
        if FLOAT32:
            x = x.to(tl.float32)
        total = tl.dot(tl.trans(x), x, total, input_precision="ieee")
    tl.store(total_ptr, total)
