"""How consumers of the kernel for wgmma give each other their sums of slices of K, in Gluon: see partial_sums.py.

Words are stored and read one by one, relaxed: each says by itself whether it is there, so their order does not matter,
and no fence is needed. Of a relaxed store nothing is promised but that others see it in finite time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Four words of a thread: of two tokens and two rows that are next to each other in its registers.
_LEAVE = gl.constexpr(
    "{ .reg .b64 a; .reg .u32 b<4>; cvt.u64.u32 a, $9; add.s64 a, a, $5; min.u32 b0, $1, 0xfffffffe; "
    "min.u32 b1, $2, 0xfffffffe; min.u32 b2, $3, 0xfffffffe; min.u32 b3, $4, 0xfffffffe; "
    "st.relaxed.gpu.global.v4.b32 [a], {b0, b1, b2, b3}; mov.u32 $0, 0; }"
)
_READ = gl.constexpr(
    "{ .reg .b64 a; cvt.u64.u32 a, $8; add.s64 a, a, $4; ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [a]; }"
)
_EMPTY_AGAIN = gl.constexpr(
    "{ .reg .b64 a; .reg .u32 b; cvt.u64.u32 a, $5; add.s64 a, a, $1; mov.u32 b, 0xffffffff; "
    "st.relaxed.gpu.global.v4.b32 [a], {b, b, b, b}; mov.u32 $0, 0; }"
)


@gluon.jit
def _words(sums_ptr, place, like):
    """Addresses of words for sums (64, tokens) of a slice and a consumer: where those of a thread begin, and bytes from
    there on. Each group of four words has one: a warp then moves 512 bytes in a row."""
    TOKENS: gl.constexpr = like.shape[1]
    LAYOUT: gl.constexpr = like.type.layout
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))[None, :]
    thread = (row & 7) * 4 + (row // 16) * 32 + token // 2 % 4
    start = sums_ptr.to(gl.int64) + place.to(gl.int64) * (64 * TOKENS * 4)
    start, inside = gl.broadcast(start + thread.to(gl.int64) * 16, token // 8 * 2048)
    return start, inside


@gluon.jit
def leave_sums(total, sums_ptr, place):
    """Leave the sums of a slice of K, float32 (64, tokens) as wgmma lays them out, for the program with the last slice.

    place: a number that no other slice, tile or consumer of the launch has. What is left is never EMPTY.
    """
    start, inside = _words(sums_ptr, place, total)
    words = total.to(gl.int32, bitcast=True)
    ASM: gl.constexpr = "=r,r,r,r,r,l,l,l,l,r,r,r,r"
    gl.inline_asm_elementwise(_LEAVE, ASM, [words, start, inside], gl.int8, is_pure=False, pack=4)


@gluon.jit
def add_sums(total, sums_ptr, place, TWICE: gl.constexpr):
    """total, float32 (64, tokens), and the sums that are left at `place`, once all are there; the words are EMPTY then.

    TWICE: read them again to add them, for want of registers to keep some while others are missing.
    """
    start, inside = _words(sums_ptr, place, total)
    words = _read(start, inside)
    while _are_missing(words):
        words = _read(start, inside)
    if TWICE:
        words = _read(start, inside)
    ASM: gl.constexpr = "=r,l,l,l,l,r,r,r,r"
    gl.inline_asm_elementwise(_EMPTY_AGAIN, ASM, [start, inside], gl.int8, is_pure=False, pack=4)
    return total + words.to(gl.float32, bitcast=True)


@gluon.jit
def _are_missing(words):
    """Whether any word of the warp group is EMPTY, the largest uint32."""
    return gl.max(gl.max(words.to(gl.uint32, bitcast=True), 1), 0) == 0xFFFFFFFF


@gluon.jit
def _read(start, inside):
    ASM: gl.constexpr = "=r,=r,=r,=r,l,l,l,l,r,r,r,r"
    return gl.inline_asm_elementwise(_READ, ASM, [start, inside], gl.int32, is_pure=False, pack=4)
