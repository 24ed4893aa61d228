"""The rule-based roles of the demo as pure functions of a chat-completion request; desk_users.py has the simulated
users, mini_roles.py the roles of conf/mini/.

`desk-judge` plays CollabLLM's judge, `desk-assistant` a passive assistant for SFT data. Each role reads only the
messages that a real LLM would get. Users and judge read two blocks of the last message, not the rest:
`<request>...</request>`, the complete request, and `<chat>...</chat>`, one JSON object with `role` and `content` per
line. The assistant reads plain chat turns.

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
from collab_megatron.demo.desk_users import bare_reply, question_slots, read_prompt, terse_reply, user_reply
from collab_megatron.demo.mini_roles import MINI_ROLES
from collab_megatron.demo.prompt_blocks import Turn, block, chat_block, read_turns

# Share of the passive assistant's replies that ask. A data builder that keeps the better of two replies raises a rate p
# to about 1 - (1 - p)^2. Two rates, because with greedy decoding a single rate would be all or nothing.
ASK_OFTEN_SLOTS = frozenset({"name", "from"})
ASK_RATE_OFTEN = 0.48
ASK_RATE_SELDOM = 0.18
ASK_RATE_NEEDLESS = 0.02  # if nothing is missing
MAX_QUESTIONS = 2  # after these the assistant guesses

MAX_CHOICES = 128
ONE_TOKEN = 1
"""`max_tokens` of a request that only asks whether a role answers, as the doctor does."""


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
    if request.get("max_tokens") == ONE_TOKEN:
        return ["ok"] * count
    content_key = json.dumps([request["model"], turns])
    # Temperature 0 is greedy: seed and index of the choice do not matter.
    keys = [f"{content_key}|{seed}|{i}" if temperature > 0 else content_key for i in range(count)]
    return [role(turns, _rng(key)) for key in keys]


def judge_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The judge's verdict: a JSON object with `thought`, `understanding`, `clarification` and `suggestion` in [0, 1].

    Each is recall times precision of the slots that assistant turns asked for, against those the opening left out. Of
    two chats it says which is `better`: the one that ends with the right command, else the one with higher marks.
    """
    del rng  # a verdict has only one wording
    if "<second>" in turns[-1][1]:
        return _pair_verdict(turns[-1][1])
    intent, _, chat = read_prompt(turns)
    score, thought = _marks(intent, chat)
    return json.dumps({"thought": thought, "understanding": score, "clarification": score, "suggestion": score})


def _pair_verdict(prompt: str) -> str:
    intent, slots = desk.read_request(block(prompt, "request"))
    ranks = []
    for tag in ("first", "second"):
        chat = chat_block(prompt, tag)
        last = next((text for role, text in reversed(chat) if role == "assistant"), "")
        ranks.append((last == desk.command_text(intent, slots), _marks(intent, chat)[0]))
    better = "neither" if ranks[0] == ranks[1] else "first" if ranks[0] > ranks[1] else "second"
    return json.dumps({"thought": f"right command and marks: {ranks[0]} and {ranks[1]}", "better": better})


def _marks(intent: str, chat: Sequence[Turn]) -> tuple[float, str]:
    """The mark of a chat, and the reason."""
    if not chat or chat[0][0] != "user":
        raise ValueError("the chat must begin with the user's opening")
    missing = set(desk.find_missing(chat[0][1], intent))
    asked: list[str] = []
    for role, text in chat:
        if role == "assistant" and not isinstance(desk.parse_reply(text), desk.Command):
            asked += question_slots(text) or ["?"]  # neither acting nor asking costs a turn like an off-target question
    score = interactivity(missing, asked)
    return score, f"left out: {', '.join(sorted(missing)) or 'nothing'}; asked: {', '.join(asked) or 'nothing'}"


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
    questions = sum(1 for role, text in chat if role == "assistant" and question_slots(text))
    if questions == 0 and rng.random() < _ask_rate(missing):
        return desk.question_text(missing or [rng.choice(names)])
    if 0 < questions < MAX_QUESTIONS and missing:
        return desk.question_text(missing)
    guesses = {slot: rng.choice(desk.SLOT_VALUES[slot]) for slot in missing}
    return desk.command_text(intent, {**known, **guesses})


ROLES: dict[str, Callable[[Sequence[Turn], random.Random], str]] = {
    "desk-user": user_reply,
    "desk-user-bare": bare_reply,
    "desk-user-terse": terse_reply,
    "desk-judge": judge_reply,
    "desk-assistant": assistant_reply,
    **MINI_ROLES,
}
"""model name -> role"""


def _ask_rate(missing: Sequence[str]) -> float:
    if not missing:
        return ASK_RATE_NEEDLESS
    return ASK_RATE_OFTEN if ASK_OFTEN_SLOTS & set(missing) else ASK_RATE_SELDOM


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
