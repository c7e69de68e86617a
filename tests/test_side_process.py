from __future__ import annotations

import sys
from pathlib import Path

from qwantize_vllm.side_process import run_module


def test_a_module_is_given_what_it_asks_for():
    assert run_module("json.tool", {"asked": [1, 2]}) == ""


def test_why_a_module_failed():
    assert "No module named" in run_module("qwantize_vllm.no_such_module", None)


def test_no_process_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "FileNotFoundError" in run_module("json.tool", None)


def test_whatever_is_wrong_is_said_and_not_raised():
    assert run_module("json.tool", object()).startswith("TypeError: ")


def test_import_paths_need_not_be_strings(monkeypatch):
    """Python ignores others, and so does who has them."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    assert run_module("json.tool", None) == ""
