"""`qwantize export` and `qwantize verify`: what is refused before vLLM is imported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from qwantize_vllm.checkpoint.export import NOTES
from qwantize_vllm.checkpoint.files import digest
from qwantize_vllm.cli import app


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(4, 16)}, path / "model.safetensors")
    return path


def said(*arguments: object) -> tuple[int, str]:
    """Exit code and output, its lines joined."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "400"})
    return result.exit_code, " ".join(result.output.split())


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoint, tmp_path):
    (checkpoint / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    code, output = said("export", checkpoint, "--out", tmp_path / "out")
    assert code == 2
    assert "is quantized already (awq)" in output


def test_an_unknown_format_and_a_directory_that_is_there(checkpoint, tmp_path):
    code, output = said("export", checkpoint, "--out", tmp_path / "out", "--format", "gguf")
    assert code == 2
    assert "--format is 'gguf'; there are compressed-tensors, modelopt, qwantize" in output
    code, output = said("export", checkpoint, "--out", checkpoint)
    assert code == 2
    assert "exists and is not an empty directory" in output
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def test_what_was_done_otherwise_than_asked_is_printed(checkpoint, tmp_path, monkeypatch):
    exporting = pytest.importorskip("qwantize_vllm.plugin.exporting")
    done = exporting.Exported(
        ["a", "b"], {"c": "ignored"}, {"b": "the Hessian file does not have it"}, ["*.x"], 2**30, 0
    )
    monkeypatch.setattr(exporting, "export_model", lambda *given: done)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")  # as the command sets it, which then outlives it
    code, output = said("export", checkpoint, "--out", tmp_path / "out")
    assert code == 0
    for line in (
        "left as it is: c (ignored)",
        "searched by optimal, not hessian: b (the Hessian file does not have it)",
        "ignore pattern '*.x' names no layer of this model",
        "2 layers quantized, 1.000 -> 0.000 GiB",
    ):
        assert line in output


def test_verify(checkpoint):
    notes = {"shards": {"model.safetensors": {"a.weight": digest(torch.ones(4, 16))}}}
    (checkpoint / NOTES).write_text(json.dumps(notes))
    code, output = said("verify", checkpoint)
    assert code == 0
    assert "1 tensors are what was written" in output
    save_file({"a.weight": torch.zeros(4, 16)}, checkpoint / "model.safetensors")
    code, output = said("verify", checkpoint)
    assert code == 2
    assert "model.safetensors: the bytes of tensor 'a.weight' are not those that were written" in output
