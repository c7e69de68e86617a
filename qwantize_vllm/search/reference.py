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
_OCTAVE = 8  # E4M3 codes from a scale to its double


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
        nearest = round_magnitudes(y.clamp_(max=E2M1_MAX)).mul_(scale)
        return (magnitude - nearest * self.head).sub_(nearest * self.tail), nearest

    def exact_residual(self, magnitude: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """The residual in float64."""
        return magnitude.double() - nearest.double() * self.g.double()


def round_magnitudes(y: torch.Tensor) -> torch.Tensor:
    """y in [0, 6] to the nearest E2M1 magnitude, ties to the even code; y is overwritten.

    E2M1 steps by p/2 where p is the power of two below y (1 below 2). Adding 1.5 * 2^22 * p leaves
    exactly such steps in a float32 mantissa, and rounds ties to the even step.
    """
    magic = (y.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(1.5 * 2**22)
    return y.add_(magic).sub_(magic)


def _search_sse(blocks: torch.Tensor, global_scale: torch.Tensor, optimal: bool) -> torch.Tensor:
    """E4M3 code (int64, (blocks,)) by snap(amax/6), or of the least squared error over all 126.

    Tries the eight codes from the smallest with 7*scale >= amax on: from there on, eight codes higher is twice the
    scale, every magnitude of which, up to 6 scales, the scale itself has too. (Below code 16 only even codes have a
    half, so there all codes up to 15 are tried.) Then walks down while the clipping error of the largest element,
    which only grows, is below the best error.
    """
    z_amax = (blocks / global_scale).abs_().amax(dim=0)
    if not optimal:
        # By a tensor: CUDA divides by a Python number as a multiplication by its rounded reciprocal.
        return snap_to_e4m3(z_amax / torch.full_like(z_amax, E2M1_MAX))
    errors = _Errors(blocks, global_scale)
    magnitude = errors.signed.abs()
    first = _first_codes(z_amax)
    best, best_error = first.clone(), torch.full_like(magnitude[0], torch.inf)
    for step in range(_OCTAVE):
        # Beyond the last code it is tried again.
        _keep_better(errors, magnitude, (first + step).clamp(max=E4M3_CODES), None, best, best_error)
    for step in range(_OCTAVE, 2 * _OCTAVE - 1):
        small = torch.nonzero(first + step < 2 * _OCTAVE).flatten()
        if small.numel():
            _keep_better(errors, magnitude[:, small], first[small] + step, small, best, best_error)
    _walk_down(errors, magnitude, first, best, best_error)
    return best


def _first_codes(z_amax: torch.Tensor) -> torch.Tensor:
    """Smallest E4M3 code (int64) whose value is at least z_amax/7, or the largest; z_amax float32, any shape."""
    code = torch.bucketize(z_amax, 7 * e4m3_values(z_amax.device)) + 1
    return code.clamp(max=E4M3_CODES)


def _walk_down(
    errors: _Errors, magnitude: torch.Tensor, first: torch.Tensor, best: torch.Tensor, best_error: torch.Tensor
) -> None:
    """Lower best_error and best in place with the scales below first."""
    going = torch.arange(first.numel(), device=first.device)
    amax, code = magnitude.amax(dim=0), first
    while going.numel():
        code = code - 1
        clipped = amax - E2M1_MAX * errors.values[code.clamp(min=1) - 1] * errors.g
        keep = torch.nonzero((code >= 1) & (clipped.clamp_(min=0).square_() < best_error[going])).flatten()
        magnitude, amax, code, going = magnitude[:, keep], amax[keep], code[keep], going[keep]
        _keep_better(errors, magnitude, code, going, best, best_error)


def _keep_better(
    errors: _Errors,
    magnitude: torch.Tensor,
    code: torch.Tensor,
    where: torch.Tensor | None,
    best: torch.Tensor,
    best_error: torch.Tensor,
) -> None:
    """Enter the squared errors of magnitudes at scale codes into best and best_error, at the indices where or all."""
    residual, _ = errors.residual(magnitude, errors.values[code - 1])
    error = residual.square_().sum(dim=0)
    known, known_best = (best_error, best) if where is None else (best_error[where], best[where])
    better = error < known
    error, chosen = torch.where(better, error, known), torch.where(better, code, known_best)
    if where is None:
        best_error.copy_(error), best.copy_(chosen)
    else:
        best_error[where], best[where] = error, chosen


def _search_hessian(
    weight: torch.Tensor, block_size: int, global_scale: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """E4M3 codes uint8 (N, K/block_size) of the least r'Hr."""
    n, k = weight.shape
    scales = torch.empty(n, k // block_size, dtype=torch.uint8, device=weight.device)
    columns = weight.reshape(n, k // block_size, block_size)
    form = normalize_hessian(hessian)
    bound = diagonal_bound(form)
    singular = bound.amax(dim=-1) == 0
    step = max(1, _CHUNK_BLOCKS // max(n, 1))
    for group in (torch.nonzero(singular).flatten(), torch.nonzero(~singular).flatten()):
        for j in group.split(step):
            for row in range(0, n, _CHUNK_BLOCKS):
                part = slice(row, row + _CHUNK_BLOCKS)
                blocks = columns[part, j].float().permute(1, 2, 0).contiguous()
                chosen = _QuadraticSearch(blocks, global_scale, form[j], bound[j]).run()
                scales[part, j] = chosen.t().to(torch.uint8)
    return scales


def normalize_hessian(hessian: torch.Tensor) -> torch.Tensor:
    """Each block Hessian times a power of two that brings its largest diagonal entry to [1/2, 1); the identity where
    that is zero. Exact, but for entries that underflow; errors keep their order."""
    peak = hessian.diagonal(dim1=-2, dim2=-1).amax(dim=-1)[..., None, None].double()
    _, exponent = torch.frexp(peak)
    identity = torch.eye(hessian.shape[-1], dtype=torch.float32, device=hessian.device)
    scaled = hessian.double() * torch.ldexp(torch.ones_like(peak), -exponent)
    return torch.where(peak > 0, scaled.float(), identity)


def diagonal_bound(hessian: torch.Tensor) -> torch.Tensor:
    """d >= 0, float32 (J, block), with r'Hr >= sum d_i r_i^2 for every r: the diagonal times the least eigenvalue of
    the H with unit diagonal. 0 where that is below 1/64: H is nearly singular, or not positive semidefinite.
    """
    h = hessian.double()
    h = (h + h.mT) / 2
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    root = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    correlation = h * root[..., None] * root[..., None, :]
    # A zero on the diagonal of a positive semidefinite H has zeros beside it, and its r_i does not count.
    dead = diagonal <= 0
    sound = ~(dead[..., None] & (h != 0)).flatten(-2).any(dim=-1)
    correlation.diagonal(dim1=-2, dim2=-1).masked_fill_(dead, 1.0)
    least = torch.linalg.eigvalsh(correlation)[..., 0]
    # The factor leaves room for the rounding of the eigenvalues, and for float32 in what is bounded.
    least = torch.where(sound & (least >= 1 / 64), 0.999 * least, 0.0)
    return (least[..., None] * diagonal).float()


class _QuadraticSearch:
    """The search for the least r'Hr of blocks (J, block, rows), with H (J, block, block) and its bound (J, block).

    Starts at the smallest scale with 7*scale >= amax and walks up, then down. With d the bound, up ends where
    sum d_i r_i^2 over the |z_i| < scale/2 reaches the best error (r_i is the distance to 0 or to scale/2, whichever
    is less, and scale/2 only moves away), or where all rounds to zero; down ends where sum d_i (|z_i| - 6*scale)^2
    over what is clipped does. If all bounds are 0, all codes are tried, in float64: r'Hr may be left of a cancellation.
    """

    def __init__(
        self, blocks: torch.Tensor, global_scale: torch.Tensor, hessian: torch.Tensor, bound: torch.Tensor
    ) -> None:
        self.errors = _Errors(blocks, global_scale)
        self.magnitude, self.sign = self.errors.signed.abs(), self.errors.signed.sign()
        self.z = (blocks / global_scale).abs_()
        self.bound = bound[..., None]
        self.dtype = torch.float32 if bool(bound.any()) else torch.float64
        self.hessian = hessian.to(self.dtype)
        self.best = torch.ones_like(blocks[:, 0], dtype=torch.long)
        self.best_error = torch.full_like(blocks[:, 0], torch.inf, dtype=self.dtype)

    def run(self) -> torch.Tensor:
        """E4M3 codes (int64, (J, rows))."""
        z_amax = self.z.amax(dim=1)
        first = _first_codes(z_amax)
        code, going = first, torch.ones_like(first, dtype=torch.bool)
        while bool(going.any()):
            residual, y = self._try(code.clamp(max=E4M3_CODES), going)
            lost = (self.bound * residual.square_()).mul_(y < 0.5).sum(dim=1)
            going &= self._may_win(lost) & (code < E4M3_CODES)
            going &= z_amax > 0.25 * self._scale(code.clamp(max=E4M3_CODES))[:, 0]
            code = code + 1
        code, going = first - 1, first > 1
        while bool(going.any()):
            scale = self._scale(code.clamp(min=1))
            excess = (self.magnitude - E2M1_MAX * self.errors.g * scale).clamp_(min=0)
            going &= self._may_win((self.bound * excess.square_()).sum(dim=1))
            self._try(code.clamp(min=1), going)
            code = code - 1
            going &= code >= 1
        return self.best

    def _may_win(self, lower_bound: torch.Tensor) -> torch.Tensor:
        # Without a bound not even an error of 0 ends the search: an H that is not positive semidefinite goes below.
        return (lower_bound < self.best_error) | (self.dtype == torch.float64)

    def _scale(self, code: torch.Tensor) -> torch.Tensor:
        return self.errors.values[code - 1][:, None]

    def _try(self, code: torch.Tensor, going: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Enter the errors at scale codes (J, rows) where going; returns |residual| and z/scale (J, block, rows)."""
        scale = self._scale(code)
        y = self.z / scale
        residual, nearest = self.errors.residual(self.magnitude, scale, y.clone())
        exact = residual if self.dtype == torch.float32 else self.errors.exact_residual(self.magnitude, nearest)
        signed = exact * self.sign
        error = (signed * torch.bmm(self.hessian, signed)).sum(dim=1)
        better = going & (error < self.best_error)
        self.best = torch.where(better, code, self.best)
        self.best_error = torch.where(better, error, self.best_error)
        return residual, y
