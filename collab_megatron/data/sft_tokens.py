"""Conversations as token ids with a training mask, and the selection of those that supervised training can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.parquet import read_conversation_files
from collab_megatron.data.token_limit import keep_fitting
from collab_megatron.errors import UserError

T = TypeVar("T")


class TokenRow(NamedTuple):
    """One conversation."""

    ids: list[int]  # [T]
    mask: list[bool]  # [T], True where a token is trained


@dataclass(frozen=True)
class UsableRows(Generic[T]):
    """The usable conversations, or pairs of replies (pair_tokens.py), of some files, in order."""

    kept: list[T]
    left_out: int  # too long, or without an assistant turn
    notices: list[str]  # one line for each reason to leave rows out

    @property
    def share_left_out(self) -> float:
        return self.left_out / (self.left_out + len(self.kept))


def read_sft_rows(files: Sequence[Path], chat: ChatTemplate, max_tokens: int) -> UsableRows[TokenRow]:
    """Read and tokenize. Raises UserError for a file or conversation that cannot be read or rendered, if more than half
    exceed `max_tokens`, or if nothing is left to train on."""
    names = ", ".join(map(str, files))
    conversations, repeated = read_conversation_files(files)
    rows = []
    for number, conversation in enumerate(conversations, start=1):
        try:
            rows.append(TokenRow(*chat.sft_ids_and_mask(conversation.messages)))
        except ValueError as error:
            raise UserError(
                f"conversation {number} of {names} cannot be used: {error}; use another chat template, or remove it"
            ) from None
    numbers = {id(row): number for number, row in enumerate(rows, start=1)}
    fit = keep_fitting(
        rows,
        [len(row.ids) for row in rows],
        max_tokens,
        what=f"conversations of {names}",
        name=lambda row: f"number {numbers[id(row)]}",
        remedy="raise max_tokens",
    )
    kept = [row for row in fit.kept if any(row.mask[1:])]
    if not kept:
        raise UserError(f"no conversation of {names} has an assistant turn to train on: name other files")
    silent = len(fit.kept) - len(kept)
    notices = [fit.notice] if fit.left_out else []
    notices += [f"left out: {silent} conversations of {names} without an assistant turn"] if silent else []
    notices += [f"left out: {repeated} conversations that an earlier file of {names} already has"] if repeated else []
    return UsableRows(kept, fit.left_out + silent, notices)
