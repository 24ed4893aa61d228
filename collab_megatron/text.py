r"""Text that others wrote, made fit for tokenizers, msgspec and files of one record a line.

JSON can write half of a surrogate pair ("\ud83d" without its other half), which has no UTF-8: tokenizers, msgspec and
orjson raise at it.
"""

from __future__ import annotations

import re

HALF = re.compile("[\ud800-\udfff]")
LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Line ends to str.splitlines() and to editors, which JSON may hold as they are; with JSON's own escape for each."""
LINE_END_BYTES = tuple((end.encode(), escape.encode()) for end, escape in LINE_ENDS.items())


def has_half(text: str) -> bool:
    """Whether half of a surrogate pair stands in it; two halves that belong together, but were not joined, count."""
    return not text.isascii() and HALF.search(text) is not None


def joined(text: str) -> str:
    """The two halves of a pair as the character that they are. Halves without a partner stay."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if has_half(text) else text


def whole_text(text: str) -> str:
    """Pairs joined, and the replacement character in place of each half without a partner: always valid UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if has_half(text) else text


def on_one_line(json_line: bytes) -> bytes:
    """A JSON value in UTF-8 whose strings hold no line end of any kind; its meaning is the same."""
    for end, escape in LINE_END_BYTES:
        if end in json_line:
            json_line = json_line.replace(end, escape)
    return json_line
