"""Does a reply ask something? Measured on tasks that need no question, where asking is a fault."""

from __future__ import annotations

QUESTION_MARKS = "?？؟"  # Latin, full-width, Arabic


def asks_question(text: str) -> bool:
    """Whether a question mark stands in `text`. Marks in code or URLs count too: a figure to watch, not a reward."""
    return any(mark in text for mark in QUESTION_MARKS)
