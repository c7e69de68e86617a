"""Checkpoints for the tests: tiny ones of random weights, and what their quantization should be."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from qwantize_vllm import Nvfp4Tensor, block_hessian, quantize_nvfp4

TINY_LAYERS = 2
# vLLM fuses these, in this order, into one weight with one global scale.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),  # of an expert of Mixtral
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),  # of DeepSeek, where queries are compressed
}
_MEMBER_OF = {member: fused for fused, members in FUSED.items() for member in members}

_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": TINY_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}  # has biases on q, k and v


def write_tiny(path: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None, **config: Any) -> Path:
    """A random-weight checkpoint of a few hundred kilobytes, without a tokenizer.

    change: gets the weights by name before they are written, and edits them in place.
    """
    config = {**_TINY, **config}
    tensors = _random_weights(config)
    if change is not None:
        change(tensors)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_byte_tokenizer(path: Path) -> None:
    """For a checkpoint of `write_tiny`, whose vocabulary it fills: every byte is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _random_weights(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale / math.sqrt(shape[-1])).bfloat16()

    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    attention, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    # Embeddings and a head four times as large as usual make the next token depend visibly on every weight.
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=4.0)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, scale=4.0)
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in [("q", attention), ("k", keys), ("v", keys)]:
            tensors[f"{at}.self_attn.{name}_proj.weight"] = normal(rows, hidden)
            if config["model_type"] == "qwen2":
                tensors[f"{at}.self_attn.{name}_proj.bias"] = normal(rows, scale=math.sqrt(rows))
        tensors[f"{at}.self_attn.o_proj.weight"] = normal(hidden, attention)
        tensors[f"{at}.mlp.gate_proj.weight"] = normal(inner, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = normal(inner, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = normal(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(hidden).bfloat16()
    return tensors


def linear_layers(tensors: Iterable[str], fuse: bool = True) -> dict[str, list[str]]:
    """vLLM's linear layers, each with the checkpoint's layers that it is made of, in order.

    fuse: False gives the checkpoint's own layers, each made of itself.
    """
    layers: dict[str, list[str]] = {}
    names = set(tensors)
    for tensor in tensors:
        match = re.fullmatch(r"(.+)\.(\w+_proj\w*|w[123])\.weight", tensor)
        if match:
            parent, name = match.groups()
            fused = _MEMBER_OF.get(name, name) if fuse else name
            if not all(f"{parent}.{member}.weight" in names for member in FUSED.get(fused, ())):
                fused = name  # q_proj stands alone where attention is latent
            layers[f"{parent}.{fused}"] = [f"{parent}.{member}" for member in FUSED.get(fused, (fused,))]
    return layers


def quantize_checkpoint(
    checkpoint: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    hessians: Mapping[str, torch.Tensor] | None = None,
    skip: Collection[str] = (),
    fuse: bool = True,
    **search: Any,
) -> dict[str, Nvfp4Tensor]:
    """What an engine of that dtype should hold, by the name of vLLM's layer (or of the checkpoint's: fuse=False).

    hessians: by the same names; skip: layers left out; search: arguments of `quantize_nvfp4`.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    quantized = {}
    for layer, members in linear_layers(tensors, fuse).items():
        if layer in skip:
            continue
        weight = torch.cat([tensors[f"{member}.weight"] for member in members]).to(dtype)
        with _one_thread():
            quantized[layer] = quantize_nvfp4(weight, hessian=hessians[layer] if hessians else None, **search)
    return quantized


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Where others use the cores too, threads that spin while they wait for each other take many times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def random_hessians(checkpoint: Path, full: bool = False) -> dict[str, torch.Tensor]:
    """Hessians, or their blocks, by the name of vLLM's layer, of random inputs whose elements depend on each other."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(checkpoint / "model.safetensors")
    hessians = {}
    for layer, members in linear_layers(tensors).items():
        k = tensors[f"{members[0]}.weight"].shape[1]
        mix = torch.randn(k, k, generator=generator)
        x = torch.randn(64, k, generator=generator) @ mix
        hessians[layer] = x.T @ x if full else block_hessian(x)
    return hessians


def write_dequantized(
    checkpoint: Path, quantized: Mapping[str, Nvfp4Tensor], out: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """The checkpoint with every quantized weight replaced by what its codes and scales stand for."""
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    members_of = linear_layers(tensors) | linear_layers(tensors, fuse=False)
    for layer, q in quantized.items():
        rows = [tensors[f"{member}.weight"].shape[0] for member in members_of[layer]]
        parts = q.dequantize(dtype).split(rows)
        tensors |= {f"{member}.weight": part.clone() for member, part in zip(members_of[layer], parts, strict=True)}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
