"""A JSON object out of an LLM's reply: strict first, repaired where that fails, never guessed.

Every function raises MalformedReply (a ValueError) with a few words for a reply that cannot be used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

SCRATCHPADS = re.compile(r"<(think|thinking|scratchpad|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
FENCE = re.compile(r"^```[a-zA-Z]*\s*\n(.*?)\n?```$", re.DOTALL)


class MalformedReply(ValueError):
    """A reply that came, but cannot be used."""


def object_schema(**fields: str) -> Mapping[str, Any]:
    """The JSON Schema of an object with exactly these fields: name -> type (string, number, boolean).

    Without bounds on numbers, which some providers refuse: the readers below check them.
    """
    return {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }


def strip_scratchpad(text: str) -> str:
    """The reply without the thinking blocks that some models put first, and without a code fence around it."""
    text = SCRATCHPADS.sub("", text).strip()
    fenced = FENCE.match(text)
    return fenced.group(1).strip() if fenced else text


def json_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; words around it and small mistakes in it are forgiven."""
    text = strip_scratchpad(text)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = _repaired(text)
    if not isinstance(value, dict) or not value:
        raise MalformedReply("no JSON object in the reply")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # no tokenizer takes it
        raise MalformedReply("half a surrogate pair in the reply") from None
    return value


def text_field(reply: dict[str, Any], name: str) -> str:
    """A field that must be text with something in it."""
    value = _field(reply, name)
    if not isinstance(value, str) or not value.strip():
        raise MalformedReply(f"field {name!r} holds no text")
    return value.strip()


def share_field(reply: dict[str, Any], name: str) -> float:
    """A field that must be a number in [0, 1]; a number in quotes will do."""
    value = _field(reply, name)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise MalformedReply(f"field {name!r} is not a number") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise MalformedReply(f"field {name!r} is not a number between 0 and 1")
    return float(value)


def verdict_field(reply: dict[str, Any], name: str) -> bool:
    """A field that must be true or false; 1, 0 and the words will do."""
    value = _field(reply, name)
    text = str(value).strip().lower()
    if text in ("true", "yes", "1", "1.0"):
        return True
    if text in ("false", "no", "0", "0.0"):
        return False
    raise MalformedReply(f"field {name!r} is neither true nor false")


def read_for_record(text: str) -> tuple[str, dict[str, Any], str]:
    """The `thought` of a reply in JSON; its other plain values, except the `response`, which stands in the chat; and
    the text itself where it is no JSON: a caller without a check takes it as it comes."""
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


def _repaired(text: str) -> Any:
    import json_repair  # here: well-formed replies never need it

    start = text.find("{")
    if start < 0:
        return None
    value = json_repair.loads(text[start:])
    if isinstance(value, list):  # several objects: the last one is the answer
        value = next((item for item in reversed(value) if isinstance(item, dict)), None)
    return value
