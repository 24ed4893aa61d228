"""Length check of the rows that tools/prepare_dataset.py writes, with the chat template of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.statistics import lengths_line
from collab_megatron.data.token_limit import keep_fitting
from collab_megatron.errors import UserError
from collab_megatron.types import Message

T = TypeVar("T")
SHOWN = 3


@dataclass(frozen=True)
class LengthCheck:
    """Counts tokens; without a template, words."""

    chat: ChatTemplate | None = None
    max_tokens: int | None = None  # longer rows are left out and counted; None: no limit
    skip_bad_rows: bool = False  # leave out rows that the template cannot render, too

    def fitting(
        self, rows: Sequence[T], chats: Callable[[T], Sequence[tuple[Message, ...]]], path: Path
    ) -> tuple[list[T], list[str]]:
        """The rows that fit into `max_tokens`, and lines about lengths and what is left out.

        `chats`: the chats of a row, of which the longest counts; one that ends with a user turn is a prompt. `path` is
        for messages. Raises UserError for a chat that the template cannot render, or if more than half of the rows are
        too long.
        """
        if self.chat is None:
            words = [max(sum(len(m.content.split()) for m in chat) for chat in chats(row)) for row in rows]
            return list(rows), [lengths_line(words, "words")] if words else []
        usable: list[T] = []
        lengths: list[int] = []
        refused: list[str] = []
        for number, row in enumerate(rows, start=1):
            try:
                lengths.append(max(self._tokens(self.chat, chat) for chat in chats(row)))
                usable.append(row)
            except ValueError as error:
                refused.append(f"row {number}: {error}")
        more = f"; and {len(refused) - SHOWN:,} more" if len(refused) > SHOWN else ""
        shown = "; ".join(refused[:SHOWN]) + more
        if refused and not (self.skip_bad_rows and usable):
            raise UserError(
                f"{len(refused):,} of {len(rows):,} rows for {path} cannot be rendered with the chat template: "
                f"{shown}; use the tokenizer of another model, or leave them out with --on-error skip"
            )
        notes = [lengths_line(lengths, "tokens")] if lengths else []
        notes += [f"left out: {len(refused):,} rows that the chat template cannot render: {shown}"] if refused else []
        if self.max_tokens is None:
            return usable, notes
        numbers = {id(row): number for number, row in enumerate(usable, start=1)}
        fit = keep_fitting(
            usable,
            lengths,
            self.max_tokens,
            what=f"rows for {path}",
            name=lambda row: f"number {numbers[id(row)]}",
            remedy="raise --max-tokens",
        )
        return fit.kept, [*notes, *([fit.notice] if fit.notice else [])]

    @staticmethod
    def _tokens(chat: ChatTemplate, messages: tuple[Message, ...]) -> int:
        """Tokens of a prompt with its generation prompt, or of a whole conversation as SFT and DPO train it."""
        if messages[-1].role == "user":
            return len(chat.prompt_ids(messages))
        return len(chat.sft_ids_and_mask(messages)[0])
