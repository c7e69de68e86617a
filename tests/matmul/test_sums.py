from __future__ import annotations

import pytest

from tests.programs import run_program

pytest.importorskip("triton")


def test_programs_that_wait_for_each_other_share_out_a_tile():
    """The PTX of what the kernel for wgmma does with the sums of slices, on a CPU."""
    assert len(run_program("tests.emulate_sums")) == 9
