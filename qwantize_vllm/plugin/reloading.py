"""Weights that must not be taken: they are refused, and what they have not reached stays as it was.

While weights arrive, vLLM has the layers that it waits for on the meta device, and puts their tensors back when all is
done. What breaks off on the way would leave them there, and the parts that it brought would be taken for those of the
next update.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload import layerwise

# By which loaders are told which part of a parameter they get; DBRX's by the name alone.
_PARTS = ("loaded_shard_id", "shard_id", "expert_id", "weight_name")


def check_arrived(layer: torch.nn.Module, name: str, numel: int, members: str) -> None:
    """See that every element of a layer's weights was given, once.

    A checkpoint, or an update from a trainer, may have some members of a fused layer, or some experts, and lack others.
    A checkpoint may lack all of a layer, for which vLLM then has memory that nobody has written. (Of an update that has
    nothing for a layer vLLM keeps the old weights, and does not ask.) What came of an update that broke off elsewhere
    is still there when the next one comes: in the same order, it brings some of it a second time before the layer is
    full. Biases are not looked at.

    Args:
        numel: how many elements the weights have on this rank. members: what they are made of, for the message.

    Raises:
        ValueError: some are missing, or came twice.
    """
    info = layerwise.get_layerwise_info(layer)
    if info.load_numel == 0 < numel and _reads_checkpoint():
        raise ValueError(
            f"qwantize: {name}: the checkpoint has no weight for it, or the model or load_format takes it another way "
            f"than by the weight's loader; give {members} (on this rank), or, if the model does without, name the "
            "layer in the setting ignore"
        )
    if 0 < info.load_numel < numel:
        raise ValueError(
            f"qwantize: {name}: {info.load_numel} of {numel} elements of its weight were given; "
            f"give all of {members} (on this rank)"
        )
    parts = Counter(
        (parameter, *(given.arguments.get(key) for key in _PARTS)) for parameter, given in info.loaded_weights
    )
    if twice := [part for part, count in parts.items() if count > 1]:
        which = ", ".join(" ".join(str(each) for each in part if each is not None) for part in twice)
        raise ValueError(
            f"qwantize: {name}: of its weights {which} was given more than once, by this update or by one before it "
            "that broke off; give each once, again from the first"
        )


def check_bias_arrived(layer: torch.nn.Module, name: str, members: int) -> None:
    """See that an update has the layer's bias, where the old one does not stay: vLLM before 0.27 would serve memory
    that nobody has written.

    Args:
        members: parts of which the bias may consist.

    Raises:
        ValueError: some parts are missing.
    """
    info = layerwise.get_layerwise_info(layer)
    if not is_update(layer) or "bias" not in info.restore_metadata[0]:  # from 0.27 on it is not
        return
    given = [call.arguments.get("loaded_shard_id") for parameter, call in info.loaded_weights if parameter == "bias"]
    parts = sum(members if part is None else len(part) if isinstance(part, tuple) else 1 for part in given)
    if parts < members:
        raise ValueError(
            f"qwantize: {name}: {parts} of {members} parts of its bias were given; with this version of vLLM an update "
            "must have it, with the weight"
        )


def is_update(layer: torch.nn.Module) -> bool:
    """Whether what has arrived is an update of weights that the layer had before."""
    return layerwise.get_layerwise_info(layer).kernel_tensors is not None


def _reads_checkpoint() -> bool:
    """Whether weights come from files, those of a draft model too, which may have a load_format of its own; with
    `dummy` vLLM writes random ones into layers itself."""
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    draft = getattr(config.speculative_config, "draft_load_config", None)
    return all(each.load_format != "dummy" for each in (config.load_config, draft) if each is not None)


def check_not_moved(runner: Any, name: str, physical: int, logical: int) -> None:
    """See that experts are still where they were at the start: it is there that vLLM puts the weights of an update.

    Args:
        runner: vLLM's MoERunner of the layer; None where there is none yet.
        physical, logical: how many places for experts all ranks have, and how many experts.

    Raises:
        ValueError: load balancing (EPLB) has moved some of them.
    """
    state = getattr(runner, "eplb_state", None)
    if state is None or state.logical_to_physical_map is None:  # without load balancing, or while the model is built
        return
    now = [sorted(place for place in places if place >= 0) for places in state.logical_to_physical_map.tolist()]
    if moved := sum(places != list(range(expert, physical, logical)) for expert, places in enumerate(now)):
        raise ValueError(
            f"qwantize: {name}: load balancing (EPLB) has moved {moved} of {logical} experts since the start, and vLLM "
            "loads weights into the places that they had then: restart the server with the new weights, or serve "
            "without --enable-eplb if weights are to be updated"
        )


@contextlib.contextmanager
def old_weights_on_error() -> Iterator[None]:
    """What fails inside ends the update: the layers that it has not reached get their old weights back."""
    try:
        yield
    except BaseException:
        for layer, info in list(layerwise.LAYERWISE_INFO.items()):
            if info.can_load() and info.kernel_tensors is not None:  # not at a start, where there are none
                layerwise._place_kernel_tensors(layer, info)
                info.reset()
        layerwise.LOADING_LAYERS.clear()
        raise
