"""Checkpoints of random weights in the shape of a model that exists, for what depends on sizes alone: made fast, and of
any number of layers. The same seed gives the same weights, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwantize_vllm.plugin.throughput import SHAPES

# Drawn once, and cut into weights: drawing each of 8 billion takes a CPU minutes.
_DRAWN = 2**26
_SHARD_BYTES = 2**30
_INDEX = "model.safetensors.index.json"
# Larger than usual, so that the next token depends visibly on every weight.
_EMBEDDING_SCALE = 4.0


def llama_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """The config of a shape of `qwantize bench serve`, of a Llama, with fewer layers if so asked.

    Raises:
        ValueError: there is no such Llama.
    """
    llamas = [name for name, config in SHAPES.items() if config["model_type"] == "llama"]
    if shape not in llamas:
        raise ValueError(f"shape must be one of {llamas}, got {shape!r}")
    config = SHAPES[shape]
    return config if layers is None else config | {"num_hidden_layers": layers}


def weights(config: dict[str, Any], seed: int = 0, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """(name in a checkpoint, bf16 tensor) of a Llama, layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_DRAWN, generator=generator, device="cpu").bfloat16().to(device)
    start = 0
    for name, shape in _shapes(config):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
            continue
        scale = (_EMBEDDING_SCALE if "layers" not in name else 1.0) / math.sqrt(shape[1])
        # Prime, so that no two weights are alike.
        start = (start + 7_368_787) % _DRAWN
        yield name, _cut(drawn, start, math.prod(shape)).view(shape).mul_(scale)


def _cut(drawn: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """A copy of `count` of the numbers from `start` on, from the beginning again where they end."""
    out, filled = torch.empty(count, dtype=drawn.dtype, device=drawn.device), 0
    while filled < count:
        part = drawn[start : start + count - filled]
        out[filled : filled + len(part)] = part
        filled, start = filled + len(part), 0
    return out


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, shape in {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
        }.items():
            yield f"{at}.self_attn.{name}_proj.weight", shape
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            yield f"{at}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_checkpoint(path: Path, config: dict[str, Any], seed: int = 0) -> int:
    """Write one, without a tokenizer, in files of about 1 GiB, into a new folder; returns the bytes of its weights.

    The folder gets its name when all is in it: one of that name is never a part of a checkpoint.

    Raises:
        FileExistsError: there is something of that name.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    try:
        total = _write_files(unfinished, config, seed)
    except BaseException:  # gigabytes, where the disk may be full
        shutil.rmtree(unfinished)
        raise
    unfinished.rename(path)
    return total


def is_written(path: Path, config: dict[str, Any]) -> bool:
    """Whether a checkpoint of this config is there.

    Raises:
        FileExistsError: something else has that name.
    """
    if not path.exists():
        return False
    with contextlib.suppress(OSError, ValueError, KeyError):
        places = json.loads((path / _INDEX).read_text())["weight_map"]
        whole = all((path / name).is_file() for name in places.values())
        if whole and json.loads((path / "config.json").read_text()) == config:
            return True
    raise FileExistsError(f"{path} is there, and is no checkpoint of the model asked for: remove it")


def _write_files(path: Path, config: dict[str, Any], seed: int) -> int:
    (path / "config.json").write_text(json.dumps(config))
    total = 0
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    number = 1
    for name, tensor in weights(config, seed):
        if shard and _bytes(shard) + tensor.nbytes > _SHARD_BYTES:
            _write_shard(path, number, shard)
            shard, number = {}, number + 1
        shard[name], places[name] = tensor, _shard_name(number)
        total += tensor.nbytes
    _write_shard(path, number, shard)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / _INDEX).write_text(json.dumps(index))
    return total


def _write_shard(path: Path, number: int, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / _shard_name(number), metadata={"format": "pt"})


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _shard_name(number: int) -> str:
    return f"model-{number:05}.safetensors"
