"""Write the demo model: an ordinary Hugging Face folder with a tiny random Llama and its tokenizer.

    python -m collab_megatron.demo.tiny_model --output DIR --seed 1

Two wide layers learn the demo's tasks about twice as fast as four narrow ones of the same size. The folder is written
atomically, so a reader never sees half a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from collab_megatron.demo.tokenizer import VOCAB_SIZE, build_tokenizer
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import atomic_write

MOST_SEEDS = 2**32  # as run.seed
MAX_POSITIONS = 512  # tokens of a whole chat; the longest has about 100


def write_model(output: Path, seed: int) -> int:
    """Write the new folder `output`; returns the number of parameters. Raises UserError if it exists."""
    if output.exists():
        raise UserError(f"{output} exists already: choose another --output or remove it")
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        initializer_range=0.05,  # near 1/sqrt(hidden); the usual 0.02 takes twice the steps to learn to copy
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m collab_megatron.demo.tiny_model", description="Write the demo's random model and its tokenizer."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist yet")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not 0 <= args.seed < MOST_SEEDS:
        raise UserError(f"--seed {args.seed}: it must be a number from 0 to {MOST_SEEDS - 1}")
    torch.set_num_threads(1)
    print(f"wrote {args.output}: {write_model(args.output, args.seed):,} parameters", flush=True)


if __name__ == "__main__":
    run_cli(main)
