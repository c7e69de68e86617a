"""`serve_examples/serve.sh`: what it asks of vLLM, which is a script here that prints its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "serve_examples" / "serve.sh"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    vllm = tmp_path / ".venv" / "bin" / "vllm"
    for folder in (vllm.parent, tmp_path / ".cache" / "smollm2-135m-instruct", tmp_path / "serve_examples"):
        folder.mkdir(parents=True)
    vllm.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    vllm.chmod(0o755)
    return Path(shutil.copy(SCRIPT, tmp_path / "serve_examples"))


def asked(script: Path, *arguments: str, **variables: str) -> list[str]:
    environment = {**os.environ, **variables}
    return subprocess.check_output([script, *arguments], env=environment, text=True).splitlines()


def test_without_settings_none_are_given(script):
    """So that those of a checkpoint, of --additional-config and of QWANTIZE_CONFIG count."""
    model = str(script.parent.parent / ".cache" / "smollm2-135m-instruct")
    assert asked(script, "--port", "1") == ["serve", model, "--quantization", "qwantize", "--port", "1"]


def test_settings_in_a_variable_are_handed_over(script):
    arguments = asked(script, "some/model", SETTINGS='{"scale_search": "naive"}')
    assert arguments == [
        *("serve", "some/model", "--quantization", "qwantize"),
        *("--additional-config", '{"qwantize": {"scale_search": "naive"}}'),
    ]
