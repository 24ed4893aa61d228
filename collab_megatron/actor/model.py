"""A Hugging Face config as a Megatron GPTModel whose output is log-probabilities, not logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from collab_megatron.actor.grid import RankGrid
from collab_megatron.actor.layers import layer_spec
from collab_megatron.actor.logprobs import logprobs_and_entropy
from collab_megatron.convert.spec import ModelSpec, RopeSpec
from collab_megatron.convert.tables import canonical_name, rows


class PolicyModel(GPTModel):
    """GPTModel that, given labels, returns [2, b, s] fp32: log-probability of each label, and entropy.

    Overrides the one method into which GPTModel hands the logits while they are still [s, b, v/tp]: without labels it
    would copy them into [b, s, v/tp].
    """

    spec: ModelSpec
    grid: RankGrid

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [b, s] int64, logits [s, b, v/tp] -> [2, b, s]."""
        logprobs, entropy = logprobs_and_entropy(
            logits,
            labels.transpose(0, 1),
            vocab=self.spec.vocab,
            tp_rank=self.grid.tp_rank,
            group=self.grid.tp_group if self.grid.tp_size > 1 else None,
        )
        return torch.stack([logprobs, entropy]).transpose(1, 2)


def transformer_config(spec: ModelSpec, dtype: torch.dtype, grid: RankGrid) -> TransformerConfig:
    """Megatron's config of the model on this grid; what is fused depends on the backend."""
    backend = grid.backend
    on_gpu = backend.name == "cuda"
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        window_size=(spec.sliding_window - 1, 0) if spec.sliding_window else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=spec.init_std,
        perform_initialization=False,  # every weight comes from the folder or a checkpoint
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=grid.tp_size,
        sequence_parallel=grid.sequence_parallel,
        use_cpu_initialization=not on_gpu,
        # the caller divides by the global token count itself: no averaging over micro-batches or data ranks
        calculate_per_token_loss=True,
        # fusions are torch.compile or CUDA kernels
        masked_softmax_fusion=False,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=backend.transformer_engine,
        persist_layer_norm=backend.transformer_engine,
        gradient_accumulation_fusion=backend.gradient_fusion,
    )


def build_model(spec: ModelSpec, dtype: torch.dtype, grid: RankGrid) -> PolicyModel:
    """The model's shard on this rank, on grid.device, with weights that are still undefined."""
    config = transformer_config(spec, dtype, grid)
    model = PolicyModel(
        config=config,
        transformer_layer_spec=layer_spec(config, grid.backend),
        vocab_size=spec.padded_vocab(grid.tp_size),
        max_sequence_length=spec.max_positions,
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type="rope",
        rotary_base=spec.rope.theta,
    )
    model.spec, model.grid = spec, grid
    model.to(grid.device)
    _mark_shards(model, spec)
    # upstream knows llama3 stretching with one set of constants only; the frequencies are a plain attribute
    model.rotary_pos_emb.inv_freq = rope_frequencies(spec.rope, spec.head_dim).to(grid.device)
    return model


def _mark_shards(model: PolicyModel, spec: ModelSpec) -> None:
    """Say of each parameter how it is cut. Upstream does so only while initialising weights, which we skip; unmarked,
    a shard counts as a copy and is left out of the gradient norm on every rank but the first, in silence.
    """
    cuts = {row.megatron: row.cut for row in rows(spec)}
    for name, parameter in model.named_parameters():
        cut = cuts[canonical_name(name)]
        marks = {
            "tensor_model_parallel": cut is not None,
            "partition_dim": -1 if cut is None else cut,
            "partition_stride": 1,
        }
        for mark, value in marks.items():
            setattr(parameter, mark, value)


def rope_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[head_dim / 2] fp32 inverse frequencies. Source: transformers/modeling_rope_utils.py, Llama 3.1's reference."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    stretched = frequencies / rope.factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * stretched + smooth * frequencies
    return torch.where(wavelength > low, stretched, torch.where(wavelength < high, frequencies, between))


def token_statistics(model: Any, ids: Tensor, *, sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    """ids [B, S] -> log-probability of each token given those before it, and the entropy there; [B, S] fp32, zero at 0.

    `model` is a PolicyModel, wrapped or not.
    """
    if sequence_parallel:
        inputs, labels = ids, ids.roll(-1, dims=1)  # the length must stay a multiple of the tensor-parallel size
    else:
        inputs, labels = ids[:, :-1], ids[:, 1:]
    out = model(input_ids=inputs, position_ids=None, attention_mask=None, labels=labels)
    logprobs, entropy = F.pad(out[..., : ids.shape[1] - 1], (1, 0))
    return logprobs, entropy
