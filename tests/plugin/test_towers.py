"""Layers of a tower are known while vLLM builds them, whatever they are called."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from qwantize_vllm.plugin import towers
from qwantize_vllm.plugin.towers import is_of_tower, watch_towers


class Encoder:
    def __init__(self, found):
        found["encoder"] = is_of_tower("model.encoder.layers.0.fc1")


class Decoder:
    def __init__(self, found):
        found["decoder"] = is_of_tower("model.decoder.layers.0.fc1")


class Marking:
    """vLLM's mixin, without what it does itself."""

    @contextlib.contextmanager
    def _mark_tower_model(self, vllm_config, modalities, *, targets=None):
        yield


@pytest.fixture
def model(monkeypatch):
    class Watched(Marking):
        pass

    Watched._mark_tower_model = Marking._mark_tower_model
    running = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=object()))
    monkeypatch.setattr(towers, "SupportsMultiModal", Watched)
    monkeypatch.setattr(towers, "get_current_vllm_config", lambda: running)
    watch_towers()
    return Watched()


def test_what_is_built_where_a_tower_is_marked(model):
    found = {}
    with model._mark_tower_model(None, "image"):
        Encoder(found)
    Decoder(found)
    assert found == {"encoder": True, "decoder": False}


@pytest.mark.parametrize("targets", [Encoder, (Encoder,)], ids=["class", "classes"])
def test_what_marked_classes_build(model, targets):
    """As in Whisper, where encoder and decoder are made in one go."""
    found, construct = {}, Encoder.__init__
    with model._mark_tower_model(None, "audio", targets=targets):
        Encoder(found), Decoder(found)
    assert found == {"encoder": True, "decoder": False}
    assert Encoder.__init__ is construct
    Encoder(found)
    assert found["encoder"] is False
