"""The simulated users of the desk, as pure functions of a chat-completion request.

    desk-user        answers a question in a few words (`at 6pm`), and tells the desk whether its command is right
    desk-user-bare   answers with the value and nothing else (`6pm`)
    desk-user-terse  takes no part in training: bare values, and out of two values that the desk asks for at once only
                     the first. Where its opening left out one detail, it gives another value first and changes its mind
                     once it has seen the command (`no it is 6pm`)

All three answer only what they are asked, and end the chat after a command. In at most three replies an assistant that
listens reaches the right command with each of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from collab_megatron.demo import desk
from collab_megatron.demo.prompt_blocks import Turn, block, chat_block
from collab_megatron.types import TERMINATION_SIGNAL

AMBIGUOUS_SHARE = 0.6  # of the openings that a user invents
FRUITLESS_TURNS = 2  # after this many replies that it does not understand, the user gives up

Answer = Callable[[random.Random, Mapping[str, str], Sequence[str]], str]


@dataclass(frozen=True)
class Situation:
    """What a user knows when the assistant has spoken."""

    intent: str
    slots: Mapping[str, str]  # of the whole request
    chat: Sequence[Turn]  # user first, assistant last

    @property
    def reply(self) -> str:
        return self.chat[-1][1]

    @property
    def asked(self) -> list[str]:
        """Slots of the request that the last reply asks for."""
        return asked_for(self.reply, self.slots)

    @property
    def right(self) -> bool:
        return self.reply == desk.command_text(self.intent, self.slots)

    @property
    def changeable(self) -> str | None:
        """The one slot that the opening leaves out; None if it leaves out none or several."""
        missing = desk.find_missing(self.chat[0][1], self.intent)
        return missing[0] if len(missing) == 1 else None

    def said_last(self, slot: str) -> str | None:
        """The value that the user named last."""
        words = " ".join(text for role, text in self.chat if role == "user")
        return desk.find_values(words, self.intent).get(slot)


def user_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The turn of desk-user: a JSON object with `thought` and `response`."""
    return _wordy(turns, rng, desk.render_answer)


def bare_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The turn of desk-user-bare, as `user_reply`."""
    return _wordy(turns, rng, lambda _, slots, asked: desk.render_bare_answer(slots, asked))


def terse_reply(turns: Sequence[Turn], rng: random.Random) -> str:
    """The turn of desk-user-terse, as `user_reply`."""
    situation = _situation(turns)
    if situation is None:
        return _opening(turns, rng)
    slot = situation.changeable
    said = None if slot is None else situation.said_last(slot)
    if isinstance(desk.parse_reply(situation.reply), desk.Command):
        if slot is not None and said is not None and said != situation.slots[slot]:
            return user_json("i want something else now", desk.render_correction(situation.slots[slot]))
        verdict = "ok" if situation.right else "wrong"
        return user_json("the desk has acted", f"{verdict} {TERMINATION_SIGNAL}")
    asked = situation.asked[:1]
    if not asked:
        return _not_understood(situation, rng)
    if asked == [slot] and said is None:
        others = [value for value in desk.SLOT_VALUES[asked[0]] if value != situation.slots[asked[0]]]
        return user_json("i am not sure yet", rng.choice(others))
    thought = "i answer" if asked == situation.asked else "i forget the rest"
    return user_json(thought, desk.render_bare_answer(situation.slots, asked))


def _wordy(turns: Sequence[Turn], rng: random.Random, answer: Answer) -> str:
    situation = _situation(turns)
    if situation is None:
        return _opening(turns, rng)
    if isinstance(desk.parse_reply(situation.reply), desk.Command):
        verdict = "that is right" if situation.right else "that is not right"
        return user_json("the desk has acted", f"{verdict} {TERMINATION_SIGNAL}")
    if situation.asked:
        thought = f"the desk asks for {', '.join(situation.asked)}"
        return user_json(thought, answer(rng, situation.slots, situation.asked))
    return _not_understood(situation, rng)


def _situation(turns: Sequence[Turn]) -> Situation | None:
    """None for an empty chat, which the user opens. Raises ValueError for a chat that waits for the assistant."""
    intent, slots, chat = read_prompt(turns)
    if not chat:
        return None
    if chat[-1][0] != "assistant":
        raise ValueError("the chat must be empty or end with an assistant turn for the user to reply to")
    return Situation(intent, slots, chat)


def _opening(turns: Sequence[Turn], rng: random.Random) -> str:
    intent, slots, _ = read_prompt(turns)
    missing = desk.draw_missing(rng, intent, AMBIGUOUS_SHARE)
    opening = desk.render_opening(rng, intent, slots, missing)
    return user_json("i open the chat" + (" without every detail" if missing else ""), opening)


def _not_understood(situation: Situation, rng: random.Random) -> str:
    fruitless = sum(1 for role, text in situation.chat if role == "assistant" and not asked_for(text, situation.slots))
    if fruitless >= FRUITLESS_TURNS:
        return user_json("this leads nowhere", f"never mind {TERMINATION_SIGNAL}")
    return user_json("i cannot tell what is meant", rng.choice(("i do not follow", "what do you mean")))


def question_slots(text: str) -> list[str]:
    """The slots that an assistant turn asks for, with repetitions; none for a command."""
    reply = desk.parse_reply(text)
    return list(reply.slots) if isinstance(reply, desk.Question) else []


def asked_for(text: str, slots: Mapping[str, str]) -> list[str]:
    """The slots of a request that an assistant turn asks for."""
    return [slot for slot in dict.fromkeys(question_slots(text)) if slot in slots]


def read_prompt(turns: Sequence[Turn]) -> tuple[str, dict[str, str], list[Turn]]:
    """(intent, slots, chat) from the prompt of a simulated user or a judge. Raises ValueError."""
    prompt = turns[-1][1]
    intent, slots = desk.read_request(block(prompt, "request"))
    return intent, slots, chat_block(prompt)


def user_json(thought: str, response: str) -> str:
    return json.dumps({"thought": thought, "response": response})
