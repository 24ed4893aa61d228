"""Batches of pairs from real files, and what a run of DPO reports."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
from torch import Tensor

from collab_megatron.config import DPOConfig
from collab_megatron.data.parquet import Pair, write_pairs
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.trainer.actor.actor import StepResult
from collab_megatron.trainer.batching import MicroBatch
from collab_megatron.trainer.loss.dpo import PREFERENCE, make_dpo_loss
from collab_megatron.trainer.rank_batch import RankBatch
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.trainer.supervised.data import StepBatch, SupervisedData
from collab_megatron.trainer.supervised.dpo import PAIRS, DPOObjective
from collab_megatron.trainer.supervised.held_out import HeldOutPairs
from collab_megatron.trainer.supervised.reporter import SupervisedReporter
from collab_megatron.types import Message
from tests.trainer.one_process import SPEC, grid_of

TRAINED, HELD_OUT, BATCH = 6, 3, 4


def pair(number: int) -> Pair:
    replies = [(Message("assistant", "which day? " * (1 + (number + extra) % 3)),) for extra in (0, 1)]
    return Pair(str(number), (Message("user", "a table for " + "4 " * (1 + number)),), *replies)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DPOConfig:
    folder = tmp_path_factory.mktemp("dpo")
    build_tokenizer().save_pretrained(str(folder / "model"))
    write_pairs(folder / "train.parquet", map(pair, range(TRAINED)))
    write_pairs(folder / "held_out.parquet", map(pair, range(TRAINED - 1, TRAINED - 1 + HELD_OUT)))  # one is trained on
    return DPOConfig.model_validate(
        {
            "run": {"dir": folder / "run", "name": "dpo"},
            "model": {"path": str(folder / "model")},
            "data": {"train": folder / "train.parquet", "validation": folder / "held_out.parquet"},
            "batch_size": BATCH,
            "train": {"steps": 3},
        }
    )


def numbers(batches: list[Any]) -> list[int]:
    """The pairs of a rank, each once for its chosen reply and once, negative, for its rejected one."""
    return sorted(int(each) for batch in batches for each in batch.values[PREFERENCE][batch.mask > 0].unique())


def test_a_step_has_whole_pairs_on_every_data_rank_and_an_epoch_takes_each_pair_once(config: DPOConfig) -> None:
    ranks = [SupervisedData(config, grid_of(rank, 2), SPEC, PAIRS) for rank in range(2)]
    steps, tokens = TRAINED * 2 // BATCH, 0  # two epochs
    for step in range(steps):
        shares = [data.step(step) for data in ranks]
        assert sorted(n for share in shares for n in numbers(share.rank.micro_batches)) == [-4, -3, -2, -1, 1, 2, 3, 4]
        for share in shares:
            found = numbers(share.rank.micro_batches)
            assert found == sorted(-n for n in found)
        assert {share.rows for share in shares} == {BATCH}
        assert {share.trained_tokens for share in shares} == {
            sum(batch.num_trained_tokens for share in shares for batch in share.rank.micro_batches)
        }
        tokens += shares[0].trained_tokens
    everything = SupervisedData(config.model_copy(update={"batch_size": TRAINED}), grid_of(), SPEC, PAIRS)
    assert tokens == 2 * everything.step(0).trained_tokens


def test_held_out_pairs_come_once_each_and_those_trained_on_are_reported(config: DPOConfig) -> None:
    data = SupervisedData(config, grid_of(), SPEC, PAIRS)
    assert (len(data), data.num_held_out) == (TRAINED, HELD_OUT)
    assert [numbers(batches) for batches in data.held_out_batches()] == [[-3, -2, -1, 1, 2, 3]]
    assert sum(b.num_trained_tokens for part in data.held_out_batches() for b in part) == data.held_out_tokens
    assert any("1 held-out pairs are trained on too" in notice for notice in data.notices)


class Flat:
    """A model that gives every token one log-probability."""

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob

    def logprobs(self, micro_batches: list[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]:
        found = [self.logprob * batch.mask for batch in micro_batches]
        return found, found


def test_held_out_sums_are_over_pairs(config: DPOConfig) -> None:
    """Every token is 0.5 above the reference, so a pair's margin is half the difference of its lengths, times beta."""
    objective = DPOObjective.__new__(DPOObjective)
    objective.data = SupervisedData(config, grid_of(), SPEC, PAIRS)
    objective._actor, objective._reference = cast(Any, Flat(-1.0)), cast(Any, Flat(-1.5))
    objective._loss = make_dpo_loss(0.5)
    (batches,) = objective.data.held_out_batches()
    words = [[1 + (number + extra) % 3 for extra in (0, 1)] for number in range(TRAINED - 1, TRAINED - 1 + HELD_OUT)]
    margins = [0.25 * 3 * (chosen - rejected) for chosen, rejected in words]  # "which", " day", "?"
    wanted = [sum(math.log1p(math.exp(-m)) for m in margins), sum(m > 0 for m in margins), sum(margins)]
    assert objective._measure(batches).tolist() == pytest.approx(wanted)


def test_a_dpo_run_reports_pairs_margins_and_log_probs(config: DPOConfig, capsys: pytest.CaptureFixture[str]) -> None:
    objective = DPOObjective.__new__(DPOObjective)
    objective.data = SupervisedData(config, grid_of(), SPEC, PAIRS)
    reporter = SupervisedReporter(config, first_step=0, objective=objective)
    metrics = {"loss": 0.5, "entropy": 20.0, "pair_accuracy": 0.75, "reward_margin": 0.25, "chosen_logprob": -9.0}
    seconds = {"time_s/logprobs": 1.0, "time_s/update": 2.0}
    for done in (1, 2, 3):
        batch = StepBatch(RankBatch([], imbalance=1.0, forward_flops=3e12), rows=BATCH, trained_tokens=40)
        reporter.step(done, StepResult(1.5, 1e-3, cast(Any, metrics), skipped=False), batch, seconds)
    reporter.evaluation(3, HeldOutPairs(0.4, 0.5, 0.125, 60, 3), best=True, seconds=0.5)
    reporter.close()
    rows = read_metrics(config.run.tensorboard_dir)
    assert rows[0]["train/entropy"] == 2.0  # over tokens; the others over pairs
    assert (rows[0]["train/pair_accuracy"], rows[0]["train/chosen_logprob"]) == (0.75, -9.0)
    assert rows[0]["train/tokens_per_s"] == 20
    assert rows[0]["train/tflop_per_s_per_rank"] == pytest.approx(4 * 3 / 3.0)  # the reference's pass counts
    assert rows[0]["data/pairs_left_out"] == 0
    assert (rows[3]["eval/loss"], rows[3]["eval/pair_accuracy"], rows[3]["eval/reward_margin"]) == (0.4, 0.5, 0.125)
    out = capsys.readouterr().out
    assert "dpo: 6 pairs, 3 held out, 2.0 epochs" in out
    assert "loss 0.500 | pairs ranked right 75.0% | margin 0.250" in out
    assert "held-out loss 0.4000 after step 3, the lowest so far (50.0% of 3 pairs ranked right, " in out
