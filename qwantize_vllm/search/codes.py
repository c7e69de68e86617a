"""Better codes at given scales, in plain PyTorch: coordinate descent under r'Hr.

A scale search rounds every weight of a block to the nearest code. With H not diagonal that is not the least r'Hr
either: an error may be worth making because it cancels those beside it. With the scale s and all codes but one fixed,
r'Hr is a parabola in the value v_i of that one,

    least at  v_i + (Hr)_i / (H_ii s g),    lower than now by  d (2 (Hr)_i - d H_ii)  after a step  d = (v' - v_i) s g,

so the best code is the one nearest to that vertex. The elements of a block are visited in order, some sweeps long, and
a code changes only where r'Hr falls. It ends in a local optimum: no single code can be changed to gain anything, unless
the sweeps ran out before. (Coordinate descent for weights that are quantized is QuantEase, Behdin et al.,
arXiv:2309.01885.)

Here everything is float64, so that "falls" can be taken at its word. `triton_codes.py` is the kernel.
"""

from __future__ import annotations

import torch

from qwantize_vllm.format import E2M1_MAX, e2m1_values, e4m3_values, pack_codes, round_to_e2m1, unpack_codes
from qwantize_vllm.search.reference import normalize_hessian, round_magnitudes

SWEEPS = 4  # most blocks are done after two; the last one only finds that nothing changes
_CHUNK_BLOCKS = 8192


def refine_reference(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    block_size: int,
    global_scale: torch.Tensor,
    hessian: torch.Tensor,
) -> torch.Tensor:
    """Codes of one matrix whose r'Hr is on every block at most that of the given ones.

    Args:
        weight: (N, K) float32, bfloat16 or float16, finite, K a multiple of block_size; any strides.
        codes: uint8 (N, K/2), packed.
        scales: uint8 (N, K/block_size), E4M3 codes 1..126.
        block_size: 16 or 32.
        global_scale: float32 (), positive and normal.
        hessian: float32 (K/block_size, block_size, block_size).

    Returns:
        Packed codes uint8 (N, K/2).
    """
    n, k = weight.shape
    columns = weight.reshape(n, k // block_size, block_size)
    table = e2m1_values(weight.device).double()
    indices = unpack_codes(codes).view(columns.shape)
    form = normalize_hessian((hessian + hessian.mT) / 2).double()
    g, exponent = torch.frexp(global_scale)
    refined = torch.empty_like(indices)
    step = max(1, _CHUNK_BLOCKS // max(n, 1))
    for j in torch.arange(k // block_size, device=weight.device).split(step):
        for row in range(0, n, _CHUNK_BLOCKS):
            part = slice(row, row + _CHUNK_BLOCKS)
            value = table[indices[part, j].permute(1, 2, 0).long()]
            scaled = torch.ldexp(columns[part, j].permute(1, 2, 0).float(), -exponent).double()
            unit = e4m3_values(weight.device).double()[scales[part, j].t().long() - 1] * g.double()
            refined[part, j] = round_to_e2m1(_descend(scaled, value, unit, form[j]).permute(2, 0, 1).contiguous())
    return pack_codes(refined.view(n, k))


def _descend(scaled: torch.Tensor, value: torch.Tensor, unit: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Values (J, block, rows) of the refined codes, all float64: scaled and value (J, block, rows), unit = s*g
    (J, rows), H (J, block, block)."""
    gradient = hessian @ (scaled - value * unit[:, None])
    diagonal = hessian.diagonal(dim1=1, dim2=2)[..., None]
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)  # without curvature there is no vertex: the code stays
    for _ in range(SWEEPS):
        moved = torch.zeros((), dtype=torch.bool, device=value.device)
        for i in range(value.shape[1]):
            nearest = _nearest(value[:, i] + gradient[:, i] * inverse[:, i] / unit)
            change = (nearest - value[:, i]) * unit
            gains = change * (2 * gradient[:, i] - change * diagonal[:, i]) > 0
            value[:, i] = torch.where(gains, nearest, value[:, i])
            gradient -= hessian[:, :, i, None] * torch.where(gains, change, 0.0)[:, None]
            moved |= gains.any()
        if not bool(moved):
            break
    return value


def _nearest(y: torch.Tensor) -> torch.Tensor:
    """The E2M1 values nearest to y, both float64."""
    return torch.copysign(round_magnitudes(y.abs().float().clamp_(max=E2M1_MAX)).double(), y)
