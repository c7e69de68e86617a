"""Sleep mode, which vLLM has on GPUs only: level 1 keeps weights in CPU memory, level 2 forgets them.

Run with vLLM's CUDA build: pytest -m gpu tests/gpu
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.checkpoints import write_tiny
from tests.e2e.engine import run_engine
from tests.e2e.probe import generate
from tests.gpu.engine import NEEDS_VLLM

PROMPTS = [[1, 5, 9, 30], [7], list(range(3, 160))]

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def sleep_and_wake(llm: Any, level: int) -> dict[str, Any]:
    """What the engine says and holds before and after, and by how many bytes its memory shrank meanwhile."""
    result = {"before": state(llm)}
    awake = torch.cuda.mem_get_info()[0]
    llm.sleep(level=level)
    result["freed"] = torch.cuda.mem_get_info()[0] - awake
    if level == 1:
        llm.wake_up()
    else:  # weights are gone, and the KV cache comes last: it leaves room for loading
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()
    result["after"] = state(llm)
    return result


def state(llm: Any) -> dict[str, Any]:
    return {"completions": generate(llm, PROMPTS, 16), "held": llm.apply_model(held)[0]}


def held(model: torch.nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    """Address and value of every parameter of the quantized layers."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight_scale")}
    return {
        f"{name}.{key}": (parameter.data_ptr(), parameter.detach().reshape(-1).view(torch.uint8).cpu().clone())
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters(recurse=False)
    }


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_wakes_up_as_it_was(tmp_path: Path, level: int) -> None:
    """With CUDA graphs, which read the weights where they were when the graphs were captured."""
    checkpoint = write_tiny(tmp_path / "tiny")
    outcome = run_engine(
        functools.partial(sleep_and_wake, level=level),
        tmp_path / "engine",
        model=str(checkpoint),
        quantization="qwantize",
        skip_tokenizer_init=True,
        enable_sleep_mode=True,
        enforce_eager=False,
        gpu_memory_utilization=0.2,
    )
    assert outcome.exit_code == 0, outcome.log[-5000:]
    before, after = outcome.result["before"], outcome.result["after"]
    assert len(before["held"]) >= 8 * 3
    for name, (address, value) in before["held"].items():
        assert after["held"][name][0] == address, name
        torch.testing.assert_close(
            after["held"][name][1], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert after["completions"] == before["completions"]
    assert outcome.result["freed"] > 2**30  # of the KV cache above all
