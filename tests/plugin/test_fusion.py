"""The pass over compiled graphs, on parts of layers as vLLM's classes put them.

float16, as what interprets kernels here truncates bfloat16.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

import vllm.ir  # noqa: F401

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.op import matmul_swizzled_op, normed_matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.plugin.fusion import FuseNorms

K, INTERMEDIATE = 128, 192
norm_op = torch.ops.vllm_ir.fused_add_rms_norm.default


class Recorded(FuseNorms):
    """The pass, which keeps what it leaves."""

    def __call__(self, graph):
        super().__call__(graph)
        self.targets = [node.target for node in graph.nodes]


def make_weight(n):
    return swizzle(quantize_nvfp4(0.1 * torch.randn(n, K)))


def multiply(x, weight, backend="auto"):
    tensors = (weight.words, weight.scales, weight.global_scale, weight.arrived)
    return matmul_swizzled_op(x, *tensors, None, weight.shape[0], 16, backend)


def compiled(layer, *inputs):
    """The layer's results, and targets of the nodes that the pass leaves."""
    recorded = Recorded()
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(inputs[0], 0)
    torch._dynamo.mark_dynamic(inputs[1], 0)
    with torch._inductor.config.patch(force_disable_caches=True):
        options = {"post_grad_custom_post_pass": recorded}
        results = torch.compile(layer, fullgraph=True, options=options)(*inputs)
    return results, recorded.targets


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, K, dtype=torch.float16)
    return x, residual, torch.rand(K).half() + 0.5


def swiglu(y):
    half = y.shape[-1] // 2
    return torch.nn.functional.silu(y[..., :half]) * y[..., half:]


def test_a_norm_a_product_and_a_gate_become_one(inputs):
    q = make_weight(2 * INTERMEDIATE)

    def layer(x, residual, gain):
        normed, residual = norm_op(x, residual, gain, 1e-5)
        return swiglu(multiply(normed, q)), residual

    (y, sums), targets = compiled(layer, *inputs)
    assert targets.count(normed_matmul_swizzled_op) == 1
    assert not {matmul_swizzled_op, norm_op, torch.ops.aten.mul.Tensor} & set(targets)
    expected, residual = layer(*inputs)
    assert torch.equal(sums, residual)
    assert relative(y, expected) < 2e-3


def test_a_norm_and_a_product_become_one(inputs):
    q = make_weight(40)

    def layer(x, residual, gain):
        normed, residual = norm_op(x, residual, gain, 1e-5)
        return multiply(normed, q).relu(), residual + 1

    (y, sums), targets = compiled(layer, *inputs)
    assert normed_matmul_swizzled_op in targets
    assert norm_op not in targets
    expected, residual = layer(*inputs)
    assert torch.equal(sums, residual)
    assert relative(y, expected) < 2e-3


def read_twice(x, residual, gain, q):
    normed, residual = norm_op(x, residual, gain, 1e-5)
    return multiply(normed, q), normed, residual


def batch_invariant(x, residual, gain, q):
    normed, residual = norm_op(x, residual, gain, 1e-5)
    return multiply(normed, q, "batch_invariant"), residual


def part_of_the_columns(x, residual, gain, q):
    normed, residual = norm_op(x, residual, gain, 1e-5, 64)
    return multiply(normed, q), residual


def no_gain(x, residual, gain, q):
    normed, residual = norm_op(x, residual, None, 1e-5)
    return multiply(normed, q), residual


def gain_of_float32(x, residual, gain, q):
    normed, residual = norm_op(x, residual, gain.float(), 1e-5)
    return multiply(normed.half(), q), residual


@pytest.mark.parametrize("layer", [read_twice, batch_invariant, part_of_the_columns, no_gain, gain_of_float32])
def test_what_looks_otherwise_stays(inputs, layer):
    q = make_weight(40)
    _, targets = compiled(lambda *tensors: layer(*tensors, q), *inputs)
    assert matmul_swizzled_op in targets
    assert normed_matmul_swizzled_op not in targets


def test_a_gate_whose_product_is_read_elsewhere_stays(inputs):
    q = make_weight(2 * INTERMEDIATE)

    def layer(x, residual, gain):
        normed, _ = norm_op(x, residual, gain, 1e-5)
        y = multiply(normed, q)
        return swiglu(y), y[:, 0]

    results, targets = compiled(layer, *inputs)
    assert normed_matmul_swizzled_op in targets
    assert torch.ops.aten.mul.Tensor in targets
    for result, expected in zip(results, layer(*inputs), strict=True):
        assert relative(result, expected) < 2e-3


def relative(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()
