"""Llama models of any size from transformers, with random weights and eager attention, and their static caches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

LLAMA_1B = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
}


def build(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, attn_implementation="eager", tie_word_embeddings=False, dtype=dtype)
    before = torch.get_default_dtype()
    # made in `dtype`, not cast to it: the rotary frequencies stay float32, as in a model that was loaded
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def in_higher_precision(model: LlamaForCausalLM, dtype: torch.dtype) -> LlamaForCausalLM:
    """A copy with the same weights, exactly, in `dtype`."""
    with torch.device(model.device):
        copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype).eval()


def static_cache(model: LlamaForCausalLM, length: int, filled: int, seed: int = 1) -> StaticCache:
    """A cache for `length` positions of which the first `filled` hold random keys and values."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    source = torch.Generator(model.device).manual_seed(seed)
    # drawn in one dtype, so that a model in another sees the same numbers
    shape = (1, config.num_key_value_heads, filled, config.head_dim)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            values = torch.randn(shape, generator=source, device=model.device).to(config.dtype)
            tensor[:, :, :filled].copy_(values)
    rewind(cache, filled)
    return cache


def rewind(cache: StaticCache, position: int) -> None:
    """Let the next token be written at `position` again."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(position)
        if hasattr(layer, "cumulative_length_int"):  # sliding windows count in Python, and graphs are compiled for it
            layer.cumulative_length_int = position


class DecodeStep:
    """One token through `model` with its own cache, always at the same position."""

    def __init__(self, model: Any, cache: StaticCache, position: int, token: torch.Tensor) -> None:
        self.model, self.cache, self.position, self.token = model, cache, position, token

    def __call__(self) -> torch.Tensor:
        rewind(self.cache, self.position)
        return self.advance()

    def advance(self) -> torch.Tensor:
        """The step alone; the cache moves on by one position."""
        logits: torch.Tensor = self.model(self.token, past_key_values=self.cache).logits
        return logits
