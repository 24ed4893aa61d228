r"""Rules for accuracy: texts whose verdict needs no judge. Pure.

A rule decides only what it can be sure of. It reads the last assistant turn: the whole turn, or the last \boxed{...} in
it. An answer that also stands in a user's turn is left to the judge, since the assistant may only have repeated it.
"""

from __future__ import annotations

import re
import unicodedata

from collab_megatron.types import ScoredConversation

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
MARKUP = re.compile(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}")  # emphasis and code marks of Markdown
MARKED = re.compile(r"(\*{1,3}|`{1,3})(.+)\1", re.DOTALL)  # a whole text between them
AROUND = " \t\n\"'.,;:!$"
WORD = re.compile(r"(?<!\\)(?<![a-z])[a-z]{2,}", re.IGNORECASE)
"""Two letters in a row outside of a LaTeX command: a word, so the text is no expression."""
IN_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
EXPRESSION = re.compile(r"[0-9a-z]", re.IGNORECASE)
LONGEST_CHARS = 400  # of an expression that is compared


def equal_answer(conversation: ScoredConversation) -> bool:
    """Whether the last assistant turn, or its boxed answer, is the reference except for form."""
    answer, reference = conversation.last_assistant, conversation.task.ground_truth
    wanted = {_form(reference), _form(boxed(reference) or "")} - {""}
    return bool(wanted & {_form(answer), _form(boxed(answer) or "")})


def _form(text: str) -> str:
    """What must be equal: words as `normalized`; of an expression every sign, except dollars and marks around it and a
    final full stop: in `.5`, `5!`, `2*3` and `2²` the rest has a meaning."""
    if not is_expression(text):
        return normalized(text)
    inner = text.strip(" \t\n$").removesuffix(".")
    marked = MARKED.fullmatch(inner)
    return " ".join((marked[2] if marked else inner).strip(" \t\n$").split())


def expressions(conversation: ScoredConversation) -> tuple[str, str] | None:
    """(reference, answer) as mathematical expressions; None if one of the two is none."""
    reference = conversation.task.ground_truth
    wanted, answer = boxed(reference) or reference.strip(), boxed(conversation.last_assistant)
    if answer is None or not (is_expression(wanted) and is_expression(answer)):
        return None
    return wanted, answer


def said_by_user(conversation: ScoredConversation) -> bool:
    """Whether a user's turn contains the reference answer as whole words."""
    reference = conversation.task.ground_truth
    wanted = normalized(boxed(reference) or reference)
    pattern = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)")
    return any(
        message.role == "user" and pattern.search(normalized(message.content)) for message in conversation.messages
    )


def normalized(text: str) -> str:
    """Case, width, white space, Markdown's marks, and punctuation around the text do not count."""
    plain = MARKUP.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(plain.split()).strip(AROUND)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}; None without one, or if it is empty or not closed."""
    *_, start = (-1, *(found.end() for found in BOXED.finditer(text)))
    if start < 0:
        return None
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[start:at].strip() or None
    return None


def is_expression(text: str) -> bool:
    """Whether a text is short and has no words: numbers, single letters, operators, LaTeX commands."""
    if len(text) > LONGEST_CHARS:
        return False
    rest = IN_TEXT.sub(" ", text)
    return bool(EXPRESSION.search(text)) and not WORD.search(rest)
