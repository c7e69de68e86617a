from __future__ import annotations

import logging
import math
import threading

import pytest
import torch

from qwantize_vllm import Nvfp4Tensor, matmul_nvfp4, quantize_nvfp4
from qwantize_vllm.matmul import backends, cpu_fused
from tests.guarded import at_the_end
from tests.numbers import make_weight

binding = pytest.importorskip("llvmlite.binding")


def weight_and_input(n=100, k=1056, m=3, dtype=torch.float32):
    torch.manual_seed(0)
    return quantize_nvfp4(make_weight("student", n, k)), torch.randn(m, k).to(dtype)


def error(y, x, q):
    exact = x.double() @ q.dequantize().double().T
    return ((y.double() - exact).norm() / exact.norm()).item()


VARIANTS = {"pairs": "avx512bf16", "permutation": "avx512f", "shift": None}


@pytest.fixture(params=VARIANTS)
def variant(monkeypatch, request):
    """One of the kernel's variants, whatever this machine would choose; pairs only serve bfloat16."""
    from qwantize_vllm.matmul.llvm_run import has

    needs = VARIANTS[request.param]
    if needs and not has(needs):
        pytest.skip(f"needs {needs}")
    monkeypatch.setattr(cpu_fused, "_variant", lambda dtype: request.param)
    return request.param


@pytest.mark.parametrize("block_size", [16, 32])
def test_every_code_and_every_scale(variant, block_size):
    # Row i holds byte i throughout, so codes i % 16 and i // 16; scales are all 126 positive ones and zero.
    codes = torch.arange(256).byte()[:, None].expand(256, 127 * block_size // 2).contiguous()
    scales = torch.arange(127).byte().view(torch.float8_e4m3fn).expand(256, 127).contiguous()
    q = Nvfp4Tensor(codes, scales, torch.tensor(1.0), block_size)
    one_block = torch.eye(127).repeat_interleave(block_size, dim=1)
    one_block[:, 1::2] *= 64  # so that low and high nibble can be told apart
    dtype = torch.bfloat16 if variant == "pairs" else torch.float32
    wanted = (one_block @ q.dequantize().T).to(dtype)
    assert torch.equal(matmul_nvfp4(one_block.to(dtype), q, backend="cpu_fused"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [48, 64])
def test_it_reads_nothing_behind_the_weight(k, dtype):
    """Codes that end where the process may not read on."""
    q, x = weight_and_input(5, k, dtype=dtype)
    with at_the_end(q.codes) as codes:
        ending = Nvfp4Tensor(codes, q.block_scales, q.global_scale, q.block_size)
        got = matmul_nvfp4(x, ending, backend="cpu_fused")
    assert torch.equal(got, matmul_nvfp4(x, q, backend="cpu_fused"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [*range(1, 18), 40])
def test_a_token_gets_the_same_bits_in_any_company(m, dtype):
    q, x = weight_and_input(m=m, dtype=dtype)
    together = matmul_nvfp4(x, q, backend="cpu_fused")
    assert error(together, x, q) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert torch.equal(together, torch.cat([matmul_nvfp4(row[None], q, backend="cpu_fused") for row in x]))


def test_any_number_of_threads_gives_the_same_bits():
    q, x = weight_and_input(n=333)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(matmul_nvfp4(x, q, backend="cpu_fused"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_callers_on_several_threads_do_not_meet():
    q, x = weight_and_input(n=333)
    wanted, results = matmul_nvfp4(x, q, backend="cpu_fused"), []

    def call():
        for _ in range(20):
            results.append(matmul_nvfp4(x, q, backend="cpu_fused"))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(result, wanted) for result in results)


def test_rows_of_a_larger_weight_and_columns_that_are_not_adjacent():
    q, x = weight_and_input()
    whole = matmul_nvfp4(x, q, backend="cpu_fused")
    part = Nvfp4Tensor(q.codes[7:30], q.block_scales[7:30], q.global_scale, q.block_size)
    assert torch.equal(matmul_nvfp4(x, part, backend="cpu_fused"), whole[:, 7:30])
    turned = Nvfp4Tensor(q.codes.T.contiguous().T, q.block_scales, q.global_scale, q.block_size)
    assert torch.equal(matmul_nvfp4(x, turned, backend="cpu_fused"), whole)


@pytest.mark.parametrize("k", [1056, 4096])
@pytest.mark.parametrize("m", [65, 333, 515])  # the last one in two pieces
def test_many_tokens(variant, m, k):
    dtype = torch.bfloat16 if variant == "pairs" else torch.float32
    q, x = weight_and_input(k=k, m=m, dtype=dtype)
    assert error(matmul_nvfp4(x, q, backend="cpu_fused"), x, q) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_takes_it_up_to_a_number_of_tokens(dtype):
    limit = backends.cpu_fused_tokens(dtype)
    for m in (1, 32, 33, 64, 65, 300):
        q, x = weight_and_input(m=m, dtype=dtype)
        got = matmul_nvfp4(x, q)
        assert torch.equal(got, matmul_nvfp4(x, q, backend="cpu_fused" if m <= limit else "cpu"))
        assert error(got, x, q) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    ("dtype", "features", "tokens"),
    [
        (torch.bfloat16, ["avx512f", "avx512bf16"], 64),
        (torch.bfloat16, ["avx512f", "avx512bf16", "amx-bf16"], 32),
        (torch.bfloat16, ["avx512f"], math.inf),
        (torch.bfloat16, [], 32),
        (torch.float16, ["avx512f", "avx512bf16"], math.inf),
        (torch.float16, ["avx512f", "avx512fp16"], 32),
        (torch.float32, ["avx512f", "amx-bf16"], 64),
        (torch.float32, [], 32),
    ],
)
def test_that_number_is_of_the_dtype_and_of_what_the_cpu_has(monkeypatch, dtype, features, tokens):
    monkeypatch.setattr("qwantize_vllm.matmul.llvm_run.has", lambda feature: feature in features)
    assert backends.cpu_fused_tokens.__wrapped__(dtype) == tokens


def test_without_a_compiler_strips_serve_and_one_line_says_why(monkeypatch, caplog):
    def missing(*_):
        raise ImportError("No module named 'llvmlite'")

    monkeypatch.setattr(cpu_fused, "compiled", missing)
    cpu_fused.why_not_fused.cache_clear()
    q, x = weight_and_input()
    try:
        with caplog.at_level(logging.WARNING):
            assert all(torch.equal(matmul_nvfp4(x, q), matmul_nvfp4(x, q, backend="cpu")) for _ in range(3))
    finally:
        cpu_fused.why_not_fused.cache_clear()
    assert len(caplog.records) == 1
    assert "No module named 'llvmlite'" in caplog.text


def test_a_default_device_does_not_reach_the_kernel():
    q, x = weight_and_input()
    wanted = matmul_nvfp4(x, q, backend="cpu_fused")
    cpu_fused.why_not_fused.cache_clear()
    with torch.device("meta"):
        assert torch.equal(matmul_nvfp4(x, q), wanted)


def test_memory_that_is_not_the_cpus_is_refused():
    assert "on the CPU" in backends.BACKENDS["cpu_fused"].why_not(torch.zeros(1, 16, device="meta"))


@pytest.mark.parametrize(("triple", "cpu"), [("x86_64-linux-gnu", "haswell"), ("aarch64-linux-gnu", "neoverse-n1")])
@pytest.mark.parametrize("kernel", ["fused", "strip of bfloat16", "strip of float32"])
def test_the_portable_decoding_compiles_for_other_machines(triple, cpu, kernel):
    from qwantize_vllm.matmul.llvm_decode import decode_by_shift
    from qwantize_vllm.matmul.llvm_fused import FusedCode
    from qwantize_vllm.matmul.llvm_products import FloatProducts
    from qwantize_vllm.matmul.llvm_strips import StripCode

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    except RuntimeError:
        pytest.skip(f"this LLVM does not compile for {triple}")
    if kernel == "fused":
        code = FusedCode(8, 16, FloatProducts(decode_by_shift))
    else:
        code = StripCode(16, decode_by_shift, halved=kernel == "strip of bfloat16")
    assembly = machine.emit_assembly(binding.parse_assembly(str(code.module)))
    assert "call" not in assembly.split()  # no function that the machine would have to bring
    assert "bl" not in assembly.split()
