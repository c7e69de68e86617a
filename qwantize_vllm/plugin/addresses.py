"""What CUDA graphs hold the addresses of, and vLLM's reload of weights does not look after: it stays where it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.attention import MLAAttention


@contextlib.contextmanager
def same_addresses(*owners: Any) -> Iterator[None]:
    """Tensors of a layer that are neither parameters nor buffers, and those of other objects, stay where they are, with
    what is put in their place inside: CUDA graphs hold their addresses, and vLLM's reload does not look after them.

    Not for tensors of one owner that exchange their memory, nor for such as only inference mode may write.
    """
    before = [
        (owner, name, each) for owner in owners for name, each in vars(owner).items() if isinstance(each, torch.Tensor)
    ]
    yield
    for owner, name, old in before:
        new = vars(owner).get(name)
        if not isinstance(new, torch.Tensor) or new is old:
            continue
        if (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device):
            setattr(owner, name, old.copy_(new))


def keep_latent_projections(layer: torch.nn.Module) -> None:
    """See that a layer of latent attention has at the same addresses, after each load, what it takes `kv_b_proj` apart
    into; nothing for other layers.

    vLLM 0.25 makes new tensors each time. Those of a dense weight are views of it, which a reload writes in place;
    those of a quantized one are dequantized anew.
    """
    if not isinstance(layer, MLAAttention) or "process_weights_after_loading" in vars(layer):
        return  # the latter as vLLM asks more than once for the method of a layer
    process = layer.process_weights_after_loading

    def process_in_place(*args: Any, **kwargs: Any) -> Any:
        with same_addresses(layer):
            return process(*args, **kwargs)

    layer.process_weights_after_loading = process_in_place
