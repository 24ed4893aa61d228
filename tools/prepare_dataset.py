"""Convert CollabLLM rows to the parquet files of training.

    python tools/prepare_dataset.py --dataset ROWS --dataset-type rl --output DIR [--split train,validation] [...]

ROWS: a hub name, a saved `datasets` folder, a folder or file of parquet, JSON or JSONL; docs/data.md describes the
forms of rows. Writes DIR/{sft,rl}_train.parquet and {sft,rl}_validation.parquet. One task in ten is held out, chosen by
the hash of its text, so that calls for SFT and for RL hold out the same tasks.
Exit code 2 with one sentence for an error in the arguments or the data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from collab_megatron.config.sections import UMASKS
from collab_megatron.data.prepare import PrepareOptions, collaborative_prompt, prepare, text_or_file
from collab_megatron.data.splits import DEFAULT_SHARE
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import keep_from_others
from collab_megatron.launch.path_checks import check_folder


def main() -> None:
    args = _arguments()
    keep_from_others(args.umask)
    _refuse_ignored(args)
    check_folder("--output", args.output)
    system_prompt = text_or_file(args.system_prompt, "--system-prompt")
    options = PrepareOptions(
        system_prompt=collaborative_prompt() if args.collaborative_prompt else system_prompt,
        first_turn_only=args.turns == "first",
        max_rows=args.max_rows,
        metric=args.metric,
        threshold=args.threshold or 0.0,
        task_desc=None if args.task_desc is None else text_or_file(args.task_desc, "--task-desc"),
    )
    for written in prepare(
        args.dataset_type,
        args.dataset,
        args.output,
        splits=[name for names in args.split for name in names.split(",") if name],
        validation=args.validation,
        validation_share=args.validation_share,
        skip_bad_rows=args.on_error == "skip",
        options=options,
    ):
        print(
            f"{written.path}: {written.rows_written} rows from {written.rows_read} dataset rows "
            f"({written.conversations} conversations)"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/prepare_dataset.py", description="Convert CollabLLM rows to the parquet files of training."
    )
    parser.add_argument("--dataset", required=True, help="hub name, folder or file with CollabLLM rows")
    parser.add_argument("--dataset-type", required=True, choices=("sft", "rl"))
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="A[,B]",
        help="of a hub or saved dataset; several are concatenated (default: train)",
    )
    parser.add_argument("--validation", help="held-out dataset; must not share tasks with --dataset")
    parser.add_argument(
        "--validation-share",
        type=float,
        help=f"share of the tasks to hold out, the same in every call (default {DEFAULT_SHARE:g}; 0: none)",
    )
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="for a row that cannot be read")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--system-prompt", default="", metavar="TEXT|FILE", help="system prompt of every chat")
    prompt.add_argument(
        "--collaborative-prompt", action="store_true", help="the shipped system prompt for a proactive assistant"
    )
    parser.add_argument("--task-desc", metavar="TEXT|FILE", help="description of the task, replaces that of the rows")
    parser.add_argument("--turns", choices=("all", "first"), default="all", help="rl: every history, or openings only")
    parser.add_argument("--max-rows", type=int, help="the most rows per file")
    parser.add_argument("--metric", help="sft: keep rows whose reward with this name reaches --threshold")
    parser.add_argument("--threshold", type=float, help="with --metric (default 0)")
    parser.add_argument("--umask", choices=UMASKS, default=UMASKS[0], help=f"of the files (default {UMASKS[0]})")
    return parser.parse_args()


def _refuse_ignored(args: argparse.Namespace) -> None:
    """Raises UserError for an option that would have no effect."""
    if args.dataset_type == "rl" and args.metric is not None:
        raise UserError("--metric is for --dataset-type sft: leave it out for rl")
    if args.dataset_type == "sft" and args.turns == "first":
        raise UserError("--turns first is for --dataset-type rl: leave it out for sft, which keeps whole conversations")
    if args.threshold is not None and args.metric is None:
        raise UserError("--threshold needs the name of a reward: add --metric, or leave --threshold out")


if __name__ == "__main__":
    run_cli(main)
