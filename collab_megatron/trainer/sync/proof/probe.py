"""The probe prompt: trainer and engines must agree on its log-probs, because equal bytes are not yet the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from collab_megatron.data.chat import load_tokenizer
from collab_megatron.errors import WeightsDiffer
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.batching import TokenSample, split_by_tokens
from collab_megatron.wire.roster import EngineEntry

PROBE_TEXT = (
    "Could you help me plan a short trip? Before you suggest anything, ask me what you need to know: "
    "how many days I have, what it may cost, and whether I would rather walk or take the train."
)
MAX_TOKENS = 48


def probe_ids(model_path: str) -> list[int]:
    """Token ids of the probe prompt in the model's vocabulary, at most MAX_TOKENS."""
    ids = load_tokenizer(model_path)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return [int(token) for token in ids[:MAX_TOKENS]]


def trainer_logprobs(actor: Actor, ids: Sequence[int]) -> list[float]:
    """Log-probability of every id but the first, under the raw logits. Collective; the same on every rank."""
    length = len(ids)
    batches = split_by_tokens(
        [TokenSample(ids=tuple(ids), mask=(1.0,) * length)],
        micro_batch_tokens=2 * length + actor.grid.pad_multiple,
        pad_id=0,
        pad_multiple=actor.grid.pad_multiple,
        packed=False,
    )
    with actor.at_temperature(1.0):  # engines do not scale the log-probs of a prompt
        ((logprobs,), _) = actor.logprobs(batches)
    return [float(value) for value in logprobs[0, 1:length]]


def largest_gap(
    trainer: Sequence[float], engines: Mapping[EngineEntry, Sequence[float]], *, max_gap: float, version: int
) -> float:
    """The largest mean |trainer - engine| of an engine, in nats. Raises WeightsDiffer above `max_gap` and for NaN."""
    worst = 0.0
    for entry, logprobs in engines.items():
        if len(logprobs) != len(trainer):
            raise WeightsDiffer(
                f"{entry} scored {len(logprobs)} tokens of the probe prompt, the trainer {len(trainer)}"
            )
        gap = sum(abs(a - b) for a, b in zip(trainer, logprobs, strict=True)) / len(trainer)
        if not gap <= max_gap:  # also for NaN
            raise WeightsDiffer(
                f"{entry} does not serve the trainer's model at version {version}: log-probs of the probe prompt "
                f"differ by {gap:.3g} on average (sync.max_probe_gap is {max_gap:g})"
            )
        worst = max(worst, gap)
    return worst
