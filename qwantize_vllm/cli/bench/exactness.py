"""Whether a sample of quantized blocks is what its search promises, by the float64 brute force."""

from __future__ import annotations

import dataclasses
import random

import torch

from qwantize_vllm.format import Nvfp4Tensor, unpack_codes
from qwantize_vllm.search import brute_force as truth


@dataclasses.dataclass(frozen=True)
class Sample:
    """n blocks of a weight, each seen as a matrix of one row and one block.

    Attributes:
        weight: (n, 1, block_size), the weight's dtype.
        hessian: float32 (n, 1, block_size, block_size), for the search "hessian".
        index: int64 (n,), which blocks they are, counted along the rows.
    """

    weight: torch.Tensor
    hessian: torch.Tensor | None
    index: torch.Tensor

    def of(self, q: Nvfp4Tensor) -> Nvfp4Tensor:
        """The same blocks of the quantized weight: an Nvfp4Tensor (n, 1, block_size)."""
        scales = q.block_scales.view(torch.uint8).reshape(-1)[self.index]
        matrix = self.index // q.block_scales.shape[-2:].numel()
        return Nvfp4Tensor(
            codes=q.codes.reshape(-1, 1, q.block_size // 2)[self.index],
            block_scales=scales.view(torch.float8_e4m3fn)[:, None, None],
            global_scale=q.global_scale.reshape(-1)[matrix],
            block_size=q.block_size,
        )


def draw_sample(weight: torch.Tensor, hessian: torch.Tensor | None, block_size: int, count: int) -> Sample:
    """count blocks at random, the same ones in every run; all of them if there are no more.

    weight: (..., N, K). hessian: float32 (K/block_size, block_size, block_size).
    """
    blocks = weight.numel() // block_size
    chosen = random.Random(0).sample(range(blocks), count) if count < blocks else range(blocks)
    index = torch.tensor(chosen, dtype=torch.int64, device=weight.device)
    return Sample(
        weight=weight.reshape(-1, 1, block_size)[index],
        hessian=None if hessian is None else hessian[index % hessian.shape[0], None],
        index=index,
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Blocks looked at, blocks that keep the promise, and the worst one that does not, in words."""

    checked: int
    kept: int
    worst: str | None


def judge(sample: Sample, quantized: Nvfp4Tensor, nearest: bool = True) -> Verdict:
    """Hold blocks against the promise of "optimal", or with a Hessian in the sample of "hessian".

    quantized: the whole weight. The errors must be the least of all scales, and the codes the nearest ones at the
    chosen scales (nearest) unless they were refined, which may only lower errors.
    """
    q = sample.of(quantized)
    residual = truth.residuals(sample.weight, q)
    if sample.hessian is None:
        error, least = residual.square().sum(-1), truth.least_sse(sample.weight, q)
        allowed = truth.largest_allowed_sse(least)
    else:
        error = truth.quadratic(residual, sample.hessian)
        least = truth.least_quadratic(sample.weight, q, sample.hessian)
        allowed = truth.largest_allowed_quadratic(least, residual, sample.hessian)
    return _verdict(sample, quantized, ~(error <= allowed), error, least, "error", nearest)


def judge_naive(sample: Sample, quantized: Nvfp4Tensor) -> Verdict:
    """Hold blocks against the rule of "naive": the scale is snap(amax/6), the codes are the nearest ones there."""
    q = sample.of(quantized)
    got, wanted = q.block_scales.double(), truth.snapped_scales(sample.weight, q).double()
    return _verdict(sample, quantized, got != wanted, got, wanted, "scale")


def _verdict(
    sample: Sample,
    quantized: Nvfp4Tensor,
    bad: torch.Tensor,
    got: torch.Tensor,
    wanted: torch.Tensor,
    what: str,
    nearest: bool = True,
) -> Verdict:
    """got, wanted float64 and bad bool, each (n, 1, 1); what: the quantity that got and wanted are."""
    q = sample.of(quantized)
    wrong_codes = (unpack_codes(q.codes) != truth.nearest_codes(sample.weight, q)).any(-1, keepdim=True) & nearest
    bad = (bad | wrong_codes).flatten()
    kept = bad.numel() - int(bad.sum())
    if kept == bad.numel():
        return Verdict(kept, kept, None)
    excess = (got / wanted - 1).abs().nan_to_num(torch.inf).flatten().masked_fill(~bad, -1)
    worst = int(excess.argmax())
    words = f"{what} {got.flatten()[worst]:.7g} where it must be {wanted.flatten()[worst]:.7g}"
    if wrong_codes.flatten()[worst]:
        words += ", codes not the nearest at its scale"
    return Verdict(bad.numel(), kept, f"{_place(int(sample.index[worst]), quantized)}: {words}")


def _place(block: int, q: Nvfp4Tensor) -> str:
    """Where a block is, in words."""
    row, column = divmod(block, q.block_scales.shape[-1])
    matrix, row = divmod(row, q.shape[-2])
    prefix = f"matrix {matrix}, " if len(q.shape) > 2 else ""
    return f"{prefix}row {row}, columns {column * q.block_size} to {(column + 1) * q.block_size - 1}"
