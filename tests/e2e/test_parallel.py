"""Pipelines and data parallelism, and shards that blocks do not divide. Codes under tensor parallelism: see
test_tensor_parallel.py."""

from __future__ import annotations

import functools
import os
import shutil

import httpx
import pytest
import torch

from .checkpoints import quantize_checkpoint, write_byte_tokenizer, write_tiny
from .compare import (
    assert_agree,
    assert_scores_agree,
    assert_serves,
    sequences_of,
    served_layers,
    tensors_of,
    token_ids,
)
from .conftest import TINY_PROMPTS
from .engine import PATIENCE
from .probe import probe
from .test_serve import serve

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores"),
]

TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_stages_of_a_pipeline_hold_their_layers_and_say_together_what_one_does(engines, tiny, tmp_path):
    """Compiled: an eager pipeline of vllm-cpu 0.32.0, quantized or not, fails at its first token, for want of a warm-up
    (`assert self.intermediate_tensors is not None`)."""
    one = engines.start(tiny, dtype="float32")
    use = functools.partial(probe, prompts=TINY_PROMPTS, sequences=sequences_of(one))
    env = {**TWO_PROCESSES, "VLLM_CACHE_ROOT": str(tmp_path)}
    two = engines.start(tiny, use, dtype="float32", pipeline_parallel_size=2, enforce_eager=False, env=env)
    for layer, q in quantize_checkpoint(tiny, torch.float32).items():
        rank = int(layer.split(".")[2])  # the first layer is on the first rank, the second on the second
        assert_serves(tensors_of(two, rank), layer, q)
        assert f"{layer}.weight" not in tensors_of(two, 1 - rank)
    summaries = two.lines("qwantize summary: 4 layers quantized")
    assert len(summaries) == 2
    assert token_ids(two) == token_ids(one)
    assert_scores_agree(one.result["own_scores"], two.result["scores"], 1e-4)


def test_a_shard_that_blocks_do_not_divide_is_left_on_every_rank(engines, tmp_path):
    """Blocks divide 240, but not the 120 of each of two ranks: one rank alone quantizes the layer."""
    checkpoint = write_tiny(tmp_path / "checkpoint", intermediate_size=240)
    odd = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert odd < served_layers(engines.start(checkpoint))

    two = engines.start(checkpoint, dtype="float32", tensor_parallel_size=2, env=TWO_PROCESSES)
    for rank in range(2):
        held = tensors_of(two, rank)
        quantized = {name.removesuffix(".weight_scale") for name in held if name.endswith(".weight_scale")}
        assert quantized == set(quantize_checkpoint(checkpoint, skip=odd))
    for layer in odd:
        lines = two.lines(f"qwantize: {layer} is left unquantized: K=120 is not a multiple of block_size 16")
        assert len(lines) == 2  # one for each rank
    quantized = quantize_checkpoint(checkpoint, torch.float32, skip=odd)
    assert_agree(two, engines.start_dequantized(checkpoint, quantized, two, "float32"), 1e-3)


@pytest.mark.slow
def test_engines_side_by_side_answer_alike(tmp_path):
    """Data parallelism behind one server: every engine quantizes for itself, to the same codes."""
    checkpoint = write_tiny(tmp_path / "checkpoint")
    write_byte_tokenizer(checkpoint)
    options = ["--data-parallel-size", "2", "--max-model-len", "128", "--dtype", "float32"]
    with serve(tmp_path, checkpoint, *options, "--served-model-name", "tiny", env=TWO_PROCESSES) as server:
        server.wait_until_healthy()
        ask = {"model": "tiny", "prompt": "Side by side", "max_tokens": 16, "temperature": 0}
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            answers = [client.post("/v1/completions", json=ask).json()["choices"][0]["text"] for _ in range(6)]
        assert len(set(answers)) == 1
        assert server.engines_that_answered() == 2
        assert len(server.lines("qwantize summary: 8 layers quantized")) == 2
