"""The batches of a record are those that real drivers delivered; and what cannot be replayed is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import AlgorithmSection, ReplaySection
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.engine.client import UNPUBLISHED
from collab_megatron.errors import UserError
from collab_megatron.launch.epochs import epochs_to_steps
from collab_megatron.rollout.record_files import read_trees
from collab_megatron.rollout.replay import find_record, open_replay
from collab_megatron.types import RolloutBatch, TrainingSample
from tests.rollout.runs import PROMPTS, config, play, stand_in

STEPS = 3
SPREAD = 0.2
"""Of the rewards of a group, below which it is replaced: some of the stand-in's groups are."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RLConfig, list[tuple[TrainingSample, ...]]]]:
    """Two driver processes that train later turns too, and their batches."""
    folder = tmp_path_factory.mktemp("run")
    with stand_in(folder, latency_ms=5.0) as url:
        given = config(folder, url, shards=2, refill_groups=2)
        given = given.model_copy(update={"algorithm": AlgorithmSection(credit="tree", min_group_std=SPREAD)})
        yield given, play(given, url, steps=STEPS).batches


def replaying(given: RLConfig, *, steps: str = "0-", record: Path | None = None, **changed: Any) -> RLConfig:
    section = ReplaySection(record=record or given.run.dir, steps=steps)
    return given.model_copy(update={"replay": section, **changed})


def batches(given: RLConfig, first: int, count: int) -> list[RolloutBatch]:
    return list(islice(open_replay(given).batches(first), count))


def without_versions(samples: tuple[TrainingSample, ...]) -> list[TrainingSample]:
    return [replace(sample, versions_T=(UNPUBLISHED,) * len(sample.versions_T)) for sample in samples]


@pytest.mark.slow
def test_the_batches_are_those_of_the_drivers(run: tuple[RLConfig, list[tuple[TrainingSample, ...]]]) -> None:
    """Ids, contexts of later turns, log-probs, advantages and their order: equal to the last bit."""
    given, delivered = run
    found = batches(replaying(given), 0, STEPS)
    assert [batch.step for batch in found] == [0, 1, 2]
    for batch, samples in zip(found, delivered, strict=True):
        assert list(batch.samples) == without_versions(samples)
        assert {version for sample in samples for version in sample.versions_T} == {batch.step}
    later = [s for batch in found for s in batch.samples if not s.reward]
    assert later, "no later turn was trained"
    replaced = [tree for tree in read_trees(given.run.conversations_dir) if tree["replaced"]]
    assert replaced, "no group was replaced"


@pytest.mark.slow
def test_several_passes_and_a_resume_take_the_same_steps(
    run: tuple[RLConfig, list[tuple[TrainingSample, ...]]],
) -> None:
    given, _ = run
    whole = batches(replaying(given), 0, 2 * STEPS + 1)
    assert [batch.samples for batch in whole[STEPS : 2 * STEPS]] == [batch.samples for batch in whole[:STEPS]]
    for first in (1, STEPS, 2 * STEPS):
        resumed = batches(replaying(given), first, 1)[0]
        assert (resumed.step, resumed.samples, resumed.metrics) == (
            first,
            whole[first].samples,
            {**whole[first].metrics, "replay/pass": resumed.metrics["replay/pass"]},
        )
    assert [batch.metrics["replay/recorded_step"] for batch in whole] == [1, 2, 3, 1, 2, 3, 1]
    assert [batch.metrics["replay/pass"] for batch in whole] == [1, 1, 1, 2, 2, 2, 3]
    last = batches(replaying(given, steps="2-3"), 0, 1)[0]
    assert last.samples == whole[1].samples
    assert open_replay(replaying(given, steps="3")).size().steps == 1


@pytest.mark.slow
def test_another_algorithm_makes_other_samples_of_the_same_conversations(
    run: tuple[RLConfig, list[tuple[TrainingSample, ...]]],
) -> None:
    given, delivered = run
    plain = replaying(given, algorithm=AlgorithmSection(baseline="leave_one_out", scale="none", min_group_std=SPREAD))
    found = batches(plain, 0, STEPS)
    for batch, samples in zip(found, delivered, strict=True):
        assert [s.reply_ids_T for s in batch.samples] == [s.reply_ids_T for s in samples if s.reward]
        for sample in batch.samples:
            others = [other.reward for other in batch.samples if other.group == sample.group and other is not sample]
            assert sample.advantage == pytest.approx(sample.reward - fmean(others)) or not sample.advantage
    assert any(sample.advantage for batch in found for sample in batch.samples)
    size = open_replay(plain).size()
    assert (size.steps, size.samples) == (STEPS, sum(len(batch.samples) for batch in found))
    assert size.trees >= PROMPTS * STEPS


def changed(given: RLConfig, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A file with the record's first step, every tree changed in place."""
    rows = [tree for tree in read_trees(given.run.conversations_dir) if tree["step"] == 1]
    for row in rows:
        change(row)
    file = folder / "changed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def no_logprobs(row: dict[str, Any]) -> None:
    for reply in row["replies"]:
        reply["logprobs"] = []


def other_text(row: dict[str, Any]) -> None:
    for reply in row["replies"]:
        reply["text"] += "!"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, says",
    [
        (lambda row: row.pop("slot"), "not the conversations of an evaluation"),
        (lambda row: row.update(schema=99), "schema 1"),
        (lambda row: row.pop("prompt_ids"), "KeyError: 'prompt_ids'"),
        (lambda row: row["prompt_ids"].append(7), "do not give the token ids of the tree 0/"),
        (no_logprobs, "tokens without log-probs"),
        (other_text, "do not give the token ids of the tree 0/"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_refused(
    run: tuple[RLConfig, list[tuple[TrainingSample, ...]]], tmp_path: Path, change: Callable[..., Any], says: str
) -> None:
    given, _ = run
    record = changed(given, tmp_path, change)
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        open_replay(replaying(given, record=record)).size()


@pytest.mark.slow
def test_what_the_user_gets_wrong(run: tuple[RLConfig, list[tuple[TrainingSample, ...]]], tmp_path: Path) -> None:
    given, _ = run
    with pytest.raises(UserError, match=r"no trees of replay.steps=9"):
        open_replay(replaying(given, steps="9")).size()
    weights = {**given.reward.metric_weights, "turn_count": 0.1}
    reward = given.reward.model_copy(update={"metric_weights": weights})
    with pytest.raises(UserError, match=r"has no score of turn_count.*rescore.*--output"):
        open_replay(replaying(given, reward=reward)).size()
    other = build_tokenizer()
    other.add_tokens(["table"])
    other.save_pretrained(str(tmp_path / "model"))
    model = given.model.model_copy(update={"path": str(tmp_path / "model")})
    with pytest.raises(UserError, match="train the model that the record was sampled with"):
        open_replay(replaying(given, model=model)).size()
    train = given.train.model_copy(update={"steps": STEPS + 1})
    with pytest.raises(UserError, match=f"train.steps={STEPS + 1} is more than the {STEPS} recorded steps"):
        epochs_to_steps(replaying(given, train=train))
    train = given.train.model_copy(update={"epochs": 2.5})
    assert epochs_to_steps(replaying(given, train=train)).train.steps == 8


def test_a_record_is_found_by_its_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "conversations" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="is no record of conversations: name RUN_DIR"):
        find_record(tmp_path)
    (tmp_path / "conversations" / "a" / "shard0.jsonl").touch()
    assert find_record(tmp_path) == find_record(tmp_path / "conversations" / "a") == tmp_path / "conversations" / "a"
    (tmp_path / "conversations" / "b" / "shard0.jsonl").touch()
    with pytest.raises(UserError, match=r"several runs, name one of .*/a, .*/b$"):
        find_record(tmp_path)
