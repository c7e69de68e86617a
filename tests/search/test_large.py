"""Weights of more than 2^31 elements, and how much memory a search takes."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm import quantize_nvfp4
from qwantize_vllm.search.quantize import matrix_amax, search_nvfp4
from tests.numbers import make_weight

SEARCHES = ["naive", "optimal", "hessian"]


def identities(k: int, device: str) -> torch.Tensor:
    return torch.eye(16, device=device).repeat(k // 16, 1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2**20 + 1, 2048), (3, 2**19, 1408)], ids=["matrix", "experts"])
@pytest.mark.parametrize("scale_search", SEARCHES)
def test_the_last_rows_of_more_than_2_31_elements(shape, scale_search):
    k = shape[-1]
    hessian = identities(k, "cuda") if scale_search == "hessian" else None
    weight = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    last = make_weight("gaussian", 64, k, torch.bfloat16).cuda()
    weight.view(-1, k)[-64:] = last
    q = quantize_nvfp4(weight, scale_search, hessian=hessian)
    wanted = quantize_nvfp4(last, scale_search, hessian=hessian)
    assert torch.equal(q.codes.view(-1, k // 2)[-64:], wanted.codes)
    assert torch.equal(q.block_scales.view(torch.uint8).view(-1, k // 16)[-64:], wanted.block_scales.view(torch.uint8))


@pytest.mark.slow
def test_the_last_rows_of_more_than_2_31_elements_interpreted():
    """The offsets of the naive and the optimal search, in 9 minutes and 6 GB; of 32 bits, they end the process."""
    weight = torch.zeros(2**20 + 1, 2048, dtype=torch.bfloat16)
    last = make_weight("gaussian", 64, 2048, torch.bfloat16)
    weight[-64:] = last
    q = quantize_nvfp4(weight, "naive", backend="triton")
    assert torch.equal(q.codes[-64:], quantize_nvfp4(last, "naive", backend="reference").codes)


@pytest.mark.gpu
@pytest.mark.parametrize("scale_search", SEARCHES)
def test_a_search_takes_no_more_than_a_twentieth_of_the_weight_besides_its_result(scale_search):
    weight = make_weight("gaussian", 2048, 4096, torch.bfloat16).cuda()
    hessian = identities(4096, "cuda") if scale_search == "hessian" else None
    scale = torch.ones((), device="cuda")
    search_nvfp4(weight, scale_search, 16, scale, hessian)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matrix_amax(weight)
    q = search_nvfp4(weight, scale_search, 16, scale, hessian)
    extra = torch.cuda.max_memory_allocated() - before - q.codes.nbytes - q.block_scales.nbytes
    assert extra <= weight.nbytes / 20
