"""The matmul backends, and who serves which number of tokens.

To add a backend: write its function in a file of its own, and enter it below with what it supports.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.cpu import matmul_cpu
from qwantize_vllm.matmul.cpu_fused import matmul_cpu_fused, why_not_fused
from qwantize_vllm.matmul.experts import SwizzledExperts
from qwantize_vllm.matmul.gpu import capability_major
from qwantize_vllm.matmul.grouped_shapes import WGMMA_PAIRS
from qwantize_vllm.matmul.launcher import launch_again
from qwantize_vllm.matmul.reference import matmul_reference
from qwantize_vllm.matmul.swizzle import SwizzledNvfp4
from qwantize_vllm.matmul.tile_shapes import ANY_TOKENS, DecodeShape, Shape, TileShape, choose_shape
from qwantize_vllm.triton_launch import Launch, launch_now

logger = logging.getLogger(__name__)

Matmul = Callable[[torch.Tensor, Nvfp4Tensor, torch.Tensor | None], torch.Tensor]

# Up to this many tokens the fused kernel is faster than dequantizing, by NVIDIA compute capability major.
# Measured on 9 (H200); elsewhere, AMD included, a cautious guess until someone measures it.
_FUSED_TOKENS = {9: 32}
_FUSED_TOKENS_ELSEWHERE = 16
# The same on a CPU, measured on one and on two cores of a Zen 4 (AVX-512 with bfloat16, no AMX) against strips; below
# and above the limit the slower one takes up to a sixth longer. Where AVX-512 has no instruction for x's 16-bit numbers
# oneDNN takes two to four times as long as the fused kernel, whatever the number of tokens.
# `python scripts/tune_cpu.py` times both on the CPU at hand. On one core of a Zen 5 it says 48 in bfloat16 (at 64 the
# fused kernel takes a quarter longer), and in float32 that strips take 10 to 60 % longer, up to 1,024 tokens at least.
_CPU_FUSED_TOKENS = 64
# Not measured: AMX, float16 that the CPU can multiply, and CPUs without AVX-512.
_CPU_FUSED_TOKENS_ELSEWHERE = 32


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute x . W'.

    Attributes:
        run: (x (M, K), q (N, K), bias (N,), contiguous, or None) -> (M, N) in x's dtype; x may have any strides.
        dtypes: of x.
        needs_gpu: whether x must be on a GPU (or Triton be interpreted).
        needs_cpu: whether x must be in the CPU's memory.
    """

    run: Matmul
    dtypes: tuple[torch.dtype, ...]
    needs_gpu: bool
    needs_cpu: bool = False

    def why_not(self, x: torch.Tensor) -> str | None:
        """Why this backend cannot multiply x; None where it can."""
        if x.dtype not in self.dtypes:
            return f"takes x in one of {self.dtypes}, got {x.dtype}"
        if self.needs_gpu and not x.is_cuda and not _triton_is_interpreted():
            return f"needs a GPU (or TRITON_INTERPRET=1), x is on {x.device}"
        if self.needs_cpu and not x.is_cpu:
            return f"needs x on the CPU, it is on {x.device}"
        return None


def _dequantize(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from qwantize_vllm.matmul.triton_dequantize import matmul_dequantize

    return matmul_dequantize(x, q, bias)


def _fused(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from qwantize_vllm.matmul.triton_fused import matmul_fused

    return matmul_fused(x, q, bias)


_HALF = (torch.bfloat16, torch.float16)
# Triton is imported where a kernel runs: reference and cpu work on machines that have none.
BACKENDS: dict[str, Backend] = {
    "reference": Backend(matmul_reference, (torch.float32, *_HALF), needs_gpu=False),
    "cpu": Backend(matmul_cpu, (torch.float32, *_HALF), needs_gpu=False),
    "cpu_fused": Backend(matmul_cpu_fused, (torch.float32, *_HALF), needs_gpu=False, needs_cpu=True),
    "dequantize": Backend(_dequantize, (torch.float32, *_HALF), needs_gpu=True),
    "fused": Backend(_fused, _HALF, needs_gpu=True),
}


def choose_backend(x: torch.Tensor) -> str:
    """Name of the backend that serves x (M, K): the table behind `backend="auto"`."""
    # why_not_fused first: so an engine's warm-up, of many tokens, compiles the kernel or says why not.
    if x.is_cpu and why_not_fused() is None and x.shape[0] <= cpu_fused_tokens(x.dtype):
        return "cpu_fused"
    if not x.is_cuda:
        return "cpu"  # plain PyTorch, so right on every other device too
    limit = _FUSED_TOKENS.get(capability_major(x.device) or 0, _FUSED_TOKENS_ELSEWHERE)
    return "fused" if x.dtype in _HALF and x.shape[0] <= limit else "dequantize"


@functools.cache
def cpu_fused_tokens(dtype: torch.dtype) -> float:
    """Up to how many tokens of x in this dtype this CPU multiplies faster with the fused kernel than by strips."""
    from qwantize_vllm.matmul.llvm_run import has

    by_unit = (dtype == torch.bfloat16 and has("amx-bf16")) or (dtype == torch.float16 and has("avx512fp16"))
    if by_unit or not has("avx512f"):
        return _CPU_FUSED_TOKENS_ELSEWHERE
    multiplied = dtype == torch.float32 or (dtype == torch.bfloat16 and has("avx512bf16"))
    return _CPU_FUSED_TOKENS if multiplied else math.inf


# Backends of a swizzled weight.
SWIZZLED_BACKENDS = ("auto", "swizzled", "unswizzled", "batch_invariant")


def run_swizzled(
    x: torch.Tensor,
    weight: SwizzledNvfp4,
    bias: torch.Tensor | None,
    backend: str = "auto",
    launch: Launch = launch_now,
) -> torch.Tensor:
    """x (M, K) times a swizzled weight.

    backend: "swizzled" dequantizes inside the product, "unswizzled" before it; "auto" takes what is faster for so many
    tokens, and "batch_invariant" gives a row the same bits whatever the others are. launch: for all but "unswizzled".
    """
    from qwantize_vllm.matmul.triton_swizzled import matmul_swizzled
    from qwantize_vllm.matmul.triton_unswizzle import matmul_unswizzled

    if reason := BACKENDS["fused"].why_not(x):
        raise ValueError(f"a swizzled weight {reason}")
    if backend == "batch_invariant":
        return matmul_swizzled(x, weight, bias, ANY_TOKENS, split=False, launch=launch)
    major, (groups, tiles) = capability_major(x.device), weight.words.shape[:2]
    shape = choose_shape(major, x.shape[0], groups, tiles, x.is_cuda, weight.block_size)
    if shape is not None and (reason := why_not_gluon(x, weight, shape)):
        tell_once(f"a kernel in Gluon {reason}; slower ones take its place")
        shape = choose_shape(major, x.shape[0], groups, tiles, gluon=False, block_size=weight.block_size)
    if backend == "unswizzled" or (backend == "auto" and shape is None):
        return matmul_unswizzled(x, weight, bias)
    if shape is None or isinstance(shape, TileShape):
        return matmul_swizzled(x, weight, bias, shape or ANY_TOKENS, launch=launch)
    if isinstance(shape, DecodeShape):
        from qwantize_vllm.matmul.gluon_decode import matmul_decode

        return matmul_decode(x, weight, bias, shape, launch=launch)
    from qwantize_vllm.matmul.gluon_wgmma import matmul_wgmma

    return matmul_wgmma(x, weight, bias, launch=launch)


def run_experts(
    x: torch.Tensor,
    w13: SwizzledExperts,
    w2: SwizzledExperts,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    backend: str = "auto",
    launch: Launch = launch_again,
) -> torch.Tensor:
    """x (M, K) through the swizzled experts that each token is routed to; see `experts_swizzled`.

    backend: "auto" takes what is faster for so many tokens, "batch_invariant" gives a token the same bits whatever the
    others are.
    """
    from qwantize_vllm.matmul.triton_grouped import experts_swizzled

    given = (x, w13, w2, topk_weights, topk_ids, activation)
    if backend == "batch_invariant":
        return experts_swizzled(*given, (ANY_TOKENS, ANY_TOKENS), split=False, launch=launch)
    few = w13.expected(topk_ids.numel()) < WGMMA_PAIRS * w13.words.shape[0]
    if few or not serves_by_wgmma(x.device, w13, w2):
        return experts_swizzled(*given, launch=launch)
    from qwantize_vllm.matmul.gluon_grouped import experts_wgmma

    return experts_wgmma(*given, launch=launch)


def serves_by_wgmma(device: torch.device, w13: SwizzledExperts, w2: SwizzledExperts) -> bool:
    """Whether the kernel in Gluon serves these experts where they have many pairs; a warning where it ought to."""
    if device.type != "cuda" or capability_major(device) != 9:
        return False
    if reason := why_no_gluon() or _why_no_grouped_wgmma(w13, w2):
        tell_once(f"the kernel of gluon_grouped {reason}; a slower one takes its place")
        return False
    return True


def _why_no_grouped_wgmma(w13: SwizzledExperts, w2: SwizzledExperts) -> str | None:
    from qwantize_vllm.matmul.gluon_grouped import why_not_wgmma

    return why_not_wgmma(w13, w2)


def why_not_gluon(x: torch.Tensor, weight: SwizzledNvfp4, shape: Shape) -> str | None:
    """Why the kernel of a shape, if it is one in Gluon, cannot multiply x (M, K) here; None where it can."""
    if isinstance(shape, TileShape):
        return None
    if reason := why_no_gluon():
        return reason
    from qwantize_vllm.matmul import gluon_decode, gluon_wgmma

    return gluon_decode.why_not_decode(x) if isinstance(shape, DecodeShape) else gluon_wgmma.why_not_wgmma(x, weight)


@functools.cache
def why_no_gluon() -> str | None:
    """Why kernels in Gluon do not work here; None where they do."""
    try:
        import qwantize_vllm.matmul.gluon_decode
        import qwantize_vllm.matmul.gluon_wgmma  # noqa: F401
    except (ImportError, AttributeError) as error:  # Gluon is not stable yet, nor there before Triton 3.4
        return f"does not work with this version of Triton: {error}"
    return None


_told: set[str] = set()


def tell_once(line: str) -> None:
    """A warning, the first time that it is given in a process, whatever the numbers in it (strides, addresses)."""
    words = re.sub(r"\b\d+\b", "", line)
    if words not in _told:
        _told.add(words)
        logger.warning(line)


def _triton_is_interpreted() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)
