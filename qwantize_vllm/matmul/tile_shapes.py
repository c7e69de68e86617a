"""Which kernel for swizzled weights, launched how, serves how many tokens: one table per GPU architecture.

Nothing is tuned while serving. `python scripts/tune_matmul.py` times the candidates on the GPU at hand and prints, for
layers of Llama 3, the best ones in the form of the rules below.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class TileShape(NamedTuple):
    """A program's tile of the result, 64*groups rows of W by so many tokens, and how it is computed: so many tiles of
    64 columns at a time, by so many warps, with loads so many stages ahead."""

    tokens: int
    groups: int
    steps: int
    warps: int
    stages: int


class DecodeShape(NamedTuple):
    """Of the kernel of gluon_decode.py: a program's tile of the result, 16*parts rows of W by so many tokens (1, 2 or
    4). Its warps share the columns of W; each takes so many tiles of 64 at a time."""

    tokens: int
    parts: int
    tiles: int
    warps: int

    def takes(self, block_size: int) -> bool:
        """Whether so many tiles have two blocks for each lane of a row, the least that it reads the scales of."""
        return self.tiles * 64 // block_size >= 2 * min(8 // self.tokens, 4)


class Wgmma(enum.Enum):
    """In place of a shape: the kernel of gluon_wgmma.py, whose shape wgmma_shapes.py chooses."""

    KERNEL = "wgmma"


Shape = TileShape | DecodeShape | Wgmma


class Rule(NamedTuple):
    """Up to so many tokens, for weights of at least so many groups of 64 rows and tiles of 64 columns; only for blocks
    of one size, if it says which."""

    tokens: int
    groups: int
    tiles: int
    shape: Shape
    block_size: int | None = None

    def fits(self, tokens: int, groups: int, tiles: int, block_size: int) -> bool:
        """Whether it is for so many tokens and a weight of so many groups and tiles, with blocks of that size."""
        large_enough = groups >= self.groups and tiles >= self.tiles
        return tokens <= self.tokens and large_enough and self.block_size in (None, block_size)


_ANY = 2**31
# By the major version of the compute capability, the first rule that fits. Measured on an H200; beyond the last one the
# weight is dequantized for a dense product. Where a kernel in Gluon cannot run, the rules without them hold.
RULES = {
    9: (
        # So few rows that no multiprocessor has more than two programs get more warps.
        Rule(1, 67, 0, DecodeShape(1, 1, 4, 8)),
        Rule(1, 0, 0, DecodeShape(1, 1, 2, 16), block_size=16),
        Rule(1, 0, 0, DecodeShape(1, 1, 4, 8)),
        Rule(2, 256, 0, DecodeShape(2, 1, 4, 8)),
        Rule(2, 67, 0, DecodeShape(2, 1, 2, 8), block_size=16),
        Rule(2, 0, 0, DecodeShape(2, 1, 2, 16), block_size=16),
        Rule(2, 0, 0, DecodeShape(2, 1, 4, 8)),
        Rule(8, 0, 0, TileShape(8, 1, 4, 4, 3)),
        Rule(16, 512, 0, TileShape(16, 2, 2, 4, 3)),
        Rule(16, 0, 0, TileShape(16, 1, 4, 4, 3)),
        Rule(32, 256, 0, TileShape(32, 2, 2, 4, 3)),
        Rule(32, 0, 0, TileShape(32, 1, 4, 4, 3)),
        Rule(_ANY, 256, 0, Wgmma.KERNEL),
        Rule(_ANY, 0, 128, Wgmma.KERNEL),
        Rule(64, 256, 0, TileShape(64, 2, 1, 4, 4)),
        Rule(64, 0, 0, TileShape(64, 1, 2, 4, 3)),
        Rule(_ANY, 0, 0, Wgmma.KERNEL),
        Rule(128, 256, 0, TileShape(128, 2, 1, 4, 4)),
        Rule(128, 0, 128, TileShape(128, 1, 2, 4, 3)),
        Rule(128, 0, 0, TileShape(64, 1, 2, 4, 3)),
        Rule(256, 256, 0, TileShape(256, 1, 1, 4, 3)),
        Rule(256, 0, 128, TileShape(128, 1, 2, 4, 3)),
        Rule(256, 0, 0, TileShape(64, 1, 2, 4, 3)),
    )
}


class NormedShapes(NamedTuple):
    """Of the kernel that norms x first, by the block size: where it does not gate the result, and where it does. For
    other block sizes kernels one after the other are faster."""

    plain: dict[int, DecodeShape]
    gated: dict[int, DecodeShape]


# By the number of tokens.
_NORMED = {
    9: {
        1: NormedShapes(
            {16: DecodeShape(1, 1, 4, 8), 32: DecodeShape(1, 1, 4, 8)},
            {16: DecodeShape(1, 2, 2, 4), 32: DecodeShape(1, 2, 4, 2)},
        ),
        2: NormedShapes(
            # Blocks of 16: norm and product one after the other take 7.6 us (qkv of Llama 3 8B, H200; tune_matmul.py),
            # one kernel 8.1.
            {32: DecodeShape(2, 1, 4, 8)},
            {16: DecodeShape(2, 4, 2, 4), 32: DecodeShape(2, 2, 4, 2)},
        ),
    }
}
NORMED_TOKENS = (1, 2)
# Elsewhere, unmeasured: small tiles, which fit the shared memory of every GPU, and dense products from early on.
ELSEWHERE = (
    Rule(16, 0, 0, TileShape(16, 1, 2, 4, 3)),
    Rule(64, 0, 0, TileShape(64, 1, 1, 4, 3)),
)
# For any number of tokens: what batch invariance takes, so that the order of a row's sums never changes.
ANY_TOKENS = TileShape(64, 1, 1, 4, 3)


def choose_shape(
    major: int | None, tokens: int, groups: int, tiles: int, gluon: bool = False, block_size: int = 16
) -> Shape | None:
    """The shape for x of so many tokens and a weight of so many groups and tiles; None where a dense product is faster.

    major: of an NVIDIA GPU's compute capability; None for anything else. gluon: whether kernels in Gluon can run.
    block_size: of the weight, 16 or 32.
    """
    for rule in ELSEWHERE if major is None else RULES.get(major, ELSEWHERE):
        served = gluon or isinstance(rule.shape, TileShape)
        if served and rule.fits(tokens, groups, tiles, block_size):
            return rule.shape
    return None


def choose_normed_shape(major: int | None, tokens: int, gated: bool, block_size: int) -> DecodeShape | None:
    """The shape for so many tokens that are normed first; None where that is left to a kernel of its own."""
    shapes = _NORMED.get(major or 0, {}).get(tokens)
    if shapes is None:
        return None
    return (shapes.gated if gated else shapes.plain).get(block_size)


def shapes_for(major: int | None, groups: int, tiles: int, block_size: int, gluon: bool = True) -> list[Shape]:
    """What `choose_shape` answers for a weight of so many groups and tiles, over all numbers of tokens."""
    tokens = (rule.tokens for rule in (ELSEWHERE if major is None else RULES.get(major, ELSEWHERE)))
    shapes = (choose_shape(major, limit, groups, tiles, gluon, block_size) for limit in tokens)
    return list(dict.fromkeys(shape for shape in shapes if shape is not None))
