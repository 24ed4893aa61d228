"""The demo: a small model learns to ask before it answers. `make demo` and `make demo-ablation` call this.

python tools/demo.py [--run-dir runs/demo] [--seed 1] [--device cpu|cuda]
python tools/demo.py --ablation [--run-dir runs/demo]
python tools/demo.py --short --run-dir DIR     # every stage for a few steps; nothing is learned
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from collab_megatron.config.sections import UMASKS
from collab_megatron.demo.pipeline import DemoSettings, Device, run_ablation, run_demo
from collab_megatron.demo.summary import print_summary
from collab_megatron.errors import run_cli
from collab_megatron.files import keep_from_others
from collab_megatron.launch.path_checks import check_folder

REPOSITORY = Path(__file__).resolve().parents[1]


def short_settings(run_dir: Path, seed: int, device: Device) -> DemoSettings:
    """Every stage for real, but short."""
    few = ("evaluation.num_tasks=24",)
    rl = (
        *few,
        "rollout.prompts_per_step=4",
        "rollout.num_replies=4",
        "train.save_interval=2",
        "optimizer.warmup_steps=1",
    )
    return DemoSettings(
        run_dir=run_dir,
        seed=seed,
        device=device,
        conversations=48,
        held_out=24,
        sft_steps=10,
        rl_steps=3,
        overrides={
            "evaluate": few,
            "rl": rl,
            "sft": ("batch_size=16", "optimizer.warmup_steps=2", "train.eval_interval=4"),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=get_args(Device), default="cpu", help="the CPU on any machine, or one GPU")
    parser.add_argument("--ablation", action="store_true", help="two more RL runs from an earlier demo's SFT model")
    parser.add_argument("--short", action="store_true", help="a few steps of everything; nothing is learned")
    args = parser.parse_args()
    keep_from_others(UMASKS[0])
    run_dir = args.run_dir.absolute()
    check_folder("--run-dir", run_dir)
    if args.short:
        settings = short_settings(run_dir, args.seed, args.device)
    else:
        settings = DemoSettings(run_dir, args.seed, args.device)
    summary = run_ablation(settings, REPOSITORY) if args.ablation else run_demo(settings, REPOSITORY)
    print_summary(summary, args.run_dir)


if __name__ == "__main__":
    run_cli(main)
