"""Supervised fine-tuning on conversations; the loss is on assistant tokens only.

    python -m collab_megatron.train_sft conf/demo_sft.yaml [section.key=value ...] [--dry-run]

`main` launches the trainer ranks on this node; `train` runs in every rank. With data.validation the held-out loss is
computed every train.eval_interval steps, and the checkpoint with the lowest loss is kept (best.json in the run's
checkpoint folder names it). export_weights selects the weights for export_hf.
"""

from __future__ import annotations

from collab_megatron.config import SFTConfig
from collab_megatron.errors import run_cli
from collab_megatron.launch.supervised import run_supervised


def train(config: SFTConfig, attempt: int) -> None:
    """The loop of one trainer rank."""
    # heavy imports that need megatron: the launcher, which shares this file, must start without them
    from collab_megatron.trainer.supervised.loop import train_supervised
    from collab_megatron.trainer.supervised.sft import SFTObjective

    train_supervised(config, SFTObjective, attempt)


def main() -> None:
    run_supervised(SFTConfig, "collab_megatron.train_sft", __doc__, train)


if __name__ == "__main__":
    run_cli(main)
