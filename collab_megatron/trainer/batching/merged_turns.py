"""Merged turns: policy turns of one conversation as one sequence with several trained spans.

    prompt reply                          one sequence, and each token before the last turn is computed once:
    prompt reply user turn                    prompt [reply] user [turn] user [turn]
    prompt reply user turn user turn

Attention is causal, so a turn has the log-probs that it has alone. A turn that several conversations go on from is
trained in one of them, and is context in the others.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from collab_megatron.trainer.batching.micro_batch import TokenSample


def merge_turns(samples: Sequence[TokenSample]) -> list[TokenSample]:
    """The samples in fewer sequences, with the same trained tokens and values.

    A sample is merged into one whose untrained beginning starts with all of its ids; a sample that no other goes on
    from stays as it is. Prefixes stay shareable where they were.
    """
    parents = _parents(samples)
    merged_into: dict[int, int] = {parent: child for child, parent in reversed(list(parents.items()))}
    return [_merged(samples, i, parents, merged_into) for i in range(len(samples)) if i not in merged_into]


def _parents(samples: Sequence[TokenSample]) -> dict[int, int]:
    """Sample -> the longest other one that it goes on from. Equal ones are given to different samples, in turn."""
    keys = [array("Q", sample.ids).tobytes() for sample in samples]
    width = array("Q").itemsize
    parents: dict[int, int] = {}
    taken: set[int] = set()
    nested: list[int] = []  # each starts with the one before it
    for i in sorted(range(len(samples)), key=lambda i: (keys[i], i)):
        while nested and not keys[i].startswith(keys[nested[-1]]):
            nested.pop()
        room = _first_trained(samples[i]) * width
        fitting = [j for j in nested if len(keys[j]) <= room]
        nearest = [j for j in fitting if keys[j] == keys[fitting[-1]]]
        if nearest:
            parent = next((j for j in nearest if j not in taken), nearest[0])
            parents[i] = parent
            taken.add(parent)
        nested.append(i)
    return parents


def _first_trained(sample: TokenSample) -> int:
    """Number of tokens before the first trained one."""
    return next((t for t, trained in enumerate(sample.mask) if trained), len(sample.mask))


def _merged(
    samples: Sequence[TokenSample], last: int, parents: dict[int, int], merged_into: dict[int, int]
) -> TokenSample:
    """The sequence that ends with sample `last`, and trains the earlier turns that are merged into it."""
    mask = list(samples[last].mask)
    values = {name: list(numbers) for name, numbers in samples[last].values.items()}
    shareable = samples[last].shareable
    child, merging = last, True
    while (turn := parents.get(child)) is not None:
        merging = merging and merged_into[turn] == child
        shareable = min(shareable, samples[turn].shareable)
        if merging:
            for t, trained in enumerate(samples[turn].mask):
                if trained:
                    mask[t] = trained
                    for name, numbers in values.items():
                        numbers[t] = samples[turn].values[name][t]
        child = turn
    return TokenSample(samples[last].ids, mask, values, shareable)
