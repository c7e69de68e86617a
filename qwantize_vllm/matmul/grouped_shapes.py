"""Which grouped kernel, launched how, serves so many pairs of a token and an expert: one table per GPU architecture."""

from __future__ import annotations

import functools
from typing import NamedTuple

from qwantize_vllm.matmul.tile_shapes import TileShape
from qwantize_vllm.matmul.wgmma_shapes import STEPS, WgmmaShape


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
        GroupedRule(5.0, TileShape(8, 2, 4, 4, 3), TileShape(8, 2, 4, 4, 3)),
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


# From so many pairs an expert on, on average, the kernel of gluon_grouped.py is faster on an H200: with 32 to 64 both
# take the same time, with 128 it takes 6 to 11 % less, with 1,024 a fifth. `python scripts/tune_experts.py` says it of
# the GPU at hand.
WGMMA_PAIRS = 96


@functools.lru_cache(maxsize=4096)
def choose_grouped_wgmma(pairs: int, experts: int) -> WgmmaShape:
    """The shape that takes least time: as many tiles as pairs fill, and half a tile for each expert that is not."""

    def cost(shape: WgmmaShape) -> float:
        return (pairs / shape.tokens + min(experts, pairs) / 2) * STEPS[shape] / shape.groups

    return min(STEPS, key=cost)


def grouped_wgmma_shapes() -> list[WgmmaShape]:
    """What `choose_grouped_wgmma` answers from WGMMA_PAIRS an expert on."""
    experts = 64  # any: where all have pairs, how many each has decides
    pairs = (round(experts * WGMMA_PAIRS * 2 ** (step / 8)) for step in range(80))
    return list(dict.fromkeys(choose_grouped_wgmma(each, experts) for each in pairs))
