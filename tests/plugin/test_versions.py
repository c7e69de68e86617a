from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qwantize_vllm.plugin import versions
from qwantize_vllm.plugin.versions import NEWEST, OLDEST, warn_if_untested

ROOT = Path(__file__).parents[2]


def test_the_version_under_test_is_the_one_imported():
    """`make versions` names the folder that vLLM must come from."""
    import vllm

    if wanted := os.environ.get("QWANTIZE_TEST_VLLM"):
        assert Path(wanted) in Path(vllm.__file__).parents
        assert versions.installed() == Path(wanted).name


def test_pyproject_and_readme_say_the_same():
    (required,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    oldest, below = re.fullmatch(r"vllm>=([\d.]+),<([\d.]+)", required).groups()
    major, minor, _ = map(int, NEWEST.split("."))
    assert (oldest, below) == (OLDEST, f"{major}.{minor + 1}")
    assert f"vLLM {OLDEST} to {major}.{minor}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.24.0", True), (OLDEST, False), ("0.32.0+cpu", False), ("0.33.5", False), ("0.34.0rc1", True), ("dev", False)],
)
def test_other_versions_are_warned_of(version, warns, monkeypatch, caplog_vllm):
    monkeypatch.setattr(versions, "installed", lambda: version)
    warn_if_untested()
    assert any(version in message for message in caplog_vllm) == warns


@pytest.fixture
def caplog_vllm(monkeypatch):
    """What the module's logger is given: vLLM's loggers do not reach pytest's."""
    from vllm import logger as vllm_logger

    messages = []

    class Logger:
        def warning(self, message, *args):
            messages.append(message % args)

    monkeypatch.setattr(vllm_logger, "init_logger", lambda name: Logger())
    return messages
