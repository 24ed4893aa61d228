"""Keep text of others from becoming control tokens.

A user who types `<|im_end|>` must not end the turn, and a dataset must not open one. Each such name goes into the
template with a mark inside. The mark is removed in the tokenizer's normalizer, which runs after the search for control
tokens, so the ids are those of the plain letters. Text without such names is encoded as usual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

MARK = "\ufdd0"
"""A code point that Unicode reserves for internal use of a program; it is never part of valid text."""


class ControlTokens:
    """The names that a tokenizer reads as one token with a special meaning."""

    def __init__(self, tokenizer: Any, core: Any, *, thought_tags: Collection[str]) -> None:
        """`core`: the fast tokenizer inside `tokenizer`, or None. Assistant turns may use `thought_tags`."""
        self._tokenizer, self._core = tokenizer, core
        template = str(getattr(tokenizer, "chat_template", None) or "")
        special, named = set(), set()
        for token in tokenizer.added_tokens_decoder.values():
            text = str(token)
            if token.special:
                special.add(text)
            elif text in thought_tags or (
                text.strip() and text in template
            ):  # other added tokens are words: spaces, HTML
                named.add(text)
        self._assistants = _pattern(special - set(thought_tags))
        self._others = _pattern(special | named)

    def marked(self, text: str, role: str) -> str:
        """A turn's text with a MARK inside each name that its role must not use."""
        pattern = self._assistants if role == "assistant" else self._others
        while pattern is not None and pattern.search(text) is not None:  # repeated, because names may overlap
            text = pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text

    def encode(self, text: str) -> list[int]:
        """The ids of a marked text without its marks."""
        if self._core is None:  # piece by piece; a tokenizer may add spaces between them
            return [i for piece in text.split(MARK) for i in self._tokenizer.encode(piece, add_special_tokens=False)]
        ids: list[int] = self._unmarking.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _unmarking(self) -> Tokenizer:
        """The fast tokenizer with a normalizer that removes marks after control tokens were found."""
        described = json.loads(self._core.to_str())
        unmark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        before = described["normalizer"]
        described["normalizer"] = {"type": "Sequence", "normalizers": [unmark, *([before] if before else [])]}
        for token in described["added_tokens"]:
            token["normalized"] = False  # else the tokenizer looks for it again after the marks are removed
        return Tokenizer.from_str(json.dumps(described))


def _pattern(names: Collection[str]) -> re.Pattern[str] | None:
    """Matches the longest of `names`; None without names. A name of one letter has no place for a mark: left out."""
    listed = sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, listed))) if listed else None
