"""A checkpoint that names a Hessian file in its own config: its own is read, another ends the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwantize_vllm.hessian import save_hessians

from .checkpoints import quantize_checkpoint, random_hessians, write_tiny
from .compare import assert_serves, tensors_of

pytestmark = pytest.mark.e2e


def write_with_hessian(folder: Path, named: str) -> Path:
    """A checkpoint whose config names that file, with Hessians of its own in a folder."""
    settings = {"quant_method": "qwantize", "scale_search": "hessian", "hessian": named}
    checkpoint = write_tiny(folder / "checkpoint", quantization_config=settings)
    # Not beside the weights: vLLM takes every safetensors file there for weights.
    (checkpoint / "qwantize").mkdir()
    save_hessians(checkpoint / "qwantize" / "own.safetensors", random_hessians(checkpoint), block_size=16)
    return checkpoint


def test_a_checkpoint_brings_its_own_hessians(engines, tmp_path):
    """Found in the checkpoint's directory, wherever the server was started, with no flag given."""
    checkpoint = write_with_hessian(tmp_path, "qwantize/own.safetensors")
    outcome = engines.start(checkpoint, quantization=None)
    hessians = random_hessians(checkpoint)
    for layer, q in quantize_checkpoint(checkpoint, hessians=hessians, scale_search="hessian").items():
        assert_serves(tensors_of(outcome), layer, q)


def test_a_checkpoint_reads_nothing_else(engines, tmp_path):
    """Though the file is there and good."""
    hessians = random_hessians(write_tiny(tmp_path / "other"))
    save_hessians(tmp_path / "secret.safetensors", hessians, block_size=16)
    checkpoint = write_with_hessian(tmp_path, str(tmp_path / "secret.safetensors"))
    log = engines.refuse(checkpoint, quantization=None)
    assert "secret.safetensors' in the checkpoint's own config, which may name files of the checkpoint only" in log
    assert "Loading safetensors" not in log
