"""Each mistake of a user gets one sentence that names it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import UserError
from collab_megatron.model.folder import read_hf_config, resolve_model_folder
from collab_megatron.model.layout import check_layout
from collab_megatron.model.spec import model_spec
from collab_megatron.trainer.convert.finite import not_finite
from collab_megatron.trainer.convert.loader import load_hf_weights
from tests.trainer.convert.fake_ranks import make_ranks, one_rank
from tests.trainer.parallel.tiny import config_of, make_model


def hf_config(**changes: Any) -> dict[str, Any]:
    return {**config_of("llama").to_dict(), "architectures": ["LlamaForCausalLM"], **changes}


def of_kind(kind: str, **changes: Any) -> dict[str, Any]:
    name = {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3moe": "Qwen3MoeForCausalLM"}[kind]
    return {**config_of(kind).to_dict(), "architectures": [name], **changes}


YARN = {"rope_type": "yarn", "rope_theta": 1e4}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            hf_config(architectures=["GPT2LMHeadModel"]),
            "the model's architecture is GPT2LMHeadModel; supported are LlamaForCausalLM, MistralForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM",
        ),
        (hf_config(hidden_act="gelu"), "hidden_act 'gelu'"),
        (hf_config(attention_bias=True), "attention_bias of LlamaForCausalLM is not supported"),
        (hf_config(mlp_bias=True), "mlp_bias of LlamaForCausalLM is not supported"),
        (hf_config(quantization_config={"bits": 4}), "quantization_config of LlamaForCausalLM is not supported"),
        (of_kind("qwen2", use_sliding_window=True), "use_sliding_window of Qwen2ForCausalLM is not supported"),
        (hf_config(rope_parameters=YARN), "type 'yarn'; supported are default, linear, llama3"),
        (hf_config(rope_parameters=PARTIAL), r"partial_rotary_factor=0\.5 is not supported"),
        (of_kind("qwen3moe", mlp_only_layers=[0]), "dense layers between mixture-of-experts layers"),
        (of_kind("qwen3moe", decoder_sparse_step=2), "dense layers between mixture-of-experts layers"),
        (of_kind("qwen3moe", shared_expert_intermediate_size=8), "shared experts of Qwen3MoeForCausalLM"),
        (of_kind("qwen3moe", num_experts_per_tok=5), "num_experts_per_tok=5 of 4 experts"),
        (of_kind("qwen3moe", num_experts_per_tok=1), "num_experts_per_tok=1 of 4 experts and norm_topk_prob=True"),
    ],
)
def test_models_that_are_not_supported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(config, ParallelSection())


MOE = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("config", "parallel", "message"),
    [
        (hf_config(), {"tensor": 4}, "tensor=4 does not divide the model's 2 key/value heads; it may be 1, 2"),
        (hf_config(), {"tensor": 3}, "tensor=3 does not divide the model's 4 attention heads; it may be 1, 2"),
        (
            hf_config(intermediate_size=9),
            {"tensor": 2},
            "tensor=2 does not divide the model's 9 MLP columns; it may be 1$",
        ),
        (hf_config(), {"pipeline": 3}, "pipeline=3 does not divide the model's 2 layers; it may be 1, 2"),
        (hf_config(), {"interleave": 2}, r"interleave=2 needs parallel\.pipeline above 1: set parallel\.interleave=1"),
        (
            hf_config(num_hidden_layers=12),
            {"pipeline": 2, "interleave": 4},
            "interleave=4 does not divide the 6 layers of each of 2 pipeline stages; it may be 1, 2, 3, 6",
        ),
        (
            hf_config(),
            {"expert": 2, "data": 2},
            "expert=2 needs a mixture of experts, but the model is dense: set it to 1",
        ),
        (
            of_kind("qwen3moe"),
            {"expert": 3, "data": 6},
            "expert=3 does not divide the model's 4 experts; it may be 1, 2$",
        ),
        (
            of_kind("qwen3moe"),
            {"expert": 4, "tensor": 2, **MOE},
            r"expert=4 does not divide parallel\.tensor \* context \* data = 2; it may be 1, 2$",
        ),
        (of_kind("qwen3moe"), {"tensor": 2}, r"parallel\.tensor=2 needs parallel\.sequence_parallel=true"),
        (of_kind("mistral"), {"context": 2}, r"sliding_window=8: set parallel\.context=1"),
    ],
)
def test_layouts_that_cannot_be(config: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(config, ParallelSection(**parallel))


@pytest.mark.parametrize(
    ("config", "parallel"),
    [
        (hf_config(), {"tensor": 2, "pipeline": 2, "data": 3}),
        (hf_config(num_hidden_layers=4), {"pipeline": 2, "interleave": 2}),
        (hf_config(), {"sequence_parallel": True}),
        (hf_config(), {"context": 2}),
        (of_kind("qwen3moe", intermediate_size=7), {"tensor": 2, "expert": 4, "data": 2, **MOE}),
        (of_kind("qwen3moe", num_experts_per_tok=1, norm_topk_prob=False), {"expert": 2, "context": 2}),
    ],
)
def test_layouts_that_can_be(config: dict[str, Any], parallel: dict[str, Any]) -> None:
    check_layout(config, ParallelSection(**parallel))


def test_experts_are_counted_under_either_key() -> None:
    old, new = of_kind("qwen3moe", num_experts=4), of_kind("qwen3moe")
    del old["num_local_experts"]
    assert model_spec(old) == model_spec(new)
    assert model_spec(new).experts == 4


def test_a_missing_key_is_named() -> None:
    config = hf_config()
    del config["intermediate_size"]
    with pytest.raises(UserError, match="intermediate_size"):
        check_layout(config, ParallelSection())


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_hf_config(tmp_path)
    with pytest.raises(UserError, match="no model folder"):
        resolve_model_folder("no/such/folder/anywhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"tensor model\.norm\.weight of shape \[64\] is missing in .*broken"),
        (
            "shape",
            r"tensor model\.norm\.weight in .*model\.safetensors has shape \[32\], but config\.json asks for \[64\]",
        ),
        ("unknown", r"does not have, such as model\.layers\.0\.self_attn\.q_proj\.bias"),
        ("torn", r"model\.safetensors cannot be read as a safetensors file"),
        ("none", r"has no \*\.safetensors"),
        ("nan", r"tensor model\.norm\.weight in .*model\.safetensors has 1 of 64 values that are NaN or infinite"),
        ("inf", r"tensor model\.layers\.1\.mlp\.up_proj\.weight in .*safetensors has 2 of .* NaN or infinite"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: str, message: str) -> None:
    folder = make_model(tmp_path / "broken", "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "shape":
        tensors["model.norm.weight"] = torch.ones(32)
    elif change == "unknown":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    elif change == "nan":
        tensors["model.norm.weight"][7] = torch.nan
    elif change == "inf":  # their sum is not infinite
        tensors["model.layers.1.mlp.up_proj.weight"][3, :2] = torch.tensor([torch.inf, -torch.inf])
    save_file(tensors, file)
    if change == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    elif change == "none":
        file.unlink()
    spec = model_spec(read_hf_config(folder))
    rank = one_rank(spec)
    with pytest.raises(UserError, match=message):
        load_hf_weights(rank.chunks, spec, folder, rank.grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_values_that_are_no_numbers_are_found(dtype: torch.dtype) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)  # finite, and their sum is not
    ruined = [torch.zeros(3, 1000, dtype=dtype) for _ in range(3)]
    for tensor, value in zip(ruined, (torch.nan, torch.inf, -torch.inf), strict=True):
        tensor[1, 500] = value
    fine, empty = torch.ones(4, dtype=dtype), torch.zeros(0, dtype=dtype)
    assert not_finite([]) == []
    assert not_finite([largest, ruined[0], fine, *ruined[1:], empty]) == [1, 3, 4]


def test_a_missing_tensor_is_seen_by_ranks_that_do_not_read_it(tmp_path: Path) -> None:
    """So that no rank waits in a collective for one that has given up."""
    folder = make_model(tmp_path, "qwen3moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    spec = model_spec(read_hf_config(folder))
    ranks = make_ranks(spec, ParallelSection(pipeline=2, expert=2, data=2))
    for rank in ranks:
        with pytest.raises(UserError, match=r"experts\.3\.up_proj\.weight of shape \[48, 64\] is missing"):
            load_hf_weights(rank.chunks, spec, folder, rank.grid)


def test_the_layout_check_needs_neither_torch_nor_megatron(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    code = (
        "import sys; from collab_megatron.model.folder import read_hf_config; "
        "from collab_megatron.model.layout import check_layout; "
        "from collab_megatron.config.sections import ParallelSection; "
        f"check_layout(read_hf_config({str(tmp_path)!r}), ParallelSection(tensor=2)); "
        "print(sorted({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_the_converters_module_wants_two_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    from collab_megatron.trainer.checkpoint import to_hf

    monkeypatch.setattr("sys.argv", ["to_hf", "one"])
    with pytest.raises(UserError, match=r"name two folders: .* STEP_FOLDER OUTPUT"):
        to_hf.main()
