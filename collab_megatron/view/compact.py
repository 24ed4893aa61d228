"""A tree of the record in the short form that the browser reads.

    tree     id, task, truth, p prompt [[role, content]], error, begun, t0 seconds since the epoch, r replies
    turn     x text, th thought, cut, fin finish reason, t [begin, end], re replayed, ids, lp log-probs,
             vr version runs [[version, tokens]], a advantage; of a reply also mr, same as, f futures
    future   st status, m messages, tu turns, c calls, s scores, s2 second scores, d details, rw reward, tok tokens,
             v versions, error, copy
    call     role, mo model, me metric, t, n requests, tok [prompt, completion], usd, th thought, x text, mk marks,
             sh shared, re replayed, error

Times are milliseconds after the tree began, log-probs have three
decimals, prompt ids are left out. Texts are whole. Every value is untrusted: a model, a simulator or a dataset wrote
it. What has the wrong type becomes null or is left out; what is missing stays missing and never becomes 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

LOGPROB_DIGITS = 3
SCORE_DIGITS = 6
DEEPEST = 16  # levels of details and marks


def compact_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """One line of a record for the page's detail view."""
    begin_s = first_second(tree)
    return {
        "id": text(tree.get("task_id")),
        "task": text(tree.get("single_turn_prompt")),
        "truth": text(tree.get("ground_truth")),
        "p": _messages(tree.get("prompt")),
        "error": text(tree.get("error")),
        "begun": number(tree.get("begun_for_step")),
        "t0": begin_s,
        "r": [_reply(reply, begin_s) for reply in objects(tree.get("replies"))],
    }


def first_second(tree: Mapping[str, Any]) -> float | None:
    """When the tree's first request was sent, in seconds since the epoch; null where nothing has a time."""
    begins = [number(part.get("begin_s")) for part in timed_parts(tree)]
    return min((begin for begin in begins if begin), default=None)  # 0: no time was noted


def timed_parts(tree: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Everything in a tree that has begin_s and end_s: replies, later turns, calls."""
    for reply in objects(tree.get("replies")):
        yield reply
        for future in objects(reply.get("futures")):
            yield from objects(future.get("turns"))
            yield from objects(future.get("calls"))


def _reply(reply: Mapping[str, Any], begin_s: float | None) -> dict[str, Any]:
    return {
        **_turn(reply, begin_s),
        "mr": number(reply.get("mr")),
        "same": number(reply.get("same_as")),
        "f": [_future(future, begin_s) for future in objects(reply.get("futures"))],
    }


def _turn(turn: Mapping[str, Any], begin_s: float | None) -> dict[str, Any]:
    return {
        "x": text(turn.get("text")),
        "th": text(turn.get("thought")),
        "cut": bool(turn.get("cut")),
        "fin": text(turn.get("finish_reason")),
        "t": _times(turn, begin_s),
        "re": bool(turn.get("replayed")),
        "ids": [int(value) for value in map(number, items(turn.get("token_ids"))) if value is not None],
        "lp": [rounded(value, LOGPROB_DIGITS) for value in items(turn.get("logprobs"))],
        "vr": [[number(part) for part in items(run)] for run in items(turn.get("version_runs"))],
        "a": rounded(turn.get("advantage")),
    }


def _future(future: Mapping[str, Any], begin_s: float | None) -> dict[str, Any]:
    return {
        "st": text(future.get("status")),
        "m": _messages(future.get("messages")),
        "tu": [_turn(turn, begin_s) for turn in objects(future.get("turns"))],
        "c": [_call(call, begin_s) for call in objects(future.get("calls"))],
        "s": scores(future.get("scores")),
        "s2": scores(future.get("second_scores")),
        "d": plain(future.get("details")) if isinstance(future.get("details"), dict) else {},
        "rw": rounded(future.get("reward")),
        "tok": number(future.get("policy_tokens")),
        "v": [number(version) for version in items(future.get("weight_versions"))],
        "error": text(future.get("error")),
        "copy": bool(future.get("copied")),
    }


def _call(call: Mapping[str, Any], begin_s: float | None) -> dict[str, Any]:
    return {
        "role": text(call.get("role")),
        "mo": text(call.get("answered_by")) or text(call.get("model")),
        "me": text(call.get("metric")),
        "t": _times(call, begin_s),
        "n": number(call.get("requests")),
        "tok": [number(call.get("prompt_tokens")), number(call.get("completion_tokens"))],
        "usd": number(call.get("cost_usd")),
        "th": text(call.get("thought")),
        "x": text(call.get("text")),
        "mk": plain(call.get("marks")) if isinstance(call.get("marks"), dict) else {},
        "sh": bool(call.get("shared")),
        "re": bool(call.get("replayed")),
        "error": text(call.get("error")),
    }


def _messages(value: Any) -> list[list[str]]:
    return [[text(message.get("role")), text(message.get("content"))] for message in objects(value)]


def _times(part: Mapping[str, Any], begin_s: float | None) -> list[int] | None:
    """[begin, end] in ms after the tree's first request; null without both."""
    begin, end = number(part.get("begin_s")), number(part.get("end_s"))
    if not begin or not end or begin_s is None:
        return None
    return [round(1000 * (begin - begin_s)), round(1000 * (end - begin_s))]


def scores(value: Any) -> dict[str, float | None]:
    """Scores by metric."""
    return {text(name): rounded(score) for name, score in value.items()} if isinstance(value, dict) else {}


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def number(value: Any) -> float | int | None:
    """A finite number; None for anything else, a bool included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value if abs(value) < 2**53 else None  # JavaScript has no larger ones
    return value if math.isfinite(value) else None


def rounded(value: Any, digits: int = SCORE_DIGITS) -> float | int | None:
    found = number(value)
    return found if found is None else round(found, digits)


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in items(value) if isinstance(item, dict)]


def plain(value: Any, depth: int = 0) -> Any:
    """Details and marks of any form, with numbers that JSON and JavaScript can hold; others become text. What is
    nested deeper than DEEPEST is left out."""
    if isinstance(value, dict | list) and depth >= DEEPEST:
        return "..."
    if isinstance(value, dict):
        return {text(key): plain(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each, depth + 1) for each in value]
    if isinstance(value, str | bool) or value is None:
        return value
    found = number(value)
    return str(value) if found is None else found
