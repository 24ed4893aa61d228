"""Attention and norm for megatron's local layer spec: plain torch, on any device, aware of sequence parallelism.

Upstream's own local attention builds the whole score matrix, knows no packed rows, and its norm refuses sequence
parallelism; transformer-engine has all three but needs CUDA. Legend: s sequence, b batch, t tokens of a packed row,
h heads of this rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from collab_megatron.actor.backend import Backend


@dataclass
class Packing(PackedSeqParams):
    """How a packed row is divided; the lengths also as numbers, so that nothing waits for a device to read them."""

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Packing:
        ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=lengths,
        )


class SdpaAttention(MegatronModule):
    """Causal core attention through torch's scaled_dot_product_attention.

    Padding is on the right, where a causal mask already hides it from every real token. The sequences of a packed row
    are attended to one by one: each at its own length, so packing also saves the work on padding.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        """The remaining keywords are those of upstream's DotProductAttention; none of them matters here."""
        super().__init__(config=config)
        self.scale = softmax_scale
        window = config.window_size
        self.window = window[0] + 1 if window is not None else None  # tokens seen, the token itself included

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, kv_h, d] -> [s, b, h*d]; packed: [t, h, d] ... -> [t, h*d]."""
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
        assert isinstance(packed_seq_params, Packing)
        sequences = zip(*(x.split(packed_seq_params.lengths) for x in (query, key, value)), strict=True)
        out = [self._attend(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1) for qkv in sequences]
        return torch.cat(out).reshape(query.shape[0], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, h, s, d], [b, kv_h, s, d] twice -> [b, h, s, d]."""
        length = q.shape[2]
        grouped = q.shape[1] != k.shape[1]
        if self.window is None or length <= self.window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=grouped)


class RmsNorm(nn.Module):
    """RMSNorm whose weight is marked so that megatron sums its gradient over the ranks that share a sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same shape and dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def layer_spec(
    config: TransformerConfig, backend: Backend, model_chunk: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers GPTModel is built of: transformer-engine's where the backend has it, else the local ones above.

    `model_chunk`: which chunk of an interleaved pipeline stage; None where a stage is one chunk.
    """
    if backend.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RmsNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    num_layers = get_num_layers_to_build(config, vp_stage=model_chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RmsNorm)
