"""The architecture of a decoder, read once from config.json into one typed value. Pure: no torch.

Config keys map to fields in the same way for Llama 2/3, Mistral, Qwen2, Qwen3 and Qwen3-MoE. The differences (biases,
query/key norms, experts) are one row of `ARCHITECTURES`. A feature that changes the computed function and is not
implemented raises UserError here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.model.hf_values import flag, mapping, names, real, whole


@dataclass(frozen=True)
class Architecture:
    """The differences of one Hugging Face class from plain Llama."""

    qkv_bias: bool = False  # query, key and value projections have a bias
    qk_norm: bool = False  # RMSNorm over each head's query and key
    sliding_window: bool = False  # the config's `sliding_window` applies (in Qwen2 only with use_sliding_window)
    experts: bool = False  # every MLP is a mixture of experts


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "MistralForCausalLM": Architecture(sliding_window=True),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(qk_norm=True),
    "Qwen3MoeForCausalLM": Architecture(qk_norm=True, experts=True),
}


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: the base, and for Llama 3.x and linear scaling the factors that stretch the frequencies."""

    theta: float
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_max_positions: int = 8192  # llama3 only


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. All sizes are those of the whole model, not of a shard."""

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # columns of a dense MLP; a mixture of experts has none
    vocab: int
    max_positions: int
    norm_eps: float
    tied: bool  # the output projection shares the embedding's weight
    qkv_bias: bool
    qk_norm: bool
    rope: RopeSpec
    sliding_window: int | None  # a token attends to itself and the window - 1 before it; None: to all
    init_std: float
    experts: int = 0  # MLPs per layer among which a router chooses; 0: dense
    experts_per_token: int = 0
    expert_ffn: int = 0  # columns of one expert's MLP
    norm_topk: bool = False  # the chosen experts' weights are scaled to sum 1

    @property
    def dims(self) -> dict[str, int]:
        """The named dimensions of the shapes in tables.py."""
        return {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head": self.head_dim,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn,
        }

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Rows of the embedding: a multiple of 64 and of the tensor-parallel size.

        With a multiple of 64 in every layout, a checkpoint fits each tensor-parallel size of 1, 2, 4 ... 64.
        """
        multiple = 64
        while multiple % tensor_parallel:
            multiple += 64
        return -(-self.vocab // multiple) * multiple


def model_spec(hf_config: Mapping[str, Any]) -> ModelSpec:
    """Parse the contents of a config.json.

    Raises UserError for an unsupported architecture (with the supported ones), a key that is missing or has the wrong
    type, or a feature that is not implemented.
    """
    name = next(iter(names(hf_config, "architectures")), None) or str(hf_config.get("model_type"))
    if name not in ARCHITECTURES:
        raise UserError(f"the model's architecture is {name}; supported are {', '.join(ARCHITECTURES)}")
    traits = ARCHITECTURES[name]
    _refuse_unsupported(name, hf_config)
    heads, hidden = whole(hf_config, "num_attention_heads"), whole(hf_config, "hidden_size")
    kv_heads = whole(hf_config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UserError(
            f"the model's config.json has num_key_value_heads={kv_heads}, which does not divide its "
            f"num_attention_heads={heads}: use the original file"
        )
    windowed = traits.sliding_window and hf_config.get("sliding_window") is not None
    return ModelSpec(
        architecture=name,
        hidden=hidden,
        layers=whole(hf_config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=whole(hf_config, "head_dim", hidden // heads),
        ffn=whole(hf_config, "intermediate_size"),
        vocab=whole(hf_config, "vocab_size"),
        max_positions=whole(hf_config, "max_position_embeddings", 2048),
        norm_eps=real(hf_config, "rms_norm_eps", 1e-6),
        tied=flag(hf_config, "tie_word_embeddings"),
        qkv_bias=traits.qkv_bias,
        qk_norm=traits.qk_norm,
        rope=_rope(hf_config),
        sliding_window=whole(hf_config, "sliding_window") if windowed else None,
        init_std=real(hf_config, "initializer_range", 0.02),
        **(_experts(name, hf_config) if traits.experts else {}),
    )


def _experts(name: str, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes `num_local_experts`; earlier versions, and the hub's files, `num_experts`
    experts = whole(hf_config, "num_local_experts" if "num_local_experts" in hf_config else "num_experts")
    per_token, normalized = whole(hf_config, "num_experts_per_tok", least=0), flag(hf_config, "norm_topk_prob")
    if hf_config.get("mlp_only_layers") or hf_config.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            f"{name} with dense layers between mixture-of-experts layers is not supported: use a model without them"
        )
    if hf_config.get("shared_expert_intermediate_size") or hf_config.get("n_shared_experts"):
        raise UserError(f"shared experts of {name} are not supported: use a model without them")
    if not 1 <= per_token <= experts or (per_token == 1 and normalized):
        raise UserError(
            f"{name} with num_experts_per_tok={per_token} of {experts} experts and norm_topk_prob={normalized} is not "
            "supported: use a model that chooses several experts, or one without norm_topk_prob"
        )
    return {
        "experts": experts,
        "experts_per_token": per_token,
        "expert_ffn": whole(hf_config, "moe_intermediate_size"),
        "norm_topk": normalized,
    }


def _rope(hf_config: Mapping[str, Any]) -> RopeSpec:
    # transformers 5 writes `rope_parameters`; earlier versions `rope_theta` and an optional `rope_scaling`
    rope = {**mapping(hf_config, "rope_scaling"), **mapping(hf_config, "rope_parameters")}
    theta = real(rope, "rope_theta", real(hf_config, "rope_theta", 10000.0))
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if (share := rope.get("partial_rotary_factor") or hf_config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"partial_rotary_factor={share} is not supported: use a model that rotates whole heads")
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, kind, real(rope, "factor"))
    if kind == "llama3":
        return RopeSpec(
            theta,
            kind,
            real(rope, "factor"),
            real(rope, "low_freq_factor"),
            real(rope, "high_freq_factor"),
            whole(rope, "original_max_position_embeddings"),
        )
    raise UserError(
        f"the model's config.json has rotary embeddings of type {kind!r}; supported are default, linear, llama3: use a "
        "model with one of them"
    )


def _refuse_unsupported(name: str, hf_config: Mapping[str, Any]) -> None:
    if (act := hf_config.get("hidden_act", "silu")) != "silu":
        raise UserError(
            f"the model's config.json has hidden_act {act!r}; for {name} only silu is supported: use another model"
        )
    for key in ("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"):
        if hf_config.get(key):
            raise UserError(f"{key} of {name} is not supported: use a model without it")
