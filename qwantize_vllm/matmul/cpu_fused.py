"""x . W' on a CPU from the codes themselves: the LLVM kernel's arguments and its result."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul.cpu_tensors import adjacent, half_scales

if TYPE_CHECKING:
    from qwantize_vllm.matmul.llvm_run import Kernel

logger = logging.getLogger(__name__)
_LANES = 16  # of llvm_code.py, which cannot be imported without llvmlite
_TOKENS_AT_ONCE = 8  # with two rows, 16 sums and what they are made of fit the 32 vector registers
_PIECE = 512  # tokens: so much of x and of the result is there in float32 at a time


def matmul_cpu_fused(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (M, K) -> (M, N) in x's dtype, accumulated in float32; a token's bits do not depend on the others."""
    products = [_float_product(piece, q, bias).to(x.dtype) for piece in x.split(_PIECE)]
    return products[0] if len(products) == 1 else torch.cat(products)


def _float_product(x: torch.Tensor, q: Nvfp4Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """float32 (M, N)."""
    from qwantize_vllm.matmul.llvm_fused import FusedJob

    m, (n, k) = x.shape[0], q.shape
    y = torch.empty(m, n, dtype=torch.float32, device="cpu")
    if y.numel():
        variant = _variant(x.dtype)
        inputs = adjacent(x) if variant == "pairs" else _even_and_odd(x)
        codes, scales = adjacent(q.codes), adjacent(q.block_scales)
        turns = -(-m // _TOKENS_AT_ONCE)
        tensors = (inputs, codes, scales, half_scales(), q.global_scale, y)
        job = FusedJob(
            *(tensor.data_ptr() for tensor in tensors),
            *(m, n, k // 2, inputs.stride(0) * inputs.element_size(), codes.stride(0), scales.stride(0), 0),
        )
        compiled(-(-m // turns), q.block_size, variant)(job, m * n * k)
    if bias is not None:
        y += bias
    return y


@functools.cache
def compiled(tokens: int, block_size: int, variant: str) -> Kernel:
    """The kernel that takes `tokens` rows of x at a time; compiled in some 0.05 s when it is first needed."""
    from qwantize_vllm.matmul import llvm_decode, llvm_fused, llvm_products, llvm_run

    variants: dict[str, llvm_products.Products] = {
        "pairs": llvm_products.PairProducts(llvm_decode.decode_by_permutation),
        "permutation": llvm_products.FloatProducts(llvm_decode.decode_by_permutation),
        "shift": llvm_products.FloatProducts(llvm_decode.decode_by_shift),
    }
    return llvm_run.Kernel(str(llvm_fused.FusedCode(tokens, block_size, variants[variant]).module), "fused")


@functools.cache
def _variant(dtype: torch.dtype) -> str:
    """The fastest that this machine has for x of this dtype."""
    from qwantize_vllm.matmul.llvm_run import has

    if dtype == torch.bfloat16 and has("avx512bf16"):
        return "pairs"
    return "permutation" if has("avx512f") else "shift"


@functools.cache
def why_not_fused() -> str | None:
    """Why this machine cannot run the kernel, also logged once; None where it can."""
    try:
        zeros = torch.zeros(1, 16, dtype=torch.bfloat16, device="cpu")
        scale = torch.ones((), device="cpu")
        q = Nvfp4Tensor(zeros[:, :8].byte(), scale.view(1, 1).to(torch.float8_e4m3fn), scale)
        matmul_cpu_fused(zeros, q, None)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        logger.warning("qwantize: decoding on the CPU will be slow, its kernel cannot be compiled here: %s", reason)
        return reason
    return None


def _even_and_odd(x: torch.Tensor) -> torch.Tensor:
    """float32 (M, 2, K/2 rounded up to whole steps of the kernel): x's even k, its odd k, zeros behind."""
    m, half = x.shape[0], x.shape[1] // 2
    padded = (-(-half // _LANES) | 1) * _LANES  # odd, as what lies a power of two apart shares few lines of the cache
    halves = torch.empty(m, 2, padded, dtype=torch.float32, device="cpu")
    halves[:, :, :half] = x.unflatten(1, (half, 2)).mT
    halves[:, :, half:] = 0
    return halves
