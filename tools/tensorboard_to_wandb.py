"""Copies the curves of a run to Weights & Biases, whose `wandb sync` reads no TensorBoard files after version 0.29.

pip install wandb
python tools/tensorboard_to_wandb.py runs/mine/tensorboard/rl --project mine
WANDB_MODE=offline python tools/tensorboard_to_wandb.py ...      without a network; `wandb sync` uploads it later
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from collab_megatron.errors import UserError, run_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with events.out.tfevents.*")
    parser.add_argument("--project", required=True)
    args = parser.parse_args()
    if not any(args.folder.glob("events.out.tfevents.*")):
        raise UserError(f"{args.folder} has no events.out.tfevents.*: name RUN_DIR/tensorboard/NAME")
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed: pip install wandb") from None
    events = EventAccumulator(str(args.folder), size_guidance={"scalars": 0}).Reload()
    steps: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for point in events.Scalars(tag):
            steps.setdefault(point.step, {})[tag] = point.value
    with wandb.init(project=args.project, name=args.folder.name) as run:
        for step in sorted(steps):
            run.log(steps[step], step=step)


if __name__ == "__main__":
    run_cli(main)
