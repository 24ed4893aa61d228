"""Direct preference optimization on pairs of replies: the chosen one against the rejected one.

    python -m collab_megatron.train_dpo conf/demo_dpo.yaml [section.key=value ...] [--dry-run]

The pairs come from tools/prepare_dataset.py --dataset-type dpo. The loss of a pair is -log sigmoid(dpo.beta * margin),
with both replies relative to a frozen reference, which has the weights of model.path. Everything else is that of
train_sft: epochs, packing, held-out loss, best checkpoint, export. Online DPO, with pairs from the groups of the
running policy, is a mode of train_rl (online_dpo).
"""

from __future__ import annotations

from collab_megatron.config import DPOConfig
from collab_megatron.errors import run_cli
from collab_megatron.launch.supervised import run_supervised


def train(config: DPOConfig, attempt: int) -> None:
    """The loop of one trainer rank."""
    # heavy imports that need megatron: the launcher, which shares this file, must start without them
    from collab_megatron.trainer.supervised.dpo import DPOObjective
    from collab_megatron.trainer.supervised.loop import train_supervised

    train_supervised(config, DPOObjective, attempt)


def main() -> None:
    run_supervised(DPOConfig, "collab_megatron.train_dpo", __doc__, train)


if __name__ == "__main__":
    run_cli(main)
