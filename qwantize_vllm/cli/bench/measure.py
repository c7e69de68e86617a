"""Everything that `qwantize bench quantize` measures, one line of the tables after another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from tqdm import tqdm

from qwantize_vllm.cli.bench.clock import copy_bytes_per_second, median_seconds
from qwantize_vllm.cli.bench.compare import Comparison, compare
from qwantize_vllm.cli.bench.exactness import draw_sample, judge, judge_naive
from qwantize_vllm.cli.bench.inputs import random_hessian, random_weight
from qwantize_vllm.cli.bench.peers import Peer
from qwantize_vllm.cli.bench.shapes import Layer
from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.search.quantize import (
    GlobalScale,
    Refine,
    ScaleSearch,
    matrix_amax,
    resolve_global_scale,
    search_nvfp4,
)


@dataclasses.dataclass(frozen=True)
class Search:
    """A scale search, and what follows it: "hessian+codes" as text, where that is not nothing."""

    scales: ScaleSearch
    refine: Refine = "none"

    def __str__(self) -> str:
        return self.scales if self.refine == "none" else f"{self.scales}+{self.refine}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and on what."""

    layers: list[Layer]
    searches: list[Search]
    peers: list[Peer]
    block_size: int
    global_scale: GlobalScale
    dtype: torch.dtype
    device: torch.device
    check_blocks: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        bytes_moved: of the weight read, and of the codes and block scales written.
        search_*: the search alone, the global scale given.
        whole_*: from the weight to codes and scales: one more pass over it for the global scale, then the search.
        of_copy: bytes_moved a second over the bandwidth of a copy.
        checked, kept, worst: see `exactness.Verdict`.
    """

    layer: Layer
    search: str
    bytes_moved: int
    search_ms: float
    search_gb_per_s: float
    search_of_copy: float
    whole_ms: float
    whole_gb_per_s: float
    whole_of_copy: float
    checked: int
    kept: int
    worst: str | None


@dataclasses.dataclass
class Results:
    """copy: bytes read and written a second by a copy; the lines of both tables."""

    copy: float
    rows: list[Row] = dataclasses.field(default_factory=list)
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What must not be, in words: blocks that break their promise, peers that found a better scale."""
        rows = [f"{r.layer} {r.search}: {r.checked - r.kept} wrong, worst {r.worst}" for r in self.rows if r.worst]
        return rows + [
            f"{c.layer} {c.search}: {c.peer} has a smaller error on {c.ours_larger} of {c.checked} blocks"
            for c in self.comparisons
            if c.refuted
        ]


def measure(plan: Plan) -> Results:
    """The bandwidth of a copy first, then every layer with every search, and every peer that has it."""
    results = Results(copy_bytes_per_second(plan.device))
    for layer in tqdm(plan.layers, unit="layer", disable=None):  # no bar where stderr is no terminal
        weight = random_weight(layer.shape, plan.dtype, plan.device)
        for search in plan.searches:
            hessian = None
            if search.scales == "hessian":
                hessian = random_hessian(layer.shape[-1], plan.block_size, plan.device)
            results.rows.append(_measure_search(plan, layer, search, weight, hessian, results.copy))
            results.comparisons += _measure_peers(plan, layer, search, weight, hessian)
    return results


def _measure_search(
    plan: Plan, layer: Layer, search: Search, weight: torch.Tensor, hessian: torch.Tensor | None, copy: float
) -> Row:
    whole = functools.partial(_quantize, weight, search, plan.block_size, plan.global_scale, hessian)
    q = whole()
    sample = draw_sample(weight, hessian, plan.block_size, plan.check_blocks)
    nearest = search.refine == "none"
    verdict = judge_naive(sample, q) if search.scales == "naive" else judge(sample, q, nearest)
    given = (weight, search.scales, plan.block_size, q.global_scale, hessian)
    alone = functools.partial(search_nvfp4, *given, refine=search.refine)
    search_seconds, whole_seconds = (median_seconds(call, plan.device) for call in (alone, whole))
    moved = weight.nbytes + q.codes.nbytes + q.block_scales.nbytes
    return Row(
        layer=layer,
        search=str(search),
        bytes_moved=moved,
        search_ms=1e3 * search_seconds,
        search_gb_per_s=moved / search_seconds / 1e9,
        search_of_copy=moved / search_seconds / copy,
        whole_ms=1e3 * whole_seconds,
        whole_gb_per_s=moved / whole_seconds / 1e9,
        whole_of_copy=moved / whole_seconds / copy,
        **dataclasses.asdict(verdict),
    )


def _measure_peers(
    plan: Plan, layer: Layer, search: Search, weight: torch.Tensor, hessian: torch.Tensor | None
) -> Iterator[Comparison]:
    def ours(rows: torch.Tensor) -> Nvfp4Tensor:
        return _quantize(rows, search, plan.block_size, "none", hessian)

    for peer in plan.peers:
        if str(search) in peer.searches:
            yield compare(peer, layer, search.scales, weight, hessian, ours, plan.block_size, plan.check_blocks)


def _quantize(
    weight: torch.Tensor,
    search: Search,
    block_size: int,
    global_scale: GlobalScale,
    hessian: torch.Tensor | None,
) -> Nvfp4Tensor:
    """`quantize_nvfp4` without the questions it asks the GPU (is the weight finite?), for which Python has to wait."""
    scale = resolve_global_scale(matrix_amax(weight), global_scale)
    return search_nvfp4(weight, search.scales, block_size, scale, hessian, refine=search.refine)
