"""CollabLLM rows to the parquet files that training reads.

    python tools/prepare_dataset.py --dataset ROWS --dataset-type rl --output DIR --validation-share 0.05

ROWS: a hub name, a saved `datasets` folder, a folder or file of parquet, JSON or JSONL; flat or nested form.
Writes DIR/{sft,rl}_train.parquet and, with held-out data, DIR/{sft,rl}_validation.parquet.
Exit code 2 with one sentence for a mistake in the arguments or the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from collab_megatron.data.prepare import Shape, prepare
from collab_megatron.errors import run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description="CollabLLM rows to the parquet files that training reads.")
    parser.add_argument("--dataset", required=True, help="hub name, folder or file with CollabLLM rows")
    parser.add_argument("--dataset-type", required=True, choices=("sft", "rl"))
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--validation", help="held-out dataset")
    parser.add_argument("--validation-share", type=float, default=0.0, help="share of the conversations to hold out")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out choice")
    parser.add_argument("--system-prompt", default="", help="stands first in every chat")
    parser.add_argument("--turns", choices=("all", "first"), default="all", help="rl: every history, or openings only")
    parser.add_argument("--max-rows", type=int, help="at most so many rows per file")
    parser.add_argument("--metric", help="sft: keep rows whose reward of this name reaches --threshold")
    parser.add_argument("--threshold", type=float, default=0.0)
    args = parser.parse_args()
    shape = Shape(args.system_prompt, args.turns == "first", args.max_rows, args.metric, args.threshold)
    for written in prepare(
        args.dataset_type,
        args.dataset,
        args.output,
        validation=args.validation,
        validation_share=args.validation_share,
        seed=args.seed,
        shape=shape,
    ):
        print(
            f"{written.path}: {written.rows_written} rows from {written.rows_read} dataset rows "
            f"({written.conversations} conversations)"
        )


if __name__ == "__main__":
    run_cli(main)
