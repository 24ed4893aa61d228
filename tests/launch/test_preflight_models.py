"""The checks before an evaluation of several models: every model, user and address; what all of them will ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.config import EvaluateConfig, load_config
from collab_megatron.data.parquet import write_tasks
from collab_megatron.demo.pipeline import desk_addresses
from collab_megatron.errors import UserError
from collab_megatron.launch.preflight import check_evaluate
from tests.conftest import DESK_KEY, REPOSITORY, Server
from tests.rollout.fakes import TASK


def test_an_evaluation_of_several_models_checks_and_counts_them_all(
    tmp_path: Path,
    tiny_model: Path,
    desk: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DESK_API_KEY", DESK_KEY)
    write_tasks(tmp_path / "tasks.parquet", [TASK])
    overrides = [
        *(f"run.dir={tmp_path / 'run'}", f"model.path={tiny_model}", f"data.validation={tmp_path / 'tasks.parquet'}"),
        *desk_addresses(desk.url, "user", "judge", mixture=False),
        *("models.sft=null", "models.rl=null", f"models.desk.api.api_base={desk.url}", "compare.baseline=base"),
    ]
    demo = REPOSITORY / "conf" / "demo_evaluate_models.yaml"
    contexts = check_evaluate(load_config(EvaluateConfig, demo, overrides), dry_run=True)
    assert list(contexts) == [str(tiny_model)]
    told = capsys.readouterr().out
    assert "models      base, desk\n" in told
    assert "users       simulators.user, bare, unseen\n" in told
    assert "at most 4 calls of user to hosted_vllm/desk-user" in told  # one task, two user turns, two models
    assert "at most 9 calls of models.desk.api to hosted_vllm/desk-assistant" in told  # three turns, three users
    missing = [*overrides, f"models.rl={{path: {tmp_path / 'missing'}}}"]
    with pytest.raises(UserError, match="missing"):
        check_evaluate(load_config(EvaluateConfig, demo, missing), dry_run=True)
    only_api = [*overrides, "models.base=null", "compare={}"]
    assert check_evaluate(load_config(EvaluateConfig, demo, only_api), dry_run=True) == {}  # no model is served
