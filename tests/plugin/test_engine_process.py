"""What goes wrong in a process of its own is said in this one."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from qwantize_vllm.plugin.engine_process import in_own_process


class CannotLeaveError(ValueError):
    """As pydantic's errors that vLLM raises."""

    def __reduce__(self):
        raise TypeError("cannot pickle it")


def fail(error):
    raise CannotLeaveError("what is wrong") if error is None else error


def test_an_error_arrives_as_it_is():
    with pytest.raises(KeyError, match="a"):
        in_own_process(fail, KeyError("a"))


def test_what_an_error_that_cannot_be_pickled_said_arrives():
    with pytest.raises(ValueError, match="what is wrong"):
        in_own_process(fail, None)
