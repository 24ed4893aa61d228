"""Rows of the table of bad inputs: config, weights, tokenizer and template of model folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.config.sound import MODEL, model_with, rewrite_header
from tests.config.table import Row, World

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


def spoilt(name: str, change: Callable[[Path], object], *says: str, program: str = "train_rl") -> Row:
    return Row(name, program, ("model.path=DIR/model",), says, prepare=model_with(change))


def config(name: str, changes: dict[str, Any], *says: str) -> Row:
    """config.json with `changes`; None removes a key."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return spoilt(f"config-json-{name}", change, *says)


def write(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, share: float) -> Callable[[Path], object]:
    """The file without its end."""

    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda folder: rewrite_header(folder / MODEL, change)


def entry(key: str, value: Any) -> Callable[[Path], object]:
    """Another claim of the header about one tensor."""
    return header(lambda content: content[NORM].update({key: value}))


def index(content: Any) -> Callable[[Path], object]:
    return write(INDEX, content if isinstance(content, bytes) else json.dumps(content).encode())


def folder_in_place(file: str, folder: Path) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()


def remove(*files: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def _empty_folder(own: Path, world: World) -> None:
    (own / "model").mkdir()


def _other_weights(folder: Path) -> None:
    (folder / MODEL).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def _architecture(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "architectures": [name]}))

    return change


PATHS = [
    Row("model-path-missing", "train_rl", ("model.path=/no-such-model",), ("/no-such-model", "folder")),
    Row("model-path-empty", "train_rl", ("model.path=",), ("model.path", "string")),
    Row("model-path-blank", "train_rl", ('model.path=""',), ("model.path", "empty")),
    Row("model-path-nul", "train_rl", ('model.path="a\\0b"',), ("model.path", "NUL")),
    Row("model-path-is-a-file", "train_rl", ("model.path=WORLD/train.parquet",), ("train.parquet", "folder")),
    Row("model-path-is-empty", "train_rl", ("model.path=DIR/model",), ("config.json",), prepare=_empty_folder),
    Row("model-path-too-long", "train_rl", ("model.path=" + "a" * 5000,), ("model.path", "too long")),
    Row("evaluate-model-path-too-long", "evaluate", ("model.path=" + "a" * 300,), ("model.path", "too long")),
    Row("sft-model-path-missing", "train_sft", ("model.path=/no-such-model",), ("/no-such-model", "folder")),
    Row("evaluate-model-path-missing", "evaluate", ("model.path=/no-such-model",), ("/no-such-model", "folder")),
]

CONFIGS = [
    spoilt("config-json-missing", remove("config.json"), "config.json"),
    spoilt("config-json-not-utf8", write("config.json", b'{"a": "\xff"}'), "config.json", "cannot be read"),
    spoilt("config-json-not-json", write("config.json", b"{"), "config.json", "cannot be read"),
    spoilt("config-json-empty-file", write("config.json", b""), "config.json", "cannot be read"),
    spoilt("config-json-list", write("config.json", b"[]"), "config.json", "JSON object"),
    spoilt("config-json-deep", write("config.json", b"[" * 100_000), "config.json", "nested"),
    spoilt("config-json-is-a-folder", partial(folder_in_place, "config.json"), "config.json", "cannot be read"),
    spoilt("config-json-not-utf8-sft", write("config.json", b"\xff"), "config.json", program="train_sft"),
    spoilt("config-json-not-utf8-evaluate", write("config.json", b"\xff"), "config.json", program="evaluate"),
    config("architectures-text", {"architectures": "LlamaForCausalLM"}, "architectures", "list", "LlamaForCausalLM"),
    config("architectures-number", {"architectures": 5}, "architectures", "list"),
    config("architectures-of-numbers", {"architectures": [5]}, "architectures", "list"),
    config("architectures-empty", {"architectures": [], "model_type": "gpt2"}, "gpt2", "LlamaForCausalLM"),
    spoilt("architecture-unknown", _architecture("MambaForCausalLM"), "architecture", "MambaForCausalLM", "supported"),
    config("no-hidden-size", {"hidden_size": None}, "hidden_size"),
    config("hidden-size-text", {"hidden_size": "wide"}, "hidden_size", "wide", "number"),
    config("hidden-size-list", {"hidden_size": [256]}, "hidden_size", "number"),
    config("hidden-size-zero", {"hidden_size": 0}, "hidden_size", "0"),
    config("hidden-size-bool", {"hidden_size": True}, "hidden_size", "number"),
    config("hidden-size-fraction", {"hidden_size": 256.5}, "hidden_size", "256.5"),
    config("layers-negative", {"num_hidden_layers": -2}, "num_hidden_layers", "-2"),
    config("layers-zero", {"num_hidden_layers": 0}, "num_hidden_layers", "0"),
    config("heads-zero", {"num_attention_heads": 0}, "num_attention_heads", "0"),
    config("kv-heads-negative", {"num_key_value_heads": -1}, "num_key_value_heads", "-1"),
    config("kv-heads-do-not-divide", {"num_key_value_heads": 3}, "num_key_value_heads", "3", "4"),
    config("head-dim-text", {"head_dim": "x"}, "head_dim", "number"),
    config("vocab-negative", {"vocab_size": -1}, "vocab_size", "-1"),
    config("ffn-zero", {"intermediate_size": 0}, "intermediate_size", "0"),
    config("positions-text", {"max_position_embeddings": "many"}, "max_position_embeddings", "many"),
    config("positions-negative", {"max_position_embeddings": -5}, "max_position_embeddings", "-5"),
    config("eps-text", {"rms_norm_eps": "x"}, "rms_norm_eps", "number"),
    config("eps-nan", {"rms_norm_eps": float("nan")}, "rms_norm_eps", "nan"),
    config("tied-text", {"tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
    config("rope-parameters-text", {"rope_parameters": "x"}, "rope_parameters", "mapping"),
    config("rope-scaling-list", {"rope_scaling": [1]}, "rope_scaling", "mapping"),
    config("rope-theta-text", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta", "number"),
    config("rope-factor-missing", {"rope_parameters": {"rope_type": "linear"}}, "factor"),
    config("rope-kind", {"rope_parameters": {"rope_type": "yarn"}}, "yarn", "supported"),
    config("activation", {"hidden_act": "gelu"}, "hidden_act", "silu"),
    config(
        "window-text",
        {"architectures": ["MistralForCausalLM"], "sliding_window": "wide"},
        "sliding_window",
        "number",
    ),
    config("shapes", {"intermediate_size": 1024}, "shape"),
    config("more-layers", {"num_hidden_layers": 4}, "layers.2", "missing"),
    config("fewer-layers", {"num_hidden_layers": 1}, "layers.1", "does not have"),
]

WEIGHTS = [
    spoilt("truncated-weights", cut(MODEL, 0.5), MODEL, "truncated", "download it again"),
    spoilt("truncated-weights-by-one-byte", cut(MODEL, 1 - 1e-7), MODEL, "truncated"),
    spoilt("truncated-weights-sft", cut(MODEL, 0.9), MODEL, "truncated", program="train_sft"),
    spoilt("truncated-weights-evaluate", cut(MODEL, 0.9), MODEL, "truncated", program="evaluate"),
    spoilt("truncated-header", cut(MODEL, 0.00001), MODEL),
    spoilt("weights-empty-file", write(MODEL, b""), MODEL, "download it again"),
    spoilt("weights-no-safetensors", write(MODEL, b"PK\x03\x04" + b"\0" * 100), MODEL),
    spoilt("weights-header-huge", write(MODEL, b"\xff" * 64), MODEL),
    spoilt("weights-header-not-json", write(MODEL, (4).to_bytes(8, "little") + b"abcd"), MODEL),
    spoilt("weights-header-list", write(MODEL, (2).to_bytes(8, "little") + b"[]"), MODEL),
    spoilt("weights-header-not-utf8", write(MODEL, (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc"), MODEL),
    spoilt("weights-is-a-folder", partial(folder_in_place, MODEL), MODEL),
    spoilt("weights-missing", remove(MODEL), "safetensors", "convert"),
    spoilt("weights-of-torch", _other_weights, "safetensors", "convert"),
    spoilt("weights-dtype", entry("dtype", "I32"), NORM, "I32", "convert"),
    spoilt("weights-dtype-unknown", entry("dtype", "F99"), NORM, "F99"),
    spoilt("weights-shape", entry("shape", [255]), NORM, "255"),
    spoilt("weights-shape-text", entry("shape", "wide"), MODEL),
    spoilt("weights-shape-negative", entry("shape", [-256]), NORM),
    spoilt("weights-offsets", entry("data_offsets", [0, 4]), NORM, "bytes"),
    spoilt("weights-offsets-backwards", entry("data_offsets", [8, 4]), NORM),
    spoilt("weights-offsets-missing", header(lambda content: content[NORM].pop("data_offsets")), MODEL),
    spoilt("weights-tensor-missing", header(lambda content: content.pop(NORM)), NORM, "missing"),
    spoilt("weights-tensor-unknown", header(lambda content: content.update(own=content[NORM])), "such as own"),
    spoilt("index-not-json", index(b"{"), INDEX),
    spoilt("index-not-utf8", index(b"\xff"), INDEX),
    spoilt("index-without-map", index({}), INDEX, "weight_map"),
    spoilt("index-map-list", index({"weight_map": [1]}), INDEX, "weight_map"),
    spoilt("index-map-of-numbers", index({"weight_map": {NORM: 5}}), INDEX, "weight_map"),
    spoilt("index-file-missing", index({"weight_map": {NORM: "none.safetensors"}}), "none.safetensors"),
    spoilt("index-outside", index({"weight_map": {NORM: "../../x.safetensors"}}), INDEX, "../"),
    spoilt("index-tensor-elsewhere", index({"weight_map": {NORM: MODEL, "own": MODEL}}), "own", INDEX),
]

TOKENIZERS = [
    spoilt("tokenizer-missing", remove("tokenizer.json"), "tokenizer", "copy"),
    spoilt("tokenizer-not-json", write("tokenizer.json", b"{"), "tokenizer"),
    spoilt("tokenizer-not-utf8", write("tokenizer.json", b"\xff"), "tokenizer"),
    spoilt("tokenizer-other-json", write("tokenizer.json", b'{"a": 1}'), "tokenizer"),
    spoilt("tokenizer-config-not-json", write("tokenizer_config.json", b"{"), "tokenizer"),
    spoilt("tokenizer-config-list", write("tokenizer_config.json", b"[]"), "tokenizer"),
    spoilt("template-missing", remove("chat_template.jinja"), "chat template", "chat_template.jinja"),
    spoilt("template-syntax", write("chat_template.jinja", b"{% for %}"), "chat template"),
    spoilt("template-raises", write("chat_template.jinja", b"{{ raise_exception('no') }}"), "chat template"),
    spoilt("template-unknown-name", write("chat_template.jinja", b"{{ a.b.c }}"), "chat template"),
    spoilt("template-constant", write("chat_template.jinja", b"hello"), "chat template"),
    spoilt("template-not-utf8", write("chat_template.jinja", b"\xff"), "tokenizer"),
]

ROWS = (*PATHS, *CONFIGS, *WEIGHTS, *TOKENIZERS)
