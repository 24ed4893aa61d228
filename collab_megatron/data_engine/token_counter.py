"""Counts the tokens of a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def token_counter(tokenizer: str | None) -> Callable[[str], int]:
    """A counter of a reply's tokens, including the end-of-turn id as in RL; of words if there is no tokenizer."""
    if tokenizer is None:
        return lambda text: len(text.split())
    fast = Path(tokenizer) / "tokenizer.json"
    if fast.exists():  # the same ids, without seconds of importing transformers in every process
        from tokenizers import Tokenizer

        counter = Tokenizer.from_file(str(fast))
        return lambda text: len(counter.encode(text, add_special_tokens=False).ids) + 1
    from collab_megatron.data.chat import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded.encode(text, add_special_tokens=False)) + 1
