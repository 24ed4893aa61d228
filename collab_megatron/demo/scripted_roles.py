"""The rule-based roles of the demo as pure functions of a chat-completion request; mini_roles.py has those of
conf/mini/.

`desk-user` plays CollabLLM's user simulator, `desk-judge` its judge, `desk-assistant` a passive assistant for SFT data.
Each reads only the messages that a real LLM would get. User and judge read two blocks of the last message, not the
rest: `<request>...</request>`, the complete request, and `<chat>...</chat>`, one JSON object with `role` and `content`
per line. The assistant reads plain chat turns.

A reply depends on the messages, and above temperature 0 also on `seed` and the choice's index, so the same request
always gets the same answer. A request that a role cannot read raises ValueError, which the endpoint returns as HTTP
400.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collab_megatron.demo import desk
from collab_megatron.demo.mini_roles import MINI_ROLES
from collab_megatron.demo.prompt_blocks import Turn, block, chat_block, read_turns
from collab_megatron.types import TERMINATION_SIGNAL

AMBIGUOUS_SHARE = 0.6  # of the openings that the user simulator invents
FRUITLESS_TURNS = 2  # after this many replies that it does not understand, the user gives up

# Share of the passive assistant's replies that ask. A data builder that keeps the better of two replies raises a rate p
# to about 1 - (1 - p)^2. Two rates, because with greedy decoding a single rate would be all or nothing.
ASK_OFTEN_SLOTS = frozenset({"name", "from"})
ASK_RATE_OFTEN = 0.48
ASK_RATE_SELDOM = 0.18
ASK_RATE_NEEDLESS = 0.02  # if nothing is missing
MAX_QUESTIONS = 2  # after these the assistant guesses

MAX_CHOICES = 128


def answer(request: Mapping[str, Any]) -> list[str]:
    """The contents of the `n` choices for an OpenAI chat-completion request.

    Reads model, messages, n, seed and temperature. Raises KeyError for an unknown model, ValueError for a request that
    is malformed or that the role does not understand.
    """
    role = ROLES[request["model"]]
    turns = read_turns(request.get("messages"), "messages")
    count = _number(request, "n", 1, 1, MAX_CHOICES, int)
    temperature = _number(request, "temperature", 1.0, 0.0, 10.0, float)
    seed = _number(request, "seed", 0, -(2**63), 2**63, int)
    content_key = json.dumps([request["model"], turns])
    # Temperature 0 is greedy: seed and index of the choice do not matter.
    keys = [f"{content_key}|{seed}|{i}" if temperature > 0 else content_key for i in range(count)]
    return [role(turns, _rng(key)) for key in keys]


def user_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The user simulator's turn: a JSON object with `thought` and `response`.

    Opens an empty chat, answers exactly what a question asks for, and ends the chat after a command.
    """
    intent, slots, chat = _read_prompt(turns)
    if not chat:
        missing = desk.draw_missing(rng, intent, AMBIGUOUS_SHARE)
        opening = desk.render_opening(rng, intent, slots, missing)
        return _user_json("i open the chat" + (" without every detail" if missing else ""), opening)
    if chat[-1][0] != "assistant":
        raise ValueError("the chat must be empty or end with an assistant turn for the user to reply to")
    reply = desk.parse_reply(chat[-1][1])
    if isinstance(reply, desk.Command):
        right = reply.text == desk.command_text(intent, slots)
        verdict = "that is right" if right else "that is not right"
        return _user_json("the desk has acted", f"{verdict} {TERMINATION_SIGNAL}")
    asked = _asked_for(chat[-1][1], slots)
    if asked:
        return _user_json(f"the desk asks for {', '.join(asked)}", desk.render_answer(rng, slots, asked))
    fruitless = sum(1 for role, text in chat if role == "assistant" and not _asked_for(text, slots))
    if fruitless >= FRUITLESS_TURNS:
        return _user_json("this leads nowhere", f"never mind {TERMINATION_SIGNAL}")
    return _user_json("i cannot tell what is meant", rng.choice(("i do not follow", "what do you mean")))


def judge_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The judge's verdict: a JSON object with `thought`, `understanding`, `clarification` and `suggestion` in [0, 1].

    Each is recall times precision of the slots that assistant turns asked for, against those the opening left out.
    """
    del rng  # a verdict has only one wording
    intent, _, chat = _read_prompt(turns)
    if not chat or chat[0][0] != "user":
        raise ValueError("the chat must begin with the user's opening")
    missing = set(desk.find_missing(chat[0][1], intent))
    asked: list[str] = []
    for role, text in chat:
        if role == "assistant" and not isinstance(desk.parse_reply(text), desk.Command):
            asked += _question_slots(text) or [
                "?"
            ]  # neither acting nor asking costs a turn like an off-target question
    score = interactivity(missing, asked)
    thought = f"left out: {', '.join(sorted(missing)) or 'nothing'}; asked: {', '.join(asked) or 'nothing'}"
    return json.dumps({"thought": thought, "understanding": score, "clarification": score, "suggestion": score})


def interactivity(missing: set[str], asked: Sequence[str]) -> float:
    """Recall times precision of `asked` against `missing`; if nothing is missing, 1 if nothing was asked, else 0.

    `asked` has one entry for each slot asked, with repetitions: asking twice for a slot costs precision.
    """
    if not missing or not asked:
        return float(not missing and not asked)
    hits = len(missing & set(asked))
    return (hits / len(missing)) * (hits / len(asked))


def assistant_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The passive assistant's turn: sometimes a question, mostly a command with guesses for the missing slots."""
    chat = [turn for turn in turns if turn[0] != "system"]
    if not chat or chat[0][0] != "user" or chat[-1][0] != "user":
        raise ValueError("the chat must begin and end with a user turn for the assistant to reply to")
    intent = desk.find_intent(chat[0][1])
    names = desk.INTENT_SLOTS[intent]
    known = desk.find_values(" ".join(text for role, text in chat if role == "user"), intent)
    missing = [slot for slot in names if slot not in known]
    questions = sum(1 for role, text in chat if role == "assistant" and _question_slots(text))
    if questions == 0 and rng.random() < _ask_rate(missing):
        return desk.question_text(missing or [rng.choice(names)])
    if 0 < questions < MAX_QUESTIONS and missing:
        return desk.question_text(missing)
    guesses = {slot: rng.choice(desk.SLOT_VALUES[slot]) for slot in missing}
    return desk.command_text(intent, {**known, **guesses})


ROLES: dict[str, Callable[[Sequence[Turn], random.Random], str]] = {
    "desk-user": user_reply,
    "desk-judge": judge_reply,
    "desk-assistant": assistant_reply,
    **MINI_ROLES,
}
"""model name -> role"""


def _ask_rate(missing: Sequence[str]) -> float:
    if not missing:
        return ASK_RATE_NEEDLESS
    return ASK_RATE_OFTEN if ASK_OFTEN_SLOTS & set(missing) else ASK_RATE_SELDOM


def _question_slots(text: str) -> list[str]:
    reply = desk.parse_reply(text)
    return list(reply.slots) if isinstance(reply, desk.Question) else []


def _asked_for(text: str, slots: Mapping[str, str]) -> list[str]:
    return [slot for slot in dict.fromkeys(_question_slots(text)) if slot in slots]


def _read_prompt(turns: Sequence[Turn]) -> tuple[str, dict[str, str], list[Turn]]:
    """(intent, slots, chat) from the prompt of a simulator or judge."""
    prompt = turns[-1][1]
    intent, slots = desk.read_request(block(prompt, "request"))
    return intent, slots, chat_block(prompt)


def _number(request: Mapping[str, Any], key: str, default: Any, low: Any, high: Any, kind: type) -> Any:
    value = request.get(key)
    if value is None:
        return default
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}; it must be {kind.__name__} between {low} and {high}")
    return value


def _rng(key: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


def _user_json(thought: str, response: str) -> str:
    return json.dumps({"thought": thought, "response": response})
