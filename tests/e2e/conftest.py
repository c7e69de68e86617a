"""Engines and checkpoints that the end-to-end tests share."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwantize_vllm import Nvfp4Tensor

from .checkpoints import write_dequantized, write_tiny
from .compare import sequences_of
from .engine import Outcome, run_engine
from .probe import probe

ROOT = Path(__file__).resolve().parents[2]
# Token ids of the tiny models, which have no tokenizer: one short, one long, one that spans several KV blocks.
TINY_PROMPTS = ([1, 5, 9, 30], [7], list(range(3, 160)))


class Engines:
    """Starts engines, one after another, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folders = (folder / str(number) for number in itertools.count())

    def run(self, checkpoint: Path, use: Any = None, env: Mapping[str, str] | None = None, **arguments: Any) -> Outcome:
        """Start one and let `use` ask it (default: `probe` with the tiny prompts); it may fail."""
        has_tokenizer = (checkpoint / "tokenizer.json").exists()
        arguments = {"quantization": "qwantize", "skip_tokenizer_init": not has_tokenizer, **arguments}
        use = use or functools.partial(probe, prompts=TINY_PROMPTS)
        outcome = run_engine(use, next(self._folders), env, model=str(checkpoint), **arguments)
        assert not outcome.survivors
        return outcome

    def start(self, checkpoint: Path, *args: Any, **arguments: Any) -> Outcome:
        """As `run`, for one that must succeed."""
        outcome = self.run(checkpoint, *args, **arguments)
        assert outcome.exit_code == 0, outcome.log[-5000:]
        return outcome

    def start_dequantized(
        self,
        checkpoint: Path,
        quantized: Mapping[str, Nvfp4Tensor],
        ours: Outcome,
        dtype: str = "bfloat16",
        **arguments: Any,
    ) -> Outcome:
        """Plain vLLM on what the quantized weights stand for; it also scores the sequences of `ours`."""
        dense = write_dequantized(checkpoint, quantized, next(self._folders), getattr(torch, dtype))
        prompts = [completion["prompt_ids"] for completion in ours.result["completions"]]
        tokens = len(ours.result["completions"][0]["ids"])
        use = functools.partial(probe, prompts=prompts, sequences=sequences_of(ours), max_tokens=tokens)
        return self.start(dense, use, quantization=None, dtype=dtype, **arguments)

    def refuse(self, checkpoint: Path, *args: Any, **arguments: Any) -> str:
        """As `run`, for one that must fail; returns its log."""
        outcome = self.run(checkpoint, *args, **arguments)
        assert outcome.exit_code != 0
        assert outcome.result is None
        return outcome.log


@pytest.fixture(scope="session", autouse=True)
def _vllm_for_cpu() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    if torch.cuda.is_available():
        pytest.skip("these tests are written for vLLM's CPU build")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama of random weights."""
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def tiny_engine(engines: Engines, tiny: Path) -> Outcome:
    """What `probe` says of the tiny model, quantized with no settings given."""
    return engines.start(tiny)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 3 NaN and 2 infinite elements in a member of layer 1's gate_up_proj."""

    def break_weight(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.1.mlp.up_proj.weight"]
        weight[7, 3:6] = torch.nan
        weight[100, 20], weight[101, 21] = torch.inf, -torch.inf

    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "broken", break_weight)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, real weights; QWANTIZE_TEST_CHECKPOINT names a copy that is already there."""
    if given := os.environ.get("QWANTIZE_TEST_CHECKPOINT"):
        return Path(given)
    spec = importlib.util.spec_from_file_location("smollm2_checkpoint", ROOT / "scripts" / "smollm2_checkpoint.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.make_checkpoint(script.DEFAULT)
