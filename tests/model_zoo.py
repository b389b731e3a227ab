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


# float64 has no grouped product
_EXPERTS = {
    **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "experts_implementation": "batched_mm",
}  # fmt: skip
_LATENT = {
    **SMALL, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "experts_implementation": "batched_mm",
}  # fmt: skip
_PAIR = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 128, "max_position_embeddings": 128,
}  # fmt: skip
_IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
_TOWERS = {"text_config": {**SMALL, "eos_token_id": 2}, "vision_config": _IMAGE, "projection_dim": 32}

# Models that nobody promised; `python -m benchmarks.models` runs them too.
OTHERS: dict[str, Zoo] = {
    "afmoe": Zoo("AfmoeConfig", "AfmoeForCausalLM", {**_EXPERTS, "head_dim": 16, "num_dense_layers": 1}),
    "apertus": Zoo("ApertusConfig", "ApertusForCausalLM", GROUPED),
    "arcee": Zoo("ArceeConfig", "ArceeForCausalLM", GROUPED),
    "bitnet": Zoo("BitNetConfig", "BitNetForCausalLM", GROUPED),
    "codegen": Zoo("CodeGenConfig", "CodeGenForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 128, "n_positions": 128}),
    "cohere": Zoo("CohereConfig", "CohereForCausalLM", {**GROUPED, "use_qk_norm": True}),
    "cohere2": Zoo("Cohere2Config", "Cohere2ForCausalLM", {**GROUPED, "sliding_window": 8}),
    "deepseek_v2": Zoo("DeepseekV2Config", "DeepseekV2ForCausalLM", _LATENT),
    "deepseek_v3": Zoo("DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT),
    "diffllama": Zoo("DiffLlamaConfig", "DiffLlamaForCausalLM", GROUPED),
    "dots1": Zoo("Dots1Config", "Dots1ForCausalLM",
        {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
         "first_k_dense_replace": 1}),
    "ernie4_5": Zoo("Ernie4_5Config", "Ernie4_5ForCausalLM", GROUPED),
    "exaone4": Zoo("Exaone4Config", "Exaone4ForCausalLM", {**GROUPED, "sliding_window": 8}),
    "falcon_grouped": Zoo("FalconConfig", "FalconForCausalLM",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Zoo("FalconConfig", "FalconForCausalLM", {**SMALL, "alibi": True, "multi_query": False}),
    "falcon_h1": Zoo("FalconH1Config", "FalconH1ForCausalLM",
        {**GROUPED, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
        caches=False),
    "gemma3": Zoo("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "glm": Zoo("GlmConfig", "GlmForCausalLM", {**GROUPED, "head_dim": 16, "pad_token_id": 0}),
    "glm4": Zoo("Glm4Config", "Glm4ForCausalLM", {**GROUPED, "head_dim": 16, "pad_token_id": 0}),
    "glm4_moe": Zoo("Glm4MoeConfig", "Glm4MoeForCausalLM",
        {**_EXPERTS, "n_routed_experts": 4, "head_dim": 16, "pad_token_id": 0}),
    "gpt_bigcode": Zoo("GPTBigCodeConfig", "GPTBigCodeForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128}),
    "gpt_neo": Zoo("GPTNeoConfig", "GPTNeoForCausalLM",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "max_position_embeddings": 128,
         "attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gpt_oss": Zoo("GptOssConfig", "GptOssForCausalLM",
        {**GROUPED, "head_dim": 16, "num_local_experts": 4, "experts_implementation": "batched_mm",
         "num_experts_per_tok": 2, "sliding_window": 8}),
    "gptj": Zoo("GPTJConfig", "GPTJForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 128, "n_positions": 128}),
    "granite": Zoo("GraniteConfig", "GraniteForCausalLM",
        {**GROUPED, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "granitemoe": Zoo("GraniteMoeConfig", "GraniteMoeForCausalLM",
        {**GROUPED, "num_local_experts": 4, "experts_implementation": "batched_mm", "num_experts_per_tok": 2}),
    "helium": Zoo("HeliumConfig", "HeliumForCausalLM", {**GROUPED, "head_dim": 16}),
    "hunyuan_v1_dense": Zoo("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {**GROUPED, "head_dim": 16}),
    "jamba": Zoo("JambaConfig", "JambaForCausalLM",
        {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
        caches=False),
    "llama4": Zoo("Llama4TextConfig", "Llama4ForCausalLM",
        {**GROUPED, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 8}),
    "mamba": Zoo("MambaConfig", "MambaForCausalLM",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "vocab_size": 128, "use_mambapy": False},
        caches=False),
    "ministral": Zoo("MinistralConfig", "MinistralForCausalLM", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "mpt": Zoo("MptConfig", "MptForCausalLM",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "max_seq_len": 128}),
    "nemotron": Zoo("NemotronConfig", "NemotronForCausalLM", GROUPED),
    "olmo": Zoo("OlmoConfig", "OlmoForCausalLM", {**GROUPED, "clip_qkv": 1.0}),
    "olmo2": Zoo("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "olmo3": Zoo("Olmo3Config", "Olmo3ForCausalLM", {**GROUPED, "sliding_window": 8}),
    "olmoe": Zoo("OlmoeConfig", "OlmoeForCausalLM", _EXPERTS),
    "openai_gpt": Zoo("OpenAIGPTConfig", "OpenAIGPTLMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128}, caches=False),
    "persimmon": Zoo("PersimmonConfig", "PersimmonForCausalLM", SMALL),
    "phi": Zoo("PhiConfig", "PhiForCausalLM", {**SMALL, "qk_layernorm": True}),
    "phimoe": Zoo("PhimoeConfig", "PhimoeForCausalLM",
        {**GROUPED, "num_local_experts": 4, "experts_implementation": "batched_mm"}),
    "qwen2_moe": Zoo("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": Zoo("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_EXPERTS, "head_dim": 16}),
    "qwen3_next": Zoo("Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
         "layer_types": ["linear_attention", "full_attention"]}, caches=False),
    "recurrent_gemma": Zoo("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM",
        {**SMALL, "num_key_value_heads": 1, "num_hidden_layers": 3, "attention_window_size": 8}, caches=False),
    "seed_oss": Zoo("SeedOssConfig", "SeedOssForCausalLM", {**GROUPED, "head_dim": 16}),
    "smollm3": Zoo("SmolLM3Config", "SmolLM3ForCausalLM", {**GROUPED, "pad_token_id": 0}),
    "stablelm": Zoo("StableLmConfig", "StableLmForCausalLM", {**GROUPED, "qk_layernorm": True}),
    "starcoder2": Zoo("Starcoder2Config", "Starcoder2ForCausalLM", {**GROUPED, "sliding_window": 8}),
    "xglm": Zoo("XGLMConfig", "XGLMForCausalLM",
        {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "vocab_size": 128}),
    "albert": Zoo("AlbertConfig", "AlbertModel", {**SMALL, "embedding_size": 32}, caches=False),
    "deberta_v2": Zoo("DebertaV2Config", "DebertaV2Model",
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}, caches=False),
    "distilbert": Zoo("DistilBertConfig", "DistilBertModel",
        {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 128}, caches=False),
    "electra": Zoo("ElectraConfig", "ElectraModel", {**SMALL, "embedding_size": 32}, caches=False),
    "esm": Zoo("EsmConfig", "EsmModel",
        {**SMALL, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"}, caches=False),
    "eurobert": Zoo("EuroBertConfig", "EuroBertModel", {**GROUPED, "pad_token_id": 0}, caches=False),
    "fnet": Zoo("FNetConfig", "FNetModel", SMALL, caches=False),
    "longformer": Zoo("LongformerConfig", "LongformerModel", {**SMALL, "attention_window": 8}, caches=False),
    "modernbert": Zoo("ModernBertConfig", "ModernBertModel",
        {**SMALL, "pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2}, caches=False),
    "mpnet": Zoo("MPNetConfig", "MPNetModel", SMALL, caches=False),
    "roberta": Zoo("RobertaConfig", "RobertaModel", SMALL, caches=False),
    "roformer": Zoo("RoFormerConfig", "RoFormerModel", {**SMALL, "embedding_size": 64}, caches=False),
    "xlnet": Zoo("XLNetConfig", "XLNetModel",
        {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "vocab_size": 128}, caches=False),
    "xlm_roberta": Zoo("XLMRobertaConfig", "XLMRobertaModel", SMALL, caches=False),
    "bart": Zoo("BartConfig", "BartForConditionalGeneration", _PAIR, "ids+decoder", False),
    "blenderbot": Zoo("BlenderbotConfig", "BlenderbotModel", _PAIR, "ids+decoder", False),
    "m2m_100": Zoo("M2M100Config", "M2M100Model", _PAIR, "ids+decoder", False),
    "marian": Zoo("MarianConfig", "MarianModel", {**_PAIR, "pad_token_id": 0}, "ids+decoder", False),
    "mbart": Zoo("MBartConfig", "MBartModel", _PAIR, "ids+decoder", False),
    "mt5": Zoo("MT5Config", "MT5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
        "ids+decoder", False),
    "pegasus": Zoo("PegasusConfig", "PegasusModel", _PAIR, "ids+decoder", False),
    "umt5": Zoo("UMT5Config", "UMT5ForConditionalGeneration",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128},
        "ids+decoder", False),
    "beit": Zoo("BeitConfig", "BeitModel", {**_IMAGE, "use_relative_position_bias": True}, "pixels", False),
    "clip": Zoo("CLIPConfig", "CLIPModel", _TOWERS, "pixels+ids", False),
    "deit": Zoo("DeiTConfig", "DeiTModel", _IMAGE, "pixels", False),
    "dinov2": Zoo("Dinov2Config", "Dinov2Model", {**_IMAGE, "use_swiglu_ffn": True}, "pixels", False),
    "dinov3": Zoo("DINOv3ViTConfig", "DINOv3ViTModel", {**_IMAGE, "num_register_tokens": 2}, "pixels", False),
    "hiera": Zoo("HieraConfig", "HieraModel",
        {"embed_dim": 32, "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2],
         "patch_padding": [1, 1], "depths": [1, 1], "num_heads": [2, 4], "masked_unit_size": [4, 4],
         "query_stride": [2, 2], "num_query_pool": 1}, "pixels", False),
    "sam": Zoo("SamVisionConfig", "SamVisionModel",
        {**_IMAGE, "output_channels": 16, "mlp_dim": 96, "window_size": 2, "global_attn_indexes": [1]},
        "pixels", False),
    "siglip": Zoo("SiglipConfig", "SiglipModel", {"text_config": SMALL, "vision_config": _IMAGE}, "pixels+ids", False),
    "swin": Zoo("SwinConfig", "SwinModel",
        {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
        "pixels", False),
    "hubert": Zoo("HubertConfig", "HubertModel",
        {**SMALL, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4],
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}, "wave", False),
    "wav2vec2": Zoo("Wav2Vec2Config", "Wav2Vec2Model",
        {**SMALL, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4],
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2},
        "wave", False),
    "timesformer": Zoo("TimesformerConfig", "TimesformerModel", {**_IMAGE, "num_frames": 2}, "video", False),
}  # fmt: skip

# Bloom's eager attention, and Falcon's with ALiBi, cannot read a cache longer than what it holds.
EVERY = MODELS | OTHERS
DECODERS = tuple(name for name, zoo in EVERY.items() if zoo.caches and name not in ("bloom", "falcon_alibi"))


def static_cache(model: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    """A static cache with room for more than `inputs`, filled with them by the uncompiled model."""
    import transformers

    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(**{**inputs, "use_cache": True}, past_key_values=cache)
    return cache


def build(
    name: str, dtype: torch.dtype = torch.float32, batch: int = 2
) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
    """(model in eval mode, a function making the keyword arguments of one forward call)."""
    import transformers

    zoo = EVERY[name]
    torch.manual_seed(0)
    config = getattr(transformers, zoo.config)(**zoo.settings, attn_implementation="eager")
    model = getattr(transformers, zoo.model)(config).eval().to(dtype)

    def inputs() -> dict[str, Any]:
        ids = torch.randint(3, 100, (batch, 16))
        if zoo.inputs == "pixels":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, dtype=dtype)}
        if zoo.inputs == "pixels+ids":
            return {"pixel_values": torch.randn(batch, 3, 32, 32, dtype=dtype), "input_ids": ids}
        if zoo.inputs == "video":
            return {"pixel_values": torch.randn(batch, 2, 3, 32, 32, dtype=dtype)}
        if zoo.inputs == "wave":
            return {"input_values": torch.randn(batch, 400, dtype=dtype)}
        if zoo.inputs == "mel":
            return {"input_features": torch.randn(batch, 8, 64, dtype=dtype), "decoder_input_ids": ids}
        if zoo.inputs == "ids+decoder":
            return {"input_ids": ids, "decoder_input_ids": ids, "use_cache": False}
        return {"input_ids": ids, **({"use_cache": False} if zoo.caches else {})}

    return model, inputs
