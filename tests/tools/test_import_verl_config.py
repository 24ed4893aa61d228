"""A verl run's overrides become a config of ours, or a sentence about why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError
from tests.conftest import REPOSITORY
from tools.import_verl_config import NOT_NEEDED, SAME, WORDS, convert, nested, overrides

SCRIPT = r"""
set -x
RESUME=null
python3 -m verl.trainer.main_ppo \
    --config-name collabllm_trainer \
    algorithm.adv_estimator=grpo \
    data.train_files=$VERL_TEST_DATA/rl_train.parquet \
    +reward_model.reward_kwargs.metric_weights.accuracy=1 \
    +reward_model.reward_kwargs.metric_weights.token_amount=-0.0001 \
    +reward_model.reward_kwargs.llm_judge_kwargs.model=gpt-4o-mini \
    data.train_batch_size=16 actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    data.truncation='error' data.max_response_length=2048 \
    actor_rollout_ref.model.path="Qwen/Qwen2.5-7B-Instruct" \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.002 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.actor.clip_ratio=0.3 \
    actor_rollout_ref.rollout.n=8 actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.swap_space=4 \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    trainer.n_gpus_per_node=8 trainer.nnodes=2 trainer.total_epochs=20 trainer.test_freq=-1   # the end
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "import_verl_config.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_recipes_run_becomes_a_config_that_train_rl_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_TEST_DATA", "/data")
    (tmp_path / "run.sh").write_text(SCRIPT)
    user = {"user_model": "gpt-4o", "num_retries": 5, "max_tokens": 512, "temperature": 1.0, "enable_log": True}
    (tmp_path / "user.yaml").write_text(yaml.safe_dump({"interaction": [{"name": "collabllm", "config": user}]}))
    done = run(tmp_path / "run.sh", "--interaction", tmp_path / "user.yaml")
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.yaml").write_text(done.stdout)
    config = load_config(RLConfig, tmp_path / "mine.yaml")
    assert config.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert config.data.train == Path("/data/rl_train.parquet")
    assert config.reward.metric_weights == {"accuracy": 1.0, "token_amount": -0.1}  # 0.0001 a token, in thousands
    assert (config.rollout.prompts_per_step, config.rollout.num_replies, config.algorithm.mini_batches) == (16, 8, 2)
    assert (config.algorithm.kl_coef, config.algorithm.kl_estimator) == (0.002, "k3")
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.3, 0.3)
    assert config.optimizer.lr == 1e-6
    assert (config.train.epochs, config.train.eval_interval) == (20, 0)
    assert config.train.recompute == "full"
    assert (config.parallel.data, config.engine.count, config.engine.tensor) == (16, 8, 2)
    assert (config.simulators.user.model, config.simulators.user.max_attempts) == ("gpt-4o", 6)
    told = done.stderr.splitlines()
    assert "no equal: actor_rollout_ref.rollout.swap_space: 4 is left out" in told
    assert "not needed: data.truncation: nothing is truncated" in told
    assert any(line.startswith("differs: data.max_response_length: ") for line in told)
    assert not [line for line in told if "train_batch_size" in line]


def test_without_a_kl_loss_there_is_no_reference_model() -> None:
    assert convert({"actor_rollout_ref.rollout.n": 4}).values["algorithm.kl_coef"] == 0.0
    in_reward = convert({"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0.01}).values
    assert (in_reward["algorithm.kl_in"], in_reward["algorithm.kl_coef"]) == ("reward", 0.01)


def test_a_script_is_read_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    found = overrides(f"touch {canary}; a.b=$(touch {canary}) c.d=`touch {canary}` e.f=1")
    assert found["e.f"] == 1
    assert not canary.exists()


@pytest.mark.parametrize(
    "verl, says",
    [
        ({"algorithm.adv_estimator": "gae"}, "algorithm.adv_estimator=gae has no equal here; what has: grpo, rloo"),
        ({"actor_rollout_ref.actor.ppo_epochs": 2}, "a batch is used once"),
        ({"data.train_batch_size": 10, "actor_rollout_ref.actor.ppo_mini_batch_size": 4}, "no multiple"),
        (
            {"algorithm.use_kl_in_reward": True, "actor_rollout_ref.actor.use_kl_loss": True},
            "choose one",
        ),
    ],
)
def test_what_would_train_something_else_is_refused(verl: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        convert(verl)


@pytest.mark.parametrize(
    "script, says",
    [
        ("echo hello", "has no word of the form a.b.c=value"),
        ("python x a.b='open", "cannot be split into words"),
        ("verl data.train_batch_size=0 actor_rollout_ref.model.path=x data.train_files=y", "rollout.prompts_per_step"),
    ],
)
def test_mistakes_end_with_a_sentence(tmp_path: Path, script: str, says: str) -> None:
    (tmp_path / "run.sh").write_text(script)
    done = run(tmp_path / "run.sh")
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_every_key_it_writes_exists() -> None:
    """Else only a user of that key would notice a rename."""
    written = {*SAME.values(), *(ours for words in WORDS.values() for ours, _ in words.values())}
    text = (REPOSITORY / "docs" / "config.md").read_text()
    for section, _, name in (key.rpartition(".") for key in written):
        if section.startswith("simulators"):
            continue  # tried above
        assert f"| `{name}` |" in text.partition(f"\n## `{section}`")[2].partition("\n## ")[0], (section, name)
    assert not set(SAME) & set(NOT_NEEDED)
    assert nested({"a.b.c": 1, "a.d": 2}) == {"a": {"b": {"c": 1}, "d": 2}}
