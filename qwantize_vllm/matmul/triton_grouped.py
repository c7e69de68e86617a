"""The experts of a mixture in two Triton launches and a sum, from swizzled weights, each token with the experts that it
was routed to.

A pair is a token and one of its top_k experts: pair p = token * top_k + i. With h = activation(gate) * up,

    gate, up = W13[expert] x[token]        h[p] = ...        z[p] = W2[expert] h[p]        y[token] = sum of weight * z

Each product is computed as in triton_swizzled.py, W on the left; here a program's columns are pairs of one expert, and
it gathers their rows of x. So the pairs must be put together by expert, without the host knowing how many each has:

- Few pairs, most of them with an expert of their own: program s looks at all. Pair s leads a tile if the pairs of its
  expert that come before it are a multiple of the tile's width; the program then takes it and those of its expert that
  follow. Otherwise it ends. At one token that is one program a pair and no launch besides.
- Many, or so few experts that most programs would end at once: kernels before them count, and write down each tile's
  expert and pairs (triton_plan.py).

Rows of gate and up lie eight by eight in turn, so that a thread has both of a row: h needs no exchange, and gate and up
are never stored. A pair whose expert is negative (on another rank) is left out.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gpu import capability_major, multiprocessors
from qwantize_vllm.matmul.grouped_shapes import choose_grouped
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.matmul.swizzle import COLUMNS
from qwantize_vllm.matmul.tile_shapes import TileShape
from qwantize_vllm.matmul.triton_fragments import (
    TILE_COLUMNS,
    TILE_ROWS,
    block_values,
    load_scales,
    load_words,
    rescale,
)
from qwantize_vllm.matmul.triton_plan import make_plan, slots_for
from qwantize_vllm.matmul.triton_swizzled import _product
from qwantize_vllm.triton_launch import Launch

# With few pairs (_planned_from) every program finds its own; it is compiled for each of these numbers of them.
_FEW_PAIRS = (16, 64, 256)
# Slices of K, as in triton_swizzled.py.
_PROGRAMS, _SHORTEST = 4, 8
_SUM_COLUMNS = 512


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Who takes which pairs: `slots` programs for each tile of rows.

    ids: int32 (pairs,), the expert of each. plan: None, or what triton_plan.py found out.
    """

    ids: torch.Tensor
    slots: int
    plan: torch.Tensor | None


def experts_swizzled(
    x: torch.Tensor,
    w13: SwizzledExperts,
    w2: SwizzledExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    shapes: tuple[TileShape, TileShape] | None = None,
    *,
    split: bool = True,
    launch: Launch = launch_again,
) -> torch.Tensor:
    """x (M, K) bfloat16 or float16, contiguous rows -> (M, N of w2) in x's dtype.

    topk_weights: float (M, top_k). topk_ids: (M, top_k) integers below E; negative: not here. activation: one of
    ACTIVATIONS. shapes: of both products, default those of grouped_shapes.py. split: whether K may be cut into slices,
    of which there are the more the fewer tokens: the last bits depend on it. launch: what else to do with the kernels
    than to run them (compile_ahead.py).
    """
    tokens, top_k = topk_ids.shape
    y = torch.empty(tokens, w2.shape[0], dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    pairs, experts = topk_ids.numel(), w13.words.shape[0]
    first, second = shapes or choose_grouped(capability_major(x.device), w13.expected(pairs), experts)
    ids = topk_ids.reshape(-1).to(torch.int32)
    tiles = _tiles(ids, experts, first.tokens, launch)
    h = torch.empty(pairs, w13.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(x, w13, tiles, h, first, top_k, 1, activation, launch)
    if second.tokens != first.tokens:
        tiles = _tiles(ids, experts, second.tokens, launch)
    splits = _splits(x.device, pairs, tiles.slots, w2, second) if split else 1
    z = torch.empty(splits, pairs, w2.shape[0], dtype=torch.float32 if splits > 1 else x.dtype, device=x.device)
    _launch(h, w2, tiles, z, second, 1, splits, "none", launch)
    sum_experts(z, topk_weights, ids, None, y, launch)
    return y


def tokens_of_each_kind(w13: SwizzledExperts, w2: SwizzledExperts, top_k: int, most: int) -> list[int]:
    """Of the numbers of tokens up to `most`, and up to where pairs need a plan, the first for each set of kernels that
    `experts_swizzled` launches."""
    device, experts = w13.words.device, w13.words.shape[0]
    kinds: dict[object, int] = {}
    for tokens in range(1, max(most, _planned_from(experts) // top_k + 1) + 1):
        pairs = tokens * top_k
        shapes = choose_grouped(capability_major(device), w13.expected(pairs), experts)
        slots, planned = _slots(pairs, experts, shapes[1].tokens)
        splits = _splits(device, pairs, slots, w2, shapes[1])
        kinds.setdefault((shapes, 0 if planned else _few(pairs), splits > 1), tokens)
    return list(kinds.values())


def sum_experts(
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    ids: torch.Tensor,
    places: torch.Tensor | None,
    y: torch.Tensor,
    launch: Launch = launch_again,
) -> None:
    """y (M, N): of each token the weighted sum over its pairs, and over slices of K.

    z: (slices, rows, N). ids: int32 (pairs,), negative: not there. places: int32 (pairs,), the row of each, default
    their order.
    """
    (splits, rows, n), (tokens, top_k) = z.shape, topk_weights.shape
    launch(
        _sum_kernel,
        (tokens, -(-n // _SUM_COLUMNS)),
        z,
        topk_weights.contiguous(),
        ids,
        places,
        y,
        rows,
        n,
        splits,
        TOP_K=top_k,
        COLUMNS=_SUM_COLUMNS,
        num_warps=2,
        **dependent_launch(y.device),
    )


def _tiles(ids: torch.Tensor, experts: int, width: int, launch: Launch) -> Tiles:
    slots, planned = _slots(ids.numel(), experts, width)
    return Tiles(ids, slots, make_plan(ids, experts, width, slots, launch) if planned else None)


def _slots(pairs: int, experts: int, width: int) -> tuple[int, bool]:
    """How many programs a tile of rows has, and whether a plan tells them their pairs."""
    planned = pairs >= _planned_from(experts)
    return slots_for(pairs, experts, width) if planned else pairs, planned


def _planned_from(experts: int) -> int:
    """From so many pairs on there is a plan."""
    return min(_FEW_PAIRS[-1], max(_FEW_PAIRS[0], experts)) + 1


def _few(pairs: int) -> int:
    """For how many pairs the kernel is compiled whose programs look at all of them."""
    return next(few for few in _FEW_PAIRS if pairs <= few)


def _splits(device: torch.device, pairs: int, slots: int, weight: SwizzledExperts, shape: TileShape) -> int:
    """Slices of K, a power of two, so that few rows still fill the GPU."""
    experts, groups, columns = weight.words.shape[:3]
    tiles = min(slots, max(experts, -(-weight.expected(pairs) // shape.tokens)))  # of tokens
    programs = tiles * -(-groups // shape.groups)
    wanted = _PROGRAMS * multiprocessors(device) // programs
    splits = max(1, min(columns // _SHORTEST, wanted))
    return 1 << (splits.bit_length() - 1)


def _launch(
    x: torch.Tensor,
    weight: SwizzledExperts,
    tiles: Tiles,
    y: torch.Tensor,
    shape: TileShape,
    share: int,
    splits: int,
    activation: str,
    launch: Launch,
) -> None:
    """share: pairs that share a row of x, one after the other."""
    groups, columns = weight.words.shape[1:3]
    (n, k), pairs, planned = weight.shape, tiles.ids.numel(), tiles.plan is not None
    launch(
        _grouped_kernel,
        (tiles.slots, -(-groups // shape.groups), splits),
        x,
        weight.words,
        weight.scales,
        weight.global_scales,
        tiles.ids,
        tiles.plan,
        y,
        pairs,
        tiles.slots,
        n,
        k,
        groups,
        columns,
        share,
        x.stride(0),
        MEMBERS=weight.global_scales.shape[1],
        BLOCK_SIZE=weight.block_size,
        TILE_M=shape.tokens,
        GROUPS=shape.groups,
        STEPS=shape.steps,
        PAIRS=0 if planned else _few(pairs),
        WHOLE_K=k % (shape.steps * COLUMNS) == 0,
        ACTIVATION=activation,
        PTX=x.is_cuda and torch.version.hip is None,
        STAGES=shape.stages,
        num_warps=shape.warps,
        **dependent_launch(x.device),
    )


@triton.jit(do_not_specialize=["pairs", "slots", "groups", "tiles", "share"])
def _grouped_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    global_scales_ptr,
    ids_ptr,
    plan_ptr,
    y_ptr,
    pairs,
    slots,
    n,
    k,
    groups,
    tiles,
    share,
    x_stride,
    MEMBERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_M: tl.constexpr,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    # Neighbouring programs share their weights and differ in their pairs.
    slot = tl.program_id(0)
    if PAIRS > 0:
        expert = tl.load(ids_ptr + slot)
        before = _before(ids_ptr, slot, PAIRS)
        if (expert < 0) | (before % TILE_M > 0):
            return
        pair = _from(ids_ptr, expert, before, pairs, TILE_M, PAIRS)
    else:
        expert = tl.load(plan_ptr + slot)
        if expert < 0:
            return
        pair = tl.load(plan_ptr + slots + slot * TILE_M + tl.arange(0, TILE_M))
    first = tl.program_id(1) * GROUPS
    split, splits = tl.program_id(2), tl.num_programs(2)
    whole_group: tl.constexpr = TILE_ROWS * TILE_COLUMNS // 4
    words_ptr += expert.to(tl.int64) * groups * tiles * whole_group
    scales_ptr += expert.to(tl.int64) * groups * tl.cdiv(tiles, 4) * (4 * TILE_ROWS)
    inside = (pair >= 0)[None, :]
    x_ptr += (pair // share).to(tl.int64)[None, :] * x_stride
    dtype = x_ptr.dtype.element_ty
    total = tl.zeros((GROUPS * TILE_ROWS, TILE_M), dtype=tl.float32)
    turns = tl.cdiv(tiles, STEPS)
    for turn in tl.range(split * turns // splits, (split + 1) * turns // splits, num_stages=STAGES):
        words = load_words(words_ptr, first, groups, turn * STEPS, tiles, GROUPS, STEPS, WHOLE_K)
        scales = load_scales(scales_ptr, first, groups, turn * STEPS, tiles, GROUPS, STEPS)
        column = turn * (STEPS * TILE_COLUMNS) + tl.arange(0, STEPS * TILE_COLUMNS)
        there = inside if WHOLE_K else inside & (column < k)[:, None]
        x = tl.load(x_ptr + column[:, None], mask=there, other=0.0)
        total = _product(block_values(words, scales, dtype, BLOCK_SIZE, PTX), x, total, PTX)
    scale = tl.load(global_scales_ptr + expert * MEMBERS) * rescale(dtype, PTX)
    if ACTIVATION == "none":
        result = total * scale
        row = first * TILE_ROWS + tl.arange(0, GROUPS * TILE_ROWS)
        rows = n
    else:
        up_scale = tl.load(global_scales_ptr + expert * MEMBERS + MEMBERS - 1) * rescale(dtype, PTX)
        gate, up = _gate_and_up(total, GROUPS, TILE_M)
        result = activate(gate * scale, ACTIVATION) * (up * up_scale)
        row = first * (TILE_ROWS // 2) + tl.arange(0, GROUPS * TILE_ROWS // 2)
        rows = n // 2
    y_ptr += (split.to(tl.int64) * pairs + pair)[None, :] * rows + row[:, None]
    tl.store(y_ptr, result.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit
def _before(ids_ptr, slot, PAIRS: tl.constexpr):
    """How many pairs before pair `slot` have its expert."""
    pair = tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, mask=pair < slot, other=-1)
    return tl.sum((ids == tl.load(ids_ptr + slot)).to(tl.int32), 0)


@triton.jit
def _from(ids_ptr, expert, first, pairs, TILE_M: tl.constexpr, PAIRS: tl.constexpr):
    """The pairs of an expert from its first-th on (TILE_M,), -1 where there are no more."""
    pair = tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1)
    rank = tl.cumsum((ids == expert).to(tl.int32), 0) - 1
    wanted = first + tl.arange(0, TILE_M)
    match = (ids == expert)[:, None] & (rank[:, None] == wanted[None, :])
    return tl.sum(tl.where(match, pair[:, None] + 1, 0), 0) - 1


@triton.jit
def _gate_and_up(total, GROUPS: tl.constexpr, TILE_M: tl.constexpr):
    """Both (32 * GROUPS rows, TILE_M): of each 16 rows the first eight and the last."""
    parts = tl.reshape(total, (GROUPS * TILE_ROWS // 16, 2, 8, TILE_M))
    gate, up = tl.split(tl.permute(parts, (0, 2, 3, 1)))
    gate = tl.reshape(gate, (GROUPS * TILE_ROWS // 2, TILE_M))
    return gate, tl.reshape(up, (GROUPS * TILE_ROWS // 2, TILE_M))


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """activation(gate), float32."""
    if ACTIVATION == "silu":
        return gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # gelu_tanh: (1 + tanh(u)) / 2 = sigmoid(2u), u = sqrt(2 / pi) * (g + 0.044715 g^3)
        return gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))


# Numbers that change with the tokens, and a part of a plan: one kernel for all.
@triton.jit(do_not_specialize=["rows", "splits"], do_not_specialize_on_alignment=["places_ptr"])
def _sum_kernel(
    z_ptr,
    weights_ptr,
    ids_ptr,
    places_ptr,
    y_ptr,
    rows,
    n,
    splits,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y[token] = sum over its pairs and the slices of K of weight * z, in float32, in the same order every time."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), dtype=tl.float32)
    for split in range(0, splits):
        for choice in tl.static_range(TOP_K):
            pair = token * TOP_K + choice
            end = tl.where(tl.load(ids_ptr + pair) >= 0, n, 0)
            row = pair if places_ptr is None else tl.load(places_ptr + pair)
            z = tl.load(z_ptr + (split * rows + row).to(tl.int64) * n + column, mask=column < end, other=0.0)
            y += z.to(tl.float32) * tl.load(weights_ptr + pair).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * n + column, y.to(y_ptr.dtype.element_ty), mask=column < n)
