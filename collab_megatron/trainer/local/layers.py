"""Layers in plain torch for any device, with packed rows and sequence parallelism, in megatron's local layer spec.

Upstream's local attention builds the whole score matrix and does not know packed rows, and its norm refuses sequence
parallelism. transformer-engine has all three but needs CUDA. Legend: s sequence, b batch, t tokens of a packed row,
h heads of this rank, d head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from collab_megatron.trainer.actor.backend import Backend
from collab_megatron.trainer.batching.micro_batch import PackedGroup, on_device
from collab_megatron.trainer.local import te_attention, varlen
from collab_megatron.trainer.local.kernels import linear, rms_norm, rope, short_attention, swiglu

SHORT = 256  # tokens up to which short_attention trains faster than torch's CPU kernel
COPIES = 2  # keys per token of a group, if its prefix is copied for each reply and shorter replies are padded; above
# this replies are attended to one by one, and their copies are recomputed in the backward pass


@dataclass
class Packing(PackedSeqParams):
    """Division of a packed row; the lengths also as numbers, so that no code waits for a device to read them."""

    groups: tuple[PackedGroup, ...] = ()

    @classmethod
    def of(cls, groups: tuple[PackedGroup, ...], device: torch.device) -> Packing:
        """transformer-engine reads the boundaries, which cannot express a shared prefix: use none with it."""
        lengths = tuple(length for prefix, own in groups for length in ((prefix, *own) if prefix else own))
        ends = on_device(torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32), device)
        longest = max(group.prefix + max(group.own) for group in groups)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            groups=groups,
        )


class SdpaAttention(MegatronModule):
    """Causal core attention through torch's scaled_dot_product_attention.

    Padding is on the right, where a causal mask hides it from every real token. A packed row is attended to group by
    group, which also saves the work on padding; the replies to one prompt are one call.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, **_: Any) -> None:
        """The other keywords of upstream's DotProductAttention are ignored."""
        super().__init__(config=config)
        self.scale = softmax_scale
        window = config.window_size
        self.window = window[0] + 1 if window is not None else None  # visible tokens, with the token itself

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
        groups = packed_seq_params.groups
        shared = any(group.prefix for group in groups)
        windowed = self.window is not None
        if not shared and varlen.usable(query.device, query.dtype, query.shape[-1], windowed):
            ends, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            out = varlen.attend(query, key, value, ends, longest, scale=self.scale, window=self.window)
            return out.reshape(query.shape[0], -1)
        parts = zip(*(x.split([g.prefix + sum(g.own) for g in groups]) for x in (query, key, value)), strict=True)
        outs = [out for group, qkv in zip(groups, parts, strict=True) for out in self._group(group, *qkv)]
        return torch.cat(outs).reshape(query.shape[0], -1)

    def _group(self, group: PackedGroup, query: Tensor, key: Tensor, value: Tensor) -> Iterator[Tensor]:
        """query [t, h, d], key and value [t, kv_h, d] of one group -> the t tokens as parts [.., h, d], in order."""
        prefix, own = group
        if prefix:
            yield self._attend(*(x[:prefix].transpose(0, 1)[None] for x in (query, key, value)))[0].transpose(0, 1)
        elif len(set(own)) > 1:  # nothing shared: each at its own length, no padding
            for qkv in zip(*(x.split(own) for x in (query, key, value)), strict=True):
                yield self._attend(*(x.transpose(0, 1)[None] for x in qkv))[0].transpose(0, 1)
            return
        longest = prefix + max(own)
        before, rest = (key[:prefix], value[:prefix]), [x[prefix:] for x in (query, key, value)]
        if longest <= SHORT or len(own) * longest <= COPIES * (prefix + sum(own)):
            yield self._with_prefix(*before, own, *rest)
            return
        for length, qkv in zip(own, zip(*(x.split(own) for x in rest), strict=True), strict=True):
            yield checkpoint(self._with_prefix, *before, (length,), *qkv, use_reentrant=False, preserve_rng_state=False)

    def _with_prefix(self, keys: Tensor, values: Tensor, own: tuple[int, ...], *qkv: Tensor) -> Tensor:
        """keys and values [p, kv_h, d] that come before each of the sequences in q, k, v [t, .., d] -> [t, h, d]."""
        q, k, v = (_stack(x, own) for x in qkv)
        if len(keys):
            k, v = (torch.cat((x.expand(len(own), -1, -1, -1), y), 1) for x, y in ((keys, k), (values, v)))
        out = self._attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        if len(set(own)) == 1:
            return out.flatten(0, 1)
        return torch.cat([x[:n] for x, n in zip(out, own, strict=True)])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, h, s, d], [b, kv_h, s, d] twice -> [b, h, s, d]. If there are more keys than queries, the first keys come
        before all queries."""
        queries, keys = q.shape[2], k.shape[2]
        unwindowed = self.window is None or keys <= self.window
        in_training = q.requires_grad and torch.is_grad_enabled()
        if in_training and unwindowed and keys <= SHORT and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            return short_attention(q, k, v, self.scale)
        grouped = q.shape[1] != k.shape[1]
        if unwindowed and queries == keys:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        seen = _mask(queries, keys, None if unwindowed else self.window, q.dtype, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=grouped)


@functools.lru_cache(maxsize=4)  # one for all layers: autograd keeps it, and would keep a copy per layer of a bool mask
def _mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask to add to scores [queries, keys]: 0 where the key is visible, else -inf."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if window is not None:
        seen = seen.triu(keys - queries + 1 - window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _stack(tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[t, h, d] -> [sequences, longest, h, d], zeros after shorter ones; no copy if all have one length."""
    if len(set(lengths)) == 1:
        return tokens.unflatten(0, (len(lengths), lengths[0]))
    return nn.utils.rnn.pad_sequence(tokens.split(lengths), batch_first=True)


@functools.lru_cache(maxsize=8)  # the same for all layers and for micro-batches of one length
def _cos_sin(angles: Tensor, groups: tuple[PackedGroup, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """angles [s, 1, 1, d], both halves equal -> two [s, 1, 1, d/2]; packed: positions start at 0 in each group, and
    after its prefix in each sequence."""
    half = angles[..., : angles.shape[-1] // 2]
    if groups:
        spans = [span for p, own in groups for span in ((0, p), *((p, p + length) for length in own))]
        half = torch.cat([half[start:stop] for start, stop in spans])
    return half.cos().to(dtype), half.sin().to(dtype)


class CausalSelfAttention(SelfAttention):
    """Upstream's attention without the parts for inference and fused kernels: project, rotate, attend, project."""

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, hidden], a part of s under sequence parallelism; rotary_pos_emb [s, 1, 1, d]."""
        assert not self.checkpoint_core_attention
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        groups = packed_seq_params.groups if isinstance(packed_seq_params, Packing) else ()
        cos, sin = _cos_sin(rotary_pos_emb, groups, query.dtype)
        query, key = rope(query, cos, sin), rope(key, cos, sin)
        if groups:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        out = self.core_attention(query, key, value, packed_seq_params=packed_seq_params)
        result: tuple[Tensor, Tensor | None] = self.linear_proj(out.view(-1, hidden_states.shape[1], out.shape[-1]))
        return result


def _alone(layer: Any) -> bool:
    """Whether a parallel linear layer has no other tensor-parallel rank."""
    return layer.tp_group is None or layer.tp_group.size() == 1


class ColumnLinear(ColumnParallelLinear):
    """Upstream's layer; with one tensor-parallel rank the weight gradient goes straight into the buffer."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[n, in] -> [n, out / tp], and the bias if the caller adds it."""
        if args or kwargs or not _alone(self):
            return super().forward(input_, *args, **kwargs)
        skipped = self.bias if self.skip_bias_add else None
        return linear(input_, self.weight, None if self.skip_bias_add else self.bias), skipped


class RowLinear(RowParallelLinear):
    """Upstream's layer; with one tensor-parallel rank the weight gradient goes straight into the buffer."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[n, in / tp] -> [n, out], and the bias if the caller adds it."""
        if not _alone(self):
            return super().forward(input_)
        skipped = self.bias if self.skip_bias_add else None
        return linear(input_, self.weight, None if self.skip_bias_add else self.bias), skipped


class GatedMlp(MLP):
    """Upstream's dense MLP with the gated activation as one operation."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(
            config, MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear), ffn_hidden_size=config.ffn_hidden_size
        )

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] -> the same shape; no bias."""
        gate_and_up, _bias = self.linear_fc1(hidden_states)
        result: tuple[Tensor, Tensor | None] = self.linear_fc2(swiglu(gate_and_up))
        return result


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
        return rms_norm(x, self.weight, self.eps)


def layer_spec(
    config: TransformerConfig, backend: Backend, model_chunk: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of GPTModel: transformer-engine's if the backend has it, else the local ones above. Where
    transformer-engine has no fast attention for this model, its layers get the one above; not with context
    parallelism, which only its own can do.

    model_chunk: the chunk of an interleaved pipeline stage; None if a stage is one chunk.
    """
    if backend.transformer_engine:
        whole: Any = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if config.context_parallel_size == 1 and not _is_fast_in_transformer_engine(config, backend):
            whole.submodules.self_attention.submodules.core_attention = SdpaAttention
        return cast(ModuleSpec, whole)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RmsNorm
    if config.num_moe_experts:
        # its name in checkpoints is that of transformer-engine's layers, which fuse this norm into a dense MLP only
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    else:
        parts.mlp = GatedMlp
    parts.self_attention.module = CausalSelfAttention
    attention = parts.self_attention.submodules
    attention.core_attention = SdpaAttention
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    num_layers = get_num_layers_to_build(config, vp_stage=model_chunk)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RmsNorm)


def _is_fast_in_transformer_engine(config: TransformerConfig, backend: Backend) -> bool:
    """Asked with the heads of one rank; a rank has one key head at least."""
    parts, size = config.tensor_model_parallel_size, config.kv_channels
    assert config.num_query_groups is not None  # both are set by transformer_config
    assert size is not None
    heads = (config.num_attention_heads // parts, max(1, config.num_query_groups // parts), size)
    window = config.window_size[0] + 1 if config.window_size is not None else None
    return te_attention.is_fast(backend.device, config.params_dtype, heads, window)
