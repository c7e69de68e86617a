"""`reload_weights`: fresh weights into a running engine, quantized on the way as the first were."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from .checkpoints import quantize_checkpoint, write_tiny
from .compare import assert_serves, tensors_of
from .conftest import TINY_PROMPTS
from .probe import probe

pytestmark = pytest.mark.e2e


def reload_twice(llm: Any, other: str) -> list[dict[str, Any]]:
    """What the engine holds and says at first, after a reload, and after a reload from another checkpoint."""
    states = [state(llm)]
    llm.collective_rpc("reload_weights")
    states.append(state(llm))
    llm.collective_rpc("reload_weights", kwargs={"weights_path": other})
    states.append(state(llm))
    return states


def state(llm: Any) -> dict[str, Any]:
    llm.reset_prefix_cache()
    return {**probe(llm, TINY_PROMPTS), "addresses": llm.apply_model(addresses)[0]}


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def flip(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = tensor.flip(0).contiguous()


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights: its linear layers upside down."""
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "other", flip)


def test_reload(engines, tiny, other):
    """One layer is ignored: vLLM reloads it its own way."""
    ignored = "model.layers.0.self_attn.o_proj"
    overrides = {"quantization_config": {"quant_method": "qwantize", "ignore": [ignored]}}
    outcome = engines.start(tiny, functools.partial(reload_twice, other=str(other)), hf_overrides=overrides)
    first, same, changed = outcome.result
    for states, checkpoint in ((first, tiny), (same, tiny), (changed, other)):
        for layer, q in quantize_checkpoint(checkpoint, skip=[ignored]).items():
            assert_serves(states["models"][0]["tensors"], layer, q)
    assert same["completions"] == first["completions"]
    assert same["own_scores"] == first["own_scores"]
    assert changed["own_scores"] != first["own_scores"]
    # CUDA graphs read the weights where they were when the graphs were captured.
    assert first["addresses"] == same["addresses"] == changed["addresses"]
    summaries = [line.partition("summary: ")[2] for line in outcome.lines("qwantize summary:")]
    assert len(summaries) == 3
    for summary in summaries:
        assert "7 layers quantized" in summary
        assert "3 left (2 embedding or head, 1 ignored)" in summary


def push(llm: Any, folder: str, but: str | None = None) -> None:
    """New bf16 tensors into the running engine, as from a trainer; `but` is left out."""
    tensors = load_file(Path(folder) / "model.safetensors")
    given = [(name, tensor) for name, tensor in tensors.items() if name != but]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": given})


def push_fifty_times(llm: Any, folders: list[str]) -> dict[str, Any]:
    """Weights of one checkpoint and the other in turn. What memory and tensors there are after each time, and at last
    what the engine holds and says."""
    tensors, resident = [], []
    for i in range(50):
        push(llm, folders[i % 2])
        llm.generate({"prompt_token_ids": TINY_PROMPTS[0]}, use_tqdm=False)
        gc.collect()
        tensors.append(sum(each.nbytes for each in gc.get_objects() if isinstance(each, torch.Tensor)))
        resident.append(psutil.Process().memory_info().rss)
    return {**state(llm), "tensors": tensors, "resident": resident}


@pytest.mark.slow
def test_fifty_reloads_keep_nothing(engines, tmp_path):
    """With large layers, so that one of 50 that stayed would show."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    folders = [str(write_tiny(tmp_path / name, change, **sizes)) for name, change in (("a", None), ("b", flip))]
    weights = load_file(Path(folders[1]) / "model.safetensors")
    outcome = engines.start(Path(folders[0]), functools.partial(push_fifty_times, folders=folders))
    tensors, resident = outcome.result["tensors"], outcome.result["resident"]
    assert len(set(tensors[4:])) == 1, tensors
    codes = sum(tensor.nbytes for name, tensor in weights.items() if name.endswith("_proj.weight")) / 4
    assert resident[-1] - resident[9] < 4 * codes, resident  # 40 reloads; each of them makes the codes anew
    for layer, q in quantize_checkpoint(Path(folders[1])).items():
        assert_serves(outcome.result["models"][0]["tensors"], layer, q)


def push_in_flight(llm: Any, folder: str) -> dict[str, Any]:
    """A request that is being answered when new weights come, one that waits, and one that comes after."""
    from vllm import SamplingParams

    engine, ids = llm.llm_engine, {}

    def step() -> None:
        ids.update({output.request_id: list(output.outputs[0].token_ids) for output in engine.step()})

    def ask(name: str, prompt: list[int]) -> None:
        parameters = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, parameters)

    ask("during", TINY_PROMPTS[0])
    for _ in range(10):
        step()
    said = list(ids["during"])
    ask("waiting", TINY_PROMPTS[1])
    push(llm, folder)
    ask("after", TINY_PROMPTS[2])
    while engine.has_unfinished_requests():
        step()
    return {"said": said, "ids": ids, **state(llm)}


def answers(llm: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in TINY_PROMPTS]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return {"ids": [list(output.outputs[0].token_ids) for output in outputs], **state(llm)}


def test_requests_in_flight_are_answered(engines, tiny, other):
    """And what then is served, is what a fresh start with the new weights serves."""
    pushed = engines.start(tiny, functools.partial(push_in_flight, folder=str(other)), dtype="float32")
    fresh, old = (engines.start(each, answers, dtype="float32") for each in (other, tiny))
    ids, said = pushed.result["ids"], pushed.result["said"]
    assert 5 <= len(said) < 30
    assert ids["during"][: len(said)] == said == old.result["ids"][0][: len(said)]
    assert len(ids["during"]) == 30
    assert ids["waiting"] == fresh.result["ids"][1]
    assert ids["after"] == fresh.result["ids"][2]
    assert pushed.result["own_scores"] == fresh.result["own_scores"]
    assert tensors_of(pushed).keys() == tensors_of(fresh).keys()
    for name, tensor in tensors_of(fresh).items():
        if name.endswith((".weight", "_scale")):
            ours, theirs = (each.reshape(-1).view(torch.uint8) for each in (tensor, tensors_of(pushed)[name]))
            assert torch.equal(ours, theirs), name


def test_a_part_of_a_fused_layer_is_refused(engines, tiny):
    """The rest of it would be whatever lies in memory."""
    left_out = "model.layers.1.self_attn.k_proj.weight"
    log = engines.refuse(tiny, functools.partial(push, folder=str(tiny), but=left_out))
    assert "qwantize: model.layers.1.self_attn.qkv_proj: 24576 of 32768 elements of its weight were given" in log
