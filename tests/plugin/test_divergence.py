"""KL divergences from hidden states, against their definition."""

from __future__ import annotations

import pytest
import torch

from qwantize_vllm.plugin import divergence
from qwantize_vllm.plugin.divergence import Divergence, DivergenceWorker, diverge

VOCABULARY, HIDDEN, TOKENS = 50, 8, 12


@pytest.fixture
def head():
    return torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(2)
    reference = torch.randn(TOKENS - 1, HIDDEN, generator=generator)
    return reference, reference + 0.3 * torch.randn(TOKENS - 1, HIDDEN, generator=generator)


WINDOW = list(range(5, 5 + TOKENS))


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 2**23])
def test_it_is_the_sum_over_the_whole_vocabulary(head, states, chunk, monkeypatch):
    monkeypatch.setattr(divergence, "_CHUNK_LOGITS", chunk)
    found = diverge(lambda rows: rows @ head.T, VOCABULARY, *states, WINDOW)
    p, q = ((each.double() @ head.double().T).softmax(-1) for each in states)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    for nll, each in ((found.nll, q), (found.reference_nll, p)):
        assert nll == pytest.approx(-each[range(TOKENS - 1), WINDOW[1:]].log().mean().item(), rel=1e-4)


def test_words_that_cannot_come_add_nothing(head, states):
    mask = torch.zeros(VOCABULARY)
    mask[40:] = -torch.inf
    found = diverge(lambda rows: rows @ head.T + mask, VOCABULARY, *states, WINDOW)
    kept = diverge(lambda rows: rows @ head[:40].T, 40, *states, WINDOW)
    assert found.kl == pytest.approx(kept.kl, rel=1e-6)
    assert diverge(lambda rows: None, VOCABULARY, *states, WINDOW) is None


def test_states_that_are_not_those_of_the_window_are_noticed():
    found = Divergence(kl=0.1, agreement=1.0, nll=3.0, reference_nll=2.9)
    found.check(3.01, 2.91)
    with pytest.raises(RuntimeError, match=r"this engine's hidden states give 3\.0000 nats .* 3\.2000"):
        found.check(3.2, 2.9)
    with pytest.raises(RuntimeError, match="the unquantized model's"):
        found.check(3.0, float("nan"))


def test_a_window_must_be_read_in_one_step():
    worker = DivergenceWorker()
    worker._qwantize_outputs = [torch.zeros(4, 2), torch.zeros(1, 2)]
    assert worker._qwantize_hidden(4).shape == (3, 2)
    short, two, other = [torch.zeros(3, 2)], [torch.zeros(4, 2)] * 2, [(torch.zeros(4, 2),)]
    for outputs, error in (([], RuntimeError), (short, RuntimeError), (two, RuntimeError), (other, TypeError)):
        worker._qwantize_outputs[:] = outputs
        with pytest.raises(error, match="use --"):
            worker._qwantize_hidden(4)
        assert worker._qwantize_outputs == []
