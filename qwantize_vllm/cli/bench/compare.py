"""This package against a peer on one weight: seconds, and the errors of a sample of blocks.

Peers have no global scale, so both sides quantize with 1. A peer's errors count as it leaves them. This package's
are held against the peer's *scales*, each with the codes nearest at it, ties to the even code: that is the least
error which a search promises. Where a peer breaks a tie the other way, r'Hr may come out smaller than the hardware's
rounding allows; such blocks are counted apart. "naive" promises no least error, so there the counts only inform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from qwantize_vllm.cli.bench.clock import median_seconds
from qwantize_vllm.cli.bench.exactness import Sample, draw_sample
from qwantize_vllm.cli.bench.peers import Peer, Result
from qwantize_vllm.cli.bench.shapes import Layer
from qwantize_vllm.format import Nvfp4Tensor, e2m1_values, round_to_e2m1
from qwantize_vllm.search import brute_force as truth

# A reference on a CPU gets no more weights than this, in whole rows.
_CPU_WEIGHTS = 2**20


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of the peers' table; no figures but an error if the peer did not run.

    Attributes:
        layer: what both sides quantized: on a CPU perhaps fewer rows than the layer has.
        peer_larger, ours_larger: blocks on which one side's error exceeds the other's by more than the tolerance.
        peer_smaller_by_ties: blocks on which only the peer's other way to break ties gives it the smaller error.
    """

    layer: Layer
    search: str
    peer: str
    peer_ms: float | None = None
    our_ms: float | None = None
    times_as_fast: float | None = None
    checked: int = 0
    peer_larger: int = 0
    ours_larger: int = 0
    peer_smaller_by_ties: int = 0
    error: str | None = None

    @property
    def refuted(self) -> bool:
        """Whether the peer found a better scale than a search that promises the best."""
        return self.search != "naive" and self.ours_larger > 0


def compare(
    peer: Peer,
    layer: Layer,
    search: str,
    weight: torch.Tensor,
    hessian: torch.Tensor | None,
    ours: Callable[[torch.Tensor], Nvfp4Tensor],
    block_size: int,
    check_blocks: int,
) -> Comparison:
    """Time both sides and compare a sample of blocks.

    weight: (..., N, K). ours: quantizes a weight (N, K) with the global scale 1, by the same search and Hessian.
    """
    rows = weight.reshape(-1, weight.shape[-1])
    if not weight.is_cuda:
        rows = rows[: max(1, _CPU_WEIGHTS // weight.shape[-1])]
    line = Comparison(Layer(layer.name, tuple(rows.shape)), search, peer.label)
    try:
        call = peer.searches[search](rows.reshape(-1, block_size), hessian)
        theirs = call()
        peer_seconds = median_seconds(call, weight.device)
    except Exception as error:  # whatever a package of others raises belongs in the table, and must not end the run
        return dataclasses.replace(line, error=f"{type(error).__name__}: {error}".splitlines()[0])
    our_seconds = median_seconds(lambda: ours(rows), weight.device)
    sample = draw_sample(rows, hessian, block_size, check_blocks)
    return dataclasses.replace(
        line,
        peer_ms=1000 * peer_seconds,
        our_ms=1000 * our_seconds,
        times_as_fast=peer_seconds / our_seconds,
        **_count(sample, ours(rows), theirs),
    )


def _count(sample: Sample, ours: Nvfp4Tensor, theirs: Result) -> dict[str, Any]:
    q = sample.of(ours)
    scales, values = (part[sample.index].double() for part in theirs)
    z = truth.scaled(sample.weight, q)  # (n, 1, 1, block); the global scale is 1
    scales, values = scales.view(-1, 1, 1, 1), values.view(z.shape)
    nearest = e2m1_values(z.device).double()[round_to_e2m1(z.float() / scales.float()).long()]
    our_error, allowed_for_peer = _error(sample, truth.residuals(sample.weight, q))
    _, allowed_for_us = _error(sample, z - nearest * scales)
    their_error, allowed_beside_ties = _error(sample, z - values * scales)
    # A peer whose scale is no number refutes nothing; errors that are no number count as larger.
    ours_larger = ~(our_error <= allowed_for_us.nan_to_num(torch.inf, posinf=torch.inf))
    return {
        "checked": our_error.numel(),
        "peer_larger": int((~(their_error <= allowed_for_peer)).sum()),
        "ours_larger": int(ours_larger.sum()),
        "peer_smaller_by_ties": int(((our_error > allowed_beside_ties) & ~ours_larger).sum()),
    }


def _error(sample: Sample, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The error of every block, and the largest one that counts as no larger."""
    if sample.hessian is None:
        error = residual.square().sum(-1)
        return error, truth.largest_allowed_sse(error)
    error = truth.quadratic(residual, sample.hessian)
    return error, truth.largest_allowed_quadratic(error, residual, sample.hessian)
