"""Two GPUs hold together what one does, to the last bit, and say the same but for the rounding of bfloat16.

Run with vLLM's CUDA build on two GPUs; -s shows how far they are apart: pytest -m gpu -s tests/gpu/test_two_gpus.py
"""

from __future__ import annotations

import functools
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("vllm")

from tests.e2e.checkpoints import write_byte_tokenizer, write_tiny
from tests.e2e.compare import sequences_of, tensors_of, token_ids
from tests.e2e.conftest import TINY_PROMPTS
from tests.e2e.engine import PATIENCE, Outcome, run_engine
from tests.e2e.moe_checkpoints import QWEN3, mixture_layers, write_moe
from tests.e2e.probe import generate, score
from tests.e2e.test_moe import assert_ranks_hold_experts
from tests.e2e.test_serve import Server, serve
from tests.e2e.test_tensor_parallel import MEMBERS, assert_ranks_hold

from .plain import plain_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MEMBERS_8B = {"qkv_proj": [4096, 1024, 1024], "gate_up_proj": [14336, 14336], "o_proj": [4096], "down_proj": [4096]}
# A layer of Qwen3-30B-A3B.
QWEN3_30B = {
    **QWEN3,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 1,
}
MIXTURES = {"tiny": QWEN3, "qwen3-30b-a3b": QWEN3_30B}


def ask(llm: Any, sequences: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """As `probe`, of tensors in plain layouts."""
    completions = generate(llm, TINY_PROMPTS, 32)
    own = [each["prompt_ids"] + each["ids"] for each in completions]
    return {
        "completions": completions,
        "scores": score(llm, [list(sequence) for sequence in sequences]) if sequences else [],
        "own_scores": score(llm, own),
        "models": [torch.load(io.BytesIO(saved)) for saved in llm.apply_model(saved_tensors)],
    }


def saved_tensors(model: torch.nn.Module) -> bytes:
    """`plain_tensors` in a form that vLLM can bring from another process: pickle does not take float8."""
    file = io.BytesIO()
    torch.save(plain_tensors(model), file)
    return file.getvalue()


def start(checkpoint: Path, folder: Path, use: Any, **arguments: Any) -> Outcome:
    outcome = run_engine(
        use,
        folder,
        model=str(checkpoint),
        quantization="qwantize",
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=2**30,  # given, so that tests side by side do not disturb each other's profile
        **arguments,
    )
    assert outcome.exit_code == 0, outcome.log[-8000:]
    return outcome


def one_and_two(checkpoint: Path, folder: Path, **arguments: Any) -> tuple[Outcome, Outcome]:
    """An engine on one GPU and one on two, which also scores what the first said."""
    parallel = {key: arguments.pop(key) for key in ("enable_expert_parallel",) if key in arguments}
    one = start(checkpoint, folder / "one", ask, **arguments)
    use = functools.partial(ask, sequences=sequences_of(one))
    two = start(checkpoint, folder / "two", use, **arguments, **parallel, tensor_parallel_size=2)
    return one, two


def assert_close(name: str, one: Outcome, two: Outcome) -> None:
    """Log-probabilities of the same tokens differ by what the order of sums does in bfloat16."""
    pairs = zip(one.result["own_scores"], two.result["scores"], strict=True)
    apart = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
    same = [a == b for x, y in zip(token_ids(one), token_ids(two), strict=True) for a, b in zip(x, y, strict=True)]
    print(
        f"\n{name}: greedy tokens alike {sum(same)} of {len(same)}; log-probabilities of {len(apart)} tokens apart by "
        f"{statistics.median(apart):.4f} (median), {max(apart):.4f} (largest)"
    )
    assert statistics.median(apart) < 0.05


@pytest.mark.parametrize(
    ("sizes", "members", "eager"),
    [({}, MEMBERS, False), (LLAMA_8B, MEMBERS_8B, True)],
    ids=["tiny, with CUDA graphs", "llama-3-8b"],
)
def test_two_gpus_hold_the_codes_of_one(
    tmp_path: Path, sizes: dict[str, int], members: dict[str, list[int]], eager: bool
) -> None:
    checkpoint = write_tiny(tmp_path / "checkpoint", **sizes)
    one, two = one_and_two(checkpoint, tmp_path, enforce_eager=eager)
    ranks = [tensors_of(two, rank) for rank in range(2)]
    layers = {name.removesuffix(".weight") for name in tensors_of(one) if name.endswith(".weight")}
    assert len(layers) == 8
    for layer in layers:
        assert_ranks_hold(layer, tensors_of(one), ranks, members)
    assert_close(f"dense, {sizes.get('hidden_size', 'tiny')}", one, two)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor parallel", "expert parallel"])
@pytest.mark.parametrize("size", MIXTURES)
def test_two_gpus_hold_the_experts_of_one(tmp_path: Path, size: str, expert_parallel: bool) -> None:
    config = MIXTURES[size]
    checkpoint = write_moe(tmp_path / "checkpoint", config)
    one, two = one_and_two(checkpoint, tmp_path, enable_expert_parallel=expert_parallel)
    ranks = [tensors_of(two, rank) for rank in range(2)]
    for mixture in mixture_layers(config):
        assert_ranks_hold_experts(mixture, tensors_of(one), ranks, expert_parallel)
    assert_close(f"experts of {size}, {'expert' if expert_parallel else 'tensor'} parallel", one, two)


def test_experts_are_moved_between_gpus_as_they_are(tmp_path: Path) -> None:
    """Load balancing, with two experts held twice: while requests are answered vLLM moves codes and scales about."""
    checkpoint = write_moe(tmp_path / "checkpoint", QWEN3)
    balancing = {"window_size": 8, "step_interval": 16, "num_redundant_experts": 2, "use_async": False}
    one = start(checkpoint, tmp_path / "one", ask)
    two = start(
        checkpoint,
        tmp_path / "two",
        functools.partial(ask, sequences=sequences_of(one)),
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=True,
        eplb_config=balancing,
    )
    assert two.lines("earranged experts") or two.lines("Rearranging experts"), two.log[-3000:]
    for mixture in mixture_layers(QWEN3):
        at = f"{mixture}.experts.routed_experts"
        whole = experts_in(tensors_of(one), at)
        held = [experts_in(tensors_of(two, rank), at) for rank in range(2)]
        assert [len(each) for each in held] == [3, 3]  # of 4 and 2 more
        assert {*held[0], *held[1]} == set(whole)
    assert_close("experts, balanced", one, two)


def prompt_scores(server: Server) -> list[list[float]]:
    """Log-probabilities of a prompt's tokens, in each of six answers."""
    ask = {
        "model": "tiny",
        "prompt": list(range(3, 100)),
        "max_tokens": 1,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        choices = [client.post("/v1/completions", json=ask).json()["choices"][0] for _ in range(6)]
    return [choice["logprobs"]["token_logprobs"][1:97] for choice in choices]


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor parallel", "expert parallel"])
def test_engines_side_by_side_share_their_experts(tmp_path: Path, expert_parallel: bool) -> None:
    """Data parallelism: attention is there twice, each expert or half of it once."""
    checkpoint = write_moe(tmp_path / "checkpoint", QWEN3)
    write_byte_tokenizer(checkpoint)
    options = ["--served-model-name", "tiny", "--max-model-len", "128", "--gpu-memory-utilization", "0.3"]
    two = ["--data-parallel-size", "2", *(["--enable-expert-parallel"] if expert_parallel else [])]
    scores = []
    for name, more in (("one", []), ("two", two)):
        (tmp_path / name).mkdir()
        with serve(tmp_path / name, checkpoint, *options, *more) as server:
            server.wait_until_healthy()
            scores.append(prompt_scores(server))
            assert server.engines_that_answered() == len(server.lines("qwantize summary: ")) == (2 if more else 1)
    apart = [abs(a - b) for answer in scores[1] for a, b in zip(answer, scores[0][0], strict=True)]
    print(f"\n{len(apart)} log-probabilities, apart by {statistics.median(apart):.4f}, at most by {max(apart):.4f}")
    assert statistics.median(apart) < 0.05


def experts_in(tensors: dict[str, torch.Tensor], at: str) -> list[bytes]:
    """All that is held of each expert of a layer."""
    names = [f"{at}.{weight}_weight{part}" for weight in ("w13", "w2") for part in ("", "_scale", "_global_scale")]
    bytes_ = [tensors[name].reshape(len(tensors[name]), -1).view(torch.uint8) for name in names]
    return [b"".join(each[i].numpy().tobytes() for each in bytes_) for i in range(len(bytes_[0]))]
