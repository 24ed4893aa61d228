"""Batches of one data rank from real files, tokenized with a real chat template."""

from __future__ import annotations

from typing import Any

import pytest

from collab_megatron.config import SFTConfig
from collab_megatron.data.parquet import Conversation, write_conversations
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.trainer.supervised.data import SupervisedData
from collab_megatron.trainer.supervised.sft import CONVERSATIONS
from collab_megatron.types import Message
from tests.trainer.one_process import SPEC, grid_of

TRAINED, HELD_OUT, BATCH = 6, 5, 4


def conversation(number: int) -> Conversation:
    words = "yes " * (1 + number % 3)
    return Conversation(str(number), (Message("user", f"is {number} even?"), Message("assistant", words.strip())))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    folder = tmp_path_factory.mktemp("sft")
    build_tokenizer().save_pretrained(str(folder / "model"))
    write_conversations(folder / "train.parquet", map(conversation, range(TRAINED)))
    # one of them is trained on too
    write_conversations(folder / "held_out.parquet", map(conversation, range(TRAINED - 1, TRAINED - 1 + HELD_OUT)))
    data = {"train": folder / "train.parquet", "validation": folder / "held_out.parquet"}
    return SFTConfig.model_validate({"model": {"path": str(folder / "model")}, "data": data, "batch_size": BATCH})


def trained(batches: Any) -> int:
    return sum(batch.num_trained_tokens for batch in batches)


def test_a_step_is_divided_over_the_data_ranks_and_an_epoch_takes_every_conversation(config: SFTConfig) -> None:
    ranks = [SupervisedData(config, grid_of(rank, 2), SPEC, CONVERSATIONS) for rank in range(2)]
    steps = TRAINED * 2 // BATCH  # two epochs
    seen, tokens = 0, 0
    for step in range(steps):
        shares = [data.step(step) for data in ranks]
        assert {share.trained_tokens for share in shares} == {
            sum(trained(share.rank.micro_batches) for share in shares)
        }
        seen += sum(len(batch.sample_indices) for share in shares for batch in share.rank.micro_batches)
        tokens += shares[0].trained_tokens
    assert seen == steps * BATCH
    everything = SupervisedData(config.model_copy(update={"batch_size": TRAINED}), grid_of(), SPEC, CONVERSATIONS)
    assert tokens == 2 * everything.step(0).trained_tokens


def test_held_out_conversations_come_once_each_and_those_trained_on_are_reported(config: SFTConfig) -> None:
    data = SupervisedData(config, grid_of(), SPEC, CONVERSATIONS)
    assert (len(data), data.num_held_out) == (TRAINED, HELD_OUT)
    batches = list(data.held_out_batches())
    assert trained(batch for part in batches for batch in part) == data.held_out_tokens > 0
    assert any("1 held-out conversation" in notice for notice in data.notices)


def test_without_a_validation_file_nothing_is_held_out(config: SFTConfig) -> None:
    alone = config.model_copy(update={"data": config.data.model_copy(update={"validation": None})})
    data = SupervisedData(alone, grid_of(), SPEC, CONVERSATIONS)
    assert (data.num_held_out, data.held_out_tokens, list(data.held_out_batches())) == (0, 0, [])
