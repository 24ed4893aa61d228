"""Rows as token samples; the batches of supervised training and of its held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from collab_megatron.config import SupervisedConfig
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.row_order import step_indices
from collab_megatron.data.sft_tokens import UsableRows
from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching import MicroBatch, TokenSample
from collab_megatron.trainer.rank_batch import RankBatch, rank_batch

T = TypeVar("T")


@dataclass(frozen=True)
class RowKind(Generic[T]):
    """One kind of rows: how they are read, and how they become samples."""

    noun: str  # plural
    read: Callable[[Sequence[Path], ChatTemplate, int], UsableRows[T]]  # files, chat template, most tokens
    samples: Callable[[Sequence[T]], list[TokenSample]]  # of the rows of one batch, `unit` for each
    unit: int = 1  # samples of a row, which stay in one micro-batch


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step: this data rank's part, and counts over all ranks."""

    rank: RankBatch
    rows: int
    trained_tokens: int


class SupervisedData(Generic[T]):
    """All rows, tokenized once. Raises UserError if more than half of a file set does not fit into max_tokens, or if a
    set has nothing to train on."""

    def __init__(self, config: SupervisedConfig, grid: RankGrid, spec: ModelSpec, kind: RowKind[T]) -> None:
        self._config, self._grid, self._spec, self._kind = config, grid, spec, kind
        chat = ChatTemplate(load_tokenizer(config.model.path))
        self.notices: list[str] = []  # rows that were left out, and why; one line each
        train = self._read(config.data.train_files, chat)
        self._rows, self.left_out, self.share_left_out = train.kept, train.left_out, train.share_left_out
        files = config.data.validation_files
        self._held_out = self._read(files, chat).kept if files else []
        known = {self._identity(row) for row in self._rows} if files else set()
        if shared := sum(self._identity(row) in known for row in self._held_out):
            self.notices.append(
                f"warning: {shared:,} held-out {kind.noun} are trained on too, so the held-out loss will be too low"
            )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def noun(self) -> str:
        """What a row is, plural."""
        return self._kind.noun

    @property
    def num_held_out(self) -> int:
        """Held-out rows; 0 without a validation file."""
        return len(self._held_out)

    @property
    def held_out_tokens(self) -> int:
        """Trained tokens of all held-out rows."""
        return _trained_tokens(self._kind.samples(self._held_out))

    def step(self, step: int) -> StepBatch:
        """The batch of `step`."""
        indices = step_indices(
            self._config.run.seed, step, num_rows=len(self._rows), batch_size=self._config.batch_size
        )
        samples = self._kind.samples([self._rows[i] for i in indices])
        return StepBatch(self._rank_batch(samples), len(indices), _trained_tokens(samples))

    def held_out_batches(self) -> Iterator[list[MicroBatch]]:
        """This data rank's micro-batches of the held-out rows, `batch_size` rows at a time."""
        for first in range(0, len(self._held_out), self._config.batch_size):
            rows = self._held_out[first : first + self._config.batch_size]
            yield self._rank_batch(self._kind.samples(rows)).micro_batches

    def _rank_batch(self, samples: Sequence[TokenSample]) -> RankBatch:
        return rank_batch(self._grid, self._spec, samples, self._config.train, unit=self._kind.unit)

    def _identity(self, row: T) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sample.ids) for sample in self._kind.samples([row]))

    def _read(self, files: Sequence[Path], chat: ChatTemplate) -> UsableRows[T]:
        rows = self._kind.read(files, chat, self._config.max_tokens)
        self.notices += rows.notices
        return rows


def _trained_tokens(samples: Sequence[TokenSample]) -> int:
    return int(sum(sum(sample.mask[1:]) for sample in samples))  # nothing comes before the first token
