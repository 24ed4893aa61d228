"""Convert CollabLLM rows to the parquet files of training.

    python tools/prepare_dataset.py --dataset ROWS --dataset-type rl --output DIR [--split train,validation] [...]

ROWS: a hub name, a saved `datasets` folder, a folder or file of parquet, JSON or JSONL; docs/data.md describes the
forms of rows. Writes DIR/{rl,sft,dpo}_train.parquet and {rl,sft,dpo}_validation.parquet, and prints statistics. One
task in ten is held out, chosen by the hash of its text, so that calls for RL, SFT and DPO hold out the same tasks.
--tokenizer measures every row with the model's own chat template; --max-tokens leaves out longer rows.
Exit code 2 with one sentence for an error in the arguments or the data.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from collab_megatron.config.sections import UMASKS
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.lengths import LengthCheck
from collab_megatron.data.prepare import KINDS, PrepareOptions, collaborative_prompt, prepare, text_or_file
from collab_megatron.data.splits import DEFAULT_SHARE
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import keep_from_others
from collab_megatron.launch.path_checks import check_folder


def main() -> None:
    args = _arguments()
    keep_from_others(args.umask)
    _refuse_ignored(args)
    check_folder("--output", args.output)
    skip = args.on_error == "skip"
    chat = None if args.tokenizer is None else ChatTemplate(load_tokenizer(args.tokenizer))
    system_prompt = text_or_file(args.system_prompt, "--system-prompt")
    options = PrepareOptions(
        system_prompt=collaborative_prompt() if args.collaborative_prompt else system_prompt,
        first_turn_only=args.turns == "first",
        max_rows=args.max_rows,
        metric=args.metric,
        threshold=args.threshold or 0.0,
        task_desc=None if args.task_desc is None else text_or_file(args.task_desc, "--task-desc"),
        minimum_gap=args.minimum_gap or 0.0,
        lengths=LengthCheck(chat, args.max_tokens, skip_bad_rows=skip),
    )
    for written in prepare(
        args.dataset_type,
        args.dataset,
        args.output,
        splits=[name for names in args.split for name in names.split(",") if name],
        validation=args.validation,
        validation_share=args.validation_share,
        skip_bad_rows=skip,
        options=options,
    ):
        print(
            f"{written.path}: {written.rows_written} rows from {written.rows_read} dataset rows "
            f"({written.conversations} conversations)"
        )
        for note in written.notes:
            print(f"  {note}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/prepare_dataset.py", description="Convert CollabLLM rows to the parquet files of training."
    )
    parser.add_argument("--dataset", required=True, help="hub name, folder or file with CollabLLM rows")
    parser.add_argument("--dataset-type", required=True, choices=KINDS)
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
    parser.add_argument(
        "--minimum-gap", type=float, help="dpo: a pair's scores differ by more than this (default 0; CollabLLM: 0.02)"
    )
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or hub name whose chat template measures the rows (default: words)"
    )
    parser.add_argument("--max-tokens", type=int, help="with --tokenizer: longer rows are left out and counted")
    parser.add_argument("--umask", choices=UMASKS, default=UMASKS[0], help=f"of the files (default {UMASKS[0]})")
    return parser.parse_args()


def _refuse_ignored(args: argparse.Namespace) -> None:
    """Raises UserError for an option that would have no effect, or a number that makes no sense."""
    kind = args.dataset_type
    if kind != "sft" and args.metric is not None:
        raise UserError(f"--metric is for --dataset-type sft: leave it out for {kind}")
    if kind != "rl" and args.turns == "first":
        raise UserError(f"--turns first is for --dataset-type rl: leave it out for {kind}, which keeps later turns")
    if args.threshold is not None and args.metric is None:
        raise UserError("--threshold needs the name of a reward: add --metric, or leave --threshold out")
    if kind != "dpo" and args.minimum_gap is not None:
        raise UserError(f"--minimum-gap is for --dataset-type dpo: leave it out for {kind}")
    if args.minimum_gap is not None and not 0 <= args.minimum_gap < math.inf:
        raise UserError(f"--minimum-gap {args.minimum_gap:g}: it must be a number of at least 0")
    if args.max_tokens is not None and args.tokenizer is None:
        raise UserError("--max-tokens needs a chat template: add --tokenizer with the model's folder or hub name")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: it must be at least 1")


if __name__ == "__main__":
    run_cli(main)
