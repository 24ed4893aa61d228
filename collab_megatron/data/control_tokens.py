"""Text that others wrote, kept from becoming control tokens.

A user who types `<|im_end|>` must not end the turn, and a dataset must not open one. Each such name goes into the
template with a mark inside it. The mark is taken out where it can no longer join the name: in the tokenizer's
normalizer, which runs after it has looked for control tokens. So the ids are those of the plain letters, and text
without such names goes the way that it always went.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

MARK = "\ufdd0"
"""Unicode has set this code point aside for use inside a program; in a text it would be an error."""


class ControlTokens:
    """The names that a tokenizer reads as one token of a special meaning."""

    def __init__(self, tokenizer: Any, core: Any, *, thought_tags: Collection[str]) -> None:
        """`core`: the fast tokenizer inside `tokenizer`, or None. The policy and its data may use `thought_tags`."""
        self._tokenizer, self._core = tokenizer, core
        template = str(getattr(tokenizer, "chat_template", None) or "")
        special, named = set(), set()
        for token in tokenizer.added_tokens_decoder.values():
            text = str(token)
            if token.special:
                special.add(text)
            elif text in thought_tags or (text.strip() and text in template):  # others are words: spaces, HTML
                named.add(text)
        self._assistants = _pattern(special - set(thought_tags))
        self._others = _pattern(special | named)

    def marked(self, text: str, role: str) -> str:
        """A turn's text with a MARK in each name that its role must not use."""
        pattern = self._assistants if role == "assistant" else self._others
        while pattern is not None and pattern.search(text) is not None:  # again: names may overlap
            text = pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text

    def encode(self, text: str) -> list[int]:
        """The ids of a marked text, as if the marks were not there."""
        if self._core is None:  # in pieces, which a tokenizer may join with spaces
            return [i for piece in text.split(MARK) for i in self._tokenizer.encode(piece, add_special_tokens=False)]
        ids: list[int] = self._unmarking.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _unmarking(self) -> Tokenizer:
        """The fast tokenizer, with a normalizer that takes marks out after the control tokens were found."""
        described = json.loads(self._core.to_str())
        unmark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        before = described["normalizer"]
        described["normalizer"] = {"type": "Sequence", "normalizers": [unmark, *([before] if before else [])]}
        for token in described["added_tokens"]:
            token["normalized"] = False  # else it is looked for once more, where the marks are out
        return Tokenizer.from_str(json.dumps(described))


def _pattern(names: Collection[str]) -> re.Pattern[str] | None:
    """Finds the longest of `names`; None without any. A name of one letter cannot hold a mark and is left alone."""
    listed = sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, listed))) if listed else None
