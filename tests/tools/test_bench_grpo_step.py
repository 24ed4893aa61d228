"""tools/bench/grpo_step.py without TRL and engines: configs, figures, errors; no speeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout.rewards.registry import _FACTORIES
from tools.bench.grpo_step import (
    SHAPES,
    TORCH,
    TRL,
    line,
    make_environment,
    make_prompts,
    make_row,
    our_config,
    parse,
    step_seconds,
)
from tools.bench.grpo_step_reward import reward_of


@pytest.mark.parametrize("name", list(SHAPES))
def test_our_run_does_the_shapes_work(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    file = tmp_path / "bench.yaml"
    file.write_text(yaml.safe_dump(our_config(shape, tmp_path / "m", tmp_path / "d.parquet", tmp_path / "run", 5)))
    config = load_config(RLConfig, file)
    assert config.rollout.prompts_per_step * config.rollout.num_replies == {"demo": 128, "135m": 32}[name]
    assert (config.rollout.max_new_tokens, config.rollout.num_repeat_rollouts) == (shape.reply_tokens, 0)
    assert config.algorithm.kl_coef > 0  # a reference on both sides
    assert (config.parallel.world_size, config.engine.threads, config.driver.max_staleness) == (1, None, 0)
    assert config.train.steps == 5
    assert shape.prompts * shape.replies % shape.trl_batch == 0


def test_the_reward_spreads_and_is_a_metric() -> None:
    import tools.bench.grpo_step_metric  # noqa: F401  (registers)

    assert "checksum" in _FACTORIES
    scores = {reward_of(text) for text in ("a", "b", "c", "")}
    assert len(scores) == 4
    assert all(0 <= score < 1 for score in scores)


def test_no_prompt_comes_twice() -> None:
    prompts = make_prompts(SHAPES["demo"], 6)
    assert len(set(prompts)) == len(prompts) == 6 * 16
    assert prompts == make_prompts(SHAPES["demo"], 6)


def test_a_step_lasts_from_one_log_line_to_the_next(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step, at in ((1, 10.0), (2, 12.5), (3, 14.0)):
            writer.add_scalar("time_s/step", 0.1, step, walltime=at)
    assert step_seconds(tmp_path, 3) == [2.5, 1.5]
    with pytest.raises(RunError, match="3 steps of 4"):
        step_seconds(tmp_path, 4)


def test_a_row_is_medians_and_their_quotient() -> None:
    row = make_row("demo", SHAPES["demo"], [1.0, 9.0, 2.0], [3.0, 4.0, 80.0], threads=2)
    assert (row.ours_s, row.trl_s, row.ratio) == (2.0, 4.0, 2.0)
    assert (row.steps, row.ours_spread_s) == (3, (1.0, 9.0))
    assert "ratio 2.00" in line(row)


def test_an_environment_of_the_same_versions_is_used_again(tmp_path: Path) -> None:
    (tmp_path / "made_of").write_text("\n".join((TORCH, *TRL)))
    assert make_environment(tmp_path) == tmp_path / "bin" / "python"


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--steps", "1"], "--steps 1"),
        (["parallel.tensor"], "parallel.tensor"),
    ],
)
def test_mistakes_are_named(argv: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(argv)
