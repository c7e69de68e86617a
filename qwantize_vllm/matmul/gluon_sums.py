"""How consumers of the kernel for wgmma give each other their sums of slices of K, in Gluon: see partial_sums.py.

Words are stored and read one by one, relaxed: each says by itself whether it is there, so their order does not matter,
and no fence is needed. Of a relaxed store nothing is promised but that others see it in finite time.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Four words of a thread: of two tokens and two rows that are next to each other in its registers. Their offset is
# negative where another program finishes these tokens.
_LEAVE = gl.constexpr(
    "{ .reg .b64 a; .reg .u32 b<4>, at; .reg .pred p; setp.lt.s32 p, $9, 0; and.b32 at, $9, 0x7fffffff; "
    "cvt.u64.u32 a, at; add.s64 a, a, $5; min.u32 b0, $1, 0xfffffffe; min.u32 b1, $2, 0xfffffffe; "
    "min.u32 b2, $3, 0xfffffffe; min.u32 b3, $4, 0xfffffffe; "
    "@p st.relaxed.gpu.global.v4.b32 [a], {b0, b1, b2, b3}; mov.u32 $0, 0; }"
)
_EMPTY_AGAIN = gl.constexpr(
    "{ .reg .b64 a; .reg .u32 b; .reg .pred p; setp.ge.s32 p, $5, 0; cvt.u64.u32 a, $5; add.s64 a, a, $1; "
    "mov.u32 b, 0xffffffff; @p st.relaxed.gpu.global.v4.b32 [a], {b, b, b, b}; mov.u32 $0, 0; }"
)


# Groups of four words of a thread that are waited for together: so many reads are under way, and only these are read
# again where a word is missing. They divide the 8 groups that a tile of 64 tokens has.
_TOGETHER = 8


def _add_when_there(groups: int) -> str:
    """PTX: add 4*groups words, those that this program finishes, to as many sums once none is EMPTY. A warp waits by
    itself, its lanes together."""
    n = 4 * groups
    offsets = [f"${3 * n + 4 * group}" for group in range(groups)]
    mine = "".join(f"setp.ge.s32 p{group}, {offset}, 0; " for group, offset in enumerate(offsets))
    reads = "".join(
        f"@p{group} ld.relaxed.gpu.global.v4.b32 {{{', '.join(f'w{4 * group + i}' for i in range(4))}}}, "
        f"[a+{2048 * group}]; "
        for group in range(groups)
    )
    zeros = "".join(f"mov.b32 w{i}, 0; " for i in range(n))
    largest = "".join(f"max.u32 largest, largest, w{i}; " for i in range(n))
    sums = "".join(f"add.f32 w{i}, w{i}, ${n + i}; " for i in range(n))
    results = "".join(f"mov.b32 ${i}, w{i}; " for i in range(n))
    return (
        f"{{ .reg .b64 a; .reg .b32 w<{n}>, largest, at; .reg .pred p, p<{groups}>; "
        f"and.b32 at, {offsets[0]}, 0x7fffffff; cvt.u64.u32 a, at; add.s64 a, a, ${2 * n}; {mine}{zeros}"
        f"again: {reads}mov.u32 largest, 0; {largest}setp.eq.u32 p, largest, 0xffffffff; "
        f"vote.sync.any.pred p, p, 0xffffffff; @p bra again; {sums}{results}}}"
    )


_WORDS_TOGETHER = gl.constexpr(4 * _TOGETHER)
_ADD = gl.constexpr(_add_when_there(_TOGETHER))
_ADD_OPERANDS = gl.constexpr(",".join(name for name in ("=f", "f", "l", "r") for _ in range(4 * _TOGETHER)))


@gluon.jit
def _words(sums_ptr, place, like, split, parts):
    """Addresses of words for sums (64, tokens) of a slice and a consumer: where those of a thread begin, and bytes from
    there on, negative but for the tokens that this program finishes. Each group of four words has one: a warp then
    moves 512 bytes in a row."""
    TOKENS: gl.constexpr = like.shape[1]
    LAYOUT: gl.constexpr = like.type.layout
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))[:, None]
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))[None, :]
    thread = (row & 7) * 4 + (row // 16) * 32 + token // 2 % 4
    start = sums_ptr.to(gl.int64) + place.to(gl.int64) * (64 * TOKENS * 4)
    inside = token // 8 * 2048
    inside = gl.where(token // 8 * parts // (TOKENS // 8) == split, inside, inside | -0x80000000)
    start, inside = gl.broadcast(start + thread.to(gl.int64) * 16, inside)
    return start, inside


@gluon.jit
def exchange_sums(total, sums_ptr, first, STRIDE: gl.constexpr, split, parts):
    """total, float32 (64, tokens) as wgmma lays it out, of a slice of K, plus the sums of all other slices, for the
    tokens that this one finishes: eights of tokens are shared out evenly, in the order of the slices.

    What is finished elsewhere is left for the programs that do it, never EMPTY. The words that are added here are
    waited for, and EMPTY then. first, STRIDE: this consumer's place for the sums of the first slice, and from there to
    that of the next one, numbers that no other tile or consumer of the launch has.
    """
    start, inside = _words(sums_ptr, first + split * STRIDE, total, split, parts)
    words = total.to(gl.int32, bitcast=True)
    LEAVE: gl.constexpr = "=r,r,r,r,r,l,l,l,l,r,r,r,r"
    gl.inline_asm_elementwise(_LEAVE, LEAVE, [words, start, inside], gl.int8, is_pure=False, pack=4)
    for turn in range(1, parts):
        other = split + turn - gl.where(split + turn < parts, 0, parts)
        start, inside = _words(sums_ptr, first + other * STRIDE, total, split, parts)
        total = gl.inline_asm_elementwise(
            _ADD, _ADD_OPERANDS, [total, start, inside], gl.float32, is_pure=False, pack=_WORDS_TOGETHER
        )
        EMPTY: gl.constexpr = "=r,l,l,l,l,r,r,r,r"
        gl.inline_asm_elementwise(_EMPTY_AGAIN, EMPTY, [start, inside], gl.int8, is_pure=False, pack=4)
    return total


@gluon.jit
def finished_eights(TOKENS: gl.constexpr, split, parts):
    """The first of the eights of tokens that the program of a slice finishes, and the one behind the last."""
    EIGHTS: gl.constexpr = TOKENS // 8
    return (split * EIGHTS + parts - 1) // parts, ((split + 1) * EIGHTS + parts - 1) // parts
