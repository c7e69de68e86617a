"""Which launch of the kernel for wgmma (gluon_wgmma.py) serves how many tokens: the one that is estimated to end first.

A tile of the result takes its multiprocessor a time that depends on the shape and on K alone. All multiprocessors take
tiles in rounds; in the last round, where few are left, K is cut into slices, whose sums have to be added. From these
the time of a launch follows: of 84 on an H200 (Llama's layers, 64 to 1,024 tokens) 58 to 5 %, the worst to 15 %; what
is chosen takes up to 2 % longer than the best.

Nothing is measured while serving. The times below were fitted to such launches; `python scripts/tune_matmul.py`
measures them on the GPU at hand (an H200 that it has made warm takes up to 8 % longer).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

_SHORTEST_SLICE = 4  # chunks of 256 columns
_MOST_SLICES = 16  # of a tile: its programs wait for each other (gluon_wgmma.py)


class WgmmaShape(NamedTuple):
    """A program's tile of the result: 64*groups rows (2 or 3 groups) by so many tokens. x comes in pieces of so many
    tiles of 64 columns, so many stages ahead, and the weight in chunks of 256 columns, so many stages ahead."""

    tokens: int
    groups: int
    x_tiles: int
    x_stages: int
    stages: int


class Rounds(NamedTuple):
    """Tiles of the result in full rounds of all programs, those of the last round, and into how many slices each of
    these is cut along K."""

    whole: int
    last: int
    splits: int


# Microseconds that 64 columns of K take, on an H200; of 64 x 192 with two tiles at a time, before there were four.
STEPS = {
    WgmmaShape(64, 2, 4, 3, 3): 0.267,
    WgmmaShape(64, 3, 4, 3, 3): 0.375,
    WgmmaShape(128, 2, 2, 3, 3): 0.379,
    WgmmaShape(128, 3, 2, 2, 3): 0.531,
    WgmmaShape(256, 2, 1, 3, 3): 0.700,
}
# Microseconds for 64 rows and one token of a tile: to store them; where K is cut, to leave sums to another program, and
# for that one to add them.
_STORE, _EXCHANGE = 0.0036, 0.020


@functools.lru_cache(maxsize=4096)
def choose_wgmma_shape(tokens: int, groups: int, tiles: int, programs: int) -> WgmmaShape:
    """For x of so many tokens, a weight of so many groups of 64 rows and tiles of 64 columns, and so many programs."""
    return min(STEPS, key=lambda shape: estimate(shape, tokens, groups, tiles, programs))


def rounds(shape: WgmmaShape, tokens: int, groups: int, tiles: int, programs: int) -> Rounds:
    results = -(-tokens // shape.tokens) * -(-groups // shape.groups)
    last = results % programs
    splits = min(programs // last, -(-tiles // 4) // _SHORTEST_SLICE, _MOST_SLICES) if last else 1
    return Rounds(results - last, last, max(1, splits))


def estimate(shape: WgmmaShape, tokens: int, groups: int, tiles: int, programs: int) -> float:
    """Microseconds, without what all launches take alike."""
    whole, last, splits = rounds(shape, tokens, groups, tiles, programs)
    full = microseconds_of_tile(shape, tiles)
    size = shape.tokens * shape.groups
    # A program gives away all but its part of the tile, and adds as many sums to that part.
    rest = tiles * STEPS[shape] / splits + size * (_STORE + _EXCHANGE * (splits - 1) / splits)
    return whole // programs * full + (rest if last else 0.0)


def microseconds_of_tile(shape: WgmmaShape, tiles: int) -> float:
    """Of one tile of the result, with so many tiles of 64 columns."""
    return tiles * STEPS[shape] + shape.tokens * shape.groups * _STORE
