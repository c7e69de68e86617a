"""Dequantize and multiply for at most 4 tokens, in Gluon: where reading W is the cost, and little else may be done.

y = x W' is computed as W x' from the layout of swizzle.py. Of each 16 bytes that a lane loads, a plane is its part of
a left operand of mma.m16n8k16: 16 rows, 16 columns. All 16 columns share a block, so codes are multiplied as they are,
and the scale of the block is applied to the product: each row's own, in float32.

An mma has 8 columns of results; M tokens need only M of them. So 8/M blocks take turns in one set of results,

    B of block b, a column for each token t and place j:   x[t, block b]  where j is the place of b,   else 0

which leaves the product of each block in columns of its own, to be scaled once all are there: at M = 1 a scale costs a
row an eighth of an instruction a block. Zeros come from a multiplication by 0 or 1.

Nothing goes through shared memory, and no thread waits for another, until the end: the warps of a program have the same
rows and different columns, and their sums are added in a fixed order. So the result does not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qwantize_vllm.matmul.dependent_launch import dependent_launch
from qwantize_vllm.matmul.gluon_normed import _add_and_weigh, _gate, _load_pair, _norm_factors, _pairs_of, _write_sums
from qwantize_vllm.matmul.normed import AddedNorm
from qwantize_vllm.matmul.swizzle import COLUMNS, SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import DecodeShape
from qwantize_vllm.triton_launch import Launch, launch_now

MOST_TOKENS = 4


def why_not_decode(x: torch.Tensor) -> str | None:
    """Why this kernel cannot multiply x (M, K); None where it can. It reads x in pairs."""
    if x.shape[0] > MOST_TOKENS:
        return f"takes at most {MOST_TOKENS} tokens, got {x.shape[0]}"
    if x.stride(1) != 1 or x.stride(0) % 2 or x.data_ptr() % 4:
        where = f"strides {tuple(x.stride())}, an address {x.data_ptr() % 4} bytes past a multiple of 4"
        return f"needs rows of x that are contiguous and start at multiples of 4 bytes, got {where}"
    return None


def matmul_decode(
    x: torch.Tensor,
    weight: SwizzledNvfp4,
    bias: torch.Tensor | None,
    shape: DecodeShape,
    launch: Launch = launch_now,
    norm: AddedNorm | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """x (M, K) bfloat16 or float16, as `why_not_decode` asks, M at most shape.tokens -> (M, N) in x's dtype.

    bias: (N,), contiguous, any float dtype, or None.
    launch: what else to do with the kernel than to run it (compile_ahead.py).
    norm: what is done to x first, in bfloat16 only; gated: (M, N/2), silu(first half of y) * second half, each of whole
    groups of 64 rows of W. `one_kernel` (normed.py) asks for both. bfloat16: products of values of x beyond 2^63
    overflow.
    """
    m, (n, k) = x.shape[0], weight.shape
    y = torch.empty(m, n // 2 if gated else n, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    launch(
        _decode_kernel,
        (triton.cdiv(n, 16 * shape.parts) + (norm is not None),),
        x,
        weight.words,
        weight.scales,
        weight.global_scale,
        bias,
        y,
        m,
        n,
        k,
        weight.words.shape[1],
        x.stride(0),
        None if norm is None else norm.residual,
        None if norm is None else norm.gain,
        None if norm is None else norm.sums,
        None if norm is None else norm.residual.stride(0),
        None if norm is None else norm.epsilon,
        GATED=gated,
        BLOCK_SIZE=weight.block_size,
        TOKENS=shape.tokens,
        PARTS=shape.parts,
        TILES=shape.tiles,
        SCALE_A_ROW=weight.global_scale.dim() == 1,
        WHOLE=k % (COLUMNS * shape.tiles * shape.warps) == 0,
        num_warps=shape.warps,
        **dependent_launch(x.device),
    )
    return y


_MMA = gl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, "
    "{{$10, $11, $12, $13}};"
)
_MMA_BFLOAT16 = gl.constexpr(_MMA.value.format("bf16"))
_MMA_FLOAT16 = gl.constexpr(_MMA.value.format("f16"))
# Nothing of W is read twice: it leaves the first cache to x.
_LOAD = gl.constexpr("{{ .reg .pred p; setp.ne.b32 p, ${1}, 0; @p ld.global.nc.L1::no_allocate.L2::256B.{0}; }}")
_LOAD_4 = gl.constexpr(_LOAD.value.format("v4.b32 {$0, $1, $2, $3}, [$4]", 5))
_LOAD_2 = gl.constexpr(_LOAD.value.format("v2.b32 {$0, $1}, [$2]", 3))
_LOAD_1 = gl.constexpr(_LOAD.value.format("b32 $0, [$1]", 2))
_LOAD_HALF = gl.constexpr("{ .reg .b16 h; " + _LOAD.value.format("b16 h, [$1]", 2)[1:-1] + " cvt.u32.u16 $0, h; }")


@gluon.jit
def _load_bytes(address, there, COUNT: gl.constexpr):
    """COUNT bytes (2, 4, 8 or 16) from an address that is a multiple of it, as a tuple of uint32; anything where not
    there."""
    if COUNT == 16:
        return gl.inline_asm_elementwise(_LOAD_4, "=r,=r,=r,=r,l,r", [address, there], (gl.uint32,) * 4, False, 1)
    elif COUNT == 8:
        return gl.inline_asm_elementwise(_LOAD_2, "=r,=r,l,r", [address, there], (gl.uint32,) * 2, False, 1)
    elif COUNT == 4:
        return (gl.inline_asm_elementwise(_LOAD_1, "=r,l,r", [address, there], gl.uint32, False, 1),)
    else:
        return (gl.inline_asm_elementwise(_LOAD_HALF, "=r,l,r", [address, there], gl.uint32, False, 1),)


@gluon.jit
def _load_weight(
    place,
    step,
    TILES: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    COUNT: gl.constexpr,
    NEAR: gl.constexpr,
    ALL: gl.constexpr,
):
    """A step's words, four registers for each tile and part, and its scales, COUNT bytes for each part and its rows r
    and r + 8. NEAR: the parts that follow each other; others follow each other far from there. ALL: whether
    every tile is there. Then too their loads have a condition, for without one ptxas puts half of them off until
    registers are free."""
    words_address, scales_address, words_far, scales_far, tiles = place
    words = ()
    for tile in gl.static_range(TILES):
        there = tiles if ALL else (step * TILES + tile < tiles).to(gl.int32)
        for part in gl.static_range(PARTS):
            address = words_address + (step * TILES + tile).to(gl.int64) * 2048 + part % NEAR * 512
            if part >= NEAR:
                address += words_far
            words = words + (_load_bytes(address, there, 16),)
    if not ALL:  # those of a step that is not there may be anything that is finite
        step = gl.minimum(step, (tiles - 1) // TILES)
    # A chunk of four tiles has so many bytes a row.
    ROW: gl.constexpr = 256 // BLOCK_SIZE
    chunk, inside = step * TILES // 4, step % (4 // TILES) * (ROW * TILES // 4)
    scales = ()
    for half in gl.static_range(2 * PARTS):
        address = scales_address + chunk.to(gl.int64) * (64 * ROW) + inside + half % (2 * NEAR) * (8 * ROW)
        if half >= 2 * NEAR:
            address += scales_far
        scales = scales + (_load_bytes(address, tiles, COUNT),)
    return words, scales


@gluon.jit
def _plane(word, PLANE: gl.constexpr, dtype: gl.constexpr):
    """Two codes of a plane as two of dtype, times 2^-126 (bfloat16) or 2^-14 (float16); see swizzle.py."""
    if PLANE < 3:
        code = word << (3 * PLANE)
    else:
        code = ((word >> 8) & 0x006C006C) * 0x421
    if dtype == gl.bfloat16:
        return code & 0x81C081C0
    else:
        return (code & 0x80008000) | ((code & 0x01C001C0) << 3)


@gluon.jit
def _scale(bytes_, INDEX: gl.constexpr, dtype: gl.constexpr):
    """float32 of a byte of a scale, times 2^74 (bfloat16), so that with the rest the product is far from denormal, or
    2^10 (float16)."""
    SHIFT: gl.constexpr = 20 - 8 * (INDEX % 4)
    word = bytes_[INDEX // 4]
    word = word << SHIFT if SHIFT >= 0 else word >> -SHIFT
    BASE: gl.constexpr = 0x60000000 if dtype == gl.bfloat16 else 0x40000000
    return ((word & 0x0FF00000) | BASE).to(gl.float32, bitcast=True)


@gluon.jit
def _mma(total, operand, first, second, dtype: gl.constexpr):
    """total plus operand times two pairs of x."""
    MMA: gl.constexpr = _MMA_BFLOAT16 if dtype == gl.bfloat16 else _MMA_FLOAT16
    return gl.inline_asm_elementwise(
        MMA,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [operand[0], operand[1], operand[2], operand[3], first, second, total[0], total[1], total[2], total[3]],
        (gl.float32,) * 4,
        True,
        1,
    )


@gluon.jit
def _multiply(
    totals,
    squares,
    weight,
    x,
    column,
    factors,
    dtype: gl.constexpr,
    TILES: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WHOLE: gl.constexpr,
):
    """totals plus the products of a step, squares plus those of x. x: see `_load_x`; column: the first that the lane
    needs."""
    words, scales = weight
    PLACES: gl.constexpr = len(factors)
    TURNS: gl.constexpr = TILES * 64 // BLOCK_SIZE // PLACES
    # A lane's blocks follow each other; where it has two places, the blocks of both in turn.
    SHARED: gl.constexpr = 2 if PLACES == 8 else 1
    for turn in gl.static_range(TURNS):
        pairs, squares = _load_x(x, squares, column, turn * SHARED * BLOCK_SIZE, BLOCK_SIZE // 16, WHOLE)
        products = _zeros(PARTS, totals[0][0])
        for j in gl.static_range(PLACES):
            chosen = _choose(pairs, factors[j], dtype)
            products = _multiply_block(
                products,
                words,
                chosen,
                (j // SHARED * TURNS + turn) * SHARED + j % SHARED,
                dtype,
                PARTS,
                BLOCK_SIZE // 16,
            )
        totals = _add_scaled(totals, products, scales, turn, SHARED, dtype, PARTS)
    return totals, squares


@gluon.jit
def _load_x(x, squares, column, START: gl.constexpr, PLANES: gl.constexpr, WHOLE: gl.constexpr):
    """Of each plane of a block two pairs, the lane's part of a right operand. x: where pairs begin, K, and norm as
    `_add_and_weigh` wants it, or empty. START: of the block, from `column` on, the first that the lane needs of the
    step."""
    pointer, k, norm = x
    pairs = ()
    for plane in gl.static_range(PLANES):
        for half in gl.static_range(2):
            where = column + (START + 16 * plane + 8 * half)
            pair = _load_pair(pointer, where, k, WHOLE)
            if len(norm) > 0:
                pair, squares = _add_and_weigh(pair, squares, norm, where, k, WHOLE)
            pairs = pairs + (pair,)
    return pairs, squares


@gluon.jit
def _zeros(COUNT: gl.constexpr, like):
    zero = gl.zeros_like(like)
    zeros = ()
    for _ in gl.static_range(COUNT):
        zeros = zeros + ((zero, zero, zero, zero),)
    return zeros


@gluon.jit
def _choose(pairs, factor, dtype: gl.constexpr):
    """Pairs of x times a pair of factors: 0, or what the end takes back."""
    MULTIPLY: gl.constexpr = "mul.rn.bf16x2 $0, $1, $2;" if dtype == gl.bfloat16 else "mul.rn.f16x2 $0, $1, $2;"
    chosen = ()
    for each in gl.static_range(len(pairs)):
        chosen = chosen + (gl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [pairs[each], factor], gl.int32, True, 1),)
    return chosen


@gluon.jit
def _multiply_block(
    products, words, pairs, BLOCK: gl.constexpr, dtype: gl.constexpr, PARTS: gl.constexpr, PLANES: gl.constexpr
):
    """products, of each part, plus those of a block, PLANES of a tile."""
    for plane in gl.static_range(PLANES):
        sums = ()
        for part in gl.static_range(PARTS):
            a, b, c, d = words[(BLOCK * PLANES + plane) // 4 * PARTS + part]
            operand = (
                _plane(a, (BLOCK * PLANES + plane) % 4, dtype),
                _plane(b, (BLOCK * PLANES + plane) % 4, dtype),
                _plane(c, (BLOCK * PLANES + plane) % 4, dtype),
                _plane(d, (BLOCK * PLANES + plane) % 4, dtype),
            )
            sums = sums + (_mma(products[part], operand, pairs[2 * plane], pairs[2 * plane + 1], dtype),)
        products = sums
    return products


@gluon.jit
def _add_scaled(
    totals, products, scales, TURN: gl.constexpr, SHARED: gl.constexpr, dtype: gl.constexpr, PARTS: gl.constexpr
):
    """totals plus products times the scales of their rows and blocks."""
    sums = ()
    for part in gl.static_range(PARTS):
        a = _scale(scales[2 * part], TURN * SHARED, dtype)
        b = _scale(scales[2 * part], TURN * SHARED + SHARED - 1, dtype)
        c = _scale(scales[2 * part + 1], TURN * SHARED, dtype)
        d = _scale(scales[2 * part + 1], TURN * SHARED + SHARED - 1, dtype)
        total, product = totals[part], products[part]
        sums = sums + (
            (
                gl.fma(product[0], a, total[0]),
                gl.fma(product[1], b, total[1]),
                gl.fma(product[2], c, total[2]),
                gl.fma(product[3], d, total[3]),
            ),
        )
    return sums


@gluon.jit(do_not_specialize=["m", "tiles"])
def _decode_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    global_scale_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    tiles,
    x_stride,
    residual_ptr,
    gain_ptr,
    sums_ptr,
    residual_stride,
    epsilon,
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    TOKENS: gl.constexpr,
    PARTS: gl.constexpr,
    TILES: gl.constexpr,
    SCALE_A_ROW: gl.constexpr,
    WHOLE: gl.constexpr,
    num_warps: gl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if residual_ptr is not None:  # noqa: SIM102 - a constant, and a condition
        if gl.program_id(0) == gl.num_programs(0) - 1:
            _write_sums(x_ptr, residual_ptr, sums_ptr, x_stride, residual_stride, m, k, num_warps)
            return
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    PLACES: gl.constexpr = 8 // TOKENS
    BLOCKS: gl.constexpr = TILES * 64 // BLOCK_SIZE
    # Bytes of scales, one a block, that a lane has of a row: those of its places; at 8 places it has two.
    COUNT: gl.constexpr = BLOCKS // (PLACES if PLACES < 8 else 4)
    gl.static_assert(COUNT >= 2, "a step of so few tiles has too few blocks for so few tokens")
    # Early: at the end every thread would wait for it.
    global_scale = global_scale_ptr if SCALE_A_ROW else gl.load(global_scale_ptr)
    thread = gl.arange(0, 32 * num_warps, gl.BlockedLayout([1], [32], [num_warps], [0]))
    # Of the left operand and the result a lane has rows r and r + 8, of the right one column r; q: see swizzle.py.
    warp, r, q = thread // 32, thread // 4 % 8, thread % 4
    NEAR: gl.constexpr = PARTS // 2 if GATED else PARTS
    first = gl.program_id(0) * NEAR  # of the parts of 16 rows
    group = (first // 4).to(gl.int64)
    row = first % 4 * 16
    words_address = words_ptr.to(gl.int64) + group * tiles * 2048 + row * 32 + thread % 32 * 16
    ROW: gl.constexpr = 256 // BLOCK_SIZE
    own = 2 * q // (TOKENS if TOKENS > 2 else 2) * COUNT
    scales_address = scales_ptr.to(gl.int64) + group * ((tiles + 3) // 4) * (64 * ROW) + (row + r) * ROW + own
    far = (n // 128).to(gl.int64) if GATED else 0  # groups from gate to up
    place = (words_address, scales_address, far * tiles * 2048, far * ((tiles + 3) // 4) * (64 * ROW), tiles)
    # Column r: token r % TOKENS at place r / TOKENS.
    token = gl.minimum(r % TOKENS, m - 1)
    norm = ()
    if residual_ptr is not None:
        norm = (_pairs_of(residual_ptr, token, residual_stride), gain_ptr.to(gl.pointer_type(gl.int32)))
    x = (_pairs_of(x_ptr, token, x_stride), k, norm)
    if PLACES < 8:
        column = r // TOKENS * (COUNT * BLOCK_SIZE) + 2 * q
    else:
        column = r // 2 * (COUNT * BLOCK_SIZE) + r % 2 * BLOCK_SIZE + 2 * q
    ONE: gl.constexpr = 0x5F805F80 if dtype == gl.bfloat16 else 0x3C003C00  # 2^64 or 1, twice
    factors = ()
    for j in gl.static_range(PLACES):
        factors = factors + (gl.where(r // TOKENS == j, ONE, 0),)
    squares = gl.zeros_like(thread.to(gl.float32))
    totals = _zeros(PARTS, squares)
    for turn in range(0, (tiles + TILES * num_warps - 1) // (TILES * num_warps)):
        step = turn * num_warps + warp
        weight = _load_weight(place, step, TILES, PARTS, BLOCK_SIZE, COUNT, NEAR, WHOLE)
        start = column + step * (64 * TILES)
        totals, squares = _multiply(totals, squares, weight, x, start, factors, dtype, TILES, PARTS, BLOCK_SIZE, WHOLE)
    y = _sum_up(totals, TOKENS, PARTS, num_warps)
    if residual_ptr is not None:
        y *= _norm_factors(squares, k, y, epsilon, TOKENS, num_warps)
    _finish(y, y_ptr, global_scale, bias_ptr, first * 16, m, n, NEAR, GATED, num_warps)


@gluon.jit
def _join_all(values):
    """Tensors, a power of two, as one, with a dimension of two for each bit of their number at its end."""
    if len(values) == 1:
        return values[0]
    else:
        COUNT: gl.constexpr = len(values) // 2
        joined = ()
        for each in gl.static_range(COUNT):
            joined = joined + (gl.join(values[each], values[each + COUNT]),)
        return _join_all(joined)


@gluon.jit
def _sum_up(totals, TOKENS: gl.constexpr, PARTS: gl.constexpr, num_warps: gl.constexpr):
    """(16 * PARTS, TOKENS): the totals of all warps and places."""
    values = ()
    for each in gl.static_range(len(totals)):
        a, b, c, d = totals[each]
        values = values + (gl.join(gl.join(a, c), gl.join(b, d)),)
    # warp, r, q; row of two, column of two; part -> warp; part, row of two, r; q, column of two
    y = gl.permute(gl.reshape(_join_all(values), (num_warps, 8, 4, 2, 2, PARTS)), (0, 5, 3, 1, 2, 4))
    y = gl.sum(gl.reshape(y, (num_warps, 16 * PARTS, 8 // TOKENS, TOKENS)), 2)
    return gl.sum(gl.reshape(y, (num_warps, 16 * PARTS, TOKENS)), 0)


@gluon.jit
def _finish(
    y,
    y_ptr,
    global_scale,
    bias_ptr,
    first_row,
    m,
    n,
    NEAR: gl.constexpr,
    GATED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Store y * global_scale + bias, gated or as it is."""
    TOKENS: gl.constexpr = y.shape[1]
    row = gl.arange(0, y.shape[0], gl.SliceLayout(1, y.type.layout))
    if GATED:
        row = gl.where(row < 16 * NEAR, row, row + (n // 2 - 16 * NEAR))
    row += first_row
    there = row < n
    # What codes, scales and factors leave to be multiplied.
    RESCALE: gl.constexpr = 2.0**-12 if y_ptr.dtype.element_ty == gl.bfloat16 else 2.0**4
    if global_scale.dtype.is_ptr():
        y *= (gl.load(global_scale + row, mask=there, other=0.0) * RESCALE)[:, None]
    else:
        y *= global_scale * RESCALE
    if bias_ptr is not None:
        y += gl.load(bias_ptr + row, mask=there, other=0.0).to(gl.float32)[:, None]
    if GATED:
        y = _gate(y, TOKENS, num_warps)
        n = n // 2
        row = first_row + gl.arange(0, y.shape[0], gl.SliceLayout(1, y.type.layout))
        there = row < n
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, y.type.layout))
    offsets = token.to(gl.int64)[None, :] * n + row[:, None]
    gl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=there[:, None] & (token < m)[None, :])
