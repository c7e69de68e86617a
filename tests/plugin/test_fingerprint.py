"""What vLLM's compile cache knows of this package, so that no graph outlives the operators that it calls."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qwantize_vllm

pytest.importorskip("vllm")

from vllm.config import DeviceConfig, VllmConfig

from qwantize_vllm.plugin.base_config import add_to_compile_key
from qwantize_vllm.plugin.fingerprint import sources_fingerprint
from qwantize_vllm.settings import QwantizeSettings


def test_sources_are_told_apart(tmp_path):
    package = tmp_path / "qwantize_vllm"
    shutil.copytree(Path(qwantize_vllm.__file__).parent, package)
    assert sources_fingerprint(package) == sources_fingerprint()
    op = package / "matmul" / "op.py"
    op.write_text(op.read_text() + "\n")
    assert sources_fingerprint(package) != sources_fingerprint()
    op.write_text(op.read_text()[:-1])
    assert sources_fingerprint(package) == sources_fingerprint()
    op.rename(op.with_name("ops.py"))
    assert sources_fingerprint(package) != sources_fingerprint()


def key_of_vllm(**settings):
    config = VllmConfig(device_config=DeviceConfig(device="cpu"))  # `auto` finds none where vLLM's files are alone
    add_to_compile_key(config.additional_config, QwantizeSettings(**settings))
    return config.compute_hash()


@pytest.mark.parametrize("change", [{"backend": "reference"}, {"fuse_norms": False}])
def test_settings_change_the_key_of_vllm(change):
    assert key_of_vllm() == key_of_vllm()
    assert key_of_vllm() != key_of_vllm(**change)


def test_sources_change_the_key_of_vllm(monkeypatch):
    before = key_of_vllm()
    monkeypatch.setattr("qwantize_vllm.plugin.base_config.sources_fingerprint", lambda: "another")
    assert key_of_vllm() != before
