"""What a user gets wrong is answered with one sentence that names it."""

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
from collab_megatron.convert.layout import check_layout, read_hf_config
from collab_megatron.convert.loader import load_hf_weights
from collab_megatron.convert.source import resolve_model_folder
from collab_megatron.convert.spec import model_spec
from collab_megatron.errors import UserError
from tests.parallel.tiny import config_of, make_model


def hf_config(**changes: Any) -> dict[str, Any]:
    return {**config_of("llama").to_dict(), "architectures": ["LlamaForCausalLM"], **changes}


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 1, r"GPT2LMHeadModel; supported are LlamaForCausalLM, Mistral.*Qwen3"),
        ({}, 4, r"parallel\.tensor=4 does not divide the model's 2 key/value heads; it may be 1, 2"),
        ({}, 3, r"parallel\.tensor=3 does not divide the model's 4 attention heads"),
        ({"hidden_act": "gelu"}, 1, "hidden_act 'gelu'"),
        ({"attention_bias": True}, 1, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, 1, "type 'yarn' are not supported"),
    ],
)
def test_layouts_that_cannot_be(changes: dict[str, Any], tensor: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(hf_config(**changes), ParallelSection(tensor=tensor))


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
        ("shape", r"tensor model\.norm\.weight in .*model\.safetensors has shape \[32\]; config\.json asks for \[64\]"),
        ("unknown", r"does not have: \['model\.layers\.0\.self_attn\.q_proj\.bias'\]"),
        ("torn", r"model\.safetensors is missing or not a safetensors file"),
        ("none", r"has no \*\.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change: str, message: str) -> None:
    from tests.convert.test_reshape_and_tables import Shard

    folder = make_model(tmp_path / "broken", "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "shape":
        tensors["model.norm.weight"] = torch.ones(32)
    elif change == "unknown":
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, file)
    if change == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    elif change == "none":
        file.unlink()
    spec = model_spec(read_hf_config(folder))
    with pytest.raises(UserError, match=message):
        load_hf_weights(Shard(spec, 1), spec, folder, tp_rank=0, tp_size=1)


def test_the_layout_check_needs_neither_torch_nor_megatron(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    code = (
        "import sys; from collab_megatron.convert.layout import check_layout, read_hf_config; "
        "from collab_megatron.config.sections import ParallelSection; "
        f"check_layout(read_hf_config({str(tmp_path)!r}), ParallelSection(tensor=2)); "
        "print(sorted({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
