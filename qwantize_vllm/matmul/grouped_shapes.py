"""How the grouped kernel is launched for so many (token, expert) pairs: one table per GPU architecture."""

from __future__ import annotations

from typing import NamedTuple

from qwantize_vllm.matmul.tile_shapes import TileShape


class GroupedRule(NamedTuple):
    """Up to so many pairs an expert, on average: the shapes of the product with gate and up, and of that with down."""

    pairs: float
    gate_up: TileShape
    down: TileShape


_ANY = float("inf")
RULES = {
    9: (
        GroupedRule(1.0, TileShape(8, 1, 4, 4, 3), TileShape(8, 1, 4, 4, 3)),
        GroupedRule(6.0, TileShape(16, 1, 4, 4, 3), TileShape(16, 1, 4, 4, 3)),
        GroupedRule(24.0, TileShape(32, 1, 4, 4, 3), TileShape(32, 1, 4, 4, 3)),
        GroupedRule(96.0, TileShape(64, 2, 1, 4, 4), TileShape(64, 2, 1, 4, 4)),
        GroupedRule(_ANY, TileShape(128, 2, 1, 4, 4), TileShape(128, 2, 1, 4, 4)),
    )
}
# Elsewhere, unmeasured: small tiles, which fit the shared memory of every GPU.
ELSEWHERE = (
    GroupedRule(6.0, TileShape(16, 1, 2, 4, 3), TileShape(16, 1, 2, 4, 3)),
    GroupedRule(_ANY, TileShape(64, 1, 1, 4, 3), TileShape(64, 1, 1, 4, 3)),
)


def choose_grouped(major: int | None, pairs: int, experts: int) -> tuple[TileShape, TileShape]:
    """The shapes of both products; major: of an NVIDIA GPU's compute capability, None for anything else."""
    rules = ELSEWHERE if major is None else RULES.get(major, ELSEWHERE)
    rule = next(rule for rule in rules if pairs / experts <= rule.pairs)
    return rule.gate_up, rule.down
