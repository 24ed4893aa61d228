"""Write the demo's tasks as files.

    python -m collab_megatron.demo.task_files --output DIR --train 3000 --heldout 1000 --seed 1

`train.jsonl` holds single-turn problems for the data builder, `heldout.jsonl` rows in CollabLLM's flat format for
evaluation. Openings are unique within a file, because rows are identified by their `prompt`. The files share no
combination of intent and values.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from collab_megatron.demo.desk import DeskTask, sample_task
from collab_megatron.errors import UserError, run_cli
from collab_megatron.json_lines import replace_rows

MAX_TASKS = 100_000  # far below the number of openings, so that the search for a new one ends soon


def draw_tasks(rng: random.Random, split: str, count: int) -> list[DeskTask]:
    """`count` tasks of `split` with unique openings. Raises UserError if count is not in [1, MAX_TASKS]."""
    if not 1 <= count <= MAX_TASKS:
        raise UserError(f"{count} tasks cannot be drawn: ask for 1 to {MAX_TASKS}")
    tasks: dict[str, DeskTask] = {}
    while len(tasks) < count:
        task = sample_task(rng, split)
        while task.opening in tasks:
            # Vague openings repeat more often than complete ones: redraw the same kind, or the share drifts.
            task = sample_task(rng, split, float(task.ambiguous))
        tasks[task.opening] = task
    return list(tasks.values())


def problem_row(task: DeskTask) -> dict[str, Any]:
    """A single-turn problem as the data builder reads it."""
    return {
        "single_turn_prompt": task.request,
        "single_turn_completion": task.command,
        "single_turn_metadata": {
            "ambiguous": task.ambiguous,
            "missing": list(task.missing),
            "intent": task.intent,
        },
        "prompt": [{"role": "user", "content": task.opening}],
    }


def conversation_row(task: DeskTask, conv_id: int) -> dict[str, Any]:
    """A row of CollabLLM's flat format: the opening and the right command, not scored."""
    return {
        **problem_row(task),
        "completion": task.command,
        "conv_id": conv_id,
        "score": None,
        "turn_id": 0,
        "sessions": [],
        "rewards": {},
    }


def write_tasks(output: Path, train: int, heldout: int, seed: int) -> None:
    """Write both files into the folder `output`, each atomically."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"--output {output} is a file: name a folder") from None
    except OSError as error:
        raise UserError(f"--output {output} cannot be created ({error.strerror}): name another folder") from None
    train_tasks = draw_tasks(random.Random(f"{seed} train"), "train", train)
    heldout_tasks = draw_tasks(random.Random(f"{seed} heldout"), "heldout", heldout)
    replace_rows(output / "train.jsonl", map(problem_row, train_tasks))
    replace_rows(output / "heldout.jsonl", (conversation_row(task, i) for i, task in enumerate(heldout_tasks)))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m collab_megatron.demo.task_files",
        description="Write the demo's training problems and held-out tasks.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--train", type=int, default=3000, help="number of training problems")
    parser.add_argument("--heldout", type=int, default=1000, help="number of held-out tasks")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_tasks(args.output, args.train, args.heldout, args.seed)
    print(f"wrote {args.output}/train.jsonl ({args.train}) and heldout.jsonl ({args.heldout})", flush=True)


if __name__ == "__main__":
    run_cli(main)
