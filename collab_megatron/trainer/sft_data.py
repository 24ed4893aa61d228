"""Conversations as token samples; the batches of supervised training and of its held-out loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from collab_megatron.config import SFTConfig
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.row_order import step_indices
from collab_megatron.data.sft_tokens import SFTRows, read_sft_rows
from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching import MicroBatch, TokenSample
from collab_megatron.trainer.rank_batch import RankBatch, rank_batch


class SFTData:
    """All conversations, tokenized once. Raises UserError if more than half of a file set does not fit into max_tokens,
    or if a set has nothing to train on."""

    def __init__(self, config: SFTConfig, grid: RankGrid, spec: ModelSpec) -> None:
        self._config, self._grid, self._spec = config, grid, spec
        chat = ChatTemplate(load_tokenizer(config.model.path))
        self.notices: list[str] = []  # conversations that were left out, and why; one line each
        train, self._samples = self._read(config.data.train_files, chat)
        self.left_out, self.share_left_out = train.left_out, train.share_left_out
        files = config.data.validation_files
        self._held_out = self._read(files, chat)[1] if files else []
        known = {tuple(sample.ids) for sample in self._samples} if files else set()
        if shared := sum(tuple(sample.ids) in known for sample in self._held_out):
            self.notices.append(
                f"warning: {shared:,} held-out conversations are trained on too, so the held-out loss will be too low"
            )

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def num_held_out(self) -> int:
        """Held-out conversations; 0 without a validation file."""
        return len(self._held_out)

    @property
    def held_out_tokens(self) -> int:
        """Assistant tokens of all held-out conversations."""
        return _trained_tokens(self._held_out)

    def step(self, step: int) -> tuple[RankBatch, int]:
        """This data rank's part of the batch of `step`, and the trained tokens of the whole batch."""
        indices = step_indices(
            self._config.run.seed, step, num_rows=len(self._samples), batch_size=self._config.batch_size
        )
        batch = [self._samples[i] for i in indices]
        return rank_batch(self._grid, self._spec, batch, self._config.train), _trained_tokens(batch)

    def held_out_batches(self) -> Iterator[list[MicroBatch]]:
        """This data rank's micro-batches of the held-out conversations, `batch_size` conversations at a time."""
        for first in range(0, len(self._held_out), self._config.batch_size):
            batch = self._held_out[first : first + self._config.batch_size]
            yield rank_batch(self._grid, self._spec, batch, self._config.train).micro_batches

    def _read(self, files: Sequence[Path], chat: ChatTemplate) -> tuple[SFTRows, list[TokenSample]]:
        rows = read_sft_rows(files, chat, self._config.max_tokens)
        self.notices += rows.notices
        return rows, [TokenSample(ids=row.ids, mask=[float(trained) for trained in row.mask]) for row in rows.kept]


def _trained_tokens(samples: Sequence[TokenSample]) -> int:
    return int(sum(sum(sample.mask[1:]) for sample in samples))  # nothing comes before the first token
