"""Layers are processed as soon as all of their weights have arrived: how vLLM is made to see to it."""

from __future__ import annotations

import weakref

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info, initialize_online_processing

_last: weakref.ref[torch.nn.Module] | None = None  # made in this process


def wrap_loaders(layer: torch.nn.Module) -> None:
    """Have vLLM keep what arrives for a layer just made, and process the layer once that is all of it.

    Its constructor goes on: it adds a bias, and some models give the weight another loader. vLLM would see a bias once
    a weight arrives, too late where the bias came first (the layer then waits for the end of the load), and of another
    loader nothing. So a layer is wrapped once more as the next one is made.
    """
    global _last
    earlier, _last = _last and _last(), weakref.ref(layer)
    if earlier is not None:
        info = get_layerwise_info(earlier)
        if info.can_load() and info.load_numel == 0:  # not one that has been loaded, of a model before
            initialize_online_processing(earlier)
    initialize_online_processing(layer)
