"""The verdict on a search: every block against the float64 brute force, and against the qwantize package."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from exactness_truth import Blocks, Measure, least_error, measure_by

from qwantize_vllm.format import Nvfp4Tensor, e2m1_values, unpack_codes

# What float64 itself may do to an error; below it two errors count as equal.
ROUNDING = 1e-12

# The qwantize package: RN32(z), float32 (rows, columns, block), and activations (tokens, K), or None for the squared
# error, to float32 scales (rows, columns, 1) and dequantized blocks of z's shape.
Peer = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Tally:
    """Counts over blocks, and the worst of them.

    Attributes:
        blocks: judged.
        failures: exceed the tolerance, have codes that are not the nearest, or count under peer_better.
        beyond_float32: exceed the least error even by the tolerance with the larger |r|^2 of the two scales, ours and
            the best: more than evaluating r'Hr in float32 explains. For the squared error the same as exceeding it.
        wrong_codes: have codes that are not the nearest ones at their scale, ties to even.
        worst: the largest excess over the least error, as a fraction of the tolerance.
        naive_optimal: snap(amax/6) reaches the least error.
        peer_blocks: compared with the peer.
        peer_worse: its error is larger beyond float64 rounding; peer_nan of them are NaN or infinite.
        peer_better: its error is smaller by more than the tolerance; has to be 0.
        peer_better_strictly: its error is smaller beyond float64 rounding, at codes that are the format's.
        peer_better_by_ties: smaller by more than the tolerance, with codes or a scale that the format does not have
            there: the peer rounds ties down, the format to even, and r'Hr can profit from either. Not in peer_better.
        worst_by_hessian: worst, for each kind of Hessian.
    """

    blocks: int = 0
    failures: int = 0
    beyond_float32: int = 0
    wrong_codes: int = 0
    worst: float = 0.0
    naive_optimal: int = 0
    peer_blocks: int = 0
    peer_worse: int = 0
    peer_nan: int = 0
    peer_better: int = 0
    peer_better_strictly: int = 0
    peer_better_by_ties: int = 0
    worst_by_hessian: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Result:
    """A matrix and what a search made of it.

    Attributes:
        weight: (N, K).
        q: its quantized form.
        naive_scales: (N, columns), snap(amax/6).
        hessian: float32 (columns, block, block), made of the activations (tokens, K); None for the squared error.
        hessian_kinds: a name for each column.
    """

    weight: torch.Tensor
    q: Nvfp4Tensor
    naive_scales: torch.Tensor
    hessian: torch.Tensor | None = None
    activations: torch.Tensor | None = None
    hessian_kinds: tuple[str, ...] = ()

    @property
    def columns(self) -> int:
        """How many columns of blocks to keep apart: without Hessians all blocks are one column's."""
        return 1 if self.hessian is None else self.hessian.shape[0]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Something of every weight (N, K), or of every block (N, K/block), as (rows, columns, block or 1)."""
        return x.reshape(-1, self.columns, self.q.block_size if x.shape == self.weight.shape else 1)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some rows of a result, float64 (columns, block or 1, rows), and their errors (columns, rows)."""

    blocks: Blocks
    code_values: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor
    got: torch.Tensor
    allowed: torch.Tensor  # by which got may exceed least
    allowed_float32: torch.Tensor  # the same with the larger |r|^2 of the two


def judge(
    result: Result,
    tally: Tally,
    chunk_blocks: int,
    peer: Peer | None = None,
    peer_share: float = 1.0,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Add a result to the tally, some rows at a time; the peer is asked for its share of them, evenly spread."""
    measure, g = measure_by(result.hessian), result.q.global_scale
    weight, naive = result.rows(result.weight), result.rows(result.naive_scales.float())
    values = result.rows(e2m1_values(result.q.device)[unpack_codes(result.q.codes).int()])
    scales = result.rows(result.q.block_scales.float())
    step = max(1, chunk_blocks // result.columns)
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        z32 = weight[part].float() / g
        blocks = Blocks(_columns_first(weight[part].double() / g.double()), _columns_first(z32).abs())
        chunk = _evaluate(blocks, _columns_first(values[part]), _columns_first(scales[part]), measure)
        ask_peer = peer is not None and tally.peer_blocks <= peer_share * tally.blocks
        failed = _judge_search(chunk, tally, result.hessian_kinds)
        at_naive = measure.error(blocks.residual(_columns_first(naive[part])))
        tally.naive_optimal += int((at_naive <= chunk.least + ROUNDING * chunk.least).sum())
        if peer is not None and ask_peer:
            peer_scale, dequantized = (_columns_first(x) for x in peer(z32, result.activations))
            failed |= _judge_peer(chunk, tally, measure, peer_scale, dequantized)
        tally.failures += int(failed.sum())
        progress(failed.numel())


def _columns_first(x: torch.Tensor) -> torch.Tensor:
    """(rows, columns, block) in any dtype -> float64 (columns, block, rows), contiguous."""
    return x.permute(1, 2, 0).double().contiguous()


def _evaluate(blocks: Blocks, code_values: torch.Tensor, scale: torch.Tensor, measure: Measure) -> _Chunk:
    residual = blocks.exact - code_values * scale
    energy, got = residual.square().sum(dim=1), measure.error(residual)
    least, energy_at_least = least_error(blocks, measure)
    allowed = measure.tolerance(least, energy)
    allowed_float32 = measure.tolerance(least, torch.maximum(energy, energy_at_least))
    return _Chunk(blocks, code_values, scale, least, got, allowed, allowed_float32)


def _judge_search(chunk: _Chunk, tally: Tally, hessian_kinds: tuple[str, ...]) -> torch.Tensor:
    """(columns, rows): whether a block fails against the brute force, or its codes are wrong."""
    wanted = torch.copysign(chunk.blocks.nearest(chunk.scale), chunk.blocks.exact)
    given = chunk.code_values * chunk.scale
    wrong = ((given != wanted) | (given.signbit() != wanted.signbit())).any(dim=1)
    excess = chunk.got - chunk.least
    fraction = torch.where(excess <= 0, 0.0, excess / chunk.allowed).nan_to_num(nan=torch.inf)
    tally.blocks += excess.numel()
    tally.beyond_float32 += int((excess > chunk.allowed_float32).sum())
    tally.wrong_codes += int(wrong.sum())
    tally.worst = max(tally.worst, float(fraction.max()))
    for kind, worst in zip(hessian_kinds, fraction.amax(dim=1).tolist(), strict=False):
        tally.worst_by_hessian[kind] = max(tally.worst_by_hessian.get(kind, 0.0), worst)
    return wrong | (fraction > 1)


def _judge_peer(
    chunk: _Chunk, tally: Tally, measure: Measure, scale: torch.Tensor, dequantized: torch.Tensor
) -> torch.Tensor:
    """(columns, rows): whether the peer's error is smaller by more than the tolerance, at the format's codes."""
    error = measure.error(chunk.blocks.exact - dequantized).nan_to_num(nan=torch.inf)
    format_has = torch.copysign(chunk.blocks.nearest(scale), chunk.blocks.exact)
    # 0.1.1 takes 1e-12 for the scale of a block that E4M3 snaps to zero, and gains as much on it.
    is_e4m3 = (scale.float().to(torch.float8_e4m3fn).double() == scale).all(dim=1)
    same_codes = (dequantized == format_has).all(dim=1) & is_e4m3
    better = chunk.got > error + chunk.allowed
    rounding = ROUNDING * chunk.got.abs()
    tally.peer_blocks += error.numel()
    tally.peer_worse += int((error > chunk.got + rounding).sum())
    tally.peer_nan += int(error.isinf().sum())
    tally.peer_better += int((better & same_codes).sum())
    tally.peer_better_strictly += int(((error < chunk.got - rounding) & same_codes).sum())
    tally.peer_better_by_ties += int((better & ~same_codes).sum())
    return better & same_codes
