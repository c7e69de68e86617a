from __future__ import annotations

import inspect

import pytest
import torch

from qwantize_vllm.search import qwantize_names
from tests.numbers import make_weight

NAMES = ["nvfp4_naive", "nvfp4_optimal", "nvfp4_optimal_hessian"]


@pytest.mark.parametrize("suffix", ["", "_triton"])
@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_published_ones(name, suffix):
    wanted = "(W, dim=-1, return_dequant=False" + (", X=None)" if "hessian" in name else ")")
    signature = inspect.signature(getattr(qwantize_names, name + suffix))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == wanted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", ["", "_triton"])
@pytest.mark.parametrize(("shape", "dim"), [((6, 4, 16), -1), ((6, 2, 32), -1), ((16, 6, 4), 0), ((6, 16, 4), 1)])
def test_shapes_and_values(kernel_on, name, suffix, shape, dim):
    weight = make_weight("gaussian", 6, 64).flatten()[: torch.Size(shape).numel()].view(shape).to(kernel_on)
    block = shape[dim]
    columns = weight.numel() // 6
    extra = {"X": torch.randn(50, columns, device=kernel_on)} if "hessian" in name else {}
    scales, quants, dequantized = getattr(qwantize_names, name + suffix)(weight, dim=dim, return_dequant=True, **extra)
    assert scales.shape == weight.movedim(dim, -1).shape[:-1]
    assert quants.shape == dequantized.shape == weight.shape
    assert torch.equal(dequantized, quants * scales.unsqueeze(dim))
    assert set(quants.abs().unique().tolist()) <= {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    assert (scales.to(torch.float8_e4m3fn).float() == scales).all()
    assert (scales > 0).all()
    assert (dequantized - weight).norm() < 0.4 * weight.norm()
    assert len(getattr(qwantize_names, name + suffix)(weight, dim=dim, **extra)) == 2
    assert block in (16, 32)


def test_an_all_zero_block_has_no_nan():
    scales, quants, dequantized = qwantize_names.nvfp4_naive(torch.zeros(2, 16), return_dequant=True)
    assert scales.tolist() == [2**-9] * 2
    assert quants.abs().sum() == 0
    assert dequantized.abs().sum() == 0


def test_other_blocks_and_missing_activations_are_refused():
    with pytest.raises(ValueError, match="block_size must be one of"):
        qwantize_names.nvfp4_optimal(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="needs X"):
        qwantize_names.nvfp4_optimal_hessian(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="whole rows of K=48"):
        qwantize_names.nvfp4_optimal_hessian(torch.zeros(2, 16), X=torch.zeros(4, 48))
