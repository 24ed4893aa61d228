"""Every tensor of every architecture, cut and put together again, bit for bit. No megatron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collab_megatron.convert.exporter import tensor_plan
from collab_megatron.convert.layout import read_hf_config
from collab_megatron.convert.loader import SafetensorsFolder, load_hf_weights
from collab_megatron.convert.reshape import gather, merge_qkv, split_qkv
from collab_megatron.convert.spec import ModelSpec, model_spec
from collab_megatron.convert.tables import canonical_name, rows
from tests.parallel.tiny import KINDS, make_model


class Shard(nn.Module):
    """Stands for one rank's Megatron model: parameters by Megatron's names, of the shapes that the table implies."""

    def __init__(self, spec: ModelSpec, tp_size: int) -> None:
        super().__init__()
        self.by_name: dict[str, nn.Parameter] = {}
        for row in rows(spec):
            shapes = [[spec.dims[dim] for dim in dims] for dims in row.shapes]
            if row.is_vocab:
                shapes[0][0] = spec.padded_vocab(tp_size)
            shape = [sum(s[0] for s in shapes), *shapes[0][1:]]
            if row.cut is not None:
                shape[row.cut] //= tp_size
            self.by_name[row.megatron] = nn.Parameter(torch.full(shape, float("nan")))

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.by_name.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_round_trip_is_exact(tmp_path: Path, kind: str, tp_size: int) -> None:
    folder = make_model(tmp_path, kind)
    spec = model_spec(read_hf_config(folder))
    shards = [Shard(spec, tp_size) for _ in range(tp_size)]
    for rank, shard in enumerate(shards):
        load_hf_weights(shard, spec, folder, tp_rank=rank, tp_size=tp_size)
    back: dict[str, Tensor] = {}
    for row in rows(spec):
        back.update(zip(row.hf, gather(row, [s.by_name[row.megatron] for s in shards], spec), strict=True))
    with SafetensorsFolder(folder) as source:
        assert back.keys() == source.names
        for name, tensor in back.items():
            assert torch.equal(tensor, source.read(name, tuple(tensor.shape), None, 0, 0)), name
    assert list(back) == [info.name for info in tensor_plan(spec, torch.float32)]
    assert all(back[info.name].shape == info.shape for info in tensor_plan(spec, torch.float32))


def test_queries_stand_with_their_key_and_value() -> None:
    q, k, v = torch.arange(8.0)[:, None], torch.arange(10.0, 14.0)[:, None], torch.arange(20.0, 24.0)[:, None]
    fused = merge_qkv(q, k, v, kv_heads=2, head_dim=2)
    assert fused[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(fused, kv_heads=2, head_dim=2), (q, k, v), strict=True))


def test_tied_models_have_no_output_projection_and_padding_is_even(tmp_path: Path) -> None:
    spec = model_spec(read_hf_config(make_model(tmp_path, "llama")))
    assert "lm_head.weight" not in {info.name for info in tensor_plan(spec, torch.float32)}
    assert spec.padded_vocab(1) == spec.padded_vocab(2) == 256
    assert spec.padded_vocab(3) % 3 == 0


def test_fused_norms_of_transformer_engine_have_the_tables_names() -> None:
    assert (
        canonical_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight")
        == "decoder.layers.3.pre_mlp_layernorm.weight"
    )
    assert canonical_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
