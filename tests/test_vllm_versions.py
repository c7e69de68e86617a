"""scripts/vllm_versions.py where a vLLM cannot be imported: the plugin's tests would skip themselves, and pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_versions


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vllm_versions, "CACHE", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("", "ModuleNotFoundError: No module named 'vllm."),  # what registering needs is not there
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_vllm_that_cannot_be_imported_fails(cache, line, reason, monkeypatch, capfd):
    package = cache / "0.0.0" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"{line}\n")
    monkeypatch.setattr("sys.argv", ["vllm_versions.py", "0.0.0"])
    with pytest.raises(SystemExit, match=r"the plugin's tests fail with vLLM 0\.0\.0"):
        vllm_versions.main()
    printed = capfd.readouterr().out
    assert f"error: the plugin cannot be registered with vLLM 0.0.0: {reason}" in printed
    assert "passed" not in printed
    assert "skipped" not in printed
