from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qwantize_vllm.cli import app
from qwantize_vllm.cli.eval import _finite
from qwantize_vllm.cli.setting_names import short_names

runner = CliRunner()


def test_env_names_versions_and_the_entry_point():
    result = runner.invoke(app, ["env"])
    assert result.exit_code == 0
    for part in ("qwantize-vllm: ", "torch: ", "gpu", "qwantize_vllm.plugin:register"):
        assert part in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--setting", "missing.yaml"], "missing.yaml does not exist"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--out", "."], "--out . is to be the JSON file"),
        (["--out", "a.png"], "--out a.png is to be the JSON file"),
    ],
)
def test_eval_refuses_what_it_cannot_read_before_an_engine_starts(tmp_path, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text("a")
    result = runner.invoke(app, ["eval", "model", "--text", str(text), *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output


def test_eval_writes_what_is_not_finite_as_null():
    records = {"naive": {"perplexity": float("inf"), "window_nll": [1.5, float("nan")], "kl": None}}
    assert _finite(records) == {"naive": {"perplexity": None, "window_nll": [1.5, None], "kl": None}}


def test_files_of_settings_are_named_by_their_stems():
    assert short_names(["bf16", "configs/a.yaml", "x/b.yaml", "y/b.yaml"]) == {
        "bf16": "bf16",
        "configs/a.yaml": "a",
        "x/b.yaml": "x/b.yaml",
        "y/b.yaml": "y/b.yaml",
    }


def test_calibrate_does_not_write_where_vllm_reads_weights(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a")
    out = tmp_path / "hessians.safetensors"
    arguments = ["calibrate", str(tmp_path), "--text", str(text), "--out", str(out)]
    result = runner.invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "is in the model's directory" in result.output
    assert not out.exists()


def test_merging_does_not_overwrite_what_calibrate_wrote_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hessians.safetensors").write_text("of before")
    arguments = ["calibrate", "--merge", "hessians.safetensors", "--merge", "hessians.safetensors"]
    result = runner.invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "--merge needs --out" in result.output
    assert (tmp_path / "hessians.safetensors").read_text() == "of before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full", "--tensor-parallel-size", "2"], "--full with --tensor-parallel-size 2"),
        (["--setting", "missing.yaml"], "missing.yaml does not exist"),
        (["--each-line"], "--each-line reads lines of .jsonl files"),
        (["--out", "."], "--out . is a directory"),
    ],
)
def test_calibrate_refuses_what_it_cannot_do_before_an_engine_starts(tmp_path, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text("a")
    options = ["--text", str(text), "--out", str(tmp_path / "hessians.safetensors")]
    result = runner.invoke(app, ["calibrate", "model", *options, *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "qwantize", "scale_search": "naive"}}, "has settings of qwantize in"),
        ({"quantization_config": {"quant_method": "qwantize", "packed": True}}, "is quantized already (qwantize)"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "is quantized already (fp8)"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "calibrate", "inspect", "export"])
def test_a_checkpoint_that_sets_something_itself_is_refused(tmp_path, command, config, message):
    """What is called bf16 would not be, and settings that are compared would all be the checkpoint's."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").touch()
    text.write_text("a")
    given = {"eval": ["--text", str(text)], "calibrate": ["--text", str(text)]}.get(command, [])
    out = ["--out", str(tmp_path / "out" / "file")]
    result = runner.invoke(app, [command, str(model), *given, *out], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert message in result.output


def test_eval_refuses_what_it_would_score_as_json(tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    result = runner.invoke(app, ["eval", "model", "--text", str(tmp_path / "chats.jsonl")], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    assert "would be scored as the JSON that it is" in result.output
