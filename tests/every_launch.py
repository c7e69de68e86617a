"""Compare the kernels that are launched ahead with those that any number of tokens takes; needs no GPU.

    python -m tests.every_launch

A program of its own because TRITON_INTERPRET, which the tests set, must be unset when triton is imported. Prints of how
many kernels, by what Triton compiles apart, it was all of them: for Hopper, and for a GPU that has no table of shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from qwantize_vllm.matmul import (
    backends,
    every_kernel,
    gluon_grouped,
    gluon_wgmma,
    op,
    triton_grouped,
    triton_swizzled,
    triton_unswizzle,
)
from qwantize_vllm.matmul.every_kernel import ExpertKernels, Kernels, LinearKernels
from qwantize_vllm.matmul.grouped_shapes import WGMMA_PAIRS
from qwantize_vllm.matmul.normed import AddedNorm
from qwantize_vllm.matmul.tile_shapes import DecodeShape, choose_normed_shape, choose_shape
from qwantize_vllm.matmul.triton_local_ids import map_ids
from qwantize_vllm.triton_launch import launch_now
from tests.replay_launches import Driver, experts, weight

HALF = torch.bfloat16
TOKENS = [*range(1, 140), *range(140, 9000, 239)]


def pretend(major: int) -> None:
    """Tensors are in the CPU's memory; what asks for their device is told of a GPU of this compute capability."""
    hopper = major == 9
    for module in (backends, every_kernel, triton_grouped):
        module.capability_major = lambda device: major  # type: ignore[attr-defined]
    for other in (gluon_wgmma, triton_grouped, triton_swizzled, gluon_grouped):
        other.multiprocessors = lambda device: 132  # type: ignore[attr-defined]
    backends.choose_shape = lambda major, m, groups, tiles, gluon, *rest: choose_shape(
        major, m, groups, tiles, hopper, *rest
    )
    backends.serves_by_wgmma = every_kernel.serves_by_wgmma = lambda *given: hopper
    op.one_kernel = every_kernel.one_kernel = normed_shape
    backends.BACKENDS["fused"] = backends.BACKENDS["reference"]  # what asks whether x is on a GPU
    gluon_wgmma.area_of_stream = lambda device, words: torch.empty(words, dtype=torch.int32)
    # A dense product of many tokens, which vLLM's first run has: it does not interest here.
    triton_unswizzle.matmul_unswizzled = lambda x, weight, bias: x


def normed_shape(x: torch.Tensor, norm: AddedNorm, n: int, block_size: int, gated: bool) -> DecodeShape | None:
    return choose_normed_shape(9, len(x), gated, block_size)


def compiled_by(calls: Iterable[Callable[[], object]]) -> set[tuple[str, Any]]:
    """Kernels and what they would be compiled for."""
    found: set[tuple[str, Any]] = set()

    def note(*, key: Any, fn: Any, **rest: Any) -> bool:
        found.add((fn.name, key))
        return True  # it is not compiled

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        for call in calls:
            call()
    return found


def compare(name: str, kernels: Kernels, served: Iterable[Callable[[], object]], elsewhere: Sequence[str] = ()) -> None:
    """elsewhere: kernels that others than these launch."""
    early, needed = compiled_by([functools.partial(kernels.launch_all, launch_now)]), compiled_by(served)
    missing = sorted({kernel for kernel, _ in needed - early})
    assert not missing, f"{name}: launched later: {missing}"
    # Those for many tokens are chosen by the size of the GPU too.
    by_size = {"_wgmma_kernel", "_grouped_wgmma_kernel"}
    useless = sorted({kernel for kernel, _ in early - needed} - {*by_size, *elsewhere})
    assert not useless, f"{name}: never launched: {useless}"
    print(name, len(needed))


def products(n: int, k: int) -> None:
    w = weight(n, k)
    served = (functools.partial(backends.run_swizzled, torch.empty(m, k, dtype=HALF), w, None) for m in TOKENS)
    compare(f"{n}x{k}", LinearKernels(w, HALF, None), served)


def other_products(n: int, k: int) -> None:
    """Of float16 and blocks of 32, with a bias and a global scale for each row."""
    w, bias = weight(n, k), torch.zeros(n)
    w = dataclasses.replace(w, scales=w.scales.to(torch.int16), global_scale=torch.ones(n), block_size=32)
    served = (functools.partial(backends.run_swizzled, torch.empty(m, k).half(), w, bias) for m in TOKENS)
    compare(f"{n}x{k} others", LinearKernels(w, torch.float16, bias), served)


def normed(n: int, k: int, gated: bool) -> None:
    """With norm and gate, in vLLM's compiled graph."""
    w = weight(n, k)
    tensors = (w.words, w.scales, w.global_scale, w.arrived, None, n, 16, "auto", gated)

    def call(tokens: int) -> None:
        x = torch.empty(tokens, k, dtype=HALF)
        op._normed_matmul_swizzled(x, torch.empty_like(x), x[0], 1e-5, *tensors)

    served = (functools.partial(call, each) for each in TOKENS)
    # That of one and two tokens which norms nothing is for graphs in which the norm is not seen.
    kernels = LinearKernels(w, HALF, None, normed=True, gated=gated)
    compare(f"{n}x{k} {'gated' if gated else 'normed'}", kernels, served, ["_decode_kernel"])


def mixture(count: int, top_k: int, hidden: int, intermediate: int, total: int | None = None) -> None:
    """total: experts, of which these are some."""
    total = total or count
    w13 = experts(2 * intermediate, hidden, True, count, total)
    w2 = experts(hidden, intermediate, False, count, total)

    def call(tokens: int) -> None:
        x, share = torch.empty(tokens, hidden, dtype=HALF), torch.empty(tokens, top_k)
        ids = torch.zeros(tokens, top_k, dtype=torch.int32)
        if total > count:
            ids = map_ids(ids, torch.zeros(total, dtype=torch.int32), launch_now)
        backends.run_experts(x, w13, w2, share, ids, "silu", launch=launch_now)

    every = 2 + WGMMA_PAIRS * total // top_k  # up to there shapes change from one number of tokens to the next
    tokens = [*range(1, every), *range(every, 40 * every, 149), 6000 * total // top_k]
    served = (functools.partial(call, each) for each in tokens)
    compare(f"{count} of {total} experts", ExpertKernels(w13, w2, top_k, HALF, "silu"), served)


def shapes_of_both_products() -> None:
    """With many tokens each product of Mixtral's experts has a shape of its own, by the pairs expected here."""
    cases = {(8, 256): [3, 2], (8, 2048): [3, 3], (32, 2048): [3, 2], (32, 8192): [3, 3]}
    assert {case: groups_launched(*case) for case in cases} == cases
    print("both products", len(cases))


def groups_launched(total: int, tokens: int) -> list[int]:
    """Of 64 rows, that a program's tiles have in either product of 8 of Mixtral's experts, of so many."""
    w13, w2 = experts(28672, 4096, True, 8, total), experts(4096, 14336, False, 8, total)
    ids, groups = torch.zeros(tokens, 2, dtype=torch.int32), list[int]()

    def note(kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
        if kernel is gluon_grouped._grouped_wgmma_kernel:
            groups.append(constants["GROUPS"])

    backends.run_experts(torch.empty(tokens, 4096, dtype=HALF), w13, w2, ids.float(), ids, "silu", launch=note)
    return groups


if __name__ == "__main__":
    driver.set_active(Driver())
    pretend(9)
    products(256, 1024)
    products(4096, 4096)
    other_products(136, 1040)
    normed(6144, 4096, gated=False)
    normed(28672, 4096, gated=True)
    mixture(8, 2, 256, 256)
    mixture(64, 6, 128, 64)
    mixture(8, 6, 128, 64, 64)
    shapes_of_both_products()
    pretend(8)
    products(4096, 4096)
    other_products(136, 1040)
    mixture(8, 2, 256, 256)
    mixture(8, 6, 128, 64, 64)
    mixture(2, 2, 4096, 14336, 8)  # whose last shapes cut K into slices, and with still more tokens do not
