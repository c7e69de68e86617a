"""Kernels compile for the architectures that vLLM runs on, on any machine: for NVIDIA's Hopper and AMD's CDNA 3, and as
slow tests for others, and NVIDIA's in every variant."""

from __future__ import annotations

import pytest

from tests.programs import run_program

pytest.importorskip("triton")

KERNELS = {
    "_add_blocks_kernel",
    "_search_sse_kernel",
    "_prepare_hessian_kernel",
    "_search_hessian_kernel",
    "_refine_codes_kernel",
    "_dequantize_kernel",
    "_fused_kernel",
    "_reduce_kernel",
    "_swizzled_kernel",
    "_unswizzle_kernel",
    "_words_kernel",
    "_scales_kernel",
    "_quality_kernel",
    "_add_norm_kernel",
    "_gate_kernel",
    "_grouped_kernel",
    "_count_kernel",
    "_place_kernel",
    "_map_kernel",
    "_sum_kernel",
}
ON_HOPPER = {"_decode_kernel", "_wgmma_kernel", "_copy_kernel", "_grouped_wgmma_kernel"}


NVIDIA = [
    pytest.param(capability, ["every"], marks=pytest.mark.slow) for capability in ("80", "89", "90", "100", "120")
]
AMD = [pytest.param(name, [], marks=pytest.mark.slow) for name in ("gfx90a", "gfx950", "gfx1100", "gfx1201")]


@pytest.mark.parametrize(("architecture", "which"), [("90", []), ("gfx942", []), *NVIDIA, *AMD])
def test_kernels_compile_to_machine_code(architecture, which, tmp_path):
    # In an empty cache, so that they are compiled now.
    lines = run_program("tests.compile_kernels", architecture, *which, TRITON_CACHE_DIR=str(tmp_path))
    assert {line.split()[0] for line in lines} == KERNELS | (ON_HOPPER if architecture == "90" else set())
