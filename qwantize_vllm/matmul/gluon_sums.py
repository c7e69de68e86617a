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
_EMPTY_AGAIN = gl.constexpr(
    "{ .reg .b64 a; .reg .u32 b; cvt.u64.u32 a, $5; add.s64 a, a, $1; mov.u32 b, 0xffffffff; "
    "st.relaxed.gpu.global.v4.b32 [a], {b, b, b, b}; mov.u32 $0, 0; }"
)


# Groups of four words of a thread that are waited for together: so many reads are under way, and only these are read
# again where a word is missing. They divide the 8 groups that a tile of 64 tokens has.
_TOGETHER = 8


def _add_when_there(groups: int) -> str:
    """PTX: add 4*groups words to as many sums once none is EMPTY. A warp waits by itself, its lanes together."""
    n = 4 * groups
    reads = "".join(
        f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(f'w{4 * group + i}' for i in range(4))}}}, [a+{2048 * group}]; "
        for group in range(groups)
    )
    largest = "".join(f"max.u32 largest, largest, w{i}; " for i in range(n))
    sums = "".join(f"add.f32 w{i}, w{i}, ${n + i}; " for i in range(n))
    results = "".join(f"mov.b32 ${i}, w{i}; " for i in range(n))
    return (
        f"{{ .reg .b64 a; .reg .b32 w<{n}>, largest; .reg .pred p; cvt.u64.u32 a, ${3 * n}; add.s64 a, a, ${2 * n}; "
        f"again: {reads}mov.u32 largest, 0; {largest}setp.eq.u32 p, largest, 0xffffffff; "
        f"vote.sync.any.pred p, p, 0xffffffff; @p bra again; {sums}{results}}}"
    )


_WORDS_TOGETHER = gl.constexpr(4 * _TOGETHER)
_ADD = gl.constexpr(_add_when_there(_TOGETHER))
_ADD_OPERANDS = gl.constexpr(",".join(name for name in ("=f", "f", "l", "r") for _ in range(4 * _TOGETHER)))


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
def add_sums(total, sums_ptr, place):
    """total, float32 (64, tokens), plus the sums left at `place`, once all are there; the words are EMPTY then."""
    start, inside = _words(sums_ptr, place, total)
    total = gl.inline_asm_elementwise(
        _ADD, _ADD_OPERANDS, [total, start, inside], gl.float32, is_pure=False, pack=_WORDS_TOGETHER
    )
    ASM: gl.constexpr = "=r,l,l,l,l,r,r,r,r"
    gl.inline_asm_elementwise(_EMPTY_AGAIN, ASM, [start, inside], gl.int8, is_pure=False, pack=4)
    return total
