"""Dequantize and multiply on Hopper, in Gluon: for so many tokens that tensor cores are what the product costs.

y = x W' is computed as W x', like in triton_swizzled.py, from the same layout. Triton waits for every asynchronous
product before it decodes the next weights; here both run at once:

- One warp, the producer, has the TMA bring tiles of x, words and scales to shared memory, several ahead.
- Two or three warp groups, the consumers, have 64 rows of W each. While the tensor cores multiply a tile of 64 columns
  in one set of registers, a group decodes the next tile into another set, and starts that product before it waits for
  the first.
- Programs stay: each takes tile after tile of the result, and the producer loads the next one's operands while the
  consumers store the last one's result (TMA again, through shared memory, which transposes it).

Tiles of the result seldom fill the last round of all multiprocessors. Where that leaves room, the tiles of the last
round are cut along K; the program that comes last to a tile adds the partial sums in the order of the slices, so the
result does not change from run to run.

Registers that an asynchronous product reads must stay as they are until it ends. Nothing in the language promises
that; warpgroup_mma_wait keeps its `deps` alive, so the operands are among them, and tests/wgmma_hazards.py reads the
machine code.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qwantize_vllm.matmul.gluon_fragments import decode_tile, load_scales
from qwantize_vllm.matmul.gpu import Launch, launch_now, multiprocessors
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.wgmma_shapes import WgmmaShape, choose_wgmma_shape, rounds

# Their names in Triton 3.6 are the latter ones.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
# Four tiles of 64 columns at a time: what 16 bytes of a row's scales belong to.
_CHUNK = gl.constexpr(4)
_CHUNK_WORDS = gl.constexpr(8192)  # bytes
_TOKENS_IN_CACHE = gl.constexpr(1024)

X_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
FLAT_LAYOUTS = {
    torch.int16: gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=16, rank=2),
    torch.int32: gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2),
}


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
    launch: Launch = launch_now,
) -> torch.Tensor:
    """x (M, K) bfloat16 or float16, as `why_not_wgmma` asks -> (M, N) in x's dtype.

    bias: (N,), any float dtype, or None. shape: default the one that wgmma_shapes.py chooses.
    launch: what else to do with the kernel than to run it (compile_ahead.py).

    Not for two streams at once with one weight: they would share `weight.arrived`.
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
    partial = torch.empty(
        last * splits * shape.groups * 64 * shape.tokens if splits > 1 else 0, dtype=torch.float32, device=x.device
    )
    works = whole + last * splits
    scale_words = 64 * _CHUNK.value
    launch(
        _wgmma_kernel,
        (min(works, programs),),
        TensorDescriptor(x, [m, weight.shape[1]], [x.stride(0), 1], [shape.tokens, 64], X_LAYOUT),
        _rows(weight.words, 256, 4 * _CHUNK.value),
        _rows(weight.scales, scale_words, 1),
        TensorDescriptor(y, [m, n], [n, 1], [shape.tokens, 64], X_LAYOUT),
        weight.global_scale,
        bias,
        partial,
        weight.arrived,
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
    )
    return y


def _rows(tensor: torch.Tensor, length: int, count: int) -> TensorDescriptor:
    """A contiguous tensor as rows of so many elements, so many at a time."""
    return TensorDescriptor(
        tensor, [tensor.numel() // length, length], [length, 1], [count, length], FLAT_LAYOUTS[tensor.dtype]
    )


@gluon.jit
def _place(work, extent, TOKENS: gl.constexpr):
    """Of a work: its tile of tokens and of rows, its first chunk and the one after its last; then, where K is cut,
    which slice it is, of how many, and of which tile of the last round.

    Neighbours share their rows, as far as all their tokens stay in the L2 cache.
    """
    _, chunks, whole, _, token_tiles, row_tiles, splits = extent
    NEIGHBOURS: gl.constexpr = _TOKENS_IN_CACHE // TOKENS
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
def _produce(operands, buffers, extent):
    x_desc, words_desc, scales_desc = operands
    x_bufs, words_bufs, scales_bufs, x_ready, x_empty, ready, empty = buffers
    tiles, chunks, works = extent[0], extent[1], extent[3]
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = words_bufs.shape[0] // STAGES
    X_STAGES: gl.constexpr = x_ready.shape[0]
    X_TILES: gl.constexpr = x_bufs.shape[0] // X_STAGES
    TOKENS: gl.constexpr = x_bufs.shape[1]
    BYTES: gl.constexpr = GROUPS * (_CHUNK_WORDS + 256 * scales_desc.dtype.primitive_bitwidth // 8)
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        token, row, start, end, _, _, _ = _place(work, extent, TOKENS)
        for chunk in range(start, end):
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), BYTES)
            for part in gl.static_range(GROUPS):
                group, slot = row * GROUPS + part, stage * GROUPS + part
                first = (group * tiles + chunk * _CHUNK) * 4
                _load(words_desc, [first, 0], ready.index(stage), words_bufs.index(slot))
                first = group * chunks + chunk
                _load(scales_desc, [first, 0], ready.index(stage), scales_bufs.index(slot))
            for tile in gl.static_range(_CHUNK):
                x_turn = turn * (_CHUNK // X_TILES) + tile // X_TILES
                stage = x_turn % X_STAGES
                if tile % X_TILES == 0:
                    mbarrier.wait(x_empty.index(stage), ((x_turn // X_STAGES) & 1) ^ 1)
                    mbarrier.expect(x_ready.index(stage), X_TILES * TOKENS * 128)
                place = [token * TOKENS, (chunk * _CHUNK + tile) * 64]
                _load(x_desc, place, x_ready.index(stage), x_bufs.index(stage * X_TILES + tile % X_TILES))
            turn += 1


@gluon.jit
def _start(acc, weight, running, buffers, turn, TILE: gl.constexpr):
    """Start acc + weight x of a tile of chunk `turn`. With its first plane under way, end the product before, whose
    weight is `running`, and give its x back; the first tile of a chunk has none before it."""
    x_bufs, x_ready, x_empty = buffers
    X_STAGES: gl.constexpr = x_ready.shape[0]
    X_TILES: gl.constexpr = x_bufs.shape[0] // X_STAGES
    x_turn = turn * (_CHUNK // X_TILES) + TILE // X_TILES
    stage = x_turn % X_STAGES
    if TILE % X_TILES == 0:
        mbarrier.wait(x_ready.index(stage), (x_turn // X_STAGES) & 1)
    x = x_bufs.index(stage * X_TILES + TILE % X_TILES).permute((1, 0))
    acc = warpgroup_mma(weight[0], x.slice(0, 16), acc, is_async=True)
    if TILE > 0:
        acc, _, _, _, _ = warpgroup_mma_wait(1, deps=(acc, running[0], running[1], running[2], running[3]))
        if TILE % X_TILES == 0:
            mbarrier.arrive(x_empty.index((x_turn - 1) % X_STAGES), count=1)
    acc = warpgroup_mma(weight[1], x.slice(16, 16), acc, is_async=True)
    acc = warpgroup_mma(weight[2], x.slice(32, 16), acc, is_async=True)
    return warpgroup_mma(weight[3], x.slice(48, 16), acc, is_async=True)


@gluon.jit
def _consume(buffers, extent, result, partials, PART: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    x_bufs, words_bufs, scales_bufs, x_ready, x_empty, ready, empty = buffers
    works = extent[3]
    x_buffers = (x_bufs, x_ready, x_empty)
    dtype: gl.constexpr = x_bufs.dtype
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = words_bufs.shape[0] // STAGES
    X_STAGES: gl.constexpr = x_ready.shape[0]
    X_TILES: gl.constexpr = x_bufs.shape[0] // X_STAGES
    TOKENS: gl.constexpr = x_bufs.shape[1]
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        token, row, start, end, split, parts, cut = _place(work, extent, TOKENS)
        total = gl.zeros((64, TOKENS), gl.float32, MMA)
        slot = turn % STAGES
        mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
        words = words_bufs.index(slot * GROUPS + PART)
        scales = load_scales(scales_bufs.index(slot * GROUPS + PART), DOT)
        even = decode_tile(words, 0, scales, dtype, BLOCK_SIZE, DOT)
        for chunk in range(start, end):
            words = words_bufs.index(turn % STAGES * GROUPS + PART)
            acc = _start(total, even, even, x_buffers, turn, 0)
            odd = decode_tile(words, 1, scales, dtype, BLOCK_SIZE, DOT)
            acc = _start(acc, odd, even, x_buffers, turn, 1)
            even = decode_tile(words, 2, scales, dtype, BLOCK_SIZE, DOT)
            acc = _start(acc, even, odd, x_buffers, turn, 2)
            odd = decode_tile(words, 3, scales, dtype, BLOCK_SIZE, DOT)
            acc = _start(acc, odd, even, x_buffers, turn, 3)
            mbarrier.arrive(empty.index(turn % STAGES), count=1)
            turn += 1
            slot = turn % STAGES
            mbarrier.wait(ready.index(slot), (turn // STAGES) & 1, pred=chunk + 1 < end)
            scales = load_scales(scales_bufs.index(slot * GROUPS + PART), DOT)
            even = decode_tile(words_bufs.index(slot * GROUPS + PART), 0, scales, dtype, BLOCK_SIZE, DOT)
            total, _, _, _, _ = warpgroup_mma_wait(0, deps=(acc, odd[0], odd[1], odd[2], odd[3]))
            mbarrier.arrive(x_empty.index((turn * (_CHUNK // X_TILES) - 1) % X_STAGES), count=1)
        group = row * GROUPS + PART
        if parts > 1:
            _finish_slice(total, result, partials, group, token * TOKENS, split, parts, cut * GROUPS + PART)
        else:
            _finish(total, result, group, token * TOKENS)
    tma.store_wait(0)


@gluon.jit
def _finish_slice(total, result, partials, group, token, split, parts, place):
    """Leave the sum of a slice of K for the program that comes last; that one adds all and stores the result."""
    partial_ptr, arrived_ptr = partials
    TOKENS: gl.constexpr = total.shape[1]
    MMA: gl.constexpr = total.type.layout
    inner = gl.arange(0, 64, gl.SliceLayout(1, MMA))[:, None] * TOKENS
    inner += gl.arange(0, TOKENS, gl.SliceLayout(0, MMA))[None, :]
    partial_ptr += place.to(gl.int64) * parts * (64 * TOKENS)
    gl.store(partial_ptr + split * (64 * TOKENS) + inner, total)
    _barrier()
    if gl.atomic_add(arrived_ptr + place, 1, sem="acq_rel") == parts - 1:
        total = gl.zeros((64, TOKENS), gl.float32, MMA)
        for part in range(parts):
            total += gl.load(partial_ptr + part * (64 * TOKENS) + inner, cache_modifier=".cg")
        gl.store(arrived_ptr + place, 0)
        _finish(total, result, group, token)


@gluon.jit
def _finish(total, result, group, token):
    """y = total * global_scale + bias."""
    y_desc, y_buf, global_scale_ptr, global_scale_stride, bias_ptr, n = result
    row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, total.type.layout))
    factor = gl.load(global_scale_ptr + row * global_scale_stride, mask=row < n, other=0.0)
    RESCALE: gl.constexpr = 2.0**8 if y_desc.dtype == gl.bfloat16 else 2.0**7
    y = total * (factor * RESCALE)[:, None]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + row, mask=row < n, other=0.0).to(gl.float32)[:, None]
    tma.store_wait(0)
    y_buf.permute((1, 0)).store(y.to(y_desc.dtype))
    fence_async_shared()
    _store(y_desc, [token, group * 64], y_buf)


_SIZES = ["n", "tiles", "chunks", "whole", "works", "token_tiles", "row_tiles", "splits", "global_scale_stride"]


# One program for every size; and Triton 3.6 fails to compile the one that knows `splits` to be 1.
@gluon.jit(do_not_specialize=_SIZES)
def _wgmma_kernel(
    x_desc,
    words_desc,
    scales_desc,
    y_desc,
    global_scale_ptr,
    bias_ptr,
    partial_ptr,
    arrived_ptr,
    n,
    tiles,
    chunks,
    whole,
    works,
    token_tiles,
    row_tiles,
    splits,
    global_scale_stride,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    X_TILES: gl.constexpr,
    X_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = x_desc.dtype
    x_bufs = gl.allocate_shared_memory(dtype, [X_STAGES * X_TILES, TOKENS, 64], x_desc.layout)
    y_bufs = gl.allocate_shared_memory(dtype, [GROUPS, TOKENS, 64], y_desc.layout)
    words_bufs = gl.allocate_shared_memory(words_desc.dtype, [STAGES * GROUPS, 16, 256], words_desc.layout)
    scales_bufs = gl.allocate_shared_memory(scales_desc.dtype, [STAGES * GROUPS, 1, 256], scales_desc.layout)
    x_ready, x_empty = _barriers(X_STAGES, GROUPS)
    ready, empty = _barriers(STAGES, GROUPS)
    operands = (x_desc, words_desc, scales_desc)
    buffers = (x_bufs, words_bufs, scales_bufs, x_ready, x_empty, ready, empty)
    extent = (tiles, chunks, whole, works, token_tiles, row_tiles, splits)
    partials = (partial_ptr, arrived_ptr)
    first = (y_desc, y_bufs.index(0), global_scale_ptr, global_scale_stride, bias_ptr, n)
    second = (y_desc, y_bufs.index(1), global_scale_ptr, global_scale_stride, bias_ptr, n)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (buffers, extent, first, partials, 0, BLOCK_SIZE)),
                (_consume, (buffers, extent, second, partials, 1, BLOCK_SIZE)),
                (_produce, (operands, buffers, extent)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        third = (y_desc, y_bufs.index(2), global_scale_ptr, global_scale_stride, bias_ptr, n)
        gl.warp_specialize(
            [
                (_consume, (buffers, extent, first, partials, 0, BLOCK_SIZE)),
                (_consume, (buffers, extent, second, partials, 1, BLOCK_SIZE)),
                (_consume, (buffers, extent, third, partials, 2, BLOCK_SIZE)),
                (_produce, (operands, buffers, extent)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _barriers(STAGES: gl.constexpr, GROUPS: gl.constexpr):
    """Barriers (STAGES,) each: that a buffer is full, told by the producer's copies; that it is empty, by consumers."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    return ready, empty
