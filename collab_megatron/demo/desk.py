"""The demo's tasks: a desk that fills in requests of five kinds.

A request is an intent and one value for each of its slots; the right answer is one command, such as
`BOOK size 4 time 6pm day monday name judy`. Most openings leave out one or two slots: an assistant that answers at once
must guess, and one that asks `which time?` gets the value. This is CollabLLM's problem with a few hundred words.

Choices:
- Each value belongs to one slot and is never a word of a wording, so the slots that a text fills follow from the text.
  The rule-based user and judge need no state besides the chat.
- A command repeats the values of the request (no `size=4`): the model copies tokens and translates none.
- A hash of the whole combination decides between train and held-out tasks, so they share no combination.
- Whether a task is ambiguous is drawn first and on its own: no rejection step can change the share.

Standard library only: the endpoint and the tests import this without torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


SLOT_VALUES: dict[str, tuple[str, ...]] = {
    "size": _words("2 3 4 5 6 7 8 9 10"),
    "time": _words("7am 8am 10am 11am noon 1pm 4pm 6pm 8pm 9pm"),
    "day": _words("monday tuesday wednesday thursday friday saturday sunday today tomorrow"),
    "name": _words("amir bella chen dora emil fatima goran hana ines judy"),
    "from": _words("station school library harbor hospital factory campus bakery embassy garage"),
    "to": _words("airport stadium beach museum zoo theater castle temple market lighthouse"),
    "item": _words("pizza lasagna curry sushi burgers dumplings falafel paella noodles tacos"),
    "count": _words("12 15 18 20 24 30 36 48"),
    "task": _words("laundry taxes groceries dentist gym rent homework vaccine backup haircut"),
    "kind": _words("single double twin suite loft studio cabin penthouse"),
    "nights": _words("two three four five six seven eight nine"),
}
"""slot -> its values (8 to 10, disjoint between slots; tested)."""

INTENT_SLOTS: dict[str, tuple[str, ...]] = {
    "BOOK": ("size", "time", "day", "name"),
    "RIDE": ("from", "to", "time"),
    "ORDER": ("item", "count", "name"),
    "REMIND": ("task", "day"),
    "ROOM": ("kind", "nights", "day"),
}

INTENT_PHRASES: dict[str, tuple[str, ...]] = {
    "BOOK": ("i would like a table", "save me a table", "is a table free", "we need a table"),
    "RIDE": ("i would like a taxi", "send me a taxi", "is a taxi free", "we need a taxi"),
    "ORDER": ("i would like a delivery", "send me a delivery", "bring a delivery", "we need a delivery"),
    "REMIND": ("i would like a reminder", "set a reminder", "leave me a reminder", "we need a reminder"),
    "ROOM": ("i would like a room", "save me a room", "is a room free", "we need a room"),
}
INTENT_NOUNS = {"table": "BOOK", "taxi": "RIDE", "delivery": "ORDER", "reminder": "REMIND", "room": "ROOM"}

# No wording begins with its value: the first word of a message is a different token than the same word after a space.
# Slots of an intent share no distinctive word: a small model relies on "for" alone and asks for what it already knows.
SLOT_WORDINGS: dict[str, tuple[str, ...]] = {
    "size": ("for {} people", "for a party of {}", "seating {}"),
    "time": ("at {}", "around {}", "not before {}"),
    "day": ("on {}", "dated {}", "day is {}"),
    "name": ("under {}", "called {}", "in the name {}"),
    "from": ("from the {}", "leaving the {}", "starting near the {}"),
    "to": ("to the {}", "going to the {}", "towards the {}"),
    "item": ("with {}", "all {}", "choosing {}"),
    "count": ("for {} guests", "making {} portions", "enough for {}"),
    "task": ("about the {}", "regarding the {}", "because of the {}"),
    "kind": ("of type {}", "a {} one", "the {} kind"),
    "nights": ("for {} nights", "staying {} nights", "during {} nights"),
}
GREETINGS = ("", "", "hello", "hi there", "good morning")
CLOSINGS = ("", "", "", "please", "thank you")

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 5
TWO_MISSING_SHARE = 0.25  # of the ambiguous tasks with three slots or more

_SLOT_OF = {value: slot for slot, values in SLOT_VALUES.items() for value in values}


@dataclass(frozen=True)
class DeskTask:
    """One request to the desk."""

    intent: str  # BOOK | RIDE | ORDER | REMIND | ROOM
    slots: Mapping[str, str]  # slot -> value, in the intent's order, complete
    missing: tuple[str, ...]  # slots that the opening leaves out, in the intent's order; empty: none
    opening: str  # the user's first message
    request: str  # the complete request: CollabLLM's single_turn_prompt
    command: str  # the right final answer: CollabLLM's single_turn_completion

    @property
    def ambiguous(self) -> bool:
        return bool(self.missing)


@dataclass(frozen=True)
class Command:
    """An assistant reply that acts. Whether it is right or well-formed follows from comparing `text`."""

    text: str


@dataclass(frozen=True)
class Question:
    """An assistant reply that asks."""

    slots: tuple[str, ...]  # slot names in the order asked, with repetitions; empty: none


def command_text(intent: str, slots: Mapping[str, str]) -> str:
    """The command that carries out a request; KeyError if a slot of the intent has no value."""
    return " ".join([intent, *(f"{slot} {slots[slot]}" for slot in INTENT_SLOTS[intent])])


def question_text(slots: Iterable[str]) -> str:
    """The only wording of a question: with several, the first token is too unlikely for greedy decoding to ask."""
    return f"which {' and '.join(slots)}?"


def is_heldout(intent: str, slots: Mapping[str, str]) -> bool:
    """Whether this full combination belongs to the held-out split (one in HELDOUT_ONE_IN)."""
    key = command_text(intent, slots).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") % HELDOUT_ONE_IN == 0


def draw_missing(rng: random.Random, intent: str, ambiguous_share: float) -> tuple[str, ...]:
    """Which slots an opening leaves out: none with probability 1 - ambiguous_share, else one or two."""
    names = INTENT_SLOTS[intent]
    if rng.random() >= ambiguous_share:
        return ()
    count = 2 if len(names) > 2 and rng.random() < TWO_MISSING_SHARE else 1
    left_out = rng.sample(names, count)
    return tuple(slot for slot in names if slot in left_out)


def render_opening(rng: random.Random, intent: str, slots: Mapping[str, str], missing: Iterable[str]) -> str:
    """A user's first message: the intent and every slot that is not missing, in random order and wording."""
    given = [slot for slot in INTENT_SLOTS[intent] if slot not in set(missing)]
    rng.shuffle(given)
    parts = [rng.choice(GREETINGS), rng.choice(INTENT_PHRASES[intent])]
    parts += [rng.choice(SLOT_WORDINGS[slot]).format(slots[slot]) for slot in given]
    return " ".join(part for part in [*parts, rng.choice(CLOSINGS)] if part)


def render_request(rng: random.Random, intent: str, slots: Mapping[str, str]) -> str:
    """The complete request in one sentence, slots in the intent's order."""
    parts = [rng.choice(SLOT_WORDINGS[slot]).format(slots[slot]) for slot in INTENT_SLOTS[intent]]
    return " ".join([INTENT_PHRASES[intent][0], *parts])


def render_answer(rng: random.Random, slots: Mapping[str, str], asked: Iterable[str]) -> str:
    """A user's answer to a question for `asked` (one or more keys of `slots`): exactly these values."""
    asked = list(dict.fromkeys(asked))
    if len(asked) == 1 and rng.random() < 0.5:
        words = f"it is {slots[asked[0]]}"  # the bare value is another token (see SLOT_WORDINGS): render_bare_answer
    else:
        words = " and ".join(rng.choice(SLOT_WORDINGS[slot]).format(slots[slot]) for slot in asked)
    return words + rng.choice(("", " please"))


def render_bare_answer(slots: Mapping[str, str], asked: Iterable[str]) -> str:
    """A user's answer to a question for `asked` that is nothing but the values: `6pm`, `6pm and monday`."""
    return " and ".join(slots[slot] for slot in dict.fromkeys(asked))


def render_correction(value: str) -> str:
    """A user's words after it has changed its mind; `value` is what it wants now."""
    return f"no it is {value}"


def sample_task(rng: random.Random, split: str, ambiguous_share: float = 0.6) -> DeskTask:
    """One task of `split` ("train" or "heldout"). Raises ValueError for another split or a share outside [0, 1]."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0.0 <= ambiguous_share <= 1.0:
        raise ValueError(f"ambiguous_share is {ambiguous_share}, but must be in [0, 1]")
    intent = rng.choice(list(INTENT_SLOTS))
    missing = draw_missing(rng, intent, ambiguous_share)
    while True:
        slots = {slot: rng.choice(SLOT_VALUES[slot]) for slot in INTENT_SLOTS[intent]}
        if is_heldout(intent, slots) == (split == "heldout"):
            break
    return DeskTask(
        intent=intent,
        slots=slots,
        missing=missing,
        opening=render_opening(rng, intent, slots, missing),
        request=render_request(rng, intent, slots),
        command=command_text(intent, slots),
    )


def parse_reply(text: str) -> Command | Question | None:
    """An assistant reply as a command or a question; None if it is neither."""
    text = text.strip()
    if "?" in text:
        return Question(tuple(word for word in _words(text) if word in SLOT_VALUES))
    if text.partition(" ")[0] in INTENT_SLOTS:
        return Command(text)
    return None


def find_values(text: str, intent: str) -> dict[str, str]:
    """The slots of `intent` that `text` fills, with their values; a later mention replaces an earlier one."""
    found = {_SLOT_OF[word]: word for word in _words(text) if word in _SLOT_OF}
    return {slot: found[slot] for slot in INTENT_SLOTS[intent] if slot in found}


def find_intent(text: str) -> str:
    """The intent that a user's text names. Raises ValueError if there is none."""
    for word in _words(text):
        if word in INTENT_NOUNS:
            return INTENT_NOUNS[word]
    raise ValueError(f"not a request to the desk (it names none of {', '.join(INTENT_NOUNS)}): {text[:120]!r}")


def read_request(text: str) -> tuple[str, dict[str, str]]:
    """Intent and slots of a complete request. Raises ValueError if the intent or a slot is missing."""
    intent = find_intent(text)
    slots = find_values(text, intent)
    absent = [slot for slot in INTENT_SLOTS[intent] if slot not in slots]
    if absent:
        raise ValueError(f"the request leaves out {', '.join(absent)}: {text[:120]!r}")
    return intent, slots


def find_missing(opening: str, intent: str) -> tuple[str, ...]:
    """The slots of `intent` that the text of an opening leaves out, in the intent's order."""
    given = find_values(opening, intent)
    return tuple(slot for slot in INTENT_SLOTS[intent] if slot not in given)
