"""The doctor on a config: its kind, its keys, its chat template, its engines, and one token through every role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.demo import scripted_roles
from collab_megatron.doctor import of_config
from collab_megatron.doctor.findings import findings_of
from collab_megatron.errors import UserError
from collab_megatron.launch.ports import free_port
from tests.conftest import REPOSITORY
from tests.rollout.llm.misbehaving import MisbehavingEndpoint

CONF = REPOSITORY / "conf"


@pytest.mark.parametrize(
    "file, kind",
    [
        ("demo_rl.yaml", "rl"),
        ("demo_sft.yaml", "sft"),
        ("demo_dpo.yaml", "dpo"),
        ("demo_evaluate_models.yaml", "evaluate"),
        ("demo_data.yaml", "data"),
    ],
)
def test_the_keys_of_a_config_tell_its_kind(file: str, kind: str) -> None:
    assert type(of_config.load_any(CONF / file, [], None)) is of_config.KINDS[kind]


def test_a_config_of_no_kind_is_refused_with_the_reason_of_an_rl_run(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"extends: {CONF / 'demo_rl.yaml'}\nrollout: {{num_replys: 4}}\n")
    with pytest.raises(UserError, match="num_replys"):
        of_config.load_any(file, [], None)


def test_a_file_that_no_kind_can_read_is_refused_with_its_own_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no config file"):
        of_config.load_any(tmp_path / "missing.yaml", [], None)


def test_a_runs_folder_stands_for_the_config_it_ran_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without logs/\*/resolved.yaml"):
        of_config.load_any(tmp_path, [], None)
    for name in ("rl", "sft"):
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        (folder / "resolved.yaml").write_text(f"extends: {CONF / f'demo_{name}.yaml'}\n")
        if name == "rl":
            assert isinstance(of_config.load_any(tmp_path, [], None), RLConfig)
    with pytest.raises(UserError, match=r"configs of 2 runs: name one of .*logs/rl/resolved.yaml"):
        of_config.load_any(tmp_path, [], None)


@pytest.mark.parametrize("path, needed", [("somebody/a-model", True), ("runs/demo/sft_hf", False), ("", False)])
def test_the_hub_is_needed_for_a_name_and_not_for_a_missing_folder(tmp_path: Path, path: str, needed: bool) -> None:
    config = load_config(RLConfig, CONF / "demo_rl.yaml", [f"model.path={path or tmp_path}"])
    assert of_config.needs_hub(config) is needed


def roles_at(url: str, *, users: int = 2) -> RLConfig:
    """The demo's config with every role at one endpoint; of its users the first so many."""
    config = load_config(RLConfig, CONF / "demo_rl.yaml", ["model.path=somebody/a-model"])
    at = {"api_base": url, "api_key_env": None, "max_attempts": 3, "deployments": ()}
    user = config.simulators.user.model_copy(update={**at, "model": "hosted_vllm/user-a"})
    other = config.simulators.user.mixture[0] if config.simulators.user.mixture else None
    assert other is not None
    others = tuple(other.model_copy(update={**at, "model": f"hosted_vllm/user-{n}"}) for n in range(1, users))
    assert config.simulators.judge is not None
    judge = config.simulators.judge.model_copy(update={**at, "model": "hosted_vllm/judge"})
    simulators = config.simulators.model_copy(
        update={"user": user.model_copy(update={"mixture": others}), "judge": judge}
    )
    evaluation = config.evaluation.model_copy(update={"users": {}})
    return config.model_copy(update={"simulators": simulators, "evaluation": evaluation})


def test_one_token_goes_through_every_role_and_every_user() -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> str:
        asked.append(body)
        return "ready"

    with MisbehavingEndpoint(answer) as endpoint:
        found = list(of_config.check_roles(roles_at(endpoint.url)))
    assert [(finding.level, finding.text) for finding in found] == [
        ("ok", "simulators.user answered"),
        ("ok", "simulators.user.mixture.0 answered"),
        ("ok", "simulators.judge answered"),
    ]
    assert sorted(body["model"] for body in asked) == ["judge", "user-1", "user-a"]
    assert {body["max_tokens"] for body in asked} == {1}


def test_the_demos_roles_answer_it() -> None:
    """They reply to prompts of their own form only, but to this one too."""
    config = load_config(RLConfig, CONF / "demo_rl.yaml")
    assert config.simulators.judge is not None
    models = [config.simulators.user.model, config.simulators.judge.model]
    for model in (name.partition("/")[2] for name in models):
        question = {"model": model, "messages": [{"role": "user", "content": of_config.QUESTION}]}
        assert scripted_roles.answer({**question, "max_tokens": 1}) == ["ok"]
        with pytest.raises(ValueError, match="holds no <request>"):
            scripted_roles.answer(question)


@pytest.mark.parametrize("fault", ["500", "hang"])
def test_a_role_that_does_not_answer_is_a_failure_with_a_deadline(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(of_config, "ROLE_DEADLINE_S", 0.5)
    with MisbehavingEndpoint(lambda body: "ready", faults={fault: 1.0}) as endpoint:
        found = list(of_config.check_roles(roles_at(endpoint.url, users=1)))
    assert [finding.level for finding in found] == ["fail", "fail"]
    assert found[0].text.startswith("simulators.user")
    assert all(finding.way_out for finding in found)


def test_a_missing_key_is_a_finding_that_names_role_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DESK_API_KEY", raising=False)
    config = load_config(RLConfig, CONF / "demo_rl.yaml")
    assert of_config.keys_of(config) == {"DESK_API_KEY": "simulators.user"}
    (found,) = findings_of("roles", lambda: of_config.check_roles(config))
    assert (found.level, "DESK_API_KEY" in found.way_out) == ("fail", True)


def test_the_template_of_the_demos_model_is_exact(tiny_model: Path) -> None:
    config = load_config(RLConfig, CONF / "demo_rl.yaml", [f"model.path={tiny_model}"])
    (found,) = of_config.check_template(config)
    assert (found.level, found.text.startswith("exact")) == ("ok", True)
    assert not of_config.needs_hub(config)


@pytest.mark.parametrize("mode, level", [("refuse", "fail"), ("as_sampled", "warn")])
def test_a_template_that_rewrites_turns_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, mode: str, level: str
) -> None:
    monkeypatch.setattr(of_config.ChatTemplate, "growth_difference", lambda self: "thoughts of past turns are removed")
    arguments = [f"model.path={tiny_model}", f"rollout.inexact_template={mode}"]
    (found,) = of_config.check_template(load_config(RLConfig, CONF / "demo_rl.yaml", arguments))
    assert (found.level, "thoughts of past turns" in found.text) == (level, True)


def test_an_engine_that_should_run_and_does_not_is_a_failure() -> None:
    config = load_config(RLConfig, CONF / "demo_rl.yaml")
    url = f"http://127.0.0.1:{free_port()}"
    gone = config.model_copy(update={"engine": config.engine.model_copy(update={"urls": (url,)})})
    (found,) = of_config.check_engines(gone)
    assert (found.level, url in found.text) == ("fail", True)


def test_the_starts_warnings_and_its_mistake_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_rl(config: RLConfig, *, dry_run: bool, report: Any) -> None:
        report("the plan")
        print("warning: K is 0: raise rollout.num_repeat_rollouts")
        raise UserError("port 1 is in use: set engine.port=0")

    monkeypatch.setattr(of_config, "check_rl", check_rl)
    config = load_config(RLConfig, CONF / "demo_rl.yaml")
    warning, mistake = findings_of("config", lambda: of_config.check_start(config))
    assert (warning.level, warning.way_out) == ("warn", "raise rollout.num_repeat_rollouts")
    assert (mistake.level, mistake.way_out) == ("fail", "set engine.port=0")
