"""The three scale searches in plain PyTorch, for any device: what the Triton kernels are compared with.

All of them look at one matrix in units of its global scale g. Every quantity that decides is exact
or correctly rounded, so that a float32 search keeps the promise of 1e-5 against float64:

* g is brought into [1/2, 1) by a power of two, and the weight with it, so nothing over- or underflows.
* A residual is w - value*scale*g. value*scale has at most six significant bits; g is split into a
  head of eighteen bits and a tail, so value*scale*head is exact and the subtraction rounds once.
* The codes of a block at a scale are those of z = w/g, rounded once: |z| is compared with
  midpoint*scale, which is exact, or divided by the scale, which keeps the order (the correctly
  rounded quotient equals a midpoint only if |z| equals midpoint*scale). A squared error does not
  care which way a tie falls, r'Hr does.

Arrays are (block, blocks): a reduction over a block then runs along the vector units.
"""

from __future__ import annotations

import torch

from qwantize_vllm.format import E2M1_MAX, E4M3_CODES, e4m3_values, pack_codes

# Blocks searched at once: their float32 copies stay in a core's cache.
_CHUNK_BLOCKS = 8192


def search_reference(
    weight: torch.Tensor,
    scale_search: str,
    block_size: int,
    global_scale: torch.Tensor,
    hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize one matrix.

    Args:
        weight: (N, K) float32, bfloat16 or float16, finite, K a multiple of block_size; any strides.
        scale_search: "naive", "optimal" or "hessian".
        block_size: 16 or 32.
        global_scale: float32 (), positive and normal.
        hessian: float32 (K/block_size, block_size, block_size), for "hessian".

    Returns:
        Packed codes uint8 (N, K/2) and the E4M3 codes of the block scales uint8 (N, K/block_size).
    """
    n, k = weight.shape
    codes = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // block_size, dtype=torch.uint8, device=weight.device)
    if hessian is not None:
        scales = _search_hessian(weight, block_size, global_scale, hessian)
    rows = max(1, _CHUNK_BLOCKS * block_size // max(k, 1))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        blocks = weight[part].reshape(-1, block_size).float().t().contiguous()
        if hessian is None:
            chosen = _search_sse(blocks, global_scale, optimal=scale_search == "optimal")
            scales[part] = chosen.to(torch.uint8).view(-1, k // block_size)
        chosen = scales[part].reshape(-1).long()
        codes[part] = pack_codes(_encode(blocks, global_scale, chosen).t().reshape(-1, k))
    return codes, scales


def snap_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """E4M3 code (int64, 1..126) nearest to x >= 0, ties to the even code, saturating at both ends."""
    return x.clamp(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8).long().clamp(1, E4M3_CODES)


def _encode(blocks: torch.Tensor, global_scale: torch.Tensor, scale_codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes uint8 (block, blocks): |w/g| against the midpoints times the scale, ties to the even code."""
    scale = e4m3_values(blocks.device)[scale_codes - 1]
    z = (blocks / global_scale).abs_()
    code = torch.signbit(blocks).to(torch.uint8) << 3
    for midpoint in (0.25, 1.25, 2.5, 5.0):
        code += z > midpoint * scale
    for midpoint in (0.75, 1.75, 3.5):
        code += z >= midpoint * scale
    return code


class _Errors:
    """Errors of |w| at a scale, in units where the global scale lies in [1/2, 1)."""

    def __init__(self, blocks: torch.Tensor, global_scale: torch.Tensor) -> None:
        g, exponent = torch.frexp(global_scale)
        head = (g.view(torch.int32) & ~0x3F).view(torch.float32)
        self.g, self.head, self.tail = g, head, g - head
        self.signed = torch.ldexp(blocks, -exponent)
        self.values = e4m3_values(blocks.device)

    def residual(
        self, magnitude: torch.Tensor, scale: torch.Tensor, y: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(|w| - nearest, nearest), nearest being the E2M1 magnitude of y times the scale.

        y defaults to |w|/(g*scale) within two roundings, which only a tie can tell from the quotient.
        """
        if y is None:
            y = magnitude * (1.0 / (scale * self.g))
        nearest = _round_magnitudes(y.clamp_(max=E2M1_MAX)).mul_(scale)
        return (magnitude - nearest * self.head).sub_(nearest * self.tail), nearest


def _round_magnitudes(y: torch.Tensor) -> torch.Tensor:
    """y in [0, 6] to the nearest E2M1 magnitude, ties to the even code; y is overwritten.

    E2M1 steps by p/2 where p is the power of two below y (1 below 2). Adding 1.5 * 2^22 * p leaves
    exactly such steps in a float32 mantissa, and rounds ties to the even step.
    """
    magic = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(1.5 * 2**22)
    return y.add_(magic).sub_(magic)


def _search_sse(blocks: torch.Tensor, global_scale: torch.Tensor, optimal: bool) -> torch.Tensor:
    """E4M3 code (int64, (blocks,)) by snap(amax/6), or of the least squared error over all 126.

    Starts at snap(amax/6) and walks one code at a time, up and then down. Both stops are proofs:
    upwards, what rounds to zero at a scale rounds to zero at every larger one, so the energy lost
    that way only grows, and once it reaches the best error no larger scale can win; downwards, the
    same holds for the clipping error of the largest element.
    """
    start = snap_to_e4m3((blocks / global_scale).abs_().amax(dim=0) / E2M1_MAX)
    if not optimal:
        return start
    errors = _Errors(blocks, global_scale)
    magnitude = errors.signed.abs()
    residual, nearest = errors.residual(magnitude, errors.values[start - 1])
    best_error, best = residual.square_().sum(dim=0), start.clone()
    zeroed = (magnitude.square() * (nearest == 0)).sum(dim=0)
    _walk_up(errors, magnitude, start, zeroed, best, best_error)
    _walk_down(errors, magnitude, start, best, best_error)
    return best


def _walk_up(
    errors: _Errors,
    magnitude: torch.Tensor,
    start: torch.Tensor,
    zeroed: torch.Tensor,
    best: torch.Tensor,
    best_error: torch.Tensor,
) -> None:
    """Lower best_error and best in place with the scales above start."""
    going = torch.nonzero((zeroed < best_error) & (start < E4M3_CODES)).flatten()
    code = start
    magnitude, code = magnitude[:, going], code[going]
    while going.numel():
        code = code + 1
        residual, nearest = errors.residual(magnitude, errors.values[code - 1])
        zeroed = (magnitude.square() * (nearest == 0)).sum(dim=0)
        limit = _keep_better(residual, code, going, best, best_error)
        keep = torch.nonzero((zeroed < limit) & (code < E4M3_CODES)).flatten()
        magnitude, code, going = magnitude[:, keep], code[keep], going[keep]


def _walk_down(
    errors: _Errors, magnitude: torch.Tensor, start: torch.Tensor, best: torch.Tensor, best_error: torch.Tensor
) -> None:
    """Lower best_error and best in place with the scales below start."""
    going = torch.arange(start.numel(), device=start.device)
    amax, code = magnitude.amax(dim=0), start
    limit = best_error
    while True:
        code = code - 1
        clipped = amax - E2M1_MAX * errors.values[code.clamp(min=1) - 1] * errors.g
        keep = torch.nonzero((code >= 1) & (clipped.clamp_(min=0).square_() < limit)).flatten()
        if not keep.numel():
            return
        magnitude, amax, code, going = magnitude[:, keep], amax[keep], code[keep], going[keep]
        residual, _ = errors.residual(magnitude, errors.values[code - 1])
        limit = _keep_better(residual, code, going, best, best_error)


def _keep_better(
    residual: torch.Tensor, code: torch.Tensor, where: torch.Tensor, best: torch.Tensor, best_error: torch.Tensor
) -> torch.Tensor:
    """Enter the squared error of residual into best and best_error at where; returns the best so far there."""
    error, known = residual.square_().sum(dim=0), best_error[where]
    better = error < known
    best[where] = torch.where(better, code, best[where])
    limit = torch.minimum(error, known)
    best_error[where] = limit
    return limit


def _search_hessian(
    weight: torch.Tensor, block_size: int, global_scale: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """E4M3 codes uint8 (N, K/block_size) of the least r'Hr, by trying every code that differs."""
    n, k = weight.shape
    scales = torch.empty(n, k // block_size, dtype=torch.uint8, device=weight.device)
    columns = weight.view(n, -1, block_size) if weight.is_contiguous() else weight.reshape(n, -1, block_size)
    unit = normalize_hessian(hessian)
    step = max(1, _CHUNK_BLOCKS // max(n, 1))
    for j in range(0, k // block_size, step):
        for row in range(0, n, _CHUNK_BLOCKS):
            part = (slice(row, row + _CHUNK_BLOCKS), slice(j, j + step))
            blocks = columns[part].float().permute(1, 2, 0).contiguous()
            scales[part] = _sweep(blocks, global_scale, unit[j : j + step]).t().to(torch.uint8)
    return scales


def normalize_hessian(hessian: torch.Tensor) -> torch.Tensor:
    """Each block Hessian over its largest diagonal entry, the identity where that is zero; errors keep their order."""
    peak = hessian.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[..., None, None]
    identity = torch.eye(hessian.shape[-1], device=hessian.device)
    return torch.where(peak > 0, hessian / torch.where(peak > 0, peak, 1.0), identity)


def _sweep(blocks: torch.Tensor, global_scale: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """E4M3 code (int64, (J, rows)) of the least r'Hr; blocks (J, block, rows), hessian (J, block, block).

    r is the signed residual in units of g. Codes above the first one at which every block rounds
    to zero all give the same error, so the sweep ends there.
    """
    errors = _Errors(blocks, global_scale)
    magnitude, sign = errors.signed.abs(), errors.signed.sign()
    z = (blocks / global_scale).abs_()
    last = min(int(snap_to_e4m3(z.amax() * 4.0)) + 1, E4M3_CODES)
    best = torch.ones_like(blocks[:, 0], dtype=torch.long)
    best_error = torch.full_like(blocks[:, 0], torch.inf)
    for code in range(1, last + 1):
        scale = errors.values[code - 1]
        residual, _ = errors.residual(magnitude, scale, z / scale)
        residual *= sign
        error = (residual * torch.bmm(hessian, residual)).sum(dim=1)
        best.masked_fill_(error < best_error, code)
        best_error = torch.minimum(error, best_error)
    return best
