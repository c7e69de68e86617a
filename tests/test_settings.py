from __future__ import annotations

from pathlib import Path

import pytest

from qwantize_vllm import QwantizeSettings
from qwantize_vllm.settings import environment_settings, read_settings_file, resolve_settings

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_sources_are_merged_key_by_key_strongest_first():
    settings, origin = resolve_settings(
        {"checkpoint": {"block_size": 32}, "file": {"block_size": 16, "scale_search": "naive"}, "env": {"strict": True}}
    )
    assert settings == QwantizeSettings(block_size=32, scale_search="naive", strict=True)
    assert origin == {"block_size": "checkpoint", "scale_search": "file", "strict": "env"}


@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        (
            {"scale_search": "optimum"},
            ["scale_search", "'optimum'", "'naive', 'optimal' or 'hessian'", "mean 'optimal'"],
        ),
        ({"block_size": 24}, ["block_size", "got 24", "16 or 32"]),
        ({"block_size": "16"}, ["block_size", "got '16'", "16 or 32"]),
        ({"blocksize": 16}, ["unknown key 'blocksize'", "allowed keys", "mean 'block_size'"]),
        ({"strict": "yes"}, ["strict", "got 'yes'", "boolean"]),
        ({"ignore": "lm_head"}, ["ignore", "got 'lm_head'", "list of strings"]),
        ({"ignore": ["re:("]}, ["ignore", "not a regular expression"]),
        ({"ignore": [""]}, ["ignore", "empty pattern"]),
        ({"scale_search": "hessian"}, ["needs the key hessian"]),
        ({"hessian": "h.safetensors"}, ["scale_search: hessian"]),
        ({"scale_search": "hessian", "hessian": "missing.safetensors"}, ["no file missing.safetensors"]),
        ({"refine": "code"}, ["refine", "got 'code'", "'none', 'codes' or 'gptq'", "mean 'codes'"]),
        ({"refine": "gptq"}, ["refine 'gptq' needs scale_search: hessian, got 'optimal'"]),
        ({"gptq_damping": 0.0}, ["gptq_damping", "got 0.0", "greater than 0"]),
        ({"gptq_damping": float("inf")}, ["gptq_damping", "got inf", "finite number"]),
        ({"gptq_sweeps": -1}, ["gptq_sweeps", "got -1", "greater than or equal to 0"]),
        ({"gptq_order": "trace"}, ["gptq_order", "got 'trace'", "'loss' or 'natural'"]),
        ({"backend": "cublas"}, ["backend", "got 'cublas'", "'auto'", "'marlin'"]),
        ({"backend": "marlin", "block_size": 32}, ["backend 'marlin' takes blocks of 16, block_size is 32"]),
        ({"backend": "vllm", "block_size": 32}, ["backend 'vllm' takes blocks of 16, block_size is 32"]),
        ({"backend": "humming", "block_size": 32}, ["backend 'humming' takes blocks of 16, block_size is 32"]),
        ({"backend": "vllm", "global_scale": "amax_per_member"}, ["'vllm'", "one global scale a layer"]),
    ],
)
def test_errors_name_the_key_what_was_given_and_what_is_allowed(given, fragments):
    with pytest.raises(ValueError) as error:
        resolve_settings({"--hf-overrides": given})
    for fragment in fragments:
        assert fragment in str(error.value)


def test_errors_name_the_source():
    with pytest.raises(ValueError, match=r"\(from b\)"):
        resolve_settings({"a": {"strict": True}, "b": {"block_size": 8}})
    with pytest.raises(ValueError, match="from a must be a mapping"):
        resolve_settings({"a": ["block_size"]})


def test_files(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text("scale_search: naive\nignore: ['*.o_proj']\n")
    assert read_settings_file(path) == {"scale_search": "naive", "ignore": ["*.o_proj"]}
    path.write_text("")
    assert read_settings_file(path) == {}
    path.write_text("{a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        read_settings_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        read_settings_file(path)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="must hold a mapping"):
        read_settings_file(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_settings_file(tmp_path / "none.yaml")


def test_environment_variable_names_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("QWANTIZE_CONFIG", raising=False)
    assert environment_settings() == {}
    path = tmp_path / "q.yaml"
    path.write_text("block_size: 32\n")
    monkeypatch.setenv("QWANTIZE_CONFIG", str(path))
    assert environment_settings() == {"block_size": 32}
    monkeypatch.setenv("QWANTIZE_CONFIG", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        environment_settings()


def test_every_ready_config_is_valid(monkeypatch, tmp_path):
    assert {path.stem for path in CONFIGS} >= {"naive", "optimal", "hessian", "block32"}
    monkeypatch.chdir(tmp_path)
    for path in CONFIGS:
        values = read_settings_file(path)
        if "hessian" in values:
            Path(values["hessian"]).touch()
        resolve_settings({str(path): values})


def test_every_field_documents_itself():
    assert all(field.description for field in QwantizeSettings.model_fields.values())
