"""Checks of a simulated user's turn for text that a real user would not have typed.

Pure functions of a Turn; each docstring lists what the check finds and what it does not. The results are counted for
the health figures; no check drops or changes a turn. Words are compared without case and punctuation. In scripts
without spaces (Chinese, Japanese, Thai, ...) every character is a word and counts half.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from collab_megatron.types import TERMINATION_SIGNAL, Message, Task

LONG_STRETCH = 12  # words in a row that nobody writes twice by chance
REQUEST_SHARE = 0.6  # of a short request
SHORT_REQUEST = 6  # words; a request this short can hardly be rephrased
LEAST_TRUTH = 4  # words of a reference answer that cannot appear by chance
LEAST_OPENING, LEAST_REPEATED = 4, 10  # words of a repeated turn; short answers may repeat
SAME_WORDS = 0.85  # share of common words that makes two turns the same
SHORT_QUESTION = 40  # words of an assistant turn that only asks

SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
PUNCTUATION = r"\s!-/:-@\[-`{-~\u00a1-\u00bf\u060c\u061b\u061f\u0964\u0965\u2000-\u206f\u3000-\u303f\uff01-\uff20"
WORD = re.compile(f"[{SPACELESS}]|[^{PUNCTUATION}{SPACELESS}]+")

ASSISTANT_LABELS = frozenset(
    [
        *("assistant", "ai", "ai assistant", "chatgpt", "chatbot", "assistent", "assistente", "asistente"),
        *("助手", "助理", "アシスタント"),
    ]
)
USER_LABELS = frozenset(
    ["user", "human", "benutzer", "nutzer", "utilisateur", "usuario", "usuário", "utente", "用户", "ユーザー"]
)

# Phrases of the helping side. A pattern is searched only if its key is in the text.
OFFERS: Mapping[str, re.Pattern[str]] = {
    "help": re.compile(
        r"(?:how|what) (?:can|may|could) i help you|anything else i can help"
        r"|(?:happy|glad) to help(?: you\b| with th|\s*[.!,]|\s*$)"
    ),
    "assist": re.compile(
        r"(?:how|what) (?:can|may|could) i assist you|anything else i can assist"
        r"|(?:happy|glad) to assist|i am here to assist|i['’]m here to assist"
    ),
    "do for you": re.compile(r"what (?:can|may|could) i do for you|anything else i can do for you"),
    " an ai": re.compile(r"as an ai (?:language |chat )?(?:model|assistant)|i(?: am|['’]m) (?:just |only )?an ai\b"),
    "questions": re.compile(r"let me know if you have any (?:\w+ )?questions|feel free to ask (?:me )?(?:any|more)"),
    "helfen": re.compile(r"wie kann ich (?:ihnen|dir|euch) (?:\w+ )?(?:weiter)?helfen|ihnen gerne? (?:weiter)?helfen"),
    "behilflich": re.compile(r"kann ich (?:ihnen|dir) (?:\w+ ){0,2}behilflich sein"),
    "aider": re.compile(r"comment puis-je (?:vous |t['’])aider|ravie? de (?:vous |t['’])aider|puis-je vous aider"),
    "ayudar": re.compile(r"(?:cómo|en qué) (?:te |le )?puedo ayudar(?:te|le|les|los)?|algo más en lo que pueda ayudar"),
    "ajud": re.compile(r"como posso (?:te |lhe |o |a )?ajud|em que posso ajud"),
    "aiut": re.compile(r"come posso aiutar"),
    "帮": re.compile(r"有什么(?:我)?(?:可以|能)帮|我(?:可以|能)(?:怎么|如何)?帮(?:您|你|助您|助你)|很高兴(?:能)?帮"),
    "お手伝い": re.compile(r"お手伝い(?:できること|しましょうか|いたしましょうか|させていただ)"),
}

LEAKS = re.compile(
    r"</?(?:think|thinking|thought|scratchpad|reasoning|request|reference|chat)>"
    r"|[\"'](?:thought|response|role)[\"']\s*:|^\W*thoughts?\s*:"
)
PLACEHOLDER = WORD.findall("the person's next message")  # of our prompt, for the turn; small models repeat it
QUESTION_ENDS = ("?", "？", "؟")
AFTER_QUESTION = " \t\n\"'*_)]»”’」"
COURTESIES = (  # questions that may close an answer
    *("anything else", "something else", "does that", "does this", "is that", "look good", "sound good"),
    *("sonst noch", "noch etwas", "autre chose", "algo más", "还有", "他に"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's new turn and the chat before it."""

    task: Task
    chat: Sequence[Message]
    said: str  # without the termination signal, without case
    words: Sequence[str]  # of `said`
    ended: bool  # whether the turn ends the chat

    @classmethod
    def of(cls, task: Task, chat: Sequence[Message], text: str, signal: str = TERMINATION_SIGNAL) -> Turn:
        """`chat` ends before the turn; `text` may contain the termination `signal`."""
        said = text.replace(signal, "").strip().casefold()
        return cls(task, chat, said, WORD.findall(said), signal in text)

    def before(self, role: str) -> Iterator[str]:
        """The earlier turns of one role, in order."""
        return (message.content for message in self.chat if message.role == role)


def role_swapped(turn: Turn) -> bool:
    """The user talks like the assistant.

    In any language: a code block if neither request nor chat has one; an assistant turn repeated word for word (10
    words or more); the reference answer (in full, or 12 words in a row) if neither request nor chat has it; lines
    with a speaker's name and a colon (names in eight languages).
    In English, German, French, Spanish, Portuguese, Italian, Chinese, Japanese: phrases that offer help.
    Not found: a solution in the user's own words, a reference answer under 4 words, other phrases and languages.
    """
    return (
        _has_labels(turn.said)
        or any(key in turn.said and pattern.search(turn.said) for key, pattern in OFFERS.items())
        or ("```" in turn.said and not _known(turn, "```"))
        or _copies(turn, _secrets(turn.task.single_turn_prompt, turn.task.ground_truth).truth)
        or any(_same(turn, text, LEAST_REPEATED) for text in turn.before("assistant"))
    )


def goal_copied(turn: Turn) -> bool:
    """The turn copies a stretch of the hidden request that is not in the chat yet.

    12 words in a row, or 60 % of a request that is shorter than 20; in any language. Not found: a request of up to 6
    words, or one that is retold in other words or piece by piece.
    """
    return _copies(turn, _secrets(turn.task.single_turn_prompt, turn.task.ground_truth).request)


def restarted(turn: Turn) -> bool:
    """The turn repeats the opening (4 words or more), or another earlier user turn (10 or more).

    Nearly word by word, in any order and language. Not found: a repetition in other words, or inside a longer turn. A
    long answer that is given twice for good reason counts too.
    """
    earlier = turn.before("user")
    opening = next(earlier, None)
    if opening is None:
        return False
    return _same(turn, opening, LEAST_OPENING) or any(_same(turn, text, LEAST_REPEATED) for text in earlier)


def scratchpad_leaked(turn: Turn) -> bool:
    """The turn contains thinking tags, JSON fields of the simulator's reply or tags of its prompt, or is the prompt's
    placeholder.

    In any language, since the names are those of our prompt. Not found: thoughts in plain words, another prompt's
    placeholder. Names that are in the request or the chat do not count.
    """
    if turn.words == PLACEHOLDER:
        return True
    found = LEAKS.search(turn.said)
    return found is not None and not _known(turn, found.group())


def early_end(turn: Turn) -> bool:
    """The user ends the chat before the assistant has answered anything: it said nothing, or only asked.

    It only asked if its last turn ends with a question mark, has 40 words or fewer and no usual closing question
    ("anything else?"), and no turn has the reference answer. In any language, with closing questions in six. Not found:
    an end after a promise, after a long turn, or after a question without a question mark.
    """
    if not turn.ended:
        return False
    said = list(turn.before("assistant"))
    if not said:
        return True
    last = said[-1].rstrip(AFTER_QUESTION).casefold()
    if not last.endswith(QUESTION_ENDS) or any(phrase in last for phrase in COURTESIES):
        return False
    words = WORD.findall(last)
    if len(words) > SHORT_QUESTION * _scale(words):
        return False
    answer = " ".join(WORD.findall(turn.task.ground_truth.casefold()))
    return not answer or not any(f" {answer} " in f" {' '.join(WORD.findall(text.casefold()))} " for text in said)


def bare_end(turn: Turn) -> bool:
    """The turn is the termination signal alone. The shipped prompt allows it, so it has no limit."""
    return turn.ended and not turn.words


def empty(turn: Turn) -> bool:
    """The turn is blank or only punctuation, and the chat goes on."""
    return not turn.ended and not turn.words


DETECTORS: Mapping[str, Callable[[Turn], bool]] = {
    check.__name__: check
    for check in (role_swapped, goal_copied, restarted, scratchpad_leaked, early_end, bare_end, empty)
}


@dataclass(frozen=True, slots=True)
class _Stretches:
    """Hashes of all stretches of `size` words in a text."""

    size: int
    hashes: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Secrets:
    """The texts that only simulator and judge may know; None: too short to recognize."""

    request: _Stretches | None
    truth: _Stretches | None


@lru_cache(maxsize=512)
def _secrets(request: str, truth: str) -> _Secrets:
    request_words, truth_words = WORD.findall(request.casefold()), WORD.findall(truth.casefold())
    copied, solved = None, None
    scale = _scale(request_words)
    if len(request_words) > SHORT_REQUEST * scale:
        size = min(LONG_STRETCH * scale, ceil(REQUEST_SHARE * len(request_words)))
        copied = _Stretches(size, frozenset(_hashes(request_words, size)))
    scale = _scale(truth_words)
    if len(truth_words) >= LEAST_TRUTH * scale:
        size = min(LONG_STRETCH * scale, len(truth_words))
        solved = _Stretches(size, frozenset(_hashes(truth_words, size)).difference(_hashes(request_words, size)))
    return _Secrets(copied, solved)


def _copies(turn: Turn, secret: _Stretches | None) -> bool:
    if secret is None or secret.hashes.isdisjoint(_hashes(turn.words, secret.size)):
        return False
    copied = secret.hashes.intersection(_hashes(turn.words, secret.size))
    for message in turn.chat:
        copied = copied.difference(_hashes(WORD.findall(message.content.casefold()), secret.size))
    return bool(copied)


def _hashes(words: Sequence[str], size: int) -> Iterator[int]:
    return map(hash, zip(*(words[i:] for i in range(size)), strict=False))


def _same(turn: Turn, text: str, least: int) -> bool:
    """Whether the turn is nearly `text` and has at least `least` words."""
    if len(turn.words) < least or not 0.7 < (len(text) + 1) / (len(turn.said) + 1) < 1.4:
        return False
    if len(turn.words) < least * _scale(turn.words):
        return False
    mine, others = _word_set(turn.said), _word_set(text)
    shared = len(mine & others)
    return shared >= SAME_WORDS * (len(mine) + len(others) - shared)


@lru_cache(maxsize=2048)
def _word_set(text: str) -> frozenset[str]:
    """Cached: a turn is compared at every later turn of its chat, and in every future that shares it."""
    return frozenset(WORD.findall(text.casefold()))


def _scale(words: Sequence[str]) -> int:
    """2 if most words are characters of a script without spaces, else 1."""
    single = sum(len(word) == 1 and word >= "\u0e00" for word in words)
    return 2 if 2 * single > len(words) else 1


def _has_labels(said: str) -> bool:
    if ":" not in said and "：" not in said:
        return False
    heads = [line.replace("：", ":").partition(":")[0].strip(" \t*_#>-[]()") for line in said.splitlines() if line]
    return heads[0] in USER_LABELS or not ASSISTANT_LABELS.isdisjoint(heads)


def _known(turn: Turn, text: str) -> bool:
    """Whether request or chat contain a text in any case."""
    return text in turn.task.single_turn_prompt.casefold() or any(text in m.content.casefold() for m in turn.chat)
