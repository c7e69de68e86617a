from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qwantize_vllm import block_hessian
from qwantize_vllm.hessian import HessianFile, save_hessians


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_hessian_is_the_sum_of_outer_products(block_size, dtype):
    x = torch.randn(9000, 96).to(dtype)  # more than one chunk
    got = block_hessian(x, block_size)
    full = x.double().T @ x.double()
    for j in range(96 // block_size):
        part = slice(j * block_size, (j + 1) * block_size)
        assert torch.allclose(got[j].double(), full[part, part], rtol=1e-4, atol=1e-2)
    assert got.dtype == torch.float32
    assert torch.allclose(block_hessian(x.view(90, 100, 96), block_size), got)


def test_bad_activations_are_refused():
    with pytest.raises(ValueError, match="multiple of 16"):
        block_hessian(torch.ones(3, 40))
    with pytest.raises(ValueError, match="NaN"):
        block_hessian(torch.full((3, 32), torch.nan))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        block_hessian(torch.ones(3, 32, dtype=torch.int64))


def test_a_file_gives_back_slices(tmp_path):
    hessian = block_hessian(torch.randn(20, 64))
    path = tmp_path / "h.safetensors"
    save_hessians(path, {"model.layers.0.mlp.down_proj": hessian}, 16)
    file = HessianFile(path, 16)
    assert torch.equal(file.read("model.layers.0.mlp.down_proj", 1, 3), hessian[1:3])
    assert file.find(["model.layers.0.mlp.fused", "model.layers.0.mlp.down_proj"], 4) == "model.layers.0.mlp.down_proj"
    with pytest.raises(ValueError, match="has no layer 'x' or 'y'"):
        file.find(["x", "y"], 4)
    with pytest.raises(ValueError, match="has 4 blocks, the model's has 5"):
        file.find(["model.layers.0.mlp.down_proj"], 5)
    with pytest.raises(ValueError, match="block_size 16, the settings ask for 32"):
        HessianFile(path, 32)


def test_what_is_not_finite_is_refused_when_it_is_read(tmp_path):
    hessian = torch.zeros(3, 16, 16)
    hessian[1, 2, 3] = torch.nan
    save_hessians(tmp_path / "h", {"a": hessian}, 16)
    file = HessianFile(tmp_path / "h", 16)
    assert file.read("a", 2, 3).shape == (1, 16, 16)
    with pytest.raises(ValueError, match="layer 'a' holds 1 non-finite elements"):
        file.read("a", 0, 2)


def test_foreign_broken_and_missing_files_are_refused(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="is not a Hessian file"):
        HessianFile(foreign, 16)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(foreign.read_bytes()[:20])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        HessianFile(broken, 16)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HessianFile(tmp_path / "none", 16)
    with pytest.raises(ValueError, match=r"must be float32 \(K/16, 16, 16\)"):
        save_hessians(tmp_path / "x", {"a": torch.zeros(2, 8, 8)}, 16)
