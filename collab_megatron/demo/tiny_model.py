"""Write the demo model: an ordinary Hugging Face folder with a tiny random Llama and its tokenizer.

    python -m collab_megatron.demo.tiny_model --output DIR --seed 1 [--texts conf/mini/math.jsonl]

--texts trains the tokenizer on the texts of a JSONL file, for the miniatures of conf/mini/. Two wide layers learn the
demo's tasks about twice as fast as four narrow ones of the same size. The folder is written atomically, so a reader
never sees half a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from collab_megatron.demo.tokenizer import build_tokenizer, train_tokenizer
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import atomic_write
from collab_megatron.json_lines import read_rows

MOST_SEEDS = 2**32  # as run.seed
MAX_POSITIONS = 512  # tokens of a whole chat; the longest has about 100
TEXT_POSITIONS = 1024  # the same with a tokenizer that is trained on texts


def write_model(output: Path, seed: int, texts: Path | None = None) -> int:
    """Write the new folder `output`; returns the number of parameters. Raises UserError if it exists, or for a file of
    `texts` without any."""
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output or remove it")
    tokenizer = build_tokenizer() if texts is None else train_tokenizer(_texts(texts))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        initializer_range=0.05,  # near 1/sqrt(hidden); the usual 0.02 takes twice the steps to learn to copy
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS if texts is None else TEXT_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    with atomic_write(output) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return sum(parameter.numel() for parameter in model.parameters())


def _texts(file: Path) -> list[str]:
    found = [value for row in read_rows(file).rows for value in row.values() if isinstance(value, str)]
    if not found:
        raise UserError(f"--texts {file} holds no texts: name a JSONL file such as conf/mini/math.jsonl")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m collab_megatron.demo.tiny_model", description="Write the demo's random model and its tokenizer."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--texts", type=Path, help="JSONL file whose texts the tokenizer is trained on")
    args = parser.parse_args()
    if not 0 <= args.seed < MOST_SEEDS:
        raise UserError(f"--seed {args.seed}: it must be a number from 0 to {MOST_SEEDS - 1}")
    torch.set_num_threads(1)
    print(f"wrote {args.output}: {write_model(args.output, args.seed, args.texts):,} parameters", flush=True)


if __name__ == "__main__":
    run_cli(main)
