from __future__ import annotations

import dataclasses
import io
import json
import logging
import sys

import pytest

pytest.importorskip("triton")

from qwantize_vllm.matmul import compile_process
from qwantize_vllm.matmul.compile_process import Request, start_compiling
from tests.programs import run_program

NORM = "qwantize_vllm.matmul.triton_normed"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Triton's, which a process inherits; which no test waits for long."""
    monkeypatch.setattr(compile_process, "_PATIENCE", 0.1)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_launch_finds_what_another_process_has_compiled(cache):
    products = ["_decode_kernel", "_gate_kernel", "_grouped_kernel", "_swizzled_kernel"]
    plans = ["_count_kernel", "_place_kernel", "_sum_kernel"]
    names = " ".join(run_program("tests.compile_elsewhere")).split()
    assert names == sorted(["_add_norm_kernel", *products, *plans, "_wgmma_kernel"])


def test_nothing_is_started_for_nothing():
    assert start_compiling(Request()) is None


def test_that_there_is_no_process_the_log_says_too(cache, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        thread = start_compiling(Request([(NORM, "_gate_kernel", "{}")], ["source"], ["cuda", 90, 32]))
        assert thread is not None
        thread.join()
    assert "/nowhere/python" in caplog.text


def test_requests_that_come_while_others_are_compiled_are_next(cache, monkeypatch):
    lists = []

    def run_module(name, requests):
        lists.append([Request(**each) for each in requests])
        if len(lists) == 1:
            assert start_compiling(third) is thread
            return "as if there were no memory for a process"
        return ""

    monkeypatch.setattr(compile_process, "run_module", run_module)
    first, second, third = (Request([(NORM, name, "{}")], ["source"], ["cuda", 90, 32]) for name in "abc")
    thread = start_compiling(first)
    assert start_compiling(second) is thread
    thread.join(timeout=60)
    assert lists == [[first, second], [third]]
    assert start_compiling(first) is not thread, "it has ended"


def test_what_several_ask_for_is_compiled_once(cache, monkeypatch):
    """And what fails is done for none of those who asked for it."""
    from triton.runtime import driver

    compiled = []

    def compile_one(parent, module, name, specialization):
        compiled.append(name)
        if name == "broken":
            raise KeyError("no such kernel")

    monkeypatch.setattr(compile_process, "_compile", compile_one)
    monkeypatch.setattr(driver, "set_active", lambda target: None)
    names = (["a", "b"], ["b", "c"], ["a", "broken"])
    requests = [
        Request([(NORM, name, "{}") for name in each], ["source"] * len(each), ["cuda", 90, 32]) for each in names
    ]
    with pytest.raises(ExceptionGroup, match="do not compile") as raised:
        compile_process.compile_all(io.StringIO(json.dumps([dataclasses.asdict(each) for each in requests])))
    assert len(raised.value.exceptions) == 1
    assert sorted(compiled) == ["a", "b", "broken", "c"]
    assert [request.done for request in requests] == [True, True, False]


def test_a_process_that_is_killed_is_told_of(cache, monkeypatch, caplog, tmp_path):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(killed))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        start_compiling(Request([(NORM, "_gate_kernel", "{}")], ["source"], ["cuda", 90, 32])).join()
    assert "the process ended with -9" in caplog.text


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request([(NORM, "no_such_kernel", "{}")], ["source"], ["cuda", 90, 32]), "no_such_kernel"),
        (Request([(NORM, "_gate_kernel", "{}")], ["source"], ["cuda", 90, 32], parent=0), "is gone"),
    ],
)
def test_what_fails_is_left_to_the_launch_and_the_log_says_so(request_, why, cache, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO):
        thread = start_compiling(request_)
        assert thread is not None
        thread.join()
    (record,) = caplog.records
    assert "will be compiled as they are launched" in record.message
    assert why in record.message
    assert not request_.done
