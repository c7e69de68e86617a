"""No kernel of this package is compiled or loaded while a request waits: vLLM's own monitor of that sees none.

Run with vLLM's CUDA build, each model in a process: pytest -m gpu -n 3 tests/gpu/test_warm_up.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.checkpoints import write_tiny
from tests.e2e.moe_checkpoints import MIXTRAL, QWEN3, write_moe
from tests.e2e.probe import generate
from tests.gpu.engine import NEEDS_VLLM, start
from tests.matmul.forget import own_kernels

LONGEST = 4096
LENGTHS = (1, 2, 3, 5, 9, 17, 40, 70, 130, 270, 600, 1200, 2500, 4000)

pytestmark = [
    pytest.mark.gpu,
    NEEDS_VLLM,
]


def one_by_one(llm: Any) -> list[dict[str, Any]]:
    """Prompts of many lengths, and then all of them together."""
    prompts = [[i % 250 for i in range(length)] for length in LENGTHS]
    return [generate(llm, [prompt], 2)[0] for prompt in prompts] + generate(llm, prompts, 2)


def write_dense(path: Path) -> Path:
    sizes = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "head_dim": 128}
    return write_tiny(path, **sizes, max_position_embeddings=LONGEST)


def write_few_experts(path: Path) -> Path:
    return write_moe(path, {**MIXTRAL, "hidden_size": 512, "max_position_embeddings": LONGEST})


def write_many_experts(path: Path) -> Path:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 4}
    return write_moe(path, {**QWEN3, **sizes, "max_position_embeddings": LONGEST})


@pytest.mark.parametrize("write", [write_dense, write_few_experts, write_many_experts])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_requests_meet_no_new_kernel(tmp_path: Path, write: Callable[[Path], Path], eager: bool) -> None:
    checkpoint = write(tmp_path / "checkpoint")
    arguments = {"enforce_eager": eager, "max_model_len": LONGEST, "max_num_seqs": 16, "enable_prefix_caching": False}
    env = {"TRITON_CACHE_DIR": str(tmp_path / "triton")}
    engine = start(one_by_one, tmp_path / "engine", checkpoint, {}, env=env, **arguments)
    if eager and not engine.lines("Kernel JIT monitor activated"):
        pytest.skip("this vLLM does not watch eager engines")
    assert engine.lines("Kernel JIT monitor activated")
    late = re.findall(r"during inference: (\w+)", engine.log)
    print(f"{write.__name__}: seen late {sorted(set(late))}")
    assert not {kernel.__name__ for kernel in own_kernels()} & set(late)
