"""Real checkpoints through the command: the export serves what online serving serves, and survives being killed."""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .compare import served_layers, tensors_of, token_ids
from .engine import PATIENCE, end_session, server_environment
from .probe import describe_model, probe
from .test_commands import run
from .test_encoder import encoder  # noqa: F401, a fixture
from .test_smollm2 import PROMPTS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SENTENCES = ["A cat sat on the mat.", "Quarterly earnings rose by four percent.", "Entropy never decreases."]
KILLS = 20
COMMAND = [sys.executable, "-c", "from qwantize_vllm.cli import app; app()", "export"]


def embed(llm: Any, sentences: list[str]) -> dict[str, Any]:
    outputs = llm.embed(sentences, use_tqdm=False)
    return {"embeddings": [output.outputs.embedding for output in outputs], "models": llm.apply_model(describe_model)}


def assert_the_same_codes(a: Any, b: Any, layers: int) -> None:
    assert len(served_layers(a)) == layers
    for layer in served_layers(a) | served_layers(b):
        for name in ("weight", "weight_scale", "weight_global_scale"):
            one, other = (tensors_of(each)[f"{layer}.{name}"] for each in (a, b))
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) if one.dim() else one == other


def test_smollm2(engines, smollm2, tmp_path):
    assert "120 layers quantized" in run(*COMMAND, str(smollm2), "--out", str(tmp_path / "out"))
    use = functools.partial(probe, prompts=PROMPTS, max_tokens=40)
    online, exported = engines.start(smollm2, use), engines.start(tmp_path / "out", use)
    assert_the_same_codes(online, exported, 120)
    assert token_ids(online) == token_ids(exported)
    assert online.result["own_scores"] == exported.result["own_scores"]


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_minilm(engines, encoder, tmp_path, layout):  # noqa: F811
    out = tmp_path / "out"
    run(*COMMAND, encoder, "--out", str(out), "--dtype", "float32", "--format", layout)
    use = functools.partial(embed, sentences=SENTENCES)
    online, exported = (engines.start(path, use, dtype="float32") for path in (Path(encoder), out))
    assert_the_same_codes(online, exported, 4 * 6)
    assert online.result["embeddings"] == exported.result["embeddings"]


def test_the_command_killed_at_any_time(smollm2, tmp_path):
    """Twenty kills between start and end, each run going on from what was left; where one gets to its end, anew.

    What stands at the end is what an uninterrupted run writes.
    """
    options = ["--shard-size", "0.005"]
    began = time.perf_counter()
    run(*COMMAND, str(smollm2), "--out", str(tmp_path / "whole"), *options)
    seconds, chance = time.perf_counter() - began, random.Random(0)
    expected = contents(tmp_path / "whole")
    out, kills, finished = tmp_path / "out", 0, 0
    while kills < KILLS or not finished:
        command = [*COMMAND, str(smollm2), "--out", str(out), *options]
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, env=server_environment(), stdout=null, stderr=null, start_new_session=True)
        try:
            process.wait(chance.uniform(0.3, 1.0) * seconds if kills < KILLS else PATIENCE)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            end_session(process.pid, grace=0)
            kills += 1
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
            finished += 1
        else:
            left = contents(tmp_path / "out.partial") if (tmp_path / "out.partial").exists() else {}
            assert "config.json" not in left or expected.items() <= left.items()
    print(f"{kills} kills, {finished} finished")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
