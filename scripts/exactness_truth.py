"""The float64 brute force over all 126 block scales, fast enough for millions of blocks.

The arrays are (columns, block, rows): the blocks of a column share a Hessian, and the work on a block runs along the
vector units. A few thousand blocks at a time stay in a core's cache. z is the weight in units of the global scale,
z = w/g; the E2M1 codes of a block at a scale are by definition those of RN32(z)/scale, ties to the even code.
"""

from __future__ import annotations

import dataclasses

import torch

from qwantize_vllm.format import e4m3_values
from qwantize_vllm.search.brute_force import QUADRATIC_FLOOR, QUADRATIC_TOLERANCE, SSE_TOLERANCE


def nearest_e2m1(y: torch.Tensor) -> torch.Tensor:
    """float64 y >= 0 to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code.

    The grid steps by 0.5 up to 2, by 1 up to 4, by 2 up to 6. In multiples of the step, the even code is the even
    number. y/step is exact, for the steps are powers of two.
    """
    half, one, two = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=y.device)
    y = y.clamp(max=6.0)
    step = torch.where(y < 2, half, torch.where(y < 4, one, two))
    return y.div_(step).round_().mul_(step)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks to be judged, float64 (columns, block, rows).

    Attributes:
        exact: z, of which residuals are taken.
        rounded: |RN32(z)|, of which codes are taken: in float64, so that dividing by a scale of four significant bits
            gives a midpoint of the grid exactly where RN32(z) is the midpoint times the scale, and keeps the order.
    """

    exact: torch.Tensor
    rounded: torch.Tensor

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """The magnitudes of the codes at a scale, times the scale. scale: float64 () or (columns, 1, rows).

        The scale has to be a tensor on the device: by a Python number CUDA divides with its reciprocal.
        """
        return nearest_e2m1(self.rounded / scale).mul_(scale)

    def residual(self, scale: torch.Tensor) -> torch.Tensor:
        """z - code*scale; the product is exact."""
        return self.exact - torch.copysign(self.nearest(scale), self.exact)

    def scales_that_differ(self) -> torch.Tensor:
        """float64: all scales, less those whose errors repeat the last one here.

        Where 0.25*scale reaches the largest |RN32(z)|, all blocks round to zero (0.25 is a tie, and 0 is even), and so
        they do at every larger scale: the residual is z itself and the error always the same.
        """
        scales = e4m3_values(self.exact.device).double()
        return scales[: int((0.25 * scales < self.rounded.max()).sum()) + 1]


@dataclasses.dataclass(frozen=True)
class Measure:
    """The error that a search minimizes: the squared error, or r'Hr with float64 hessian (columns, block, block)."""

    hessian: torch.Tensor | None = None

    def error(self, residual: torch.Tensor) -> torch.Tensor:
        """(columns, rows) of residuals (columns, block, rows)."""
        if self.hessian is None:
            return residual.square().sum(dim=1)
        return torch.bmm(self.hessian, residual).mul_(residual).sum(dim=1)

    def tolerance(self, least: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
        """By how much an error may exceed the least one; energy is |r|^2. All (columns, rows)."""
        if self.hessian is None:
            return SSE_TOLERANCE * least
        trace = self.hessian.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        return QUADRATIC_TOLERANCE * least + QUADRATIC_FLOOR * trace[:, None] * energy


def measure_by(hessian: torch.Tensor | None) -> Measure:
    """The measure of a float32 hessian (columns, block, block) or none; where H is zero the squared error decides."""
    if hessian is None:
        return Measure()
    zero = (hessian == 0).all(dim=-1).all(dim=-1)
    identity = torch.eye(hessian.shape[-1], dtype=torch.float64, device=hessian.device)
    return Measure(torch.where(zero[:, None, None], identity, hessian.double()))


def least_error(blocks: Blocks, measure: Measure) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns, rows): the least error over all scales, by trying each; and |r|^2 where it is reached.

    At least 0: rounded to float32, H = sum of x x' need not be positive semidefinite any more, and where x'r is all but
    0 rounding may make of it something below; but no error is.
    """
    least = energy = torch.tensor(torch.inf, dtype=torch.float64, device=blocks.exact.device)
    for scale in blocks.scales_that_differ():
        residual = blocks.residual(scale)
        error = measure.error(residual).clamp_(min=0)
        if measure.hessian is not None:
            energy = torch.where(error < least, residual.square_().sum(dim=1), energy)
        least = torch.minimum(least, error)
    return least, least if measure.hessian is None else energy
