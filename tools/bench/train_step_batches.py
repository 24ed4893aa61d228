"""The models and batches of tools/bench/train_step.py."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample

Dtype = Literal["float32", "bfloat16"]
Kind = Literal["sft", "grpo"]
KINDS: tuple[Kind, ...] = ("sft", "grpo")
REPLIES = 4  # to one prompt of a GRPO batch


@dataclass(frozen=True)
class Call:
    """What a measured call works on."""

    kind: Kind
    micro_batches: int
    packing: bool
    tokens: int | None = None  # of a micro-batch; None: the shape's own


@dataclass(frozen=True)
class ModelShape:
    """A model and its batch."""

    architecture: str
    sizes: dict[str, int]
    rows: int
    length: int  # tokens of a row; the longest one with packing
    tied: bool = True


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> dict[str, int]:
    names = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
    return dict(zip(names.split(), (hidden, layers, heads, kv_heads, ffn, vocab), strict=True))


_LLAMA, _QWEN2, _QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(_QWEN3, _sizes(64, 2, 4, 2, 128, 512), rows=2, length=32),
    "8m": ModelShape(_LLAMA, _sizes(256, 6, 8, 4, 768, 12288), rows=4, length=256),  # 7.9 M parameters, 40% embedding
    "135m": ModelShape(_LLAMA, _sizes(576, 30, 9, 3, 1536, 49152), rows=2, length=256),  # SmolLM2-135M
    "qwen2.5-1.5b": ModelShape(_QWEN2, _sizes(1536, 28, 12, 2, 8960, 151936), rows=4, length=2048),
    "qwen2.5-7b": ModelShape(_QWEN2, _sizes(3584, 28, 28, 4, 18944, 152064), rows=4, length=2048, tied=False),
}


def make_model(shape: ModelShape, dtype: Dtype, folder: Path) -> None:
    """Write a Hugging Face folder with random weights, wide enough for distributions that differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model_type = {_LLAMA: "llama", _QWEN2: "qwen2", _QWEN3: "qwen3"}[shape.architecture]
    sizes = {**shape.sizes, "max_position_embeddings": 8192}
    spread = 0.8 / shape.sizes["hidden_size"] ** 0.5  # 0.05 of a width of 1536 makes bf16 alone move log-probs by 0.2
    config = AutoConfig.for_model(model_type, **sizes, tie_word_embeddings=shape.tied, initializer_range=spread)
    config.architectures = [shape.architecture]
    torch.manual_seed(1)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a CPU takes a minute for 1.5 G random numbers
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def make_samples(shape: ModelShape, kind: Kind, *, ragged: bool, tokens: int | None, seed: int) -> list[TokenSample]:
    """Random tokens of one micro-batch. sft: the first quarter is the prompt, the rest is trained. grpo: short replies,
    a quarter of a row, to long prompts, three quarters, as in the later turns of a conversation; REPLIES to each.

    ragged: lengths differ.
    """
    from collab_megatron.trainer.batching.micro_batch import TokenSample

    rng = random.Random(seed)
    vocab, trained = shape.sizes["vocab_size"], 0.75 if kind == "sft" else 0.25
    left, samples, text = tokens or shape.rows * shape.length, list[TokenSample](), list[int]()
    while left > 1:
        length = min(rng.randint(shape.length // 4, shape.length) if ragged else shape.length, left)
        reply = max(1, round(trained * length))
        if kind == "sft" or len(samples) % REPLIES == 0:
            text = [rng.randrange(vocab) for _ in range(length - reply)]
        prompt = text[: left - reply]
        ids = [*prompt, *(rng.randrange(vocab) for _ in range(reply))]
        values = {
            "advantages": [rng.uniform(-1.0, 1.0)] * len(ids),
            **{name: [rng.uniform(-12.0, -8.0) for _ in ids] for name in ("rollout_logprobs", "ref_logprobs")},
        }
        mask = [0.0] * len(prompt) + [1.0] * reply
        samples.append(TokenSample(ids, mask, values, shareable=max(0, len(prompt) - 1) if kind == "grpo" else 0))
        left -= len(ids)
    return samples


def make_batches(shape: ModelShape, call: Call, *, share: bool) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """The micro-batches of a call, and the same samples as padded rows. share: a packed prompt is there once."""
    from collab_megatron.trainer.batching.micro_batch import collate, split_by_tokens

    ours: list[MicroBatch] = []
    padded: list[MicroBatch] = []
    for number in range(call.micro_batches):
        samples = make_samples(shape, call.kind, ragged=call.packing, tokens=call.tokens, seed=2 + number)
        all_in_one = 2 * sum(len(sample.ids) for sample in samples)
        share_here = share and call.packing and call.kind == "grpo"
        ours += split_by_tokens(samples, micro_batch_tokens=all_in_one, pad_id=0, packed=call.packing, share=share_here)
        padded.append(collate(samples, tuple(range(len(samples))), 0, 1, packed=False))
    return ours, padded
