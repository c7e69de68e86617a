from __future__ import annotations

import re
from pathlib import Path

import pytest

import qwantize_vllm
from qwantize_vllm.triton_keys import settle_key
from tests.programs import run_program

SOURCE = """
CONSTANT = 1
def kernel(): return near() + far() + CONSTANT
def near(): return far() + 1
def far(): return 1
"""


class Function:
    """As much of Triton's as has a key; made: the names of those whose keys have been asked for."""

    def __init__(self, fn, made):
        self.fn, self._made = fn, made

    @property
    def cache_key(self):
        self._made.append(self.fn.__name__)
        return "key"


def test_what_is_called_has_its_key_first_and_once():
    made, namespace = [], {}
    exec(SOURCE, namespace)
    for name in ("kernel", "near", "far"):
        namespace[name] = Function(namespace[name], made)
    settle_key(namespace["kernel"])
    settle_key(namespace["near"])
    assert made == ["far", "near", "kernel"]


def test_what_has_no_key_is_left_alone():
    settle_key(SOURCE)
    settle_key(print)


def test_keys_are_the_same_in_whatever_order_they_are_made():
    """Before Triton 3.8 they were not; this is to be run with such a version too (tests/key_orders.py)."""
    pytest.importorskip("triton")
    (count,) = run_program("tests.key_orders")
    assert int(count) > 100


def test_every_launch_settles_keys():
    launched = {
        path.name
        for path in Path(qwantize_vllm.__file__).parent.rglob("*.py")
        if re.search(r"kernel\[|\.warmup\(|\.preload\(", re.sub(r"`[^`]*`", "", path.read_text()))
    }
    assert launched == {
        "triton_launch.py",
        "compile_process.py",  # which settles the key itself, for Triton makes the arguments
        "peers.py",  # a kernel that is not this package's
    }
