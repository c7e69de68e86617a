"""The searches over batches of matrices, by the PyTorch reference and by the Triton kernels: the same two functions."""

from __future__ import annotations

from typing import Protocol

import torch

from qwantize_vllm.search.codes import refine_reference
from qwantize_vllm.search.reference import search_reference


class Searches(Protocol):
    """Shapes: weight (E, N, K), global_scale (E,), hessian (E, K/block_size, block_size, block_size), its first stride
    0 where one is shared; packed codes uint8 (E, N, K/2), E4M3 codes of scales uint8 (E, N, K/block_size)."""

    @staticmethod
    def search(
        weight: torch.Tensor,
        scale_search: str,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales) of a scale search; hessian for "hessian"."""

    @staticmethod
    def refine(
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor,
    ) -> torch.Tensor:
        """Codes whose r'Hr is on every block at most that of the given ones, which may be overwritten."""


class ReferenceSearches:
    """In PyTorch, matrix by matrix."""

    @staticmethod
    def search(
        weight: torch.Tensor,
        scale_search: str,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        e, n, k = weight.shape
        codes = torch.empty(e, n, k // 2, dtype=torch.uint8, device=weight.device)
        scales = torch.empty(e, n, k // block_size, dtype=torch.uint8, device=weight.device)
        for i in range(e):
            h = None if hessian is None else hessian[i]
            codes[i], scales[i] = search_reference(weight[i], scale_search, block_size, global_scale[i], h)
        return codes, scales

    @staticmethod
    def refine(
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor,
    ) -> torch.Tensor:
        for i in range(weight.shape[0]):
            codes[i] = refine_reference(weight[i], codes[i], scales[i], block_size, global_scale[i], hessian[i])
        return codes


class TritonSearches:
    """In Triton, which is imported where it is needed: the reference works on machines that have none."""

    @staticmethod
    def search(
        weight: torch.Tensor,
        scale_search: str,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hessian is not None:
            from qwantize_vllm.search.triton_hessian import search_hessian

            return search_hessian(weight, global_scale, block_size, _dense(hessian))
        from qwantize_vllm.search.triton_sse import search_sse

        return search_sse(weight, global_scale, block_size, optimal=scale_search == "optimal")

    @staticmethod
    def refine(
        weight: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        block_size: int,
        global_scale: torch.Tensor,
        hessian: torch.Tensor,
    ) -> torch.Tensor:
        from qwantize_vllm.search.triton_codes import refine_codes

        return refine_codes(weight, codes, scales, block_size, global_scale, hessian)


def _dense(hessian: torch.Tensor) -> torch.Tensor:
    """With each (block, block) contiguous, as the kernels read it."""
    block_size = hessian.shape[-1]
    return hessian if hessian.stride()[-2:] == (block_size, 1) else hessian.contiguous()
