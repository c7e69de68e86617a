"""The pass over compiled graphs, on parts of layers as vLLM's classes put them.

float16, as what interprets kernels here truncates bfloat16.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

import vllm.ir  # noqa: F401
from vllm.compilation.passes.inductor_pass import InductorPass

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.matmul.op import matmul_swizzled_op, normed_matmul_swizzled_op
from qwantize_vllm.matmul.swizzle import swizzle
from qwantize_vllm.plugin import fusion
from qwantize_vllm.plugin.fusion import FuseNorms, install_fusion
from qwantize_vllm.settings import QwantizeSettings

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


KEY = "post_grad_custom_post_pass"


@pytest.fixture
def hopper_config(monkeypatch):
    """A config of vLLM's, as far as it is looked at, on a machine that says it has a Hopper GPU."""
    platform = SimpleNamespace(is_cuda=lambda: True, pass_key=KEY)
    monkeypatch.setattr(fusion, "current_platform", platform)
    monkeypatch.setattr(fusion, "capability_major", lambda device: 9)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    compilation = SimpleNamespace(inductor_compile_config={})
    return SimpleNamespace(compilation_config=compilation, model_config=SimpleNamespace(dtype=torch.bfloat16))


def passes(config, **settings):
    install_fusion(config, QwantizeSettings(**settings))
    return config.compilation_config.inductor_compile_config


def test_the_pass_is_installed_where_a_kernel_gains_by_it(hopper_config, monkeypatch):
    assert isinstance(passes(hopper_config)[KEY], FuseNorms)
    hopper_config.compilation_config.inductor_compile_config.clear()
    assert not passes(hopper_config, fuse_norms=False)
    monkeypatch.setattr(fusion, "capability_major", lambda device: 8)
    assert not passes(hopper_config)
    monkeypatch.setattr(fusion, "capability_major", lambda device: 9)
    hopper_config.model_config.dtype = torch.float16
    assert not passes(hopper_config)
    hopper_config.model_config.dtype = torch.bfloat16
    fusion.current_platform.is_cuda = lambda: False
    assert not passes(hopper_config)


def test_batch_invariance_leaves_norms_alone(hopper_config, monkeypatch):
    monkeypatch.setattr(fusion.envs, "VLLM_BATCH_INVARIANT", True)
    assert not passes(hopper_config)


def test_a_pass_of_the_users_own_stays_and_the_log_says_so(hopper_config, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hopper_config.compilation_config.inductor_compile_config[KEY] = "own"
    assert passes(hopper_config) == {KEY: "own"}
    assert "norms stay kernels of their own" in caplog.text


def test_vllms_compile_cache_tells_versions_of_the_pass_apart():
    assert FuseNorms().uuid() == FuseNorms().uuid()
    assert FuseNorms().uuid() != InductorPass.hash_source(FuseNorms)


def relative(y, expected):
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()
