"""Ten RL steps of conf/demo_gpu.yaml on data and a model made for it: a part of tools/gpu_check.py.

    python tools/gpu/rl_steps.py --device cuda --run-dir DIR --json FILE [--engine-args FLAGS]

The stages are the demo's: model, tasks, rule-based endpoint, data, supervised training, RL. It fails if a step is
missing, a sync lost a server, or trainer and engine disagree (the run itself checks checksums and probe).
"""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from collab_megatron.demo.pipeline import DemoPipeline, DemoSettings, Device, refuse_used_folder
from collab_megatron.errors import RunError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.launch.supervisor import Supervisor

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS: Mapping[Device, int] = {"cuda": 10, "cpu": 2}


def settings(device: Device, run_dir: Path, engine_args: Sequence[str]) -> DemoSettings:
    """A policy that has learned the chat format, and short RL; on the CPU just enough to run every stage."""
    on_gpu = device == "cuda"
    sft: tuple[str, ...] = ("parallel.tensor=1", "model.dtype=bfloat16", "train.eval_interval=0")
    rl: tuple[str, ...] = (
        *(f"parallel.device={device}", "train.eval_at_start=false", "evaluation.num_tasks=24"),
        *("engine.max_restarts=0", f"engine.extra_args=[{', '.join(map(repr, engine_args))}]"),
    )
    if not on_gpu:
        sft += ("batch_size=16",)
        rl += ("rollout.prompts_per_step=4", "rollout.num_replies=4")
    return DemoSettings(
        run_dir=run_dir,
        device=device,
        conversations=400 if on_gpu else 48,
        held_out=48 if on_gpu else 24,
        sft_steps=200 if on_gpu else 4,
        rl_steps=STEPS[device],
        rl_config="conf/demo_gpu.yaml",
        overrides={
            "data": ("processes=8",) if on_gpu else (),
            "sft": (*sft, "optimizer.warmup_steps=2"),
            "rl": (*rl, "optimizer.warmup_steps=1"),
        },
    )


def figures(rows: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """What the run's dashboard says, checked. Raises RunError."""
    done = [row for row in rows if "time_s/step" in row]
    if [row["step"] for row in done] != list(range(1, steps + 1)):
        raise RunError(f"the dashboard has the steps {[int(row['step']) for row in done]} instead of 1 to {steps}")
    if lost := sum(row["sync/engines_lost"] for row in done):
        raise RunError(f"{lost:g} servers were lost during the steps: see the engines' logs")
    if not all(row["sync/checked"] > 0 for row in done):
        raise RunError("a sync compared no checksums: sync.verify_every must be 1 for this check")
    found = {
        "steps": float(steps),
        "reward_first": done[0]["reward/mr_mean"],
        "reward_last": done[-1]["reward/mr_mean"],
        "probe_gap_max": max(row["sync/probe_gap"] for row in done),
        "logprob_gap_max": max(row["train/logprob_gap"] for row in done),
        "checked": min(row["sync/checked"] for row in done),
    }
    for name in ("step", "wait_for_rollout", "update", "weight_sync"):
        times = [row[f"time_s/{name}"] for row in done if f"time_s/{name}" in row]
        if times:
            found[f"{name}_s"] = statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu/rl_steps.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=sorted(STEPS), required=True)
    parser.add_argument("--run-dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--engine-args", default="", metavar="FLAGS", help="more flags of sglang.launch_server, quoted")
    args = parser.parse_args()
    run_dir = args.run_dir.absolute()
    refuse_used_folder(run_dir)
    chosen = settings(args.device, run_dir, shlex.split(args.engine_args))
    pipeline = DemoPipeline(chosen, REPOSITORY)
    with Supervisor(run_dir / "logs") as supervisor:
        pipeline.make_model()
        pipeline.make_tasks()
        pipeline.start_endpoint(supervisor)
        pipeline.build_data()
        pipeline.train_sft()
        pipeline.train_rl()
    from collab_megatron.trainer.report.dashboard import read_metrics  # imports torch, which the stages do themselves

    found = figures(read_metrics(run_dir / "tensorboard" / "rl"), STEPS[args.device])
    publish_json(args.json, {**found, "wall_s": {name: round(s, 1) for name, s in pipeline.wall_s.items()}})


if __name__ == "__main__":
    run_cli(main)
