from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from qwantize_vllm.plugin.perplexity import Score, Windows, _mean_nll


def test_windows_follow_one_another():
    assert Windows(2, 3, 2).cut(range(9)) == [[2, 3, 4], [5, 6, 7]]
    assert Windows(2, 3, 0).cut(range(11)) == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]
    with pytest.raises(ValueError, match="the text has 4 tokens"):
        Windows(2, 3, 0).cut(range(4))
    with pytest.raises(ValueError, match="the text has 7 tokens"):
        Windows(2, 3, 2).cut(range(7))
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Windows(0, 1, 2).cut(range(7))


def test_the_first_token_of_a_window_is_not_predicted():
    logprobs = [
        None,
        {5: SimpleNamespace(logprob=-1.0)},
        {7: SimpleNamespace(logprob=-3.0), 1: SimpleNamespace(logprob=0)},
    ]
    assert _mean_nll([9, 5, 7], logprobs) == 2.0


def test_scores_are_compared_window_by_window():
    base, other = Score([1.0, 2.0]), Score([1.5, 2.7])
    assert base.perplexity == pytest.approx(math.exp(1.5))
    mean, error = other.log_ratio(base)
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(0.1)
    assert base.kl is None
    assert Score([1.0, 2.0], [0.1, 0.3]).kl == pytest.approx((0.2, 0.1))
