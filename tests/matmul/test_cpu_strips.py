from __future__ import annotations

import pytest
import torch

from qwantize_vllm import Nvfp4Tensor, quantize_nvfp4
from qwantize_vllm.matmul import cpu_strips
from tests.guarded import at_the_end
from tests.numbers import make_weight

pytest.importorskip("llvmlite")


@pytest.fixture(params=["permutation", "shift"])
def decoding(monkeypatch, request):
    """One of the kernel's two ways to decode, whatever this machine would choose."""
    from qwantize_vllm.matmul import llvm_run

    if request.param == "permutation" and not llvm_run.has("avx512f"):
        pytest.skip("needs avx512f")
    has = llvm_run.has
    monkeypatch.setattr(llvm_run, "has", lambda feature: request.param == "permutation" and has(feature))
    cpu_strips._compiled.cache_clear()
    yield
    cpu_strips._compiled.cache_clear()


def strip_of(q, rows, dtype):
    """The rows of q, between two rows that must stay as they are."""
    memory = torch.full((rows.stop - rows.start + 2, q.shape[1]), 7.0, dtype=dtype)
    cpu_strips.dequantize_strip(q, rows, memory[1:-1])
    assert (memory[[0, -1]] == 7).all()
    return memory[1:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "block_size"), [(5, 48, 16), (100, 1056, 16), (70, 1056, 32), (33, 64, 32)])
def test_a_strip_has_the_bits_of_the_dequantized_weight(decoding, n, k, block_size, dtype):
    q = quantize_nvfp4(make_weight("student", n, k), block_size=block_size)
    wanted = q.dequantize(dtype)
    assert torch.equal(strip_of(q, slice(0, n), dtype), wanted)
    assert torch.equal(strip_of(q, slice(2, n - 1), dtype), wanted[2 : n - 1])
    turned = Nvfp4Tensor(q.codes.T.contiguous().T, q.block_scales.T.contiguous().T, q.global_scale, block_size)
    assert torch.equal(strip_of(turned, slice(0, n), dtype), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("global_scale", [1.0, 1 / 3, 0.0123, 3e-30])
def test_every_code_and_every_scale(decoding, global_scale, dtype):
    codes = torch.arange(256).byte()[:, None].expand(256, 127 * 8).contiguous()
    scales = torch.arange(127).byte().view(torch.float8_e4m3fn).expand(256, 127).contiguous()
    q = Nvfp4Tensor(codes, scales, torch.tensor(global_scale))
    wanted = q.dequantize(dtype)
    got = strip_of(q, slice(0, 256), dtype)
    assert torch.equal(got, wanted)
    assert torch.equal(got.signbit(), wanted.signbit())


@pytest.mark.parametrize("k", [48, 64])
def test_it_reads_nothing_behind_the_codes(k):
    """Codes that end where the process may not read on."""
    q = quantize_nvfp4(make_weight("student", 5, k))
    with at_the_end(q.codes) as codes:
        got = strip_of(Nvfp4Tensor(codes, q.block_scales, q.global_scale), slice(0, 5), torch.bfloat16)
    assert torch.equal(got, q.dequantize(torch.bfloat16))


def test_pytorch_serves_where_the_kernel_cannot_be(monkeypatch):
    monkeypatch.setattr(cpu_strips, "why_not_fused", lambda: "no compiler")
    monkeypatch.setattr(cpu_strips, "_by_kernel", None)
    q = quantize_nvfp4(make_weight("student", 40, 64))
    assert torch.equal(strip_of(q, slice(3, 30), torch.bfloat16), q.dequantize(torch.bfloat16)[3:30])
