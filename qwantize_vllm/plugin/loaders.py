"""Layers are processed as soon as all of their weights have arrived: how vLLM is made to see to it."""

from __future__ import annotations

import weakref

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing

from qwantize_vllm.plugin.report import LoadReport

# Of each model that is being built, the layer made last.
_last: weakref.WeakKeyDictionary[LoadReport, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()


def wrap_loaders(layer: torch.nn.Module, report: LoadReport) -> None:
    """Have vLLM keep what arrives for a layer just made, and process the layer once that is all of it.

    Its constructor goes on: it adds a bias, and some models give the weight another loader. vLLM would see a bias once
    a weight arrives, too late where the bias came first (the layer then waits for the end of the load), and of another
    loader nothing. So a layer is wrapped once more as the next one of the model is made. report: the model's.
    """
    earlier = _last[report]() if report in _last else None
    _last[report] = weakref.ref(layer)
    if earlier is not None:
        info = get_layerwise_info(earlier)
        if info.can_load() and info.load_numel == 0:
            initialize_online_processing(earlier)
    initialize_online_processing(layer)
