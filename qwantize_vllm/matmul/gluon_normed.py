"""What gluon_decode.py does besides a product: before it x is the sum of two tensors, and normalized; after it half of
the rows gate the others.

RMS norm scales a token as a whole, so the product can be taken of what is not scaled yet. Its factor is known when all
of x has been read, as the sum of a product is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _pairs_of(pointer, row, stride):
    """Where pairs of 16-bit numbers of a row begin."""
    return pointer.to(gl.pointer_type(gl.int32)) + row.to(gl.int64) * (stride // 2)


@gluon.jit
def _load_pair(pairs, column, k, WHOLE: gl.constexpr):
    """Numbers column and column + 1; zeros from k on."""
    if WHOLE:
        return gl.load(pairs + column // 2)
    else:
        return gl.load(pairs + column // 2, mask=column < k, other=0)


@gluon.jit
def _add_pairs(pair, other):
    ADD: gl.constexpr = "add.rn.bf16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(ADD, "=r,r,r", [pair, other], gl.int32, True, 1)


@gluon.jit
def _add_and_weigh(pair, squares, norm, column, k, WHOLE: gl.constexpr):
    """The pair of bfloat16 plus that of the residual, rounded, times that of the gain; squares plus those of the sums.

    The sums are written by a program that does nothing else. A store here would keep the compiler from moving the
    loads of the next turn before it, which then wait for memory once more.
    """
    residual, gain = norm
    MULTIPLY: gl.constexpr = "mul.rn.bf16x2 $0, $1, $2;"
    weight = _load_pair(gain, column, k, WHOLE)
    pair = _add_pairs(pair, _load_pair(residual, column, k, WHOLE))
    low, high = (pair << 16).to(gl.float32, bitcast=True), (pair & -65536).to(gl.float32, bitcast=True)
    squares = gl.fma(high, high, gl.fma(low, low, squares))
    return gl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [pair, weight], gl.int32, True, 1), squares


@gluon.jit
def _write_sums(x_ptr, residual_ptr, sums_ptr, x_stride, residual_stride, m, k, num_warps: gl.constexpr):
    """x + residual of m rows."""
    THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    for row in range(0, m):
        for start in range(0, k, 64 * num_warps):
            column = start + 2 * gl.arange(0, 32 * num_warps, THREADS)
            first = _load_pair(_pairs_of(x_ptr, row, x_stride), column, k, False)
            second = _load_pair(_pairs_of(residual_ptr, row, residual_stride), column, k, False)
            gl.store(_pairs_of(sums_ptr, row, k) + column // 2, _add_pairs(first, second), mask=column < k)


@gluon.jit
def _norm_factors(squares, k, like, epsilon, TOKENS: gl.constexpr, num_warps: gl.constexpr):
    """1 / sqrt(mean square + epsilon) of each token, to be multiplied with `like` (rows, tokens). squares: of what a
    thread has read, in whose warp lane 4 * r + q has read for token r % TOKENS."""
    total = gl.sum(gl.sum(gl.reshape(squares, (num_warps, 8 // TOKENS, TOKENS, 4)), 3), 1)
    total = gl.convert_layout(gl.sum(total, 0), gl.SliceLayout(0, like.type.layout))
    return gl.rsqrt(total / k.to(gl.float32) + epsilon)[None, :]


@gluon.jit
def _gate(y, TOKENS: gl.constexpr, num_warps: gl.constexpr):
    """silu(first half of the rows) * second half."""
    ROWS: gl.constexpr = y.shape[0] // 2
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32 // TOKENS, TOKENS, 1], [num_warps, 1, 1], [2, 1, 0])
    y = gl.permute(gl.reshape(y, (2, ROWS, TOKENS)), (1, 2, 0))
    gate, up = gl.split(gl.convert_layout(y, PAIRS))
    return gate / (1 + gl.exp(-gate)) * up
