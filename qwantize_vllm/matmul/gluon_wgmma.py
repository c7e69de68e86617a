"""Dequantize and multiply on Hopper, in Gluon: for so many tokens that tensor cores are what the product costs.

Producer, consumers and buffers are those of gluon_pipeline.py. Programs stay: each takes tile after tile of the result,
and the producer loads the next one's operands while the consumers store the last one's result (TMA again, through
shared memory, which transposes it).

Tiles of the result seldom fill the last round of all multiprocessors. Where that leaves room, the tiles of the last
round are cut along K. The programs of a tile's slices share its tokens out among them: each gives the others its sums
for theirs, waits for those for its own (partial_sums.py) and adds them in the order of the slices from its own on. So
the result does not change from run to run, but a token's last bits depend on its place among the others.

They wait for each other, so all of them must run at once some time. No launch has more programs than there are
multiprocessors, and those of a tile have numbers next to each other. Where something else holds multiprocessors, GPUs
start programs in the order of their numbers, as far as is known; CUDA does not promise it. So of each launch at most
one tile has programs that wait for one that is not yet running: on at most 15 multiprocessors (_MOST_SLICES), whatever
else waits. All other programs end, and make room. Only if such launches of many streams ran into each other, one for
each 15 multiprocessors there are, could they hold them all.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.gluon_pipeline import (
    TOKENS_IN_CACHE,
    X_LAYOUT,
    load_chunk,
    make_buffers,
    multiply_chunks,
    store_tile,
    weight_descriptors,
)
from qwantize_vllm.matmul.gluon_sums import exchange_sums, finished_eights
from qwantize_vllm.matmul.gpu import multiprocessors
from qwantize_vllm.matmul.partial_sums import area_of_stream
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape, choose_wgmma_shape, rounds
from qwantize_vllm.triton_launch import Launch, launch_now

logger = logging.getLogger(__name__)

_LARGEST_TILE = max(shape.tokens * shape.groups * 64 for shape in STEPS)


def why_not_wgmma(x: torch.Tensor, weight: SwizzledNvfp4) -> str | None:
    """Why this kernel cannot multiply x (M, K); None where it can. The TMA moves 16 bytes from 16-byte addresses."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        where = f"strides {tuple(x.stride())}, an address {x.data_ptr() % 16} bytes past a multiple of 16"
        return f"needs rows of x that are contiguous and start at multiples of 16 bytes, got {where}"
    if weight.shape[0] % 8:
        return f"needs N to be a multiple of 8, got {weight.shape[0]}"
    return None


def matmul_wgmma(
    x: torch.Tensor,
    weight: SwizzledNvfp4,
    bias: torch.Tensor | None,
    shape: WgmmaShape | None = None,
    *,
    split: bool = True,
    launch: Launch = launch_now,
) -> torch.Tensor:
    """x (M, K) bfloat16 or float16, as `why_not_wgmma` asks -> (M, N) in x's dtype.

    bias: (N,), contiguous, any float dtype, or None. shape: default the one that wgmma_shapes.py chooses.
    split: whether K may be cut into slices. launch: what else to do with the kernel than to run it (compile_ahead.py).
    """
    m, n = x.shape[0], weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    groups, tiles = weight.words.shape[:2]
    chunks, programs = weight.scales.shape[1], multiprocessors(x.device)
    shape = shape or choose_wgmma_shape(m, groups, tiles, programs)
    token_tiles, row_tiles = triton.cdiv(m, shape.tokens), triton.cdiv(groups, shape.groups)
    whole, last, splits = rounds(shape, m, groups, tiles, programs)
    sums = area_of_stream(x.device, programs * _LARGEST_TILE) if split and splits > 1 else None
    if splits > 1 and sums is None:
        splits = 1
        if split:
            _tell_no_area()
            launch = launch_now  # not to be recorded (replay.py): there may be an area the next time
    works = whole + last * splits
    launch(
        _wgmma_kernel,
        (min(works, programs),),
        TensorDescriptor(x, [m, weight.shape[1]], [x.stride(0), 1], [shape.tokens, 64], X_LAYOUT),
        *weight_descriptors(weight.words, weight.scales),
        TensorDescriptor(y, [m, n], [n, 1], [shape.tokens, 64], X_LAYOUT),
        TensorDescriptor(y, [m, n], [n, 1], [8, 64], X_LAYOUT),
        weight.global_scale,
        bias,
        weight.arrived if sums is None else sums,  # of the type that the kernel is compiled for
        n,
        tiles,
        chunks,
        whole,
        works,
        token_tiles,
        row_tiles,
        splits,
        weight.global_scale.dim(),
        BLOCK_SIZE=weight.block_size,
        TOKENS=shape.tokens,
        GROUPS=shape.groups,
        X_TILES=shape.x_tiles,
        X_STAGES=shape.x_stages,
        STAGES=shape.stages,
        num_warps=4,
        **dependent_launch(x.device),
    )
    return y


@functools.cache
def _tell_no_area() -> None:
    logger.warning(
        "a CUDA graph is captured on a stream that has run no product yet: products whose K would be cut into slices "
        "are captured whole, which is slower; run the model once on that stream before"
    )


@gluon.jit
def _place(work, extent, TOKENS: gl.constexpr):
    """Of a work: its tile of tokens and of rows, its first chunk and the one after its last; then, where K is cut,
    which slice it is, of how many, and of which tile of the last round.

    Neighbours share their rows, as far as all their tokens stay in the L2 cache.
    """
    _, chunks, whole, _, token_tiles, row_tiles, splits = extent
    NEIGHBOURS: gl.constexpr = TOKENS_IN_CACHE // TOKENS
    last = gl.maximum(work - whole, 0)
    parts = gl.where(work < whole, 1, splits)
    tile = gl.minimum(work, whole) + last // parts
    split = last % parts
    band = tile // (NEIGHBOURS * row_tiles) * NEIGHBOURS
    width = gl.minimum(token_tiles - band, NEIGHBOURS)
    inside = tile % (NEIGHBOURS * row_tiles)
    start, end = split * chunks // parts, (split + 1) * chunks // parts
    return band + inside % width, inside // width, start, end, split, parts, last // parts


@gluon.jit
def _produce(operands, buffers, extent, DEPENDENT: gl.constexpr):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    tiles, chunks, works = extent[0], extent[1], extent[3]
    TOKENS: gl.constexpr = buffers[0].shape[1]
    GROUPS: gl.constexpr = buffers[1].shape[0] // buffers[5].shape[0]
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        token, row, start, end, _, _, _ = _place(work, extent, TOKENS)
        for chunk in range(start, end):
            load_chunk(operands, buffers, turn, chunk, row * GROUPS, token * TOKENS, tiles, chunks)
            turn += 1


@gluon.jit
def _consume(buffers, extent, result, sums_ptr, PART: gl.constexpr, BLOCK_SIZE: gl.constexpr, DEPENDENT: gl.constexpr):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    works = extent[3]
    TOKENS: gl.constexpr = buffers[0].shape[1]
    GROUPS: gl.constexpr = buffers[1].shape[0] // buffers[5].shape[0]
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        token, row, start, end, split, parts, cut = _place(work, extent, TOKENS)
        total, turn = multiply_chunks(buffers, start, end, turn, PART, BLOCK_SIZE)
        if parts > 1:
            total = exchange_sums(total, sums_ptr, cut * parts * GROUPS + PART, GROUPS, split, parts)
        _finish(total, result, row * GROUPS + PART, token * TOKENS, split, parts)
    tma.store_wait(0)


@gluon.jit
def _finish(total, result, group, token, split, parts):
    """y = total * global_scale + bias; where K is cut, of the tokens that this slice's program finishes."""
    y_desc, eight_desc, y_buf, global_scale_ptr, global_scale_stride, bias_ptr, n = result
    TOKENS: gl.constexpr = y_buf.shape[0]
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, total.type.layout))
    factor = gl.load(global_scale_ptr + row * global_scale_stride, mask=row < n, other=0.0)
    RESCALE: gl.constexpr = 2.0**8 if y_desc.dtype == gl.bfloat16 else 2.0**7
    y = total * (factor * RESCALE)[:, None]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32)[:, None]
    tma.store_wait(0)
    y_buf.permute((1, 0)).store(y.to(y_desc.dtype))
    fence_async_shared()
    if parts == 1:
        store_tile(y_desc, [token, group * 64], y_buf)
    else:
        eights = _as_eights(y_buf)
        first, behind = finished_eights(TOKENS, split, parts)
        for eight in range(first, behind):
            store_tile(eight_desc, [token + eight * 8, group * 64], eights.index(eight))


# Shared memory (tokens, 64) as (tokens/8, 8, 64), by its name in Triton 3.6 or the later one.
if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def _as_eights(buffer):
        return buffer.reinterpret(buffer.dtype, [buffer.shape[0] // 8, 8, 64], buffer.layout)

else:

    @gluon.jit
    def _as_eights(buffer):
        return buffer._reinterpret(buffer.dtype, [buffer.shape[0] // 8, 8, 64], buffer.layout)


_SIZES = ["n", "tiles", "chunks", "whole", "works", "token_tiles", "row_tiles", "splits", "global_scale_stride"]


# One program for every size; and Triton 3.6 fails to compile the one that knows `splits` to be 1.
@gluon.jit(do_not_specialize=_SIZES)
def _wgmma_kernel(
    x_desc,
    words_desc,
    scales_desc,
    y_desc,
    eight_desc,
    global_scale_ptr,
    bias_ptr,
    sums_ptr,
    n,
    tiles,
    chunks,
    whole,
    works,
    token_tiles,
    row_tiles,
    splits,
    global_scale_stride,
    DEPENDENT: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    X_TILES: gl.constexpr,
    X_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    operands = (x_desc, words_desc, scales_desc)
    buffers = make_buffers(operands, GROUPS, X_TILES, X_STAGES, STAGES)
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, TOKENS, 64], y_desc.layout)
    extent = (tiles, chunks, whole, works, token_tiles, row_tiles, splits)
    first = (y_desc, eight_desc, y_bufs.index(0), global_scale_ptr, global_scale_stride, bias_ptr, n)
    second = (y_desc, eight_desc, y_bufs.index(1), global_scale_ptr, global_scale_stride, bias_ptr, n)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (buffers, extent, first, sums_ptr, 0, BLOCK_SIZE, DEPENDENT)),
                (_consume, (buffers, extent, second, sums_ptr, 1, BLOCK_SIZE, DEPENDENT)),
                (_produce, (operands, buffers, extent, DEPENDENT)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        third = (y_desc, eight_desc, y_bufs.index(2), global_scale_ptr, global_scale_stride, bias_ptr, n)
        gl.warp_specialize(
            [
                (_consume, (buffers, extent, first, sums_ptr, 0, BLOCK_SIZE, DEPENDENT)),
                (_consume, (buffers, extent, second, sums_ptr, 1, BLOCK_SIZE, DEPENDENT)),
                (_consume, (buffers, extent, third, sums_ptr, 2, BLOCK_SIZE, DEPENDENT)),
                (_produce, (operands, buffers, extent, DEPENDENT)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
