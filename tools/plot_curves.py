"""Draw a demo's learning curves: reward, accuracy and the share of replies that ask, per RL step.

python tools/plot_curves.py --run-dir runs/demo --output docs/learning_curves.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from collab_megatron.errors import UserError, run_cli
from collab_megatron.trainer.report.dashboard import read_metrics

PANELS = (
    ("reward", {"reward/mr_mean": "multiturn-aware reward", "reward/accuracy_mean": "accuracy"}),
    (
        "share of replies that ask",
        {
            "rollout/clarify_rate_ambiguous": "something is missing",
            "rollout/clarify_rate_complete": "nothing is missing",
        },
    ),
)
HELD_OUT = {
    "reward/accuracy_mean": "eval/accuracy",
    "rollout/clarify_rate_ambiguous": "eval/clarify_rate_ambiguous",
    "rollout/clarify_rate_complete": "eval/clarify_rate_complete",
}


def draw(run_dir: Path, output: Path) -> None:
    """Write `output`: lines are training rollouts, dots held-out conversations. Raises UserError without a run."""
    folder = run_dir / "tensorboard" / "rl"
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"there is no {folder / 'metrics.jsonl'}: run `make demo` first")
    import matplotlib as mpl  # only here: errors in the arguments should not wait for it

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3.4), constrained_layout=True)
    for axis, (title, lines) in zip(axes, PANELS, strict=True):
        for name, label in lines.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            (line,) = axis.plot(*zip(*points, strict=True), label=label, linewidth=1.6)
            held_out = [(row["step"], row[HELD_OUT[name]]) for row in rows if HELD_OUT.get(name) in row]
            if held_out:
                axis.plot(*zip(*held_out, strict=True), "o", color=line.get_color(), markersize=6)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("RL step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/plot_curves.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    draw(args.run_dir, args.output)
    print(args.output)


if __name__ == "__main__":
    run_cli(main)
