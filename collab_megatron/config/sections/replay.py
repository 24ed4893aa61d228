"""Training on recorded conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, StringConstraints

from collab_megatron.config.sections.base import Section


def _as_text(value: Any) -> Any:
    """YAML reads a single step as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class ReplaySection(Section):
    """Training on recorded conversations: train_rl then starts no engines and no driver, and calls no LLM. The policy
    that sampled them is not the one that is trained: algorithm.importance weighs each token by the ratio of its
    probabilities under the two. null: off."""

    # what to train on: a folder RUN_DIR/conversations/NAME, a run.dir that has one such folder, or a file that rescore
    # has written
    record: Path
    # its steps: 7, 5-20 or 5-. Training step k takes the k-th of them; train.epochs counts passes over them
    steps: Annotated[str, BeforeValidator(_as_text), StringConstraints(pattern=r"^\d+(-\d*)?$")] = "0-"
