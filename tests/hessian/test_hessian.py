from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from qwantize_vllm import block_hessian
from qwantize_vllm.hessian import (
    BlockHessianSum,
    FullHessianSum,
    HessianFile,
    HessianInfo,
    merge_hessians,
    save_hessians,
)


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


def test_a_file_is_read_on_the_cpu_while_a_model_is_built_elsewhere(tmp_path):
    hessian = block_hessian(torch.randn(20, 64))
    save_hessians(tmp_path / "h", {"a": hessian}, 16)
    file = HessianFile(tmp_path / "h", 16)
    with torch.device("meta"):
        each, whole = file.read_each(["a"], 0, 4), file.read_whole("a")
    assert torch.equal(each[0], hessian)
    assert torch.equal(whole, hessian)


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


def measured(path, *texts, fingerprint="f", names=("a", "b")):
    """A file of Hessians of texts, which here are activations."""
    hessians = {name: sum(block_hessian(text) for text in texts) for name in names}
    info = HessianInfo(block_size=16, fingerprint=fingerprint, tokens=sum(text.shape[0] for text in texts))
    save_hessians(path, hessians, 16, info)
    return path


def test_a_file_says_what_it_was_measured_on_and_has_the_same_bytes_every_time(tmp_path):
    hessian = block_hessian(torch.randn(20, 64))
    info = HessianInfo(block_size=16, model="m", fingerprint="abc", tokens=20, dtype="bfloat16", package="1")
    for name in ("one", "two"):
        save_hessians(tmp_path / name, {"b": hessian, "a": hessian * 2}, 16, info)
    file = HessianFile(tmp_path / "one")
    assert file.info == info
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    file.check_model("abc")
    with pytest.raises(ValueError, match=r"measured on another model: 'm' with config abc, this one has xyz"):
        file.check_model("xyz")
    with pytest.raises(ValueError, match="block_size is 32, info says 16"):
        save_hessians(tmp_path / "x", {}, 32, info)


def test_merged_files_are_those_of_the_texts_together(tmp_path):
    texts = [torch.randint(-8, 9, (n, 32)).float() for n in (5, 7, 9)]  # small integers: sums are exact
    parts = [measured(tmp_path / f"{i}", text) for i, text in enumerate(texts)]
    info = merge_hessians(parts, tmp_path / "merged")
    assert info.tokens == 21
    measured(tmp_path / "together", *texts)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "together").read_bytes()


def test_files_that_do_not_add_up_are_not_merged(tmp_path):
    one = measured(tmp_path / "one", torch.randn(5, 32))
    model = measured(tmp_path / "model", torch.randn(5, 32), fingerprint="g")
    layers = measured(tmp_path / "layers", torch.randn(5, 32), names=("a", "c"))
    shapes = measured(tmp_path / "shapes", torch.randn(5, 64))
    for other, message in ((model, "fingerprint 'f'"), (layers, "same layers: b, c"), (shapes, r"\(2, 16, 16\)")):
        with pytest.raises(ValueError, match=message):
            merge_hessians([one, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_sum_is_the_same_in_pieces(tmp_path):
    x = torch.randint(-8, 9, (30, 64)).bfloat16()
    hessian = BlockHessianSum(64, 16, "cpu")
    for part in x.split(7):
        hessian.add(part)
    assert torch.equal(hessian.total, block_hessian(x))
    assert hessian.tokens == 30
    with pytest.raises(ValueError, match="multiple of block_size 16, got 40"):
        BlockHessianSum(40, 16, "cpu")


def test_a_full_hessian_has_the_blocks_on_its_diagonal(tmp_path):
    x = torch.randint(-8, 9, (30, 64)).bfloat16()
    hessian = FullHessianSum(64, "cpu")
    for part in x.split(7):
        hessian.add(part)
    assert hessian.tokens == 30
    assert torch.equal(hessian.total, x.float().T @ x.float())
    path = tmp_path / "full.safetensors"
    save_hessians(path, {"layer": hessian.total}, 16, HessianInfo(block_size=16, full=True))
    for block_size in (16, 32):  # whichever it was measured with
        file = HessianFile(path, block_size)
        blocks = block_hessian(x, block_size)
        assert file.find(["layer"], 64 // block_size) == "layer"
        assert torch.equal(file.read_all("layer"), blocks)
        assert torch.equal(file.read("layer", 1, 2), blocks[1:2])
        assert torch.equal(file.read_full("layer"), hessian.total)
    with pytest.raises(ValueError, match="has 4 blocks, the model's has 5"):
        HessianFile(path).find(["layer"], 5)


def test_full_files_add_up_with_their_like_only(tmp_path):
    texts = [torch.randint(-8, 9, (n, 32)).float() for n in (5, 7)]
    info = HessianInfo(block_size=16, full=True, fingerprint="f", tokens=6)
    for name, text in zip("ab", texts, strict=True):
        save_hessians(tmp_path / name, {"a": text.T @ text, "b": text.T @ text}, 16, info)
    assert merge_hessians([tmp_path / "a", tmp_path / "b"], tmp_path / "merged").tokens == 12
    assert torch.equal(HessianFile(tmp_path / "merged").read_full("a"), sum(text.T @ text for text in texts))
    blocks = measured(tmp_path / "blocks", texts[0])
    with pytest.raises(ValueError, match=r"has full True, .* has False"):
        merge_hessians([tmp_path / "a", blocks], tmp_path / "x")


def test_what_is_no_full_hessian_is_refused(tmp_path):
    blocks = measured(tmp_path / "blocks", torch.randn(5, 32))
    with pytest.raises(ValueError, match=r"has the blocks of the Hessians only.*calibrate --full"):
        HessianFile(blocks).read_full("a")
    with pytest.raises(ValueError, match=r"must be float32 \(K, K\), got torch.float32 \(2, 16, 16\)"):
        save_hessians(tmp_path / "x", {"a": torch.zeros(2, 16, 16)}, 16, HessianInfo(block_size=16, full=True))
    path = tmp_path / "nan"
    save_hessians(path, {"a": torch.full((16, 16), torch.nan)}, 16, HessianInfo(block_size=16, full=True))
    with pytest.raises(ValueError, match="holds 256 non-finite"):
        HessianFile(path).read_full("a")
