"""Every tensor of every architecture and layout, cut and put together again, bit for bit. No megatron, no processes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from collab_megatron.config.sections import ParallelSection
from collab_megatron.model.folder import read_hf_config
from collab_megatron.model.layout import check_layout
from collab_megatron.model.spec import ARCHITECTURES, ModelSpec, model_spec
from collab_megatron.model.tables import EMBEDDING, FINAL_NORM, canonical_name, layer_rows, rows
from collab_megatron.trainer.convert.buckets import tensor_plan
from collab_megatron.trainer.convert.exporter import hf_tensors
from collab_megatron.trainer.convert.loader import SafetensorsFolder, load_hf_weights
from collab_megatron.trainer.convert.placement import local_parameters, local_rows, stage_of
from collab_megatron.trainer.convert.reshape import gather, join, merge_qkv, split, split_qkv
from tests.trainer.convert.fake_ranks import make_ranks, one_rank, whole_tensors
from tests.trainer.parallel.tiny import KINDS, config_of, make_model


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], ParallelSection]:
    """A config.json and a layout that fits it."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    tensor, pipeline, interleave, expert, data = (one_of(1, 2, 3), one_of(1, 2, 3), one_of(1, 2), 1, one_of(1, 2))
    interleave = interleave if pipeline > 1 else 1
    name = draw(st.sampled_from(sorted(ARCHITECTURES)))
    config = {
        "architectures": [name],
        "num_key_value_heads": tensor * one_of(1, 2),
        "head_dim": one_of(2, 4, 6),
        "hidden_size": one_of(8, 10),
        "intermediate_size": tensor * draw(st.integers(1, 5)),
        "num_hidden_layers": pipeline * interleave * one_of(1, 2),
        "vocab_size": draw(st.integers(3, 200)),
        "tie_word_embeddings": one_of(True, False),
    }
    config["num_attention_heads"] = config["num_key_value_heads"] * one_of(1, 2, 7)
    if ARCHITECTURES[name].experts:
        expert = one_of(*(n for n in (1, 2, 3, 4, 6) if tensor * data % n == 0))
        config["num_experts"] = expert * one_of(1, 2) * 2
        config["num_experts_per_tok"] = 2
        config["moe_intermediate_size"] = draw(st.integers(1, 5))
    section = ParallelSection(
        tensor=tensor,
        pipeline=pipeline,
        interleave=interleave,
        expert=expert,
        data=data,
        sequence_parallel=tensor > 1,
    )
    return config, section


def random_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {info.name: torch.randn(info.shape, generator=generator) for info in tensor_plan(spec, torch.float32)}


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_layout_loads_and_gives_back_every_tensor(case: tuple[dict[str, Any], ParallelSection]) -> None:
    config, parallel = case
    check_layout(config, parallel)
    spec = model_spec(config)
    tensors = random_tensors(spec)
    ranks = make_ranks(spec, parallel)
    with tempfile.TemporaryDirectory() as name:
        save_file(tensors, Path(name) / "model.safetensors")
        for rank in ranks:
            load_hf_weights(rank.chunks, spec, Path(name), rank.grid)
    for rank in ranks:
        for parameter in local_parameters(rank.chunks, spec, rank.grid).values():
            assert parameter.isfinite().all(), "a parameter was not filled"
    back = dict(whole_tensors(spec, ranks))
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@settings(max_examples=40, deadline=None)
@given(cases())
def test_join_and_split_are_inverses_on_every_row(case: tuple[dict[str, Any], ParallelSection]) -> None:
    spec, tp_size = model_spec(case[0]), case[1].tensor
    tensors = random_tensors(spec)
    for row in [EMBEDDING, FINAL_NORM, *layer_rows(spec, 0)]:
        whole = [tensors[name] for name in row.hf]
        before = [tensor.clone() for tensor in whole]
        if row.is_vocab:
            whole = [torch.cat([t, t.new_zeros(spec.padded_vocab(tp_size) - spec.vocab, t.shape[1])]) for t in whole]
        size = 1 if row.cut is None else tp_size
        cut = [[t] if row.cut is None else t.chunk(size, dim=row.cut) for t in whole]
        shards = [join(row, [pieces[rank] for pieces in cut], spec, size) for rank in range(size)]
        for rank, shard in enumerate(shards):
            again = split(row, shard, spec, size)
            assert all(torch.equal(a, pieces[rank]) for a, pieces in zip(again, cut, strict=True)), row.megatron
        assert all(torch.equal(a, b) for a, b in zip(gather(row, shards, spec), before, strict=True)), row.megatron
        assert all(torch.equal(tensors[name], b) for name, b in zip(row.hf, before, strict=True)), "changed its input"


@settings(max_examples=40, deadline=None)
@given(cases())
def test_every_row_has_one_owner_and_stages_are_even(case: tuple[dict[str, Any], ParallelSection]) -> None:
    config, parallel = case
    spec = model_spec(config)
    held = [row.megatron for rank in make_ranks(spec, parallel) for row in local_rows(spec, rank.grid)]
    for row in rows(spec):
        copies = parallel.tensor * (parallel.expert if row.expert is None else 1)
        if spec.tied and row.megatron == EMBEDDING.megatron and parallel.pipeline > 1:
            copies *= 2  # the last stage's output projection
        assert held.count(row.megatron) == copies, row.megatron
    norms = [row for row in rows(spec) if row.megatron.endswith("input_layernorm.weight")]
    stages = [stage_of(row, spec, pipeline=parallel.pipeline, interleave=parallel.interleave) for row in norms]
    assert [stages.count(s) for s in range(parallel.pipeline)] == [spec.layers // parallel.pipeline] * parallel.pipeline


def test_interleaved_chunks_go_round_the_stages() -> None:
    spec = replace(model_spec(hf_config("llama")), layers=8)
    norms = [row for row in rows(spec) if row.megatron.endswith("input_layernorm.weight")]
    assert [stage_of(row, spec, pipeline=2) for row in norms] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [stage_of(row, spec, pipeline=2, interleave=2) for row in norms] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [stage_of(row, spec, pipeline=4, interleave=2) for row in norms] == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_writes_is_read_and_streamed(tmp_path: Path, kind: str) -> None:
    """Names, shapes and order as the plan says; a single rank needs no process group."""
    folder = make_model(tmp_path, kind)
    spec = model_spec(read_hf_config(folder))
    rank = one_rank(spec)
    load_hf_weights(rank.chunks, spec, folder, rank.grid)
    back = dict(hf_tensors(rank.chunks, spec, rank.grid))
    plan = tensor_plan(spec, torch.float32)
    assert [(name, tuple(tensor.shape)) for name, tensor in back.items()] == [(info.name, info.shape) for info in plan]
    with SafetensorsFolder(folder) as source:
        assert back.keys() == source.names
        for name, tensor in back.items():
            assert tensor.is_contiguous()
            assert torch.equal(tensor, source.read(name, tuple(tensor.shape), None, 0, 0)), name


def test_queries_stand_with_their_key_and_value() -> None:
    q, k, v = torch.arange(8.0)[:, None], torch.arange(10.0, 14.0)[:, None], torch.arange(20.0, 24.0)[:, None]
    fused = merge_qkv(q, k, v, kv_heads=2, head_dim=2)
    assert fused[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(fused, kv_heads=2, head_dim=2), (q, k, v), strict=True))


def test_tied_models_have_no_output_projection_and_padding_is_even() -> None:
    spec = model_spec(hf_config("llama"))
    assert "lm_head.weight" not in {info.name for info in tensor_plan(spec, torch.float32)}
    assert spec.padded_vocab(1) == spec.padded_vocab(2) == 256
    assert spec.padded_vocab(3) % 3 == 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("layers.3.mlp.linear_fc1.layer_norm_weight", "layers.3.pre_mlp_layernorm.weight"),
        ("layers.3.self_attention.linear_qkv.layer_norm_weight", "layers.3.input_layernorm.weight"),
        ("layers.3.mlp.experts.linear_fc1.weight12", "layers.3.mlp.experts.local_experts.12.linear_fc1.weight"),
        ("layers.3.mlp.experts.linear_fc2.weight0", "layers.3.mlp.experts.local_experts.0.linear_fc2.weight"),
        ("layers.3.mlp.linear_fc1.weight", "layers.3.mlp.linear_fc1.weight"),
        ("layers.3.pre_mlp_layernorm.weight", "layers.3.pre_mlp_layernorm.weight"),
        ("final_layernorm.weight", "final_layernorm.weight"),
    ],
)
def test_names_of_transformer_engine_become_the_tables(theirs: str, ours: str) -> None:
    assert canonical_name("decoder." + theirs) == "decoder." + ours


def test_parameters_without_a_row_and_rows_without_a_parameter_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "qwen3moe")
    spec = model_spec(read_hf_config(folder))
    rank = one_rank(spec)
    rank.chunks[0].by_name["decoder.layers.0.mlp.shared_experts.linear_fc1.weight"] = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match=r"without a row in tables\.py: .*shared_experts"):
        local_parameters(rank.chunks, spec, rank.grid)
    rank = one_rank(spec)
    del rank.chunks[0].by_name["decoder.layers.1.mlp.router.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.mlp\.router"):
        load_hf_weights(rank.chunks, spec, folder, rank.grid)


def hf_config(kind: str) -> dict[str, Any]:
    name = {"llama": "LlamaForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}[kind]
    return {**config_of(kind).to_dict(), "architectures": [name]}
