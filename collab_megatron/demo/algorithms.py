"""The demo's RL with every algorithm and several seeds, and their table.

    for each seed   model -> tasks -> data -> SFT                        once; RUN_DIR/seed_N
                    RL with each algorithm from that SFT model           RUN_DIR/seed_N/algorithms/NAME

A finished run leaves a row.json, and is not run again: an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from collab_megatron.demo.pipeline import DemoPipeline, DemoSettings, refuse_used_folder
from collab_megatron.errors import UserError
from collab_megatron.files import publish_json
from collab_megatron.json_lines import read_rows
from collab_megatron.launch.supervisor import Supervisor

# row of the table -> changes of conf/demo_rl.yaml; everything else is the same for all
ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "grpo": ("algorithm=grpo",),
    "grpo_apart": ("algorithm=grpo", "rollout.equal_replies=apart", "simulators.judge.answer_once=false"),
    "dr_grpo": ("algorithm=dr_grpo",),
    "rloo": ("algorithm=rloo",),
    "gspo": ("algorithm=gspo",),
    "cispo": ("algorithm=cispo",),
    "tree_credit": ("algorithm.credit=tree",),
    "online_dpo": ("online_dpo={beta: 0.1}",),
}
# for all: with one mini-batch a step every ratio is 1, and GRPO, GSPO and CISPO differ in their means at most; the demo
# is learned within some steps, so these are fewer and evaluated often, on fewer tasks
COMMON = (
    *("algorithm.mini_batches=2", "train.steps=20"),
    *("train.eval_at_start=false", "train.eval_interval=2", "evaluation.num_tasks=300"),
)
# column -> figure of the held-out conversations after the last step
FIGURES = {
    "accuracy": "accuracy",
    "asks if unclear": "clarify_rate_ambiguous",
    "asks if clear": "clarify_rate_complete",
    "bare answers": "users/bare/accuracy",
    "unseen user": "users/unseen/accuracy",
}
LEARNED = 1.75
"""Held-out multiturn-aware reward of the column that counts the calls until then: most algorithms reach it, and climb
little from there."""
CALLS_UNTIL = f"API calls to MR {LEARNED}"
COLUMNS = (*FIGURES, "API calls", CALLS_UNTIL, "seconds")
SEEDS = (1, 2, 3)


def run_algorithms(
    settings: DemoSettings,
    repository: Path,
    *,
    algorithms: Sequence[str],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """Run what is missing below `settings.run_dir`; returns a row for each algorithm and seed, also in table.json.

    The accuracy with bare answers and with a user that training does not use come from the evaluation after the last
    step (conf/demo_users.yaml). Raises UserError for a folder of a run that did not finish.
    """
    rows = []
    for seed in seeds:
        of_seed = replace(settings, run_dir=settings.run_dir / f"seed_{seed}", seed=seed)
        with Supervisor(of_seed.run_dir / "logs") as supervisor:
            pipeline = DemoPipeline(of_seed, repository)
            pipeline.start_endpoint(supervisor)
            _make_sft_model(pipeline, of_seed.run_dir)
            for name in algorithms:
                rows.append(_row(pipeline, name, seed))
                publish_json(settings.run_dir / "table.json", {"rows": rows, "means": means(rows)})
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per algorithm, in order: number of seeds, and mean and range of each column over the seeds that have it."""
    found = []
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        mine = [row for row in rows if row["algorithm"] == name]
        columns: dict[str, Any] = {}
        for column in COLUMNS:
            values = [row[column] for row in mine if row[column] is not None]
            columns[column] = (
                {"mean": statistics.fmean(values), "min": min(values), "max": max(values)} if values else None
            )
        found.append({"algorithm": name, "seeds": len(mine), **columns})
    return found


def print_table(rows: Sequence[Mapping[str, Any]], run_dir: Path) -> None:
    """Print means with their range over the seeds."""
    table = Table(title="the demo's RL by algorithm: held-out conversations, mean [range over seeds]")
    for column in ("algorithm", "seeds", *COLUMNS):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for row in means(rows):
        table.add_row(row["algorithm"], str(row["seeds"]), *(_shown(column, row[column]) for column in COLUMNS))
    console = Console(width=150)
    console.print()
    console.print(table)
    console.print(f"  {run_dir / 'table.json'}", highlight=False, soft_wrap=True)


def _shown(column: str, value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    form = "{:,.0f}" if column in ("API calls", CALLS_UNTIL, "seconds") else "{:.3f}"
    return f"{form.format(value['mean'])} [{form.format(value['min'])} {form.format(value['max'])}]"


def _make_sft_model(pipeline: DemoPipeline, folder: Path) -> None:
    """The stages before RL; sft.json says that they are done."""
    done = folder / "sft.json"
    if done.exists():
        return
    if any(path.name != "logs" for path in folder.iterdir()):
        raise UserError(f"the run up to SFT in {folder} did not finish: remove the folder (rm -r {folder})")
    pipeline.make_model()
    pipeline.make_tasks()
    pipeline.build_data()
    pipeline.train_sft()
    publish_json(done, {"wall_s": pipeline.wall_s})


def _row(pipeline: DemoPipeline, name: str, seed: int) -> dict[str, Any]:
    """Train, if there is no row yet; returns the row."""
    folder = pipeline.run_dir / "algorithms" / name
    path = folder / "row.json"
    if not path.exists():
        refuse_used_folder(folder)
        # API calls are those of the training steps; seconds also those of the start and of the evaluations
        pipeline.train_rl(name, folder, [*COMMON, *ALGORITHMS[name]])
        publish_json(path, _figures(folder, name, seed, pipeline.wall_s[name]))
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def _figures(folder: Path, name: str, seed: int, seconds: float) -> dict[str, Any]:
    evaluations = read_rows(folder / "evaluations" / f"{name}.jsonl", numbers=("step",)).rows
    last = max(evaluations, key=lambda row: row["step"])
    calls = calls_by_step(read_rows(folder / "tensorboard" / name / "metrics.jsonl", numbers=("step",)).rows)
    learned = min((row["step"] for row in evaluations if row["mr"] >= LEARNED), default=None)
    return {
        "algorithm": name,
        "seed": seed,
        **{column: last[figure] for column, figure in FIGURES.items()},
        "API calls": int(sum(calls.values())),
        CALLS_UNTIL: None if learned is None else int(sum(calls[step] for step in calls if step <= learned)),
        "seconds": round(seconds, 1),
    }


def calls_by_step(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """LLM calls of all roles by training step. A step may have several rows: one that a checkpoint wrote early, and the
    whole one."""
    found: dict[int, float] = {}
    for row in rows:
        calls = [row[name] for name in row if name.startswith("simulator/") and name.endswith("/calls")]
        if calls:
            found[int(row["step"])] = sum(calls)
    return found
