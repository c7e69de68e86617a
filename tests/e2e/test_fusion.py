"""The pass over vLLM's compiled graph, on the graph of a model as vLLM makes it.

On a CPU layers are not swizzled, nor is the pass installed; here they are, with PyTorch in place of the kernels.
"""

from __future__ import annotations

import os
import shutil
import types
from collections import Counter
from typing import Any

import pytest
import torch

from .compare import assert_scores_agree
from .conftest import TINY_PROMPTS
from .probe import probe

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"),
]
LAYERS = 2
fused: Counter[str] = Counter()


def norm_alone(x: torch.Tensor, norm: Any) -> torch.Tensor:
    sums = x.float() + norm.residual.float()
    norm.sums.copy_(sums)
    return (sums * torch.rsqrt(sums.square().mean(-1, keepdim=True) + norm.epsilon) * norm.gain.float()).to(x.dtype)


def gate_alone(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(y.dtype)


def as_on_hopper() -> None:
    from vllm.platforms.cpu import CpuPlatform

    from qwantize_vllm.matmul import op
    from qwantize_vllm.matmul.reference import matmul_reference
    from qwantize_vllm.matmul.swizzle import unswizzle
    from qwantize_vllm.plugin import fusion, linear
    from qwantize_vllm.plugin.weights import SwizzledForm

    op.run_swizzled = lambda x, weight, bias, *rest: matmul_reference(x, unswizzle(weight), bias)
    op.norm_alone, op.gate_alone = norm_alone, gate_alone
    linear.choose_form = lambda settings, quantized, name: SwizzledForm(quantized, settings.fuse_norms)
    fusion.current_platform = types.SimpleNamespace(is_cuda=lambda: True, pass_key="post_grad_custom_post_pass")
    fusion.capability_major = lambda device: 9
    torch.cuda.current_device = lambda: 0
    fuse, update = fusion._fuse, CpuPlatform.check_and_update_config

    def counted(graph: Any, product: Any, norm: Any, gate: Any) -> None:
        fused["gated" if gate is not None else "plain"] += 1
        fuse(graph, product, norm, gate)

    def compiled_as_on_a_gpu(config: Any) -> None:
        mode = config.compilation_config.mode
        update(config)
        config.compilation_config.mode, config.compilation_config.ir_enable_torch_wrap = mode, True
        config.compilation_config.compile_sizes = []

    fusion._fuse = counted
    CpuPlatform.check_and_update_config = staticmethod(compiled_as_on_a_gpu)


def probe_and_count(llm: Any) -> dict[str, Any]:
    result = probe(llm, TINY_PROMPTS, max_tokens=3)
    return {**{key: result[key] for key in ("completions", "own_scores")}, "fused": dict(fused)}


def test_the_norms_and_gates_of_a_llama_are_found(engines, tiny, tmp_path):
    outcomes = [
        engines.start(
            tiny,
            probe_and_count,
            before=as_on_hopper,
            dtype="bfloat16",
            enforce_eager=False,
            additional_config={"qwantize": {"fuse_norms": fuse_norms}},
            env={"VLLM_CACHE_ROOT": str(tmp_path / str(fuse_norms)), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        )
        for fuse_norms in (True, False)
    ]
    # The first qkv follows a norm without a sum.
    assert outcomes[0].result["fused"] == {"gated": LAYERS, "plain": LAYERS - 1}
    assert outcomes[1].result["fused"] == {}
    assert_scores_agree(*(outcome.result["own_scores"] for outcome in outcomes), 0.1)
