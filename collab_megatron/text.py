r"""Cleans text from outside for tokenizers, msgspec, line-based files and terminals.

JSON can contain half of a surrogate pair ("\ud83d" without its other half), which has no UTF-8 encoding: tokenizers,
msgspec and orjson raise an error.
"""

from __future__ import annotations

import re

HALF = re.compile("[\ud800-\udfff]")
LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""Line ends for str.splitlines() and editors that JSON may contain unescaped, with JSON's escape for each."""
LINE_END_BYTES = tuple((end.encode(), escape.encode()) for end, escape in LINE_ENDS.items())


def has_half(text: str) -> bool:
    """Whether the text contains half of a surrogate pair; two halves that are not joined count."""
    return not text.isascii() and HALF.search(text) is not None


def joined(text: str) -> str:
    """The text with the two halves of each pair joined. Single halves stay."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass") if has_half(text) else text


def whole_text(text: str) -> str:
    """Pairs joined, and each single half replaced by the replacement character: always valid UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if has_half(text) else text


def on_one_line(json_line: bytes) -> bytes:
    """The same JSON value in UTF-8, with every kind of line end in its strings escaped."""
    for end, escape in LINE_END_BYTES:
        if end in json_line:
            json_line = json_line.replace(end, escape)
    return json_line


def visible(text: str) -> str:
    r"""For a terminal: what is no line end and cannot be printed, such as an escape sequence or a character that
    changes the direction of a text, as its number (\x1b, \u202e)."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def duration(seconds: float) -> str:
    """`42s`, `3m06s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
