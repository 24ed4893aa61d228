"""Convert between Hugging Face folders and training checkpoints, in one process, whatever layout trained them.

    python tools/convert_checkpoint.py hf-to-megatron --hf-path MODEL --output DIR
    python tools/convert_checkpoint.py megatron-to-hf --checkpoint DIR --output DIR [--max-shard-size 5GB]

hf-to-megatron writes DIR/step_00000000 (weights only, no optimizer). megatron-to-hf takes a step folder, or a folder of
them, of which it converts the newest complete one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Literal, cast

from collab_megatron.checkpoint.folders import MARKER, newest_complete, read_info
from collab_megatron.config.sections import ParallelSection
from collab_megatron.convert.hf_folder import check_output, parse_size
from collab_megatron.convert.layout import check_layout, read_hf_config
from collab_megatron.convert.source import resolve_model_folder
from collab_megatron.errors import UserError, run_cli

Dtype = Literal["float32", "bfloat16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="a Hugging Face folder to a training checkpoint")
    to_megatron.add_argument("--hf-path", required=True, help="model folder or hub name")
    to_megatron.add_argument("--output", required=True, type=Path, help="folder that gets step_00000000")
    to_hf = commands.add_parser("megatron-to-hf", help="a training checkpoint to a Hugging Face folder")
    to_hf.add_argument("--checkpoint", required=True, type=Path, help="step folder, or a folder of step folders")
    to_hf.add_argument("--output", required=True, type=Path, help="new folder")
    to_hf.add_argument("--max-shard-size", default="5GB", help="largest safetensors file, e.g. 5GB")
    args = parser.parse_args()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        os.environ.pop(name, None)  # one process, also inside a Slurm step
    if args.command == "hf-to-megatron":
        hf_to_megatron(args.hf_path, args.output)
    else:
        megatron_to_hf(args.checkpoint, args.output, args.max_shard_size)


def hf_to_megatron(hf_path: str, output: Path) -> None:
    """Load the folder in its own dtype and save it as step 0."""
    folder = resolve_model_folder(hf_path)
    config = read_hf_config(folder)
    check_layout(config, ParallelSection())
    check_output(output)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"the model's dtype is {dtype}; float32 and bfloat16 are supported")
    from collab_megatron.actor.actor import Actor  # only here: usage errors should not wait for megatron
    from collab_megatron.actor.grid import close_grid, init_grid
    from collab_megatron.checkpoint.store import save_checkpoint

    actor = Actor.build(folder, dtype=cast(Dtype, dtype), grid=init_grid(ParallelSection(), seed=0), optimizer=None)
    saved = save_checkpoint(actor, output, step=0, extra={"source": hf_path}, keep_last=1)
    close_grid()
    print(saved)


def megatron_to_hf(checkpoint: Path, output: Path, max_shard_size: str) -> None:
    """Read the weights, leave optimizer and random states, write a Hugging Face folder."""
    folder = checkpoint if (checkpoint / MARKER).is_file() else newest_complete(checkpoint)
    if folder is None:
        raise UserError(f"{checkpoint} is not a complete checkpoint and holds none")
    info = read_info(folder)
    check_output(output)
    parse_size(max_shard_size)
    from collab_megatron.actor.actor import Actor  # only here: usage errors should not wait for megatron
    from collab_megatron.actor.grid import close_grid, init_grid
    from collab_megatron.checkpoint.store import load_checkpoint

    grid = init_grid(ParallelSection(), seed=0)
    dtype = cast(Dtype, info.layout["dtype"])
    actor = Actor.build(info.hf_folder, dtype=dtype, grid=grid, optimizer=None, load_weights=False)
    load_checkpoint(actor, folder)
    actor.save_hf(output, max_shard_size=max_shard_size, metadata={"step": str(info.step)})
    close_grid()
    print(output)


if __name__ == "__main__":
    run_cli(main)
