"""Tiny Hugging Face models and data that every test of actor, convert and checkpoint shares. No downloads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.trainer.batching.micro_batch import TokenSample

_SIZES = {
    "vocab_size": 250,  # not a multiple of 64: padding columns must not count
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


def config_of(kind: str, **changes: Any) -> PretrainedConfig:
    """`changes` are keys of the config, such as num_hidden_layers=4."""
    sizes = {**_SIZES, **changes}
    if kind == "llama":
        return LlamaConfig(**sizes, tie_word_embeddings=True)
    if kind == "llama3":
        return LlamaConfig(**sizes, tie_word_embeddings=False, rope_parameters=_LLAMA3)
    if kind == "mistral":
        return MistralConfig(**sizes, sliding_window=8, tie_word_embeddings=False)
    if kind == "qwen2":
        return Qwen2Config(**sizes, tie_word_embeddings=False)
    if kind == "qwen3":
        return Qwen3Config(**sizes, head_dim=32, tie_word_embeddings=True)
    if kind == "qwen3moe":
        return Qwen3MoeConfig(**{**_EXPERTS, **sizes}, head_dim=32, tie_word_embeddings=False)
    raise ValueError(kind)


KINDS = ("llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3moe")


def spec_of(kind: str, **changes: int) -> ModelSpec:
    """What a saved model of that kind says of itself."""
    config = config_of(kind, **changes).to_dict()
    classes = {"llama3": "Llama", "qwen3moe": "Qwen3Moe"}
    return model_spec({**config, "architectures": [f"{classes.get(kind, kind.capitalize())}ForCausalLM"]})


def make_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Path:
    """Write a random model (weights wide enough for peaked distributions) and stand-ins for the tokenizer's files.

    `changes` are those of config_of.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"stands": "for a tokenizer"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_samples(count: int, seed: int = 0, *, longest: int = 24) -> list[TokenSample]:
    """Ragged samples with all that the GRPO loss reads."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        length = rng.randint(6, longest)
        prompt = rng.randint(1, length - 2)
        tokens = [rng.randrange(250) for _ in range(length)]
        samples.append(
            TokenSample(
                ids=tokens,
                mask=[0.0] * prompt + [1.0] * (length - prompt),
                values={
                    "advantages": [rng.uniform(-1, 1)] * length,
                    "old_logprobs": [rng.uniform(-7, -4) for _ in tokens],
                    "rollout_logprobs": [rng.uniform(-7, -4) for _ in tokens],
                    "ref_logprobs": [rng.uniform(-7, -4) for _ in tokens],
                },
            )
        )
    return samples
