"""Tiny mixtures of experts of random weights, as Mixtral, Qwen3-MoE, DeepSeek-V2 and GLM-4.5 have them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwantize_vllm import Nvfp4Tensor

LAYERS, EXPERTS, TOP_K, HIDDEN, INNER, HEADS, HEAD = 2, 4, 2, 128, 64, 4, 32
_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": TOP_K,
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
MIXTRAL = {
    **_COMMON,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": INNER,
    "num_local_experts": EXPERTS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "sliding_window": None,
}
QWEN3 = {
    **_COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 2 * INNER,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Multi-head latent attention, a first layer without experts, then shared experts beside the others.
DEEPSEEK = {
    **_COMMON,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "intermediate_size": 2 * INNER,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_key_value_heads": HEADS,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
# As DeepSeek-V3, whose queries are compressed too; vLLM fuses what does that with kv_a_proj_with_mqa.
DEEPSEEK_V3 = {**DEEPSEEK, "q_lora_rank": 96}
# As DeepSeek-V3 it has a bias in its router.
GLM4 = {
    **_COMMON,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "intermediate_size": 2 * INNER,
    "moe_intermediate_size": INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "use_qk_norm": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
DRAFT = f"model.layers.{LAYERS}"  # its layer for multi-token prediction
# What each calls its mixture, and the gate, up and down of an expert.
NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v2": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "glm4_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def inner_size(config: Mapping[str, Any]) -> int:
    """Rows of gate, and of up, of an expert."""
    return config.get("moe_intermediate_size", config["intermediate_size"])


def experts_of(config: Mapping[str, Any]) -> int:
    return next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)


def write_moe(path: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """A random-weight checkpoint of one of the configs above, without a tokenizer."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(_random_weights(config, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_glm(path: Path) -> Path:
    """GLM4 and its draft layer, which is the model's last one again, behind what puts its inputs together."""
    write_moe(path, GLM4)
    tensors = load_file(path / "model.safetensors")
    for layer in range(GLM4["first_k_dense_replace"], LAYERS):
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    last = f"model.layers.{LAYERS - 1}."
    again = {name: tensor for name, tensor in tensors.items() if name.startswith(last)}
    tensors |= {name.replace(last, f"{DRAFT}."): tensor.clone() for name, tensor in again.items()}
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{DRAFT}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    tensors[f"{DRAFT}.eh_proj.weight"] = torch.cat([torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)], 1).bfloat16()
    tensors[f"{DRAFT}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{DRAFT}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def mixture_layers(config: Mapping[str, Any]) -> list[str]:
    """Names of the layers' mixtures, as `model.layers.1.mlp`."""
    name, _ = NAMES[config["model_type"]]
    first, end = config.get("first_k_dense_replace", 0), config["num_hidden_layers"]
    return [f"model.layers.{i}.{name}" for i in range(first, end)]


def stacked(config: Mapping[str, Any], quantized: Mapping[str, Nvfp4Tensor], mixture: str) -> dict[str, Nvfp4Tensor]:
    """w13 and w2 of all experts of a mixture, from what `quantize_checkpoint` made of the layers of each."""
    up_and_down = ("w13", "w2") if config["model_type"] == "mixtral" else ("gate_up_proj", "down_proj")
    weights = {}
    for vllm_name, name in zip(("w13", "w2"), up_and_down, strict=True):
        each = [quantized[f"{mixture}.experts.{expert}.{name}"] for expert in range(experts_of(config))]
        scales = torch.stack([q.block_scales.view(torch.uint8) for q in each]).view(each[0].block_scales.dtype)
        global_scales = torch.stack([q.global_scale for q in each])
        weights[vllm_name] = Nvfp4Tensor(torch.stack([q.codes for q in each]), scales, global_scales)
    return weights


def _random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale / math.sqrt(shape[-1])).bfloat16()

    hidden, experts, expert_size = config["hidden_size"], experts_of(config), inner_size(config)
    # Large embeddings and gates: the next token, and who computes it, depend visibly on the weights.
    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=4.0),
        "lm_head.weight": normal(config["vocab_size"], hidden, scale=4.0),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    mixtures, (name, (gate, up, down)) = mixture_layers(config), NAMES[config["model_type"]]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        attention = _latent_attention(config) if config["model_type"] == "deepseek_v2" else _attention(config)
        tensors |= {f"{at}.self_attn.{key}.weight": normal(*shape) for key, shape in attention.items() if shape[1:]}
        tensors |= {
            f"{at}.self_attn.{key}.weight": torch.ones(shape).bfloat16()
            for key, shape in attention.items()
            if not shape[1:]
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        mixture = f"{at}.{name}"
        blocks = {f"{mixture}.experts.{expert}": expert_size for expert in range(experts)}
        if mixture in mixtures:
            tensors[f"{mixture}.gate.weight"] = normal(experts, hidden, scale=4.0)
            if "n_shared_experts" in config:
                blocks[f"{mixture}.shared_experts"] = expert_size * config["n_shared_experts"]
        else:
            blocks = {mixture: config["intermediate_size"]}
        for block, inner in blocks.items():
            tensors[f"{block}.{gate}.weight"] = normal(inner, hidden)
            tensors[f"{block}.{up}.weight"] = normal(inner, hidden)
            tensors[f"{block}.{down}.weight"] = normal(hidden, inner)
    return tensors


def _attention(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"q_proj": (queries, hidden), "k_proj": (keys, hidden)}
    shapes |= {"v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    return shapes | ({"q_norm": (head,), "k_norm": (head,)} if config["model_type"] == "qwen3_moe" else {})


def _latent_attention(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    nope, rope, value, rank = (
        config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries: dict[str, tuple[int, ...]] = {"q_proj": (heads * (nope + rope), hidden)}
    if inner := config["q_lora_rank"]:
        queries = {"q_a_proj": (inner, hidden), "q_a_layernorm": (inner,), "q_b_proj": (heads * (nope + rope), inner)}
    return {
        **queries,
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (hidden, heads * value),
    }
