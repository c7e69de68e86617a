"""Who multiplies: the dense weight, the backends of this package, and the kernels of others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch

from qwantize_vllm.format import Nvfp4Tensor
from qwantize_vllm.matmul import matmul_nvfp4
from qwantize_vllm.matmul.backends import BACKENDS, SWIZZLED_BACKENDS
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.plugin import vllm_kernels

# Every backend of this package by name.
OURS = tuple(dict.fromkeys((*SWIZZLED_BACKENDS, *BACKENDS)))
Multiply = Callable[[torch.Tensor], torch.Tensor]
# From a weight (N, K) and the dtype of x to the call that is timed, x (M, K) -> (M, N). The weight is the
# competitor's own: it may keep or change it.
Prepare = Callable[[Nvfp4Tensor, torch.dtype], Multiply]


@dataclasses.dataclass(frozen=True)
class Competitor:
    """One column of the table.

    Attributes:
        kind: whose errors end the command with exit code 1 ("ours"), what all are compared with ("dense"), and others.
        cannot: why x is not multiplied, which is no failure; None where it is.
    """

    name: str
    kind: Literal["dense", "ours", "peer"]
    prepare: Prepare
    cannot: Callable[[torch.Tensor], str | None] = lambda x: None

    def weight_bytes(self, q: Nvfp4Tensor, dtype: torch.dtype) -> int:
        """Bytes of the weight that a call has to read."""
        return q.shape.numel() * dtype.itemsize if self.kind == "dense" else q.nbytes


@dataclasses.dataclass(frozen=True)
class Peer:
    """A competitor from another package.

    Attributes:
        why_not: why it cannot run here with blocks of a size, in a line; None where it can.
    """

    name: str
    prepare: Prepare
    why_not: Callable[[int], str | None]

    @property
    def competitor(self) -> Competitor:
        return Competitor(self.name, "peer", self.prepare)


def dense(dtype: torch.dtype) -> Competitor:
    """The dense layer that is replaced, with the dequantized weight: called bf16 or fp16."""

    def prepare(q: Nvfp4Tensor, dtype: torch.dtype) -> Multiply:
        weight = q.dequantize(dtype)
        return lambda x: torch.nn.functional.linear(x, weight)

    return Competitor({torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], "dense", prepare)


def ours(backend: str) -> Competitor:
    """A backend of this package, or "auto": what the plugin serves with, on a GPU from a swizzled weight."""

    def prepare(q: Nvfp4Tensor, dtype: torch.dtype) -> Multiply:
        swizzled = backend not in BACKENDS and (backend != "auto" or q.codes.is_cuda)
        weight = swizzle(q) if swizzled else q
        return lambda x: matmul_nvfp4(x, weight, None, backend)

    if backend == "auto":
        return Competitor(backend, "ours", prepare)
    return Competitor(backend, "ours", prepare, BACKENDS[backend if backend in BACKENDS else "fused"].why_not)


def _prepare_vllm(kernel: str, q: Nvfp4Tensor, dtype: torch.dtype) -> Multiply:
    return vllm_kernels.PreparedWeight(kernel, q.codes, q.block_scales, q.global_scale, dtype).apply


def _why_not_vllm(kernel: str, block_size: int) -> str | None:
    if block_size != vllm_kernels.BLOCK_SIZE:
        return f"takes blocks of {vllm_kernels.BLOCK_SIZE} only"
    return vllm_kernels.why_not(kernel)


PEERS = [
    Peer(kernel, functools.partial(_prepare_vllm, kernel), functools.partial(_why_not_vllm, kernel))
    for kernel in vllm_kernels.KERNELS
]
