"""Attention and norm for megatron's local layer spec: plain torch, on any device, aware of sequence parallelism.

Upstream's own local attention builds the whole score matrix and its norm refuses sequence parallelism;
transformer-engine has both but needs CUDA. Legend: s sequence, b batch, h heads of this rank, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from collab_megatron.actor.backend import Backend


class SdpaAttention(MegatronModule):
    """Causal core attention through torch's scaled_dot_product_attention.

    Padding is on the right, where a causal mask already hides it from every real token.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        """The remaining keywords are those of upstream's DotProductAttention; none of them matters here."""
        super().__init__(config=config)
        self.scale = softmax_scale
        window = config.window_size
        self.window = window[0] + 1 if window is not None else None  # tokens seen, the token itself included

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, h, d], key and value [s, b, kv_h, d] -> [s, b, h*d]."""
        length, batch = query.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.window is not None and length > self.window:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - self.window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


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


def layer_spec(config: TransformerConfig, backend: Backend) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers GPTModel is built of: transformer-engine's where the backend has it, else the local ones above."""
    if backend.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RmsNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RmsNorm)
