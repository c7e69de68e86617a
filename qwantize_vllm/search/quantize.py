"""The one door of the scale search: a weight goes in, an Nvfp4Tensor comes out."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from qwantize_vllm.format import FLOAT_DTYPES, Nvfp4Tensor, check_block_size, default_global_scale
from qwantize_vllm.search.gptq import GPTQ_DEFAULTS, GptqOptions, quantize_gptq
from qwantize_vllm.search.searches import ReferenceSearches, TritonSearches

ScaleSearch = Literal["naive", "optimal", "hessian"]
Refine = Literal["none", "codes", "gptq"]
GlobalScale = Literal["amax", "none"]
SearchBackend = Literal["auto", "reference", "triton"]


def quantize_nvfp4(
    weight: torch.Tensor,
    scale_search: ScaleSearch = "optimal",
    block_size: int = 16,
    global_scale: GlobalScale | torch.Tensor = "amax",
    hessian: torch.Tensor | None = None,
    *,
    refine: Refine = "none",
    gptq: GptqOptions = GPTQ_DEFAULTS,
    backend: SearchBackend = "auto",
) -> Nvfp4Tensor:
    """Quantize a weight to NVFP4, choosing each block's scale by the given search.

    Args:
        weight: (..., N, K) float32, bfloat16 or float16; leading dimensions are a batch of matrices
            (experts). Any strides, any device. Must be finite.
        scale_search: how the E4M3 scale of a block is chosen:
            "naive": snap(amax/6), the usual rule;
            "optimal": the least squared weight error over all 126 positive finite E4M3 codes;
            "hessian": the least r'Hr over the same codes, r the weight error of the block: the error
            of the layer's output when H = sum of x x' over that block's inputs.
        block_size: 16 (the NVFP4 standard) or 32; K must be a multiple of it.
        global_scale: "amax" (max|weight|/(6*448), one per matrix), "none" (1), or a float32 tensor of
            positive scales in the batch shape () or (...).
        hessian: for "hessian": float32 (K/block_size, block_size, block_size), shared by the batch,
            or with the batch shape in front; with refine "gptq" (K, K) instead.
        refine: what else is done against the error of the layer's output, with "hessian" only:
            "none": each code is the one nearest to its weight;
            "codes": at the scales found, codes are changed as long as r'Hr of their block falls;
            "gptq": blocks are quantized one after the other, each repairing what those before it broke.
                Slow: see `search/gptq.py`.
        gptq: how, for refine "gptq".
        backend: "auto" takes the Triton kernels on a GPU and the PyTorch reference elsewhere.

    Returns:
        An Nvfp4Tensor on the weight's device. The error of each chosen scale, evaluated in float64,
        exceeds the least over all codes by at most 1e-5 of it (r'Hr: 1e-4 of it plus 1e-7*tr(H)*|r|^2).
        "codes" never adds to the r'Hr of a block, evaluated in float64.

    Raises:
        ValueError: an argument is not one of the above; the weight holds NaN or infinities.
    """
    _check(weight, scale_search, block_size, hessian, refine)
    amax = matrix_amax(weight)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError(describe_nonfinite(weight))
    scale = resolve_global_scale(amax, global_scale)
    return search_nvfp4(weight, scale_search, block_size, scale, hessian, refine=refine, gptq=gptq, backend=backend)


def search_nvfp4(
    weight: torch.Tensor,
    scale_search: ScaleSearch,
    block_size: int,
    global_scale: torch.Tensor,
    hessian: torch.Tensor | None = None,
    *,
    refine: Refine = "none",
    gptq: GptqOptions = GPTQ_DEFAULTS,
    backend: SearchBackend = "auto",
) -> Nvfp4Tensor:
    """`quantize_nvfp4` without its checks and its pass over the weight, for a caller that has made them.

    global_scale: float32 in the batch shape, positive and normal.
    """
    batch, k = weight.shape[:-2], weight.shape[-1]
    matrices, scale = weight.reshape(batch.numel(), *weight.shape[-2:]), global_scale.reshape(-1)
    if hessian is not None:
        of_one = hessian.shape[-2 if refine == "gptq" else -3 :]
        hessian = hessian.expand(*batch, *of_one).reshape(batch.numel(), *of_one)
    searches = TritonSearches if _use_triton(weight, backend) else ReferenceSearches
    if refine == "gptq" and hessian is not None:
        codes, scales = quantize_gptq(matrices, block_size, scale, hessian, searches, gptq)
    else:
        codes, scales = searches.search(matrices, scale_search, block_size, scale, hessian)
        if refine == "codes" and hessian is not None:
            codes = searches.refine(matrices, codes, scales, block_size, scale, hessian)
    return Nvfp4Tensor(
        codes=codes.view(*weight.shape[:-1], k // 2),
        block_scales=scales.view(torch.float8_e4m3fn).view(*weight.shape[:-1], k // block_size),
        global_scale=global_scale,
        block_size=block_size,
    )


def matrix_amax(weight: torch.Tensor) -> torch.Tensor:
    """max|weight| of each (N, K) matrix, float32 in the batch shape, NaN where one is NaN; one pass."""
    if weight.numel() == 0:
        return torch.zeros(weight.shape[:-2], dtype=torch.float32, device=weight.device)
    if _use_triton(weight, "auto") and weight.is_contiguous() and weight.shape[-2:].numel() % 2 == 0:
        from qwantize_vllm.search.triton_amax import matrix_amax_triton

        return matrix_amax_triton(weight.view(-1, *weight.shape[-2:])).view(weight.shape[:-2])
    low, high = torch.aminmax(weight.flatten(-2), dim=-1)
    return torch.maximum(-low, high).float()


def describe_nonfinite(weight: torch.Tensor) -> str:
    """How many NaN and infinite elements a weight holds, as a sentence."""
    nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
    return f"weight {tuple(weight.shape)} holds {nan} NaN and {infinite} infinite elements; all must be finite"


def _check(weight: torch.Tensor, scale_search: str, block_size: int, hessian: torch.Tensor | None, refine: str) -> None:
    check_block_size(block_size)
    if scale_search not in get_args(ScaleSearch):
        raise ValueError(f"scale_search must be one of {get_args(ScaleSearch)}, got {scale_search!r}")
    if weight.dim() < 2 or weight.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"weight must be (..., N, K) in one of {FLOAT_DTYPES}, got {tuple(weight.shape)} {weight.dtype}"
        )
    k = weight.shape[-1]
    if k == 0 or k % block_size:
        raise ValueError(f"K must be a positive multiple of block_size {block_size}, got weight {tuple(weight.shape)}")
    if (hessian is not None) != (scale_search == "hessian"):
        given = "none" if hessian is None else "one"
        raise ValueError(
            f"scale_search 'hessian' needs a hessian and no other takes one; got {scale_search!r}, {given}"
        )
    if refine not in get_args(Refine) or (refine != "none" and hessian is None):
        raise ValueError(
            f"refine must be one of {get_args(Refine)}, and 'none' where scale_search is not 'hessian'; "
            f"got {refine!r}, {scale_search!r}"
        )
    if hessian is not None:
        _check_hessian(hessian, weight, (k, k) if refine == "gptq" else (k // block_size, block_size, block_size))


def _check_hessian(hessian: torch.Tensor, weight: torch.Tensor, shape: tuple[int, ...]) -> None:
    allowed = [shape, (*weight.shape[:-2], *shape)]
    if tuple(hessian.shape) not in allowed or hessian.dtype != torch.float32:
        raise ValueError(
            f"hessian must be float32 {' or '.join(map(str, dict.fromkeys(allowed)))}, "
            f"got {hessian.dtype} {tuple(hessian.shape)}"
        )
    if hessian.device != weight.device:
        raise ValueError(f"hessian is on {hessian.device}, the weight on {weight.device}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"hessian {tuple(hessian.shape)} holds {int((~hessian.isfinite()).sum())} non-finite elements")


def resolve_global_scale(amax: torch.Tensor, global_scale: GlobalScale | torch.Tensor) -> torch.Tensor:
    """The float32 scales, in the batch shape of amax, that `quantize_nvfp4`'s argument stands for."""
    batch = amax.shape
    if isinstance(global_scale, torch.Tensor):
        normal = torch.finfo(torch.float32).tiny
        if (
            global_scale.dtype != torch.float32
            or global_scale.shape != batch
            or not bool((global_scale >= normal).all())
        ):
            raise ValueError(
                f"global_scale must be float32 of shape {tuple(batch)}, every entry at least {normal}, "
                f"got {global_scale.dtype} {tuple(global_scale.shape)}"
            )
        return global_scale.to(amax.device)
    if global_scale == "amax":
        return default_global_scale(amax)
    if global_scale == "none":
        return torch.ones_like(amax)
    raise ValueError(f"global_scale must be one of {get_args(GlobalScale)} or a float32 tensor, got {global_scale!r}")


def _use_triton(weight: torch.Tensor, backend: str) -> bool:
    if backend not in get_args(SearchBackend):
        raise ValueError(f"backend must be one of {get_args(SearchBackend)}, got {backend!r}")
    return backend == "triton" or (backend == "auto" and weight.is_cuda)
