"""Dequantize and multiply in one Triton kernel, from the swizzled weight: for tokens so few that reading W is the cost.

y = x W' is computed as W x', tiles of 64 rows on the left. `swizzle.py` has put every code where the product wants it:
a tile is loaded in pieces of 16 bytes a thread, its axes are renamed by reshape and permute, which moves nothing, and
what comes out of a shift, a mask and one multiplication by the block scale is the operand. value * block_scale is
exact in x's dtype (six significant bits), products accumulate in float32, the global scale and the bias enter at
the end.

So that few rows still fill the GPU, K is cut into `splits` slices. The program that comes last to a tile adds the
partial sums in the order of the slices: one launch, and the result does not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.gpu import multiprocessors
from qwantize_vllm.matmul.swizzle import ARRIVALS, COLUMNS, ROWS, SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import TileShape
from qwantize_vllm.matmul.triton_fragments import (
    TILE_COLUMNS,
    TILE_ROWS,
    block_values,
    load_scales,
    load_words,
    rescale,
)
from qwantize_vllm.triton_launch import Launch, launch_now

# Slices of K: so many programs a multiprocessor (more where a program has little to do), as far as none gets shorter or
# longer than so many tiles of 64 columns.
_PROGRAMS_FOR_FEW, _PROGRAMS, _FEW_TOKENS = 4, 3, 16
_SHORTEST, _LONGEST = 16, 64


def matmul_swizzled(
    x: torch.Tensor,
    weight: SwizzledNvfp4,
    bias: torch.Tensor | None,
    shape: TileShape,
    *,
    split: bool = True,
    launch: Launch = launch_now,
) -> torch.Tensor:
    """x (M, K) bfloat16 or float16, contiguous rows -> (M, N) in x's dtype.

    bias: (N,), contiguous, any float dtype, or None. shape: see tile_shapes.py.
    split: whether K may be cut into slices. How many depends on M, and the last bits with it.
    launch: what else to do with the kernel than to run it (compile_ahead.py).

    Not for two streams at once with one weight: they would share `weight.arrived`.
    """
    m, (n, k) = x.shape[0], weight.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    groups, tiles = weight.words.shape[:2]
    token_tiles, row_tiles = triton.cdiv(m, shape.tokens), triton.cdiv(groups, shape.groups)
    splits = _splits(x.device, shape.tokens, token_tiles * row_tiles, tiles) if split else 1
    size = token_tiles * row_tiles * shape.tokens * shape.groups * ROWS
    partial = torch.empty(splits * size if splits > 1 else 0, dtype=torch.float32, device=x.device)
    launch(
        _swizzled_kernel,
        (token_tiles, row_tiles, splits),
        x,
        weight.words,
        weight.scales,
        weight.global_scale,
        bias,
        partial,
        weight.arrived,
        y,
        m,
        n,
        k,
        groups,
        tiles,
        x.stride(0),
        weight.global_scale.dim(),
        BLOCK_SIZE=weight.block_size,
        TILE_M=shape.tokens,
        GROUPS=shape.groups,
        STEPS=shape.steps,
        WHOLE_K=k % (shape.steps * COLUMNS) == 0,
        HAS_BIAS=bias is not None,
        PTX=x.is_cuda and torch.version.hip is None,
        STAGES=shape.stages,
        num_warps=shape.warps,
        **dependent_launch(x.device),
    )
    return y


def _splits(device: torch.device, tokens: int, programs: int, tiles: int) -> int:
    """Slices of K, a power of two, where one slice makes so many programs, each of so many tokens and tiles."""
    if programs > ARRIVALS:
        return 1
    wanted = (_PROGRAMS_FOR_FEW if tokens <= _FEW_TOKENS else _PROGRAMS) * multiprocessors(device) // programs
    splits = max(1, min(tiles // _SHORTEST, max(wanted, triton.cdiv(tiles, _LONGEST))))
    return 1 << (splits.bit_length() - 1)


# Else every number of tokens that is 1, or a multiple of 16, would be compiled for.
@triton.jit(do_not_specialize=["m", "groups", "tiles"])
def _swizzled_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    global_scale_ptr,
    bias_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    m,
    n,
    k,
    groups,
    tiles,
    x_stride,
    global_scale_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    # Neighbouring programs share their weights and differ in their tokens.
    split, splits = tl.program_id(2), tl.num_programs(2)
    token = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    first = tl.program_id(1) * GROUPS
    x_ptr += token.to(tl.int64)[None, :] * x_stride
    inside = (token < m)[None, :]
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((GROUPS * TILE_ROWS, TILE_M), dtype=tl.float32)
    turns = tl.cdiv(tiles, STEPS)
    for turn in tl.range(split * turns // splits, (split + 1) * turns // splits, num_stages=STAGES):
        words = load_words(words_ptr, first, groups, turn * STEPS, tiles, GROUPS, STEPS, WHOLE_K)
        scales = load_scales(scales_ptr, first, groups, turn * STEPS, tiles, GROUPS, STEPS)
        start = turn * (STEPS * TILE_COLUMNS)
        x = _load_x(x_ptr, start + tl.arange(0, STEPS * TILE_COLUMNS), k, inside, WHOLE_K)
        weight = block_values(words, scales, dtype, BLOCK_SIZE, PTX)
        total = _product(weight, x, total, PTX)
    total *= rescale(dtype, PTX)
    row = first * TILE_ROWS + tl.arange(0, GROUPS * TILE_ROWS)
    if splits > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = GROUPS * TILE_ROWS * TILE_M
        inner = tl.arange(0, GROUPS * TILE_ROWS)[:, None] * TILE_M + tl.arange(0, TILE_M)[None, :]
        partials = partial_ptr + tile.to(tl.int64) * splits * size + inner
        tl.store(partials + split * size, total)
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == splits - 1
        if last:
            total = tl.zeros((GROUPS * TILE_ROWS, TILE_M), dtype=tl.float32)
            for part in range(splits):
                total += tl.load(partials + part * size, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
            _store(y_ptr, total, global_scale_ptr, global_scale_stride, bias_ptr, row, token, m, n, HAS_BIAS)
    else:
        _store(y_ptr, total, global_scale_ptr, global_scale_stride, bias_ptr, row, token, m, n, HAS_BIAS)


@triton.jit
def _load_x(x_ptr, column, k, inside, WHOLE_K: tl.constexpr):
    """x' (columns, tokens), zero beyond the end."""
    if not WHOLE_K:
        inside = inside & (column < k)[:, None]
    return tl.load(x_ptr + column[:, None], mask=inside, other=0.0)


@triton.jit
def _product(weight, x, total, PTX: tl.constexpr):
    """total + weight x, when it is there.

    On Hopper an instruction of no length that uses the sum makes the asynchronous product end here. Otherwise Triton
    3.6 lets it run on while the registers of its left operand take the next tile: on an H200 one shape, of 256 rows by
    128 tokens, gave wrong sums so; the others were right by luck.
    """
    if PTX:
        total = tl.dot(weight, x, total)
        return tl.inline_asm_elementwise("", "=r,0", [total], dtype=tl.float32, is_pure=True, pack=1)
    else:
        # The interpreter multiplies the bit patterns of bfloat16: the product is taken in float32.
        return tl.dot(weight, x.to(tl.float32), total, input_precision="ieee")


@triton.jit
def _store(y_ptr, total, global_scale_ptr, global_scale_stride, bias_ptr, row, token, m, n, HAS_BIAS: tl.constexpr):
    """y = total * global_scale + bias."""
    there = row < n
    y = total * tl.load(global_scale_ptr + row * global_scale_stride, mask=there, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=there, other=0.0).to(tl.float32)[:, None]
    offsets = token.to(tl.int64)[None, :] * n + row[:, None]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=there[:, None] & (token < m)[None, :])
