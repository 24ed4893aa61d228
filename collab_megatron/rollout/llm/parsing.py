"""Parsing of LLM replies: a JSON object, strictly at first, then with repairs, never by guessing; and its fields.

Every function raises MalformedReply (a ValueError) for a reply that cannot be used, and nothing else, whatever the text
is: one reply must not end a run. Length and nesting are bounded before parsing, and time is linear in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, TypeVar

from collab_megatron.rollout.llm.repair import last_object
from collab_megatron.text import has_half
from collab_megatron.types import LLMReply

T = TypeVar("T")

LONGEST_CHARS = 1_000_000
"""Longest reply that is parsed; the gateway's own bound (ApiRequest.longest_chars) is lower in most cases."""
LONGEST_REPAIRED_CHARS = 16_384
"""Longest reply that is repaired: 4,000 tokens, in about 10 ms. Well-formed JSON takes a tenth of that."""
DEEPEST = 32
"""Most levels of nested objects and lists; the prompts ask for one."""

OPENING = re.compile(r"<(think|thinking|scratchpad|reasoning)>", re.IGNORECASE | re.ASCII)
CLOSING = {
    tag: re.compile(f"</{tag}>", re.IGNORECASE | re.ASCII) for tag in ("think", "thinking", "scratchpad", "reasoning")
}
FENCE = "```"
STRINGS = re.compile(r'"(?:[^"\\]++|\\(?:.|\Z))*+(?:"|\Z)', re.DOTALL)
DECODER = json.JSONDecoder(strict=False)
"""Accepts line breaks and tabs inside strings."""
STEP_OF = {"[": 1, "{": 1, "]": -1, "}": -1}


class MalformedReply(ValueError):
    """A reply that came but cannot be used; `kind` is one of accounting.MALFORMED."""

    def __init__(self, message: str, kind: str = "unreadable") -> None:
        super().__init__(message)
        self.kind = kind


def parsed(reply: LLMReply, parse: Callable[[str], T]) -> list[T]:
    """The value of each text. Raises MalformedReply if `parse` refuses one, or if there is nothing to parse."""
    if reply.problem:
        raise MalformedReply(f"the reply was {reply.problem.replace('_', ' ')}", reply.problem)
    if not all(text.strip() for text in reply.texts) or not reply.texts:
        raise MalformedReply("the reply is empty", "empty")
    if any(map(has_half, reply.texts)):  # from the journal of an older version; new replies are repaired on arrival
        raise MalformedReply("half a surrogate pair in the reply")
    try:
        return [parse(text) for text in reply.texts]
    except (ValueError, RecursionError, OverflowError) as error:  # the last two: of `json.loads`, of `int`
        raise MalformedReply(str(error)) from None


def object_schema(**fields: str) -> Mapping[str, Any]:
    """The JSON Schema of an object with exactly these fields: name -> type (string, number, boolean).

    It has no bounds on numbers, which some providers refuse: share_field checks them.
    """
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }


def strip_scratchpad(text: str) -> str:
    """The reply without thinking blocks and without a code fence around it."""
    kept, at = [], 0
    unclosed = set()  # tags without an end from here on: searched once, not once per opening
    for opening in OPENING.finditer(text):
        tag = opening[1].lower()
        if opening.start() < at or tag in unclosed:
            continue
        closing = CLOSING[tag].search(text, opening.end())
        if closing is None:
            unclosed.add(tag)
            continue
        kept.append(text[at : opening.start()])
        at = closing.end()
    text = "".join([*kept, text[at:]]).strip()
    if len(text) > 2 * len(FENCE) and text.startswith(FENCE) and text.endswith(FENCE):
        language, line_end, fenced = text[len(FENCE) : -len(FENCE)].partition("\n")
        language = language.rstrip()
        if line_end and (not language or (language.isascii() and language.isalpha())):
            return fenced.strip()
    return text


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`, which may have words around it and small syntax errors. Raises MalformedReply."""
    if len(text) > LONGEST_CHARS:
        raise MalformedReply(f"the reply has {len(text):,} characters, more than the {LONGEST_CHARS:,} that are parsed")
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):  # else thinking tags are in its texts, and belong there
        text = strip_scratchpad(text)
    if _depth(text) > DEEPEST:
        raise MalformedReply(f"the reply is nested more than {DEEPEST} deep")
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError:
        value = _among_words(text) or _repaired(text)
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits
        raise MalformedReply(f"the reply cannot be parsed: {error}") from None
    if not isinstance(value, dict) or not value:
        raise MalformedReply("there is no JSON object in the reply")
    if _has_half(value):  # no tokenizer accepts it
        raise MalformedReply("half a surrogate pair in the reply")
    return value


def text_field(reply: dict[str, Any], name: str) -> str:
    """A field that must be non-empty text."""
    value = _field(reply, name)
    if not isinstance(value, str) or not value.strip():
        raise MalformedReply(f"field {name!r} has no text")
    return value.strip()


def share_field(reply: dict[str, Any], name: str) -> float:
    """A field that must be a number in [0, 1], possibly in quotes."""
    return number_field(reply, name, 0.0, 1.0)


def number_field(reply: dict[str, Any], name: str, lowest: float, highest: float) -> float:
    """A field that must be a number between the two, possibly in quotes."""
    value = _field(reply, name)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise MalformedReply(f"field {name!r} is not a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        raise MalformedReply(f"field {name!r} is not a number between {lowest:g} and {highest:g}")
    return float(value)


def verdict_field(reply: dict[str, Any], name: str) -> bool:
    """A field that must be true or false, or the same in words or as 1 and 0."""
    value = _field(reply, name)
    text = str(value).strip().lower() if isinstance(value, (str, bool, float)) or value in (0, 1) else ""
    if text in ("true", "yes", "1", "1.0"):
        return True
    if text in ("false", "no", "0", "0.0"):
        return False
    raise MalformedReply(f"field {name!r} is neither true nor false")


def read_for_record(text: str) -> tuple[str, dict[str, Any], str]:
    """(thought, other plain values, text) of a reply for the record of calls.

    `response` is left out, since the chat has it. The text is kept only if it is not JSON.
    """
    try:
        reply = json_object(text)
    except MalformedReply:
        return "", {}, text
    marks = {
        name: value
        for name, value in reply.items()
        if name not in ("thought", "response") and (value is None or isinstance(value, (str, bool, int, float)))
    }
    return str(reply.get("thought") or ""), marks, ""


def _field(reply: dict[str, Any], name: str) -> Any:
    if name not in reply:
        raise MalformedReply(f"field {name!r} is missing")
    return reply[name]


def _among_words(text: str) -> dict[str, Any] | None:
    """The last well-formed object among words; None if a brace begins something else."""
    found, at = None, text.find("{")
    while at >= 0:
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found, at = value or found, text.find("{", end)
    return found


def _repaired(text: str) -> dict[str, Any] | None:
    if len(text) > LONGEST_REPAIRED_CHARS:
        raise MalformedReply(f"the reply is not JSON, and with {len(text):,} characters too long to be repaired")
    return last_object(text, max_depth=DEEPEST)


def _depth(text: str) -> int:
    """Levels of nested brackets outside strings: at least as many as a parser would see."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return 0
    outside = STRINGS.sub("", text)
    return max(accumulate(STEP_OF[c] for c in outside if c in STEP_OF), default=0)


def _has_half(value: dict[str, Any]) -> bool:
    """Whether a name or a text in it contains half of a surrogate pair."""
    left: list[Any] = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            if has_half(each):
                return True
        elif isinstance(each, dict):
            left += [*each, *each.values()]
        elif isinstance(each, list):
            left += each
    return False
