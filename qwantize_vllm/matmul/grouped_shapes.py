"""Which grouped kernel, launched how, serves so many pairs of a token and an expert: one table per GPU architecture."""

from __future__ import annotations

import functools
from typing import NamedTuple

from qwantize_vllm.matmul.tile_shapes import TileShape
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape, microseconds_of_tile


class GroupedRule(NamedTuple):
    """Up to so many pairs an expert, on average: the shapes of the product with gate and up, and of that with down."""

    pairs: float
    gate_up: TileShape
    down: TileShape


_ANY = float("inf")
# Measured on an H200: 8 experts of Mixtral's shape and 128 of Qwen3-30B-A3B's, 1 to 4,096 tokens. Regenerate with
# `python scripts/tune_experts.py`, which times the candidates on the GPU at hand.
RULES = {
    9: (
        GroupedRule(0.5, TileShape(8, 1, 4, 4, 3), TileShape(8, 1, 4, 4, 3)),
        GroupedRule(5.0, TileShape(8, 1, 4, 4, 3), TileShape(8, 2, 4, 4, 3)),
        GroupedRule(24.0, TileShape(32, 2, 2, 4, 4), TileShape(32, 2, 2, 4, 4)),
        GroupedRule(96.0, TileShape(64, 2, 1, 4, 4), TileShape(64, 2, 1, 4, 4)),
        GroupedRule(_ANY, TileShape(128, 2, 1, 8, 4), TileShape(128, 2, 1, 4, 3)),
    )
}
# Elsewhere, unmeasured: small tiles, which fit the shared memory of every GPU.
ELSEWHERE = (
    GroupedRule(6.0, TileShape(16, 1, 2, 4, 3), TileShape(16, 1, 2, 4, 3)),
    GroupedRule(_ANY, TileShape(64, 1, 1, 4, 3), TileShape(64, 1, 1, 4, 3)),
)


def choose_grouped(major: int | None, pairs: int, experts: int) -> tuple[TileShape, TileShape]:
    """The shapes of both products; major: of an NVIDIA GPU's compute capability, None for anything else."""
    rule = next(rule for rule in _rules(major) if pairs / experts <= rule.pairs)
    return rule.gate_up, rule.down


def last_pairs(major: int | None) -> float:
    """With more pairs an expert than these the shapes are always the same."""
    return max(rule.pairs for rule in _rules(major) if rule.pairs != _ANY)


def _rules(major: int | None) -> tuple[GroupedRule, ...]:
    return ELSEWHERE if major is None else RULES.get(major, ELSEWHERE)


# From so many pairs an expert on, on average, the kernel of gluon_grouped.py serves. On an H200, in the shapes chosen
# below, it took 599 us where the rules above take 670 (8 experts of Mixtral's shape with 64 pairs each), 656 and 838
# (96 each), 977 and 1,096 (128), 1,100 and 1,347 (192); for 128 of Qwen3-30B-A3B's 289 and 294 (64 each), 323 and 415
# (96), 475 and 486 (128). With 16 the rules take 22 to 35 % less.
# `python scripts/tune_experts.py` says it of the GPU at hand.
WGMMA_PAIRS = 64
# Both products share a plan, so their tiles have as many tokens. Those of 128 are the best or within 3 % of it, but for
# Mixtral's with 160 and 192 pairs each: there tiles of 256 took 981 and 1,018 us, these 1,093 and 1,100. That is with
# random routing, where every expert needs one tile of 256 or two of 128; where some need one of 128 it is less.
GROUPED_WGMMA_SHAPES = [shape for shape in STEPS if shape.tokens == 128]
# Tokens are not spread evenly over experts: the number of tiles may differ by so much from what is expected. A guess:
# with random routing its standard deviation is up to 7 % (8 experts, 128 pairs each).
_SPREAD = 0.1


@functools.lru_cache(maxsize=4096)
def choose_grouped_wgmma(pairs: int, words: tuple[int, ...], programs: int) -> WgmmaShape:
    """The shape that is estimated to end first, for a weight whose words (experts.py) have such a shape, and so many
    programs at a time."""
    experts, groups, tiles = words[:3]

    def cost(shape: WgmmaShape) -> float:
        token_tiles = pairs / shape.tokens + min(experts, pairs) / 2  # half a tile for each expert is not filled
        rounds = _expected_rounds(token_tiles * -(-groups // shape.groups) / programs)
        return rounds * microseconds_of_tile(shape, tiles)

    return min(GROUPED_WGMMA_SHAPES, key=cost)


def _expected_rounds(filled: float) -> float:
    """How many rounds all programs take, where so many are expected to be filled; one that is filled in part takes as
    long as a full one."""
    first, last = filled * (1 - _SPREAD), filled * (1 + _SPREAD)
    return (_area_below_rounds(last) - _area_below_rounds(first)) / (last - first)


def _area_below_rounds(filled: float) -> float:
    """The integral of filled, rounded up."""
    full = int(filled)
    return full * (full + 1) / 2 + (filled - full) * (full + 1)
