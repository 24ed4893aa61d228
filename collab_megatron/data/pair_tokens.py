"""DPO pairs as token ids with a training mask: the prompt is context, the assistant turns after it are trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.parquet import Pair, read_pair_files
from collab_megatron.data.sft_tokens import TokenRow, UsableRows
from collab_megatron.data.token_limit import keep_fitting
from collab_megatron.errors import UserError


class TokenPair(NamedTuple):
    """Two replies to one prompt."""

    chosen: TokenRow
    rejected: TokenRow
    prompt: int  # leading tokens of both, which are equal and not trained

    @property
    def longest(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


def read_pair_rows(files: Sequence[Path], chat: ChatTemplate, max_tokens: int) -> UsableRows[TokenPair]:
    """Read and tokenize. Raises UserError for a file or pair that cannot be read or rendered, or if more than half have
    a reply that ends after `max_tokens`."""
    names = ", ".join(map(str, files))
    pairs, repeated = read_pair_files(files)
    rows = []
    for number, pair in enumerate(pairs, start=1):
        try:
            rows.append(token_pair(pair, chat))
        except ValueError as error:
            raise UserError(
                f"pair {number} of {names} cannot be used: {error}; use another chat template, or remove it"
            ) from None
    numbers = {id(row): number for number, row in enumerate(rows, start=1)}
    fit = keep_fitting(
        rows,
        [row.longest for row in rows],
        max_tokens,
        what=f"pairs of {names}",
        name=lambda row: f"number {numbers[id(row)]}",
        remedy="raise max_tokens",
    )
    kept = [row for row in fit.kept if row.chosen.ids != row.rejected.ids]
    if not kept:
        raise UserError(f"no pair of {names} has two replies that differ as tokens: name other files")
    equal = len(fit.kept) - len(kept)
    notices = [fit.notice] if fit.left_out else []
    notices += [f"left out: {equal} pairs of {names} whose replies are the same tokens"] if equal else []
    notices += [f"left out: {repeated} pairs that an earlier file of {names} already has"] if repeated else []
    return UsableRows(kept, fit.left_out + equal, notices)


def token_pair(pair: Pair, chat: ChatTemplate) -> TokenPair:
    """The pair as ids. Raises ValueError as ChatTemplate.sft_ids_and_mask."""
    context = len(pair.prompt)
    chosen, rejected = (
        TokenRow(*chat.sft_ids_and_mask([*pair.prompt, *reply], context=context))
        for reply in (pair.chosen, pair.rejected)
    )
    return TokenPair(chosen, rejected, prompt=chosen.mask.index(True))
