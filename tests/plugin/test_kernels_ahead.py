"""Which rank compiles kernels ahead, and which launches them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

from qwantize_vllm.plugin import kernels_ahead
from qwantize_vllm.plugin.kernels_ahead import compiles_for_others, prepare_kernels


@pytest.mark.parametrize(
    ("local_rank", "stage", "rank_of_stage", "expected"),
    [(None, 0, 0, True), (0, 0, 0, True), (1, 0, 1, False), (2, 1, 0, True), (3, 1, 1, False), (0, 0, 8, True)],
)
def test_who_compiles_for_others(monkeypatch, local_rank, stage, rank_of_stage, expected):
    """None: the layer is in no group of ranks, as in these tests."""
    monkeypatch.setattr(kernels_ahead, "model_parallel_is_initialized", lambda: local_rank is not None)
    monkeypatch.setattr(kernels_ahead, "get_world_group", lambda: SimpleNamespace(local_rank=local_rank))
    monkeypatch.setattr(kernels_ahead, "get_pp_group", lambda: SimpleNamespace(rank_in_group=stage))
    monkeypatch.setattr(kernels_ahead, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank_of_stage))
    assert compiles_for_others() is expected


@pytest.mark.parametrize("compiles", [True, False])
def test_kernels_are_compiled_by_one_rank_and_launched_by_all(monkeypatch, compiles):
    called = []
    monkeypatch.setattr(kernels_ahead, "compiles_for_others", lambda: compiles)
    monkeypatch.setattr(kernels_ahead, "compile_ahead", lambda kernels: called.append(("compiled", kernels)))
    monkeypatch.setattr(kernels_ahead, "announce", lambda kernels: called.append(("announced", kernels)))
    prepare_kernels("kernels")
    assert called == [("compiled", "kernels"), ("announced", "kernels")][not compiles :]
    called.clear()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    prepare_kernels("kernels")
    assert not called
