"""Conversation trees without training, and training without conversations, on the real engine and trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.engine.client import UNPUBLISHED
from collab_megatron.rollout.record_files import read_trees
from collab_megatron.rollout.replay import open_replay
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.view.__main__ import read_payload
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import ONE_USER, Ended, Run, Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_replay_of_a_run_is_that_run(warm_run: Run, short_demo: tuple[Path, Ended], tmp_path: Path) -> None:
    """The same start, config and record on the same machine: every figure of training and the whole state, optimizer
    included, are equal to the last bit at two ranks. No engine, no driver, no LLM."""
    demo, _ = short_demo
    resolved = str(demo / "logs" / "rl" / "latest" / "resolved.yaml")
    given = ("-m", "collab_megatron.train_rl", resolved, f"run.dir={tmp_path}", f"replay.record={demo}")
    ended = warm_run(*given)
    assert ended.code == 0, ended.output[-4000:]
    assert "no engines, no driver, no LLM calls" in ended.output
    assert "off-policy  other weights may have sampled them" in ended.output
    logs = {path.name for path in (tmp_path / "logs" / "rl" / "latest").iterdir()}
    assert logs == {"resolved.yaml", "trainer-1.log"}  # rank 0 writes to the terminal
    before, after = (read_metrics(folder / "tensorboard" / "rl") for folder in (demo, tmp_path))
    trained = [row for row in before if "train/loss" in row]
    assert len(trained) == len(after) - sum("time_s/checkpoint" in row for row in after if "train/loss" not in row) == 3
    for old, new in zip(trained, [row for row in after if "train/loss" in row], strict=True):
        timed = ("train/tokens_per_s", "train/tflop_per_s_per_rank")
        told = {"train/on_policy_share", "train/on_policy_gap"}  # a replay does not claim to be on-policy
        names = {name for name in old if name.startswith("train/") and name not in timed} - told
        assert {name: new[name] for name in names} == {name: old[name] for name in names}
        assert (old["train/on_policy_share"], new["train/on_policy_share"]) == (1, 0)
        assert new["recorded/reward/mr_mean"] == old["reward/mr_mean"]
        assert "reward/mr_mean" not in new
        assert (new["replay/recorded_step"], new["replay/pass"]) == (old["step"], 1)
    ours, theirs = (newest_complete(folder / "checkpoints" / "rl") for folder in (tmp_path, demo))
    assert ours is not None
    assert theirs is not None
    shards = sorted((theirs / "model").glob("*.distcp"))
    assert len(shards) == 2
    for shard in shards:
        assert (ours / "model" / shard.name).read_bytes() == shard.read_bytes()
    other = warm_run(*given, "replay.steps=2-3", "train.steps=2", "run.resume=auto")
    assert other.code == 2
    assert "another config (replay.steps: 0- -> 2-3" in other.errors[0]


def test_trees_are_collected_from_a_real_engine(
    warm_run: Run, short_demo: tuple[Path, Ended], desk: Server, tiny_engine: Server, tiny_model: Path, tmp_path: Path
) -> None:
    demo, _ = short_demo
    ended = warm_run(
        *("-m", "collab_megatron.collect", "conf/demo_rl.yaml", f"run.dir={tmp_path}", f"model.path={tiny_model}"),
        *(f"data.train={demo / 'data' / 'rl_train.parquet'}", f"engine.urls=[{tiny_engine.url}]", *ONE_USER),
        *(f"simulators.user.api_base={desk.url}", f"simulators.judge.api_base={desk.url}"),
        *("rollout.prompts_per_step=2", "rollout.num_replies=2"),
    )
    assert ended.code == 0, ended.output[-4000:]
    assert "dollars     at most $0.00 for 1 step" in ended.output
    assert "collect-rl 1/1  reward" in ended.output
    trees = list(read_trees(tmp_path / "conversations" / "collect-rl"))
    assert [(tree["step"], len(tree["replies"])) for tree in trees] == [(1, 2), (1, 2)]
    replies = [reply for tree in trees for reply in tree["replies"]]
    assert {tuple(reply["weight_versions"]) for reply in replies} == {(UNPUBLISHED,)}
    calls = [call for reply in replies for future in reply["futures"] for call in future["calls"] if not call["shared"]]
    assert re.search(rf"^ +1 +2 +\S+ +\S+ +0 +0 +{len(calls)} +0\.0000$", ended.output, re.M)
    assert not (tmp_path / "checkpoints").exists()
    assert read_payload([tmp_path], (), max_trees=9, tokenizer=tiny_model).trees == 2
    trained = load_config(
        RLConfig, Path("conf/demo_rl.yaml"), [f"model.path={tiny_model}", f"replay.record={tmp_path}"]
    )
    size = open_replay(trained).size()
    assert (size.steps, size.trees, size.samples) == (1, 2, 4)
