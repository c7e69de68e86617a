from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from qwantize_vllm import side_process
from qwantize_vllm.side_process import fork_to, run_module


def test_a_module_is_given_what_it_asks_for():
    assert run_module("json.tool", {"asked": [1, 2]}) == ""


def test_why_a_module_failed():
    assert "No module named" in run_module("qwantize_vllm.no_such_module", None)


def test_no_process_can_be_started(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "FileNotFoundError" in run_module("json.tool", None)


def test_whatever_is_wrong_is_said_and_not_raised(monkeypatch):
    assert run_module("json.tool", object()).startswith("TypeError: ")


def test_import_paths_need_not_be_strings(monkeypatch):
    """Python ignores others, and so does who has them."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    assert run_module("json.tool", None) == ""


def test_a_fork_leaves_what_it_does_on_the_disk_alone(tmp_path, capfd):
    memory = []

    def write():
        memory.append("written")
        os.write(1, b"printed")
        (tmp_path / "file").write_text("written")

    assert fork_to(write)() == ""
    assert (tmp_path / "file").read_text() == "written"
    assert memory == []
    assert capfd.readouterr() == ("", "")


def test_why_a_fork_failed():
    assert fork_to(lambda: 1 // 0)().endswith("ZeroDivisionError: integer division or modulo by zero")


def test_that_a_fork_was_killed():
    assert fork_to(lambda: os.kill(os.getpid(), signal.SIGKILL))() == "the process ended with -9"


def test_a_fork_that_hangs_ends(monkeypatch):
    monkeypatch.setattr(side_process, "_LONGEST", 1)
    assert fork_to(lambda: time.sleep(300))() == f"the process ended with -{signal.SIGALRM.value}"


def test_an_interrupt_ends_a_fork_whatever_this_process_makes_of_it(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert fork_to(lambda: os.kill(os.getpid(), signal.SIGTERM))() == "the process ended with -15"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_somebody_else_saw_the_end_of_a_fork(monkeypatch):
    wait = fork_to(lambda: None)
    os.waitpid(wait.args[0], 0)
    assert wait() == ""
