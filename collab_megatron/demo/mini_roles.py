"""Rule-based roles for the miniatures of the paper's tasks in conf/mini/, as pure functions of a request.

A request is a gist and details, one sentence each. `mini-user` opens with the gist, gives two more details for every
question, and ends the chat after anything that is no question. `mini-judge` scores interactivity by the number of
questions, compares an answer with the reference, and extracts the assistant's last result. `mini-assistant` knows the
items that `learn_items` has read: it solves one whose details are all in the chat, else it asks, or guesses. Under the
proactive prompt of tools/build_dataset.py it always asks before it has the details.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.demo.prompt_blocks import Turn, block, chat_block
from collab_megatron.errors import UserError
from collab_megatron.json_lines import read_rows
from collab_megatron.types import TERMINATION_SIGNAL

AT_ONCE = 2  # details in an answer
ASK_RATE = 0.4  # of first replies without the proactive prompt
MOST_QUESTIONS = 4
QUESTION = "What else should I know?"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Item:
    """One task of a file in conf/mini/."""

    gist: str  # empty: every item of its file begins with the same words
    details: frozenset[str]
    solution: str


_ITEMS: list[Item] = []
"""What mini-assistant knows; filled once, before the endpoint serves."""


def learn_items(folder: Path) -> None:
    """Read every JSONL file of `folder`, which has the columns of MATH, MediumDocEdit or BigCodeBench. Raises UserError
    for another kind of file."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"--items {folder} holds no .jsonl file: name a folder such as conf/mini")
    _ITEMS[:] = [_item(row, file) for file in files for row in read_rows(file).rows]


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def user_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The user's turn as a JSON object with `thought` and `response`."""
    del rng  # it has only one way to put things
    prompt = turns[-1][1]
    request, chat = sentences(block(prompt, "request")), chat_block(prompt)
    if not request:
        raise ValueError("the <request> block is empty")
    if not chat:
        return _user_json("i begin with the gist", request[0])
    if chat[-1][0] != "assistant":
        raise ValueError("the chat must be empty or end with an assistant turn for the user to reply to")
    if not _asks(chat[-1][1]):
        return _user_json("there is a result", f"Thank you. {TERMINATION_SIGNAL}")
    told = {sentence for role, text in chat if role == "user" for sentence in sentences(text)}
    left = [sentence for sentence in request if sentence not in told]
    return _user_json("i was asked", "\n".join(left[:AT_ONCE]) or "That is all I know.")


def judge_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The verdict that the prompt asks for, by the field that it names."""
    del rng
    prompt = turns[-1][1]
    chat = chat_block(prompt)
    results = [text for role, text in chat if role == "assistant" and not _asks(text)]
    if '"found"' in prompt:
        text = _without_fence(results[-1]) if results else ""
        return json.dumps({"thought": "the last result", "found": bool(results), "text": text})
    if '"correct"' in prompt:
        wanted = " ".join(block(prompt, "reference").split())
        found = results and wanted in " ".join(_without_fence(results[-1]).split())
        return json.dumps({"thought": "compared word by word", "correct": bool(found)})
    if '"understanding"' not in prompt:
        raise ValueError("this judge scores interactivity, compares answers and extracts results")
    asked = sum(1 for role, text in chat if role == "assistant" and _asks(text))
    details = len(sentences(block(prompt, "request"))) - 1
    needed = -(-details // AT_ONCE)
    score = min(asked, needed) / max(asked, needed, 1) if needed or asked else 1.0
    marks: dict[str, Any] = dict.fromkeys(("understanding", "clarification", "suggestion"), score)
    return json.dumps({"thought": f"{asked} of {needed} questions", **marks})


def assistant_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """A plain chat turn; under the proactive prompt a JSON object with `thought` and `response`."""
    prompt = turns[-1][1]
    if "</reference>" in prompt:
        chat = chat_block(prompt)
        known = _solution(chat)
        return json.dumps({"thought": "reads along", "response": known if known is not None else QUESTION})
    chat = [turn for turn in turns if turn[0] != "system"]
    known = _solution(chat)
    if known is not None:
        return known
    questions = sum(1 for role, text in chat if role == "assistant" and _asks(text))
    if 0 < questions < MOST_QUESTIONS or (not questions and rng.random() < ASK_RATE):
        return QUESTION
    told = _told(chat)
    alike = [item.solution for item in _ITEMS if item.gist in told] or ["I do not know."]
    return rng.choice(alike)


MINI_ROLES: Mapping[str, Callable[[Sequence[Turn], random.Random], str]] = {
    "mini-user": user_reply,
    "mini-judge": judge_reply,
    "mini-assistant": assistant_reply,
}
"""model name -> role"""


def _item(row: Mapping[str, Any], file: Path) -> Item:
    try:
        if "problem" in row:
            gist, *details = sentences(row["problem"])
            return Item(gist, frozenset(details), row["solution"])
        if "instruct_prompt" in row:
            gist, *details = sentences(row["instruct_prompt"])
            return Item(gist, frozenset(details), f"```python\n{row['code_prompt']}{row['canonical_solution']}```")
        return Item("", frozenset((row["title"], *sentences(row["text"]))), row["text"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} has a row that is no item of conf/mini: {error}; leave it out") from None


def _told(chat: Sequence[Turn]) -> set[str]:
    return {sentence for role, text in chat if role == "user" for sentence in sentences(text)}


def _solution(chat: Sequence[Turn]) -> str | None:
    """The solution of the item whose gist and details are all in the chat."""
    told = _told(chat)
    return next(
        (item.solution for item in _ITEMS if item.details <= told and (not item.gist or item.gist in told)), None
    )


def _asks(text: str) -> bool:
    return text.rstrip().endswith("?")


def _without_fence(text: str) -> str:
    found = re.search(r"```(?:\w+)?\n(.*?)```", text, re.DOTALL)
    return found[1].strip("\n") if found else text.strip()


def _user_json(thought: str, response: str) -> str:
    return json.dumps({"thought": thought, "response": response})
