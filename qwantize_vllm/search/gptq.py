"""Error compensation across blocks (GPTQ), a block of columns at a time.

The layer's output error is tr(R H R'), R = W - Q (N, K) and H the Hessian of all K inputs. With H = T T', T upper
triangular, it is |R T|^2, and column block B of R T depends only on the residuals of the blocks up to B:

    (R T)_B  =  R_before T_before,B  +  R_B T_BB  =  (W'_B - Q_B) T_BB,      W'_B = W_B + R_before T_before,B T_BB^-1

So block after block is quantized as if its weights were W'_B, which repair what those before it broke, as far as that
can be: each row pays r'Sr, r a row of W'_B - Q_B and S = T_BB T_BB' what H leaves of the block once the later ones have
repaired what they can. What is written here as |R T|^2 is GPTQ (Frantar et al., arXiv:2210.17323), there with the
inverse of H; that it is Babai's nearest-plane algorithm was noted by Chen et al., arXiv:2507.18553.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

from qwantize_vllm.format import dequantize_rows
from qwantize_vllm.search.searches import Searches

BlockOrder = Literal["loss", "natural"]


@dataclasses.dataclass(frozen=True)
class GptqOptions:
    """How the blocks of a layer are quantized one after the other.

    Attributes:
        damping: added to the diagonal of H, as a part of the diagonal's mean; over 0.
        order: "loss", first the blocks that lose most where nothing is compensated, which is better; or "natural".
        sweeps: how often the codes of all blocks are refined again, each block given all others.

    Raises:
        ValueError: none of these.
    """

    damping: float = 0.01
    order: BlockOrder = "loss"
    sweeps: int = 0

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"damping must be over 0, got {self.damping!r}")
        if self.order not in get_args(BlockOrder):
            raise ValueError(f"order must be one of {get_args(BlockOrder)}, got {self.order!r}")
        if self.sweeps < 0:
            raise ValueError(f"sweeps must be 0 or more, got {self.sweeps}")


GPTQ_DEFAULTS = GptqOptions()


def quantize_gptq(
    weight: torch.Tensor,
    block_size: int,
    global_scale: torch.Tensor,
    hessian: torch.Tensor,
    searches: type[Searches],
    options: GptqOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a batch of matrices, one at a time, each block after block.

    A matrix costs a Cholesky factor of H in float64, K^3/3, N K^2/2 multiply-adds in float32 (a sweep 2 N K^2), and
    K/block_size searches of (N, block_size), some fifty launches each on a GPU; memory for four float64 (K, K) and
    three float32 (N, K).

    Args:
        weight: (E, N, K) float32, bfloat16 or float16, finite, K a multiple of block_size; any strides.
        block_size: 16 or 32.
        global_scale: float32 (E,), positive and normal.
        hessian: float32 (E, K, K), each the sum of x x' over the layer's inputs.
        searches: by which a column of blocks is quantized.

    Returns:
        Packed codes uint8 (E, N, K/2) and the E4M3 codes of the block scales uint8 (E, N, K/block_size).

    Raises:
        ValueError: an H, damped, is not positive definite.
    """
    e, n, k = weight.shape
    codes = torch.empty(e, n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(e, n, k // block_size, dtype=torch.uint8, device=weight.device)
    for i in range(e if n else 0):
        matrix = _Matrix(weight[i].float(), block_size, global_scale[i : i + 1], hessian[i], searches, options)
        codes[i], scales[i] = matrix.quantize(options.sweeps)
    return codes, scales


class _Matrix:
    """One matrix on its way; all of weight and H in the order in which blocks are visited."""

    def __init__(
        self,
        weight: torch.Tensor,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor,
        searches: type[Searches],
        options: GptqOptions,
    ) -> None:
        self.block_size, self.global_scale, self.searches = block_size, global_scale, searches
        damped = damp(hessian, options.damping)
        blocks = diagonal_blocks(damped, block_size)
        self.order = self._order_by_loss(weight, blocks) if options.order == "loss" else range(len(blocks))
        index = torch.tensor(self.order, device=weight.device)
        elements = (index[:, None] * block_size + torch.arange(block_size, device=weight.device)).flatten()
        self.weight = weight[:, elements]
        self.blocks = blocks[index].float()
        self.hessian = damped[elements][:, elements]
        self.residual = torch.zeros_like(self.weight)
        self.codes: list[torch.Tensor] = []  # of each block column, (1, N, block_size/2)
        self.scales: list[torch.Tensor] = []  # (1, N, 1)

    def quantize(self, sweeps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales), in the order of the weight's columns."""
        factor = upper_factor(self.hessian).float()
        for step in range(len(self.order)):
            self._quantize_block(step, factor)
        if sweeps:
            hessian = self.hessian.float()
            for _ in range(sweeps):
                self._sweep(hessian)
        back = torch.tensor(self.order, device=self.weight.device).argsort().tolist()
        return torch.cat([self.codes[j][0] for j in back], 1), torch.cat([self.scales[j][0] for j in back], 1)

    def _part(self, step: int) -> slice:
        """The columns of the block whose turn it is."""
        return slice(step * self.block_size, (step + 1) * self.block_size)

    def _quantize_block(self, step: int, factor: torch.Tensor) -> None:
        """As if its weights were W'_B."""
        part = self._part(step)
        before = self.residual[:, : part.start] @ factor[: part.start, part]
        corner = factor[part, part]
        wanted = self.weight[:, part] + torch.linalg.solve_triangular(corner, before, upper=True, left=False)
        codes, scales = self._search(wanted, self.blocks[step : step + 1])
        left = (corner @ corner.mT)[None, None]
        codes = self.searches.refine(wanted[None], codes, scales, self.block_size, self.global_scale, left)
        self.residual[:, part] = self.weight[:, part] - self._decode(codes[0], scales[0])
        self.codes.append(codes)
        self.scales.append(scales)

    def _sweep(self, hessian: torch.Tensor) -> None:
        """Once more through all blocks, now that those after a block are known too: with all others fixed the output
        error is least where R_B H_BB = -(R H)_B without the block's own part."""
        gradient = self.residual @ hessian
        for step, block in enumerate(self.blocks):
            part = self._part(step)
            residual = self.residual[:, part]
            others = gradient[:, part] - residual @ block
            wanted = self.weight[:, part] + torch.linalg.solve(block, others, left=False)
            given = (self.codes[step], self.scales[step], self.block_size, self.global_scale, block[None, None])
            codes = self.searches.refine(wanted[None], *given)
            after = self.weight[:, part] - self._decode(codes[0], self.scales[step][0])
            gradient += (after - residual) @ hessian[part]
            self.codes[step], self.residual[:, part] = codes, after

    def _search(self, weight: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.searches.search(weight[None], "hessian", self.block_size, self.global_scale, blocks[None])

    def _decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return dequantize_rows(codes, scales.view(torch.float8_e4m3fn), self.global_scale, self.block_size)

    def _order_by_loss(self, weight: torch.Tensor, blocks: torch.Tensor) -> list[int]:
        """The blocks in falling order of what they lose where nothing is compensated."""
        codes, scales = self._search(weight, blocks.float())
        residual = (weight - self._decode(codes[0], scales[0])).unflatten(1, (len(blocks), -1)).transpose(0, 1).double()
        loss = ((residual @ blocks) * residual).sum(dim=(1, 2))
        order: list[int] = loss.argsort(descending=True, stable=True).tolist()
        return order


def diagonal_blocks(hessian: torch.Tensor, block_size: int) -> torch.Tensor:
    """(K, K) -> (K/block_size, block_size, block_size)."""
    blocks = len(hessian) // block_size
    square = hessian.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1))
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def damp(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H, symmetric and of a mean diagonal of 1 (the identity where H is zero), plus damping on it, float64 (K, K)."""
    damped = hessian.double()
    damped = (damped + damped.mT) / 2
    mean = float(damped.diagonal().mean())
    damped = damped / (mean if mean > 0 else 1.0)
    damped.diagonal().add_(damping if mean > 0 else 1.0)
    return damped


def upper_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular T with H = T T', float64 (K, K).

    Raises:
        ValueError: H is not positive definite.
    """
    # The lower factor of H in reverse order, in reverse order.
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        raise ValueError(
            f"hessian {tuple(hessian.shape)} is not positive definite, not even damped; raise the damping, or "
            "calibrate on more text"
        )
    return factor.flip(0, 1)
