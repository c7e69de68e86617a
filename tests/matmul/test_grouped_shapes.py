"""Which shape of the grouped kernel for wgmma serves how many pairs of a token and an expert."""

from __future__ import annotations

import pytest

from qwantize_vllm.matmul.grouped_shapes import (
    GROUPED_WGMMA_SHAPES,
    WGMMA_PAIRS,
    _expected_rounds,
    choose_grouped_wgmma,
)
from tests.programs import run_program

MIXTRAL_GATE_UP, MIXTRAL_DOWN = (8, 448, 64, 4, 256), (8, 64, 224, 4, 256)


def test_shapes_of_both_products_can_share_a_plan():
    assert {shape.tokens for shape in GROUPED_WGMMA_SHAPES} == {128}
    assert {shape.groups for shape in GROUPED_WGMMA_SHAPES} == {2, 3}


def test_a_round_that_would_be_almost_empty_is_avoided():
    """Eight tiles of tokens: 32 times as many fill two rounds of 132 programs, 22 times as many one and a third."""
    assert choose_grouped_wgmma(8 * 64, MIXTRAL_DOWN, 132).groups == 2
    assert choose_grouped_wgmma(8 * 64, MIXTRAL_DOWN, 96).groups == 3
    assert choose_grouped_wgmma(8 * 64, MIXTRAL_GATE_UP, 132).groups == 3


@pytest.mark.parametrize("words", [MIXTRAL_GATE_UP, MIXTRAL_DOWN, (128, 24, 32, 4, 256), (128, 32, 12, 4, 256)])
def test_with_many_pairs_the_largest_tiles_are_chosen(words):
    assert choose_grouped_wgmma(words[0] * WGMMA_PAIRS * 64, words, 132).groups == 3


@pytest.mark.parametrize(("filled", "rounds"), [(0.5, 1.0), (1.3, 2.0), (2.0, 2.5), (12.0, 12.5), (100.0, 100.5)])
def test_rounds_are_whole_where_it_is_known_how_many_there_are(filled, rounds):
    assert _expected_rounds(filled) == pytest.approx(rounds, abs=0.01)


def test_programs_share_the_tiles_that_have_an_expert_evenly():
    """Each is multiplied once; compiled for Hopper, run on the CPU."""
    pytest.importorskip("triton")
    assert len(run_program("tests.emulate_places")) == 6
