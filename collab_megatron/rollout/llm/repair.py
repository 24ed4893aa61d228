r"""A lenient JSON parser: reads an object from text that is nearly JSON, in one pass and linear time.

It accepts words around the object, missing and extra commas, comments, single and typographic quotes, names and words
without quotes, Python's True, False and None, line breaks and quotes inside a string, and a missing end. A quote ends a
string only if JSON could continue after it, so `"she said "hi" to me"}` is one string.

General repair tools go back over the text for every guess, which takes minutes for 32,000 braces. Here no character is
read twice: if an object cannot be read, the search for the next one starts where reading stopped.
"""

from __future__ import annotations

import re
from typing import Any

from collab_megatron.text import joined

SPACE = re.compile(r"(?:\s++|//[^\n]*+|/\*(?:[^*]|\*(?!/))*+(?:\*/|\Z))*+")
CLOSERS = {'"': '"', "'": "'", "\u201c": '\u201d"', "\u201d": '\u201d"', "\u2018": "\u2019'"}
"""Opening quote -> possible closing quotes."""
NAME_AHEAD = r"[\"'\u201c\u201d\u2018]?[\w \-]{1,64}+[\"'\u201d\u2019]?\s*+:"
AFTER_NAME = re.compile(r"\s*+:")
AFTER_VALUE = re.compile(rf"\s*+(?:\Z|[}}\]]|,\s*+(?:\Z|[,}}\]]|//|/\*|{NAME_AHEAD})|{NAME_AHEAD})")
AFTER_ITEM = re.compile(r"\s*+(?:\Z|[,\]])")
TO_QUOTE = {closers: re.compile(rf"(?:[^{closers}\\]++|\\(?:.|\Z))*+", re.DOTALL) for closers in set(CLOSERS.values())}
BARE_NAME = re.compile(r"[\w\-]{1,64}+(?=\s*+:)")
BARE_VALUE = re.compile(r"[^,{}\[\]\n\"]*+")
NUMBER = re.compile(r"-?(?:\d{1,32}\.?\d{0,32}|\.\d{1,32})(?:[eE][+-]?\d{1,3})?", re.ASCII)
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
MEANING = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"} | {c: c for c in "\"'\\/"}


class _Unreadable(Exception):
    """No object can be read there."""


def last_object(text: str, *, max_depth: int) -> dict[str, Any] | None:
    """The last readable object in `text` that has a field; None if there is none.

    An object or list that is nested deeper than `max_depth` is not readable.
    """
    reader = _Reader(text, max_depth)
    found = None
    while (start := text.find("{", reader.at)) >= 0:
        reader.at = start + 1
        try:
            found = reader.members(1) or found
        except _Unreadable:
            continue
    return found


class _Reader:
    """Reads from position `at`, which only grows."""

    def __init__(self, text: str, max_depth: int) -> None:
        self.at = 0
        self._text, self._max_depth = text, max_depth

    def members(self, depth: int) -> dict[str, Any]:
        """The members of an object, after its opening brace. Raises _Unreadable."""
        read: dict[str, Any] = {}
        while True:
            self._skip(",")
            if self._ends("}"):
                return read
            name = self._name()
            self._skip(":")
            read[name] = self._value(depth, AFTER_VALUE)

    def _items(self, depth: int) -> list[Any]:
        read: list[Any] = []
        while True:
            self._skip(",")
            if self._ends("]"):
                return read
            before = self.at
            read.append(self._value(depth, AFTER_ITEM))
            if self.at == before:  # a stray brace
                raise _Unreadable

    def _value(self, depth: int, after: re.Pattern[str]) -> Any:
        """A value. A quoted string ends at a quote that `after` matches behind."""
        start = self._here()
        if start and start in "{[":
            if depth >= self._max_depth:
                raise _Unreadable
            self.at += 1
            return self.members(depth + 1) if start == "{" else self._items(depth + 1)
        if start in CLOSERS:
            return self._quoted(after)
        found = BARE_VALUE.match(self._text, self.at)
        assert found is not None
        self.at = found.end()
        word = found[0].strip()
        if word in WORDS:
            return WORDS[word]
        if NUMBER.fullmatch(word):
            return float(word) if set(word) & set(".eE") else int(word)
        return word

    def _name(self) -> str:
        if self._here() in CLOSERS:
            name = self._quoted(AFTER_NAME)
            if self._here() != ":":
                raise _Unreadable
            return name
        found = BARE_NAME.match(self._text, self.at)
        if found is None:
            raise _Unreadable
        self.at = found.end()
        return found[0]

    def _quoted(self, after: re.Pattern[str]) -> str:
        """The string from its opening quote to a closing quote that `after` matches behind, or to the end."""
        closers = CLOSERS[self._text[self.at]]
        start = end = self.at + 1
        while True:
            found = TO_QUOTE[closers].match(self._text, end)
            assert found is not None
            end = found.end()
            if end >= len(self._text):
                self.at = end
                break
            self.at = end + 1
            if after.match(self._text, self.at):
                break
            end += 1
        return joined(ESCAPE.sub(_unescaped, self._text[start:end]))

    def _here(self) -> str:
        """The next character that is not in white space or a comment; empty at the end."""
        found = SPACE.match(self._text, self.at)
        assert found is not None
        self.at = found.end()
        return self._text[self.at : self.at + 1]

    def _skip(self, mark: str) -> None:
        while self._here() == mark:
            self.at += 1

    def _ends(self, closer: str) -> bool:
        """Whether the list or object ends here, possibly because the text ends."""
        here = self._here()
        self.at += here == closer
        return here in ("", closer)


def _unescaped(found: re.Match[str]) -> str:
    if found[1]:
        return chr(int(found[1], 16))
    return MEANING.get(found[2], found[0])  # a path or a formula keeps its backslash
