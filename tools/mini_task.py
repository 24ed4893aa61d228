"""A miniature of one of the paper's tasks on the CPU, with every stage: conversations, SFT, DPO, RL, evaluation.

    python tools/mini_task.py math|medium|bigcodebench [reward.a=b ...] [--run-dir runs/mini_TASK] [--seed 1]

conf/mini/ has the items and the configs; rule-based roles play user, judge and assistant behind an endpoint. Overrides
are for the stages that score: conversations, RL, evaluation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from collab_megatron.config.sections import UMASKS
from collab_megatron.demo.mini_pipeline import MiniTask, run_mini
from collab_megatron.errors import run_cli
from collab_megatron.files import keep_from_others
from collab_megatron.launch.path_checks import check_folder

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/mini_task.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=get_args(MiniTask))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--run-dir", type=Path, help="a new folder (default runs/mini_TASK)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_intermixed_args()
    keep_from_others(UMASKS[0])
    run_dir = (args.run_dir or Path("runs") / f"mini_{args.task}").absolute()
    check_folder("--run-dir", run_dir)
    figures = run_mini(args.task, run_dir, REPOSITORY, seed=args.seed, overrides=args.overrides)
    print(
        f"\n{args.task}: {figures['conversations']:.0f} held-out conversations, reward {figures['mr']:.3f}; {run_dir}"
    )


if __name__ == "__main__":
    run_cli(main)
