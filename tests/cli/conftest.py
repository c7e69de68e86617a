"""What the tests of the benchmarks share."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from qwantize_vllm.cli import app
from qwantize_vllm.cli.bench import clock


@pytest.fixture
def run_bench(tmp_path, monkeypatch):
    """Runs a benchmark without waiting for steady clocks; gives its exit code, output and JSON."""
    monkeypatch.setattr(clock, "REPEAT_SECONDS", 1e-4)
    monkeypatch.setattr(clock, "_COPY_BYTES", {"cpu": 2**16, "cuda": 2**20})

    def run(command, *arguments, device="cpu"):
        options = ["--device", device, "--out", str(tmp_path / "out"), *arguments]
        result = CliRunner().invoke(app, ["bench", command, *options], env={"COLUMNS": "400"})
        written = tmp_path / "out" / f"{command}.json"
        return result.exit_code, result.output, json.loads(written.read_text()) if written.exists() else None

    return run


@pytest.fixture
def assert_plotted(tmp_path):
    """Asserts that a benchmark has drawn its plot."""

    def check(command):
        assert (tmp_path / "out" / f"{command}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    return check


@pytest.fixture
def assert_refused(run_bench):
    """Asserts that a benchmark refuses its options before anything is measured, with a message that holds this one."""

    def check(command, arguments, message):
        code, output, found = run_bench(command, *arguments)
        assert code == 2
        assert message in output
        assert found is None

    return check
