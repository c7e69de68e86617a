"""The experts of a mixture on Hopper, in Gluon: for so many tokens that tensor cores are what products cost.

Producer, consumers and buffers are those of gluon_pipeline.py. The TMA fetches adjacent
rows only, so a token is first copied to each of the tiles that its experts have in the plan (triton_plan.py). Then h
stays in the order of the plan, and what comes last, the sum over a token's experts, finds its parts by the plan.

Rows of gate and up lie eight by eight in turn: both of a row are in registers of one thread, and only h is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gluon_pipeline import (
    TOKENS_IN_CACHE,
    X_LAYOUT,
    Described,
    load_chunk,
    make_buffers,
    multiply_chunks,
    store_tile,
    weight_descriptors,
)
from qwantize_vllm.matmul.gpu import multiprocessors
from qwantize_vllm.matmul.grouped_shapes import choose_grouped_wgmma
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.matmul.triton_grouped import activate, sum_experts
from qwantize_vllm.matmul.triton_plan import make_plan, slots_for
from qwantize_vllm.matmul.wgmma_shapes import WgmmaShape
from qwantize_vllm.triton_launch import Launch

# Of h: half as wide as a tile of rows.
H_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
_COPY_COLUMNS = 1024
_activate = gluon.jit(activate.fn)


def why_not_wgmma(w13: SwizzledExperts, w2: SwizzledExperts) -> str | None:
    """Why this kernel cannot multiply by the weights; None where it can. The TMA wants rows of whole 16 bytes."""
    sizes = (w13.shape[1], w2.shape[1], w2.shape[0])
    return f"needs sizes that are multiples of 8, got {sizes}" if any(size % 8 for size in sizes) else None


def experts_wgmma(
    x: torch.Tensor,
    w13: SwizzledExperts,
    w2: SwizzledExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    shapes: tuple[WgmmaShape, WgmmaShape] | None = None,
    *,
    launch: Launch = launch_again,
) -> torch.Tensor:
    """As `experts_swizzled` of triton_grouped.py; shapes: of both products, with as many tokens; default those that
    grouped_shapes.py chooses."""
    y = torch.empty(x.shape[0], w2.shape[0], dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    pairs, experts, programs = topk_ids.numel(), w13.words.shape[0], multiprocessors(x.device)
    expected = w13.expected(pairs)
    for_gate_up, for_down = shapes or (choose_grouped_wgmma(expected, w.words.shape, programs) for w in (w13, w2))
    ids, tokens = topk_ids.reshape(-1).to(torch.int32), for_gate_up.tokens
    slots = slots_for(pairs, experts, tokens)
    plan, rows = make_plan(ids, experts, tokens, slots, launch), slots * tokens
    inputs, h, z = (
        torch.empty(rows, width, dtype=x.dtype, device=x.device)
        for width in (x.shape[1], w13.shape[0] // 2, w2.shape[0])
    )
    copy = (x, plan[slots:], inputs, x.shape[1], topk_ids.shape[1], x.stride(0))
    launch(_copy_kernel, (rows,), *copy, COLUMNS=_COPY_COLUMNS, num_warps=4, **dependent_launch(x.device))
    _launch(inputs, w13, plan, slots, h, for_gate_up, activation, launch)
    _launch(h, w2, plan, slots, z, for_down, "none", launch)
    sum_experts(z[None], topk_weights, ids, plan[slots + rows :], y, launch)
    return y


def _launch(
    x: torch.Tensor,
    weight: SwizzledExperts,
    plan: torch.Tensor,
    slots: int,
    y: torch.Tensor,
    shape: WgmmaShape,
    activation: str,
    launch: Launch,
) -> None:
    groups, tiles = weight.words.shape[1:3]
    row_tiles = -(-groups // shape.groups)
    works, width = slots * row_tiles, 64 if activation == "none" else 32
    y_layout = X_LAYOUT if activation == "none" else H_LAYOUT
    launch(
        _grouped_wgmma_kernel,
        (min(works, multiprocessors(x.device)),),
        Described(x, list(x.shape), [x.stride(0), 1], [shape.tokens, 64], X_LAYOUT),
        *weight_descriptors(weight.words, weight.scales),
        Described(y, list(y.shape), [y.stride(0), 1], [shape.tokens, width], y_layout),
        weight.global_scales,
        plan,
        tiles,
        weight.scales.shape[2],
        groups,
        plan.numel() - 1,
        row_tiles,
        MEMBERS=weight.global_scales.shape[1],
        BLOCK_SIZE=weight.block_size,
        ACTIVATION=activation,
        TOKENS=shape.tokens,
        GROUPS=shape.groups,
        X_TILES=shape.x_tiles,
        X_STAGES=shape.x_stages,
        STAGES=shape.stages,
        num_warps=4,
        **dependent_launch(x.device),
    )


@triton.jit(do_not_specialize_on_alignment=["pairs_ptr"])  # a part of a plan
def _copy_kernel(x_ptr, pairs_ptr, out_ptr, k, top_k, x_stride, COLUMNS: tl.constexpr, DEPENDENT: tl.constexpr):
    """Row i of the result is that of x whose token pair i of the plan has; others are left as they are."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(pairs_ptr + row)
    if pair < 0:
        return
    x_ptr += (pair // top_k).to(tl.int64) * x_stride
    for start in range(0, k, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        tl.store(out_ptr + row * k + column, tl.load(x_ptr + column, mask=column < k), mask=column < k)


@gluon.jit
def _works(extent, plan_ptr):
    """(slots that have an expert, works): the others, of which a plan may have many, would not be spread evenly."""
    filled = gl.load(plan_ptr + extent[3])
    return filled, filled * extent[4]


@gluon.jit
def _place(work, filled, row_tiles, plan_ptr, TOKENS: gl.constexpr):
    """Of a work: its expert, its slot, and its tile of rows. Neighbours share their rows."""
    NEIGHBOURS: gl.constexpr = TOKENS_IN_CACHE // TOKENS
    band = work // (NEIGHBOURS * row_tiles) * NEIGHBOURS
    width = gl.minimum(filled - band, NEIGHBOURS)
    inside = work % (NEIGHBOURS * row_tiles)
    slot = band + inside % width
    return gl.load(plan_ptr + slot), slot, inside // width


@gluon.jit
def _produce(operands, buffers, extent, plan_ptr, DEPENDENT: gl.constexpr):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    tiles, chunks, groups, row_tiles = extent[0], extent[1], extent[2], extent[4]
    TOKENS: gl.constexpr = buffers[0].shape[1]
    GROUPS: gl.constexpr = buffers[1].shape[0] // buffers[5].shape[0]
    filled, works = _works(extent, plan_ptr)
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        expert, slot, row = _place(work, filled, row_tiles, plan_ptr, TOKENS)
        # Beyond the last group there are rows of the next expert: they are multiplied, and not stored.
        group = expert * groups + row * GROUPS
        for chunk in range(0, chunks):
            load_chunk(operands, buffers, turn, chunk, group, slot * TOKENS, tiles, chunks)
            turn += 1


@gluon.jit
def _consume(
    buffers,
    extent,
    result,
    plan_ptr,
    PART: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    MEMBERS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    TOKENS: gl.constexpr = buffers[0].shape[1]
    GROUPS: gl.constexpr = buffers[1].shape[0] // buffers[5].shape[0]
    filled, works = _works(extent, plan_ptr)
    turn = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        expert, slot, row = _place(work, filled, extent[4], plan_ptr, TOKENS)
        total, turn = multiply_chunks(buffers, 0, extent[1], turn, PART, BLOCK_SIZE)
        _finish(total, result, expert, slot, row * GROUPS + PART, MEMBERS, ACTIVATION)
    tma.store_wait(0)


@gluon.jit
def _finish(total, result, expert, slot, group, MEMBERS: gl.constexpr, ACTIVATION: gl.constexpr):
    """y = total * global_scale, or h = activation(gate) * up."""
    y_desc, y_buf, global_scales_ptr = result
    TOKENS: gl.constexpr = total.shape[1]
    RESCALE: gl.constexpr = 2.0**8 if y_desc.dtype == gl.bfloat16 else 2.0**7
    scale = gl.load(global_scales_ptr + expert * MEMBERS) * RESCALE
    if ACTIVATION == "none":
        y = total * scale
    else:
        up_scale = gl.load(global_scales_ptr + expert * MEMBERS + MEMBERS - 1) * RESCALE
        gate, up = gl.split(gl.permute(gl.reshape(total, (4, 2, 8, TOKENS)), (0, 2, 3, 1)))
        y = gl.reshape(_activate(gate * scale, ACTIVATION) * (up * up_scale), (32, TOKENS))
    tma.store_wait(0)
    y_buf.permute((1, 0)).store(y.to(y_desc.dtype))
    fence_async_shared()
    store_tile(y_desc, [slot * TOKENS, group * y_desc.block_shape[1]], y_buf)


@gluon.jit(do_not_specialize=["tiles", "chunks", "groups", "filled_at", "row_tiles"])
def _grouped_wgmma_kernel(
    x_desc,
    words_desc,
    scales_desc,
    y_desc,
    global_scales_ptr,
    plan_ptr,
    tiles,
    chunks,
    groups,
    filled_at,
    row_tiles,
    MEMBERS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    DEPENDENT: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    X_TILES: gl.constexpr,
    X_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    operands = (x_desc, words_desc, scales_desc)
    buffers = make_buffers(operands, GROUPS, X_TILES, X_STAGES, STAGES)
    y_bufs = gl.allocate_shared_memory(y_desc.dtype, [GROUPS, TOKENS, y_desc.block_shape[1]], y_desc.layout)
    extent = (tiles, chunks, groups, filled_at, row_tiles)
    first = (y_desc, y_bufs.index(0), global_scales_ptr)
    second = (y_desc, y_bufs.index(1), global_scales_ptr)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (buffers, extent, first, plan_ptr, 0, BLOCK_SIZE, MEMBERS, ACTIVATION, DEPENDENT)),
                (_consume, (buffers, extent, second, plan_ptr, 1, BLOCK_SIZE, MEMBERS, ACTIVATION, DEPENDENT)),
                (_produce, (operands, buffers, extent, plan_ptr, DEPENDENT)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        third = (y_desc, y_bufs.index(2), global_scales_ptr)
        gl.warp_specialize(
            [
                (_consume, (buffers, extent, first, plan_ptr, 0, BLOCK_SIZE, MEMBERS, ACTIVATION, DEPENDENT)),
                (_consume, (buffers, extent, second, plan_ptr, 1, BLOCK_SIZE, MEMBERS, ACTIVATION, DEPENDENT)),
                (_consume, (buffers, extent, third, plan_ptr, 2, BLOCK_SIZE, MEMBERS, ACTIVATION, DEPENDENT)),
                (_produce, (operands, buffers, extent, plan_ptr, DEPENDENT)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
