"""Tiny transformers models with random weights, eager attention, and one forward call each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 128,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Zoo:
    """How to build a model: its transformers class prefix, head class suffix and configuration."""

    config: str
    model: str
    settings: dict[str, Any]
    inputs: str = "ids"
    caches: bool = True  # a decoder with transformers' static cache


MODELS: dict[str, Zoo] = {
    "llama": Zoo("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "qwen2": Zoo("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": Zoo("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}),
    "mistral": Zoo("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 8}),
    "mixtral": Zoo(
        "MixtralConfig", "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "experts_implementation": "batched_mm"},
    ),
    "gemma": Zoo("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 16}),
    "gemma2": Zoo("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "phi3": Zoo("Phi3Config", "Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "gpt2": Zoo(
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128},
    ),
    "gpt_neox": Zoo("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "falcon": Zoo("FalconConfig", "FalconForCausalLM", SMALL),
    "bloom": Zoo("BloomConfig", "BloomForCausalLM", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "opt": Zoo("OPTConfig", "OPTForCausalLM", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bert": Zoo("BertConfig", "BertModel", SMALL, caches=False),
    "t5": Zoo(
        "T5Config", "T5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
        "ids+decoder", False,
    ),
    "vit": Zoo("ViTConfig", "ViTModel", {**SMALL, "image_size": 32, "patch_size": 8}, "pixels", False),
    "whisper": Zoo(
        "WhisperConfig", "WhisperModel",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
         "vocab_size": 128, "max_source_positions": 32,
         "max_target_positions": 32, "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "decoder_start_token_id": 1},
        "mel", False,
    ),
}  # fmt: skip


# Bloom's eager attention cannot read a cache longer than what it holds.
DECODERS = tuple(name for name, zoo in MODELS.items() if zoo.caches and name != "bloom")

# Sites present in two layers: attentions, gated MLPs, linears behind a norm.
_PRESENT = {
    "phi3": (2, 2, 5), "gpt2": (2, 0, 5), "gpt_neox": (2, 0, 5), "falcon": (2, 0, 5), "bloom": (2, 0, 5),
    "opt": (2, 0, 9), "bert": (2, 0, 8), "t5": (6, 0, 23), "vit": (2, 0, 8), "whisper": (6, 0, 22),
    "mixtral": (2, 2, 9),
}  # fmt: skip


def present(name: str, call: str = "prompt") -> tuple[int, int, int]:
    """How many attentions, gated MLPs and linears behind a norm a call of a model holds."""
    attentions, gated, linears = _PRESENT.get(name, (2, 2, 11))
    # OPT reads its position back to the host when it decodes: the last norm and the head are then two graphs
    return attentions, gated, linears - (name == "opt" and call == "decode")


def static_cache(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    """A static cache with room for more than `inputs`, filled with them by the uncompiled model."""
    import transformers

    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(**{**inputs, "use_cache": True}, past_key_values=cache)
    return cache


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
    """(model in eval mode, a function making the keyword arguments of one forward call)."""
    import transformers

    zoo = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, zoo.config)(**zoo.settings, attn_implementation="eager")
    model = getattr(transformers, zoo.model)(config).eval().to(dtype)

    def inputs() -> dict[str, Any]:
        ids = torch.randint(3, 100, (2, 16))
        if zoo.inputs == "pixels":
            return {"pixel_values": torch.randn(2, 3, 32, 32, dtype=dtype)}
        if zoo.inputs == "mel":
            return {"input_features": torch.randn(2, 8, 64, dtype=dtype), "decoder_input_ids": ids}
        if zoo.inputs == "ids+decoder":
            return {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
        return {"input_ids": ids, **({"use_cache": False} if zoo.caches else {})}

    return model, inputs
