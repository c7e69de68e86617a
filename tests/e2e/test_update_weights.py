"""`update_weights`, vLLM's interface for trainers: weights that come in chunks, whichever way they come.

Its own ways (NCCL, CUDA IPC) need GPUs. The one here reads files, and is theirs in all else: what happens at the start
of an update, at each chunk and at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .checkpoints import quantize_checkpoint, write_tiny
from .compare import assert_serves
from .moe_checkpoints import QWEN3, mixture_layers, stacked, write_moe
from .test_moe import ARGUMENTS, assert_serves_experts
from .test_reload import flip, state

pytestmark = pytest.mark.e2e


def register() -> None:
    """In the engine's process: the backend "files"."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    @dataclasses.dataclass
    class Nothing(WeightTransferInitInfo):
        pass

    @dataclasses.dataclass
    class Chunk(WeightTransferUpdateInfo):
        file: str
        names: list[str]
        poison: str | None = None  # this one has a NaN
        breaks_off: bool = False  # when these have come

    class FilesEngine(NCCLWeightTransferEngine):
        init_info_cls, update_info_cls = Nothing, Chunk

        def init_transfer_engine(self, init_info: Nothing) -> None:
            """Nobody to meet."""

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))  # and no GPU to wait for

        def receive_weights(self, update_info: Chunk) -> None:
            tensors = load_file(update_info.file)
            if update_info.poison:
                tensors[update_info.poison][3, 5] = torch.nan
            self.model.load_weights((name, tensors[name]) for name in update_info.names)
            if update_info.breaks_off:
                raise ConnectionError("the trainer has gone")

    WeightTransferEngineFactory.register_engine("files", FilesEngine)


def update(llm: Any, folder: str, chunks: list[list[str]], **how: Any) -> None:
    llm.start_weight_update()
    for names in chunks:
        llm.update_weights({"update_info": {"file": f"{folder}/model.safetensors", "names": names, **how}})
    llm.finish_weight_update()


def in_chunks(folder: Path | str, size: int) -> list[list[str]]:
    """All names, so many at a time, in an order that tears layers apart."""
    names = sorted(load_file(Path(folder) / "model.safetensors"), key=lambda name: name[::-1])
    return [names[start : start + size] for start in range(0, len(names), size)]


def update_twice(llm: Any, folders: list[str]) -> list[dict[str, Any]]:
    llm.init_weight_transfer_engine({"init_info": {}})
    states = [state(llm)]
    for folder in folders:
        update(llm, folder, in_chunks(folder, 3))
        states.append(state(llm))
    return states


FILES = {"weight_transfer_config": {"backend": "files"}, "before": register}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "other", flip)


@pytest.fixture(scope="module")
def fresh(engines, other) -> dict[str, Any]:
    """What an engine says that was started with the other weights."""
    return engines.start(other, state, dtype="float32").result


def test_what_is_served_is_what_a_fresh_start_serves(engines, tiny, other, fresh):
    use = functools.partial(update_twice, folders=[str(other), str(tiny)])
    first, changed, back = engines.start(tiny, use, dtype="float32", **FILES).result
    for states, checkpoint in ((first, tiny), (changed, other), (back, tiny)):
        for layer, q in quantize_checkpoint(checkpoint, torch.float32).items():
            assert_serves(states["models"][0]["tensors"], layer, q)
    assert changed["own_scores"] == fresh["own_scores"] != first["own_scores"]
    assert back["own_scores"] == first["own_scores"]
    assert first["addresses"] == changed["addresses"] == back["addresses"]


@pytest.mark.slow
def test_experts_are_updated_too(engines, tmp_path):
    checkpoints = [write_moe(tmp_path / str(seed), QWEN3, seed) for seed in range(2)]
    use = functools.partial(update_twice, folders=[str(checkpoints[1])])
    first, changed = engines.start(checkpoints[0], use, **ARGUMENTS, **FILES).result
    for states, checkpoint in zip((first, changed), checkpoints, strict=True):
        expected = quantize_checkpoint(checkpoint, torch.float32)
        for mixture in mixture_layers(QWEN3):
            assert_serves_experts(states["models"][0]["tensors"], mixture, stacked(QWEN3, expected, mixture))
    assert first["addresses"] == changed["addresses"]


def refuse_and_go_on(llm: Any, bad: list[dict[str, Any]], other: str) -> dict[str, Any]:
    """What is said of each of some updates that fail, and served after it; at last one that is taken."""
    llm.init_weight_transfer_engine({"init_info": {}})
    names = [name for chunk in in_chunks(other, 1) for name in chunk]
    messages, states = [], []
    for each in bad:
        without = each.pop("without", ())
        given = [name for name in names if name not in without]
        with pytest.raises((ValueError, ConnectionError)) as error:
            update(llm, other, [given[: len(given) // 2] if "breaks_off" in each else given], **each)
        messages.append(str(error.value))
        with contextlib.suppress(RuntimeError):  # vLLM takes one that failed at its end for one that goes on
            llm.finish_weight_update()
        if "breaks_off" not in each:
            states.append(state(llm))
    update(llm, other, [names])
    return {"messages": messages, "states": states, **state(llm)}


def test_after_an_update_that_failed_the_model_answers_and_takes_the_next_one(engines, tiny, other, fresh):
    layer = "model.layers.1.self_attn"
    k, v = (f"{layer}.{name}_proj.weight" for name in "kv")
    bad = [{"without": [k]}, {"poison": v}, {"breaks_off": True}, {}]
    use = functools.partial(refuse_and_go_on, bad=bad, other=str(other))
    result = engines.start(tiny, use, dtype="float32", **FILES).result
    missing, poisoned, gone, twice = result["messages"]
    assert f"qwantize: {layer}.qkv_proj: 24576 of 32768 elements of its weight were given" in missing
    assert f"qwantize: {layer}.qkv_proj: weight (256, 128) holds 1 NaN" in poisoned
    assert gone == "the trainer has gone"
    # The parts that it had brought are not taken for those of the one after it.
    assert ".mlp.gate_up_proj: of its weights weight 0 " in twice
    assert "was given more than once, by this update or by one before it that broke off" in twice
    old = quantize_checkpoint(tiny, torch.float32)[f"{layer}.qkv_proj"]
    assert len(result["states"]) == 3
    for states in result["states"]:
        assert_serves(states["models"][0]["tensors"], f"{layer}.qkv_proj", old)
    assert result["own_scores"] == fresh["own_scores"]
    for name, q in quantize_checkpoint(other, torch.float32).items():
        assert_serves(result["models"][0]["tensors"], name, q)


def test_updates_of_single_elements_are_refused_at_the_start(engines, tiny):
    log = engines.refuse(tiny, weight_transfer_config={"backend": "sparse_nccl"})
    assert "quantized layers do not keep those: use a backend that sends whole weights, 'nccl' or 'ipc'" in log
