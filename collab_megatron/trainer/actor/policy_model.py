"""Policy model: a Megatron GPTModel of a Hugging Face config, whose output is log-probabilities instead of logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    layers,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from collab_megatron.model.spec import ModelSpec, RopeSpec
from collab_megatron.model.tables import rows
from collab_megatron.trainer.actor.backend import Backend
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.actor.logprobs import head_logprobs
from collab_megatron.trainer.convert.placement import local_parameters
from collab_megatron.trainer.local.cpu_support import patch_experts
from collab_megatron.trainer.local.layers import layer_spec

Recompute = Literal["none", "selective", "full"]


class PolicyModel(GPTModel):
    """GPTModel that, on the last stage and given labels, returns [2, b, s] fp32: log-probability of each trained label,
    and entropy; 0 elsewhere.

    Overrides the method in which GPTModel makes the logits of all tokens at once. Tokens that are not trained, such as
    prompts, have no logits at all.
    """

    spec: ModelSpec
    grid: RankGrid
    logits_chunk_bytes: int
    temperature: float = 1.0  # of the distribution of both results
    entropy_gradient: bool = False  # whether the entropy has a gradient, for an entropy bonus

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """hidden_states [s, b, h] (a part of s under sequence parallelism), labels [b, s] int64 -> [2, b, s].

        loss_mask: not a mask, but the positions in [s, b], flattened, whose labels are trained (trained_rows).
        """
        if not self.post_process or labels is None:
            return hidden_states
        assert loss_mask is not None
        rows = loss_mask
        group = self.grid.tp_group if self.grid.tp_size > 1 else None
        # in the backward pass both sum the gradient over the vocabulary's shards
        if self.grid.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, rows)
        if group is not None and not self.grid.sequence_parallel:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        found = head_logprobs(
            hidden,
            weight,
            labels.t().flatten().index_select(0, rows),
            vocab=self.spec.vocab,
            tp_rank=self.grid.tp_rank,
            group=group,
            chunk_bytes=self.logits_chunk_bytes,
            is_embedding=tied and self.pre_process,
            temperature=self.temperature,
            entropy_gradient=self.entropy_gradient,
        )
        statistics = torch.stack(found)
        every = statistics.new_zeros(2, labels.numel()).index_copy(1, rows, statistics)
        return every.view(2, *hidden_states.shape[:2]).transpose(1, 2)


def transformer_config(spec: ModelSpec, dtype: torch.dtype, grid: RankGrid, recompute: Recompute) -> TransformerConfig:
    """Megatron's config of the model on this grid; fusions depend on the backend."""
    backend = grid.backend
    on_gpu = backend.name == "cuda"
    interleaved = grid.parallel.interleave > 1
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
        pipeline_model_parallel_size=grid.pp_size,
        virtual_pipeline_model_parallel_size=grid.parallel.interleave if interleaved else None,
        context_parallel_size=grid.cp_size,
        expert_model_parallel_size=grid.ep_size,
        expert_tensor_parallel_size=1,
        # micro-batches have the length of their longest row, which stages send to each other; upstream then requires
        # the one dispatcher of experts that takes any length, even without experts
        variable_seq_lengths=grid.pp_size > 1,
        moe_token_dispatcher_type="alltoall",
        # with batched p2p the interleaved schedule of 0.16 is wrong at two stages, without an error (0.19: not tried)
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # the interleaved schedule frees an output before it waits for its sending (megatron-core 0.19.2,
        # pipeline_parallel/schedules.py); gloo, unlike NCCL, reads it when the peer asks for it
        deallocate_pipeline_outputs=grid.pp_size > 1 and backend.process_group == "nccl",
        **_recompute(recompute, spec),
        **(_experts(spec, backend) if spec.experts else {}),
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


def _recompute(recompute: Recompute, spec: ModelSpec) -> dict[str, Any]:
    """Full: only the layers' inputs are kept. Selective: the MLPs, which have the larger half of the activations, are
    recomputed; attention kernels keep very little anyway.
    """
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe" if spec.experts else "mlp"]}
    return {}


def _experts(spec: ModelSpec, backend: Backend) -> dict[str, Any]:
    """Router settings of Qwen3-MoE: softmax over the chosen experts (or all), no auxiliary loss, no dropped tokens."""
    return {
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.expert_ffn,
        "moe_router_pre_softmax": not spec.norm_topk,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": backend.transformer_engine,
    }


def build_model(
    spec: ModelSpec,
    dtype: torch.dtype,
    grid: RankGrid,
    *,
    recompute: Recompute = "none",
    logits_chunk_bytes: int = 2**29,
) -> list[PolicyModel]:
    """The model's shard on this rank, with undefined weights: one chunk, or several if the pipeline is interleaved.

    If the backend's device is torch's meta device, the weights have shapes only.
    """
    if spec.experts:
        patch_experts()
    config = transformer_config(spec, dtype, grid, recompute)
    chunks = grid.parallel.interleave
    return [
        _build_chunk(spec, config, grid, chunk if chunks > 1 else None, logits_chunk_bytes) for chunk in range(chunks)
    ]


def _build_chunk(
    spec: ModelSpec,
    config: TransformerConfig,
    grid: RankGrid,
    chunk: int | None,
    logits_chunk_bytes: int,
) -> PolicyModel:
    device = grid.device
    with device if device.type == "meta" else contextlib.nullcontext(), output_layer_without_apex():
        model = PolicyModel(
            config=config,
            transformer_layer_spec=layer_spec(config, grid.backend, chunk),
            vocab_size=spec.padded_vocab(grid.tp_size),
            max_sequence_length=spec.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
            share_embeddings_and_output_weights=spec.tied,
            position_embedding_type="rope",
            rotary_base=spec.rope.theta,
            vp_stage=chunk,
        )
    model.spec, model.grid, model.logits_chunk_bytes = spec, grid, logits_chunk_bytes
    model.to(device)
    _mark_shards(model, spec, grid)
    # upstream supports llama3 scaling with one set of constants only; the frequencies are a plain attribute
    model.rotary_pos_emb.inv_freq = rope_frequencies(spec.rope, spec.head_dim).to(device)
    return model


@contextlib.contextmanager
def output_layer_without_apex() -> Iterator[None]:
    """Megatron refuses to build its own linear layers for fused weight gradients if apex's extension is missing.

    transformer-engine's layers have a fusion of their own, so only the output layer is left, and that is never called:
    PolicyModel takes its weight. Source: megatron-core 0.16.1, tensor_parallel/layers.py, ColumnParallelLinear.
    """
    before = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = before


def _mark_shards(model: PolicyModel, spec: ModelSpec, grid: RankGrid) -> None:
    """Mark each parameter with how it is cut, which upstream does only while it initializes weights. Without the mark a
    shard counts as a copy, and the gradient norm leaves it out on every rank but the first, without an error. A whole
    expert counts as a shard: the tensor-parallel ranks hold different ones.
    """
    by_name = {row.megatron: row for row in rows(spec)}
    for name, parameter in local_parameters([model], spec, grid).items():
        cut = by_name[name].cut
        marks = {
            "tensor_model_parallel": cut is not None or by_name[name].expert is not None,
            "partition_dim": -1 if cut is None else cut,
            "partition_stride": 1,
        }
        if by_name[name].expert is not None and grid.tp_size > 1:
            # without expert parallelism upstream (0.16; fixed in 0.19) reduces experts like dense weights: not over the
            # tensor-parallel ranks, each of which has different tokens
            marks["allreduce"] = False
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
