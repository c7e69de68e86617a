"""`qwantize calibrate`: from a text to a served model."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm.hessian import HessianFile
from qwantize_vllm.layer_names import matches
from tests.e2e.checkpoints import quantize_checkpoint

from .architectures import write_blip2
from .compare import assert_serves, served_layers, tensors_of
from .test_commands import qwantize

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture(scope="module")
def hessians(smollm2, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("hessians") / "h.safetensors"
    options = ["--num-tokens", "200", "--seq-len", "64"]
    printed = qwantize("calibrate", smollm2, "--text", text, *options, "--out", path, env=None)
    assert "200 tokens in 4 windows" in " ".join(printed.split())
    return path


def test_hessians_are_those_of_the_layers_inputs(smollm2, hessians):
    file = HessianFile(hessians)
    assert (file.info.tokens, file.info.block_size, file.info.dtype) == (200, 16, "bfloat16")
    assert len(file.names) == 120
    first = file.read_all("model.layers.0.self_attn.qkv_proj")
    # The norm before it leaves every token a mean square of about 1 times its gains.
    assert first.shape == (36, 16, 16)
    assert (torch.linalg.eigvalsh(first.double()) > -1e-3).all()
    assert torch.equal(first, first.mT)


@pytest.mark.slow
def test_the_same_text_gives_the_same_bytes(smollm2, text, hessians, tmp_path):
    again = tmp_path / "again.safetensors"
    qwantize("calibrate", smollm2, "--text", text, "--num-tokens", "200", "--seq-len", "64", "--out", again)
    assert again.read_bytes() == hessians.read_bytes()


@pytest.mark.slow
def test_full_hessians_have_the_blocks_on_their_diagonals(smollm2, text, hessians, tmp_path):
    path = tmp_path / "full.safetensors"
    options = ["--num-tokens", "136", "--first-token", "64", "--seq-len", "64", "--full"]  # all but the first window
    qwantize("calibrate", smollm2, "--text", text, *options, "--out", path)
    full, file = HessianFile(path), HessianFile(hessians)
    assert (full.info.full, full.info.tokens, full.names) == (True, 136, file.names)
    name = "model.layers.29.mlp.down_proj"
    whole = full.read_full(name)
    assert whole.shape == (1536, 1536)
    assert torch.equal(full.read(name, 3, 4)[0], whole[48:64, 48:64])
    # The first window has a sum of its own in the other file: what is left of it there is positive semidefinite.
    rest = file.read_all(name).double() - full.read_all(name).double()
    scale = file.read_all(name).double().diagonal(dim1=1, dim2=2).amax(dim=1)
    assert (torch.linalg.eigvalsh(rest)[:, 0] > -1e-5 * scale).all()
    assert (rest.diagonal(dim1=1, dim2=2).sum(dim=1) > 0).all()


@pytest.mark.slow
def test_hessians_behind_quantized_layers_are_of_other_inputs(smollm2, text, hessians, tmp_path):
    path = tmp_path / "behind.safetensors"
    options = ["--num-tokens", "200", "--seq-len", "64", "--setting", "naive"]
    qwantize("calibrate", smollm2, "--text", text, *options, "--out", path)
    behind, file = HessianFile(path), HessianFile(hessians)
    assert behind.info.behind == '{"scale_search": "naive"}'
    first, last = "model.layers.0.self_attn.qkv_proj", "model.layers.29.mlp.down_proj"
    assert torch.equal(behind.read_all(first), file.read_all(first))  # nothing quantized is before it
    assert not torch.allclose(behind.read_all(last), file.read_all(last), rtol=1e-2)


@pytest.mark.parametrize("layers", [(0, 29), pytest.param(range(30), marks=pytest.mark.slow)], ids=["two", "all"])
def test_a_model_is_served_with_its_hessians(engines, smollm2, hessians, layers):
    ignore = [f"model.layers.{i}.*" for i in range(30) if i not in layers]
    settings = {"quant_method": "qwantize", "scale_search": "hessian", "hessian": str(hessians), "strict": True}
    settings["ignore"] = ignore
    outcome = engines.start(smollm2, hf_overrides={"quantization_config": settings})
    file = HessianFile(hessians)
    assert served_layers(outcome) == {name for name in file.names if not matches(name, ignore)}
    compared = ("model.layers.0.self_attn.qkv_proj", "model.layers.29.mlp.down_proj")
    expected = quantize_checkpoint(
        smollm2,
        hessians={name: file.read_all(name) for name in compared},
        skip=set(file.names) - set(compared),
        scale_search="hessian",
    )
    for layer in compared:
        assert_serves(tensors_of(outcome), layer, expected[layer])


def test_hessians_of_another_model_are_refused(engines, tiny, hessians):
    settings = {"quant_method": "qwantize", "scale_search": "hessian", "hessian": str(hessians)}
    log = engines.refuse(tiny, hf_overrides={"quantization_config": settings})
    assert "was measured on another model" in log


@pytest.mark.slow
def test_what_text_does_not_reach_is_left_out(tmp_path):
    """The vision tower and what connects it; its layers are not searched with Hessians either."""
    from qwantize_vllm.plugin.calibration import calibrate

    checkpoint, out = write_blip2(tmp_path / "checkpoint"), tmp_path / "h.safetensors"
    windows = [list(range(3, 19)), list(range(20, 36))]
    options = {"gpu_memory_utilization": 0.5, "dtype": "float32"}
    info, left = calibrate(str(checkpoint), windows, 16, out, options)
    assert info.tokens == 32
    assert {name.partition(".")[0] for name in HessianFile(out).names} == {"language_model"}
    assert len(HessianFile(out).names) == 2 * 4
    unreached = left["text not reaching them"]
    assert unreached
    assert not any(name.startswith("language_model") for name in unreached)
