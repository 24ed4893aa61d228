"""Conversations as token samples, and which of them a step trains."""

from __future__ import annotations

from collab_megatron.actor.grid import RankGrid
from collab_megatron.batching import TokenSample
from collab_megatron.config import SFTConfig
from collab_megatron.convert.spec import ModelSpec
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.order import step_indices
from collab_megatron.data.parquet import read_conversation_files
from collab_megatron.errors import UserError
from collab_megatron.training.shares import Share, my_share


class SFTData:
    """All training conversations, tokenised once. Raises UserError if none fits into `max_tokens`."""

    def __init__(self, config: SFTConfig, grid: RankGrid, spec: ModelSpec) -> None:
        self._config, self._grid, self._spec = config, grid, spec
        chat = ChatTemplate(load_tokenizer(config.model.path))
        encoded = []
        conversations, self.num_repeated = read_conversation_files(config.data.train_files)
        for number, row in enumerate(conversations):
            try:
                encoded.append(chat.sft_ids_and_mask(row.messages))
            except ValueError as error:
                files = ", ".join(map(str, config.data.train_files))
                raise UserError(
                    f"conversation {number} of {files}: {error}; use another chat template, or leave it out"
                ) from None
        self._samples = [
            TokenSample(ids=ids, mask=[float(trained) for trained in mask])
            for ids, mask in encoded
            if len(ids) <= config.max_tokens and any(mask)
        ]
        self.num_left_out = len(encoded) - len(self._samples)
        if not self._samples:
            raise UserError(
                f"none of the {len(encoded)} conversations fits into max_tokens={config.max_tokens}: raise it"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def step(self, step: int) -> tuple[Share, int]:
        """This data rank's share of `step`, and the trained tokens of the global batch."""
        indices = step_indices(
            self._config.run.seed, step, num_rows=len(self._samples), batch_size=self._config.batch_size
        )
        batch = [self._samples[i] for i in indices]
        trained = int(sum(sum(sample.mask[1:]) for sample in batch))  # nothing comes before the first token
        return my_share(self._grid, self._spec, batch, self._config.train), trained
