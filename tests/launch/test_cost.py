"""Calls, tokens and dollars by hand, for conversations small enough to write down."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.config import BuildDatasetConfig, EvaluateConfig, RLConfig, load_config
from collab_megatron.config.sections import DeploymentSection, LLMSection
from collab_megatron.launch import cost
from collab_megatron.launch.cost import (
    Calls,
    Lengths,
    build_calls,
    call_lines,
    dollar_lines,
    evaluation_calls,
    evaluations,
    lengths_of,
    step_calls,
)
from collab_megatron.types import Message, Task
from tests.conftest import ONE_USER, REPOSITORY

PROMPT = 10  # tokens of every prompt file
LENGTHS = Lengths(chat=20, request=7, description=3, reference=5)
BASE = (
    *("rollout.prompts_per_step=2", "rollout.num_replies=3", "rollout.num_repeat_rollouts=2"),
    *("rollout.max_user_turns=2", "rollout.max_assistant_turns=3", "rollout.max_new_tokens=100"),
    *("simulators.user.max_tokens=40", "simulators.judge.max_tokens=50", *ONE_USER),
    "reward={metric_weights: {accuracy: 1, interactivity: 1, token_amount: -0.1}, accuracy_verifier: judge}",
)


SECOND = "reward.second_judge={model: openai/m, api_key_env: null, max_tokens: 8}"


@pytest.fixture(autouse=True)
def _prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_prompt_tokens", lambda name, file: PROMPT)


def rl(*overrides: str) -> RLConfig:
    return load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", [*BASE, *overrides])


def figures(calls: list[Calls]) -> dict[str, tuple[float, float, float]]:
    return {item.place: (item.calls, item.tokens_in, item.tokens_out) for item in calls}


def test_the_chat_so_far_grows_and_is_sent_again_with_every_call() -> None:
    futures = 2 * 3 * 2
    told = PROMPT + 3 + 7
    first, second = 20 + 100, 20 + 100 + 40 + 100
    end = 20 + 3 * 100 + 2 * 40
    marks = PROMPT + 7 + end + PROMPT + 7 + 5 + end
    assert figures(step_calls(rl(), LENGTHS)) == {
        "simulators.user": (futures * 2, futures * (told + first + told + second), futures * 2 * 40),
        "simulators.judge": (futures * 2, futures * marks, futures * 2 * 50),
    }


def test_a_reply_that_is_scored_as_it_stands_meets_no_user() -> None:
    calls = figures(step_calls(rl("rollout.num_repeat_rollouts=0"), LENGTHS))
    assert "simulators.user" not in calls
    assert calls["simulators.judge"][0] == 2 * 3 * 2
    exact = rl("reward={metric_weights: {accuracy: 1}, accuracy_verifier: exact}")
    assert set(figures(step_calls(exact, LENGTHS))) == {"simulators.user"}


def test_extractions_are_calls_of_the_extractor() -> None:
    metrics = "reward={metric_weights: {bleu_score: 1, pass_rate: 1, judge: 1, turn_count: 1}}"
    role = "simulators.roles={extractor: {model: m, api_key_env: null, max_tokens: 60}}"
    futures, end = 2 * 3 * 2, 20 + 3 * 100 + 2 * 40
    seen = PROMPT + 7 + end
    calls = figures(step_calls(rl(metrics, role), LENGTHS))
    del calls["simulators.user"]
    assert calls == {
        "simulators.roles.extractor": (futures * 2, futures * 2 * seen, futures * 2 * 60),
        "simulators.judge": (futures, futures * seen, futures * 50),
    }
    assert figures(step_calls(rl(metrics), LENGTHS))["simulators.judge"][0] == futures * 3


def test_a_mixture_shares_the_calls_by_weight() -> None:
    mixture = "simulators.user.mixture=[{model: other, api_key_env: null, weight: 3, max_tokens: 80}]"
    calls = figures(step_calls(rl(mixture), LENGTHS))
    assert calls["simulators.user"][0] == 24 / 4
    assert calls["simulators.user.mixture.0"][0] == 24 * 3 / 4
    assert calls["simulators.user.mixture.0"][2] == 24 * 3 / 4 * 80


def test_evaluations_are_counted_with_their_calls() -> None:
    config = rl("train.steps=40", "train.eval_interval=15", "evaluation={num_tasks: 50, max_assistant_turns: 2}")
    assert evaluations(config) == 4  # before the first step, after 15, 30 and 40
    assert evaluations(rl("train.steps=30", "train.eval_interval=15", "train.eval_at_start=false")) == 2
    assert evaluations(rl("data.validation=null")) == 0
    assert figures(evaluation_calls(config, LENGTHS, 30))["simulators.user"] == (30, 30 * (PROMPT + 10 + 120), 30 * 40)
    opened = rl("evaluation={num_tasks: 50, max_assistant_turns: 2, simulated_opening: true}")
    assert figures(evaluation_calls(opened, LENGTHS, 30))["simulators.user"][0] == 60


def test_further_users_of_an_evaluation_are_counted_apart_and_the_mixture_may_stay_out() -> None:
    mixture = "simulators.user.mixture=[{model: other, api_key_env: null, weight: 3, max_tokens: 80}]"
    users = "users: {terse: {model: t, api_key_env: null, max_tokens: 10}}"
    evaluation = "evaluation={num_tasks: 50, max_assistant_turns: 2, mixture: false, %s}"
    calls = figures(evaluation_calls(rl(mixture, evaluation % users), LENGTHS, 30))
    assert (calls["simulators.user"][0], calls["evaluation.users.terse"][0]) == (30, 30)
    assert calls["evaluation.users.terse"][2] == 30 * 10
    assert "simulators.user.mixture.0" not in calls
    one = figures(evaluation_calls(rl(evaluation % "users: {}"), LENGTHS, 30))
    assert calls["simulators.judge"][0] == 2 * one["simulators.judge"][0]


def test_every_model_of_a_table_is_counted_with_its_pairs() -> None:
    models = "models={base: {}, gpt: {api: {model: m, api_key_env: null, max_tokens: 60}}}"
    demo = REPOSITORY / "conf" / "demo_evaluate.yaml"
    small = ["evaluation.num_tasks=50", "evaluation.max_assistant_turns=2", "simulators.judge.max_tokens=50"]

    def of(*overrides: str) -> dict[str, tuple[float, float, float]]:
        config = load_config(EvaluateConfig, demo, [*small, *overrides])
        return figures(evaluation_calls(config, LENGTHS, 30))

    alone, table, judged = of(), of(models), of(models, "compare.judged_pairs=10")
    assert table["simulators.user"] == pytest.approx([2 * each for each in alone["simulators.user"]])
    assert table["models.gpt.api"][0] == 30 * 2 * 3  # tasks, turns, users
    assert table["models.gpt.api"][2] == 30 * 2 * 3 * 60
    assert "models.base.api" not in table
    assert judged["simulators.judge"][0] - table["simulators.judge"][0] == 2 * 10 * 3  # orders, tasks, users


def test_a_build_counts_candidates_futures_and_the_assistant(tmp_path: Path) -> None:
    config = load_config(
        BuildDatasetConfig,
        REPOSITORY / "conf" / "demo_data.yaml",
        [
            *("num_candidate_responses=2", "num_repeat_rollouts=3", "max_total_turns=2", "max_user_turns=1"),
            *("simulators.user.max_tokens=40", "simulators.assistant.max_tokens=100", "simulators.user.mixture=[]"),
        ],
    )
    task = Task("1", (), single_turn_prompt="x" * 28, ground_truth="", task_desc="", metadata={})
    calls = figures(build_calls(config, [task]))
    futures = 2 * 2 * 3  # turns x candidates x futures
    assert calls["simulators.user"][0] == 1 + futures  # the opening
    assert calls["simulators.assistant"][0] == 2 + futures
    chat = 40, 40 + 140  # before each turn: the opening, then a reply and a user turn more
    assert calls["simulators.assistant"][1] == sum(before + 6 * (before + 140) for before in chat)
    assert calls["simulators.judge"][0] == futures  # interactivity alone asks one


def test_lengths_are_means_over_the_tasks() -> None:
    prompt = (Message("system", "s" * 8), Message("user", "u" * 8))
    task = Task("1", prompt, single_turn_prompt="x" * 4, ground_truth="y" * 40, task_desc="", metadata={})
    other = Task("2", (), single_turn_prompt="x" * 12, ground_truth="", task_desc="d" * 8, metadata={})
    assert lengths_of([task, other]) == Lengths(chat=2, request=2, description=1, reference=5)
    assert lengths_of([]) == Lengths()


def priced(model: str, into: float | None, out: float | None, **more: object) -> LLMSection:
    return LLMSection.model_validate(
        {"model": model, "input_usd_per_mtoken": into, "output_usd_per_mtoken": out, **more}
    )


def test_dollars_count_input_and_output_and_name_what_is_not_known() -> None:
    user = Calls("simulators.user", priced("hosted_vllm/a", 1.0, 2.0), 10, 3e6, 1e6)
    judge = Calls("simulators.judge", priced("hosted_vllm/nobody-knows-it", None, None), 5, 1e6, 1e6)
    assert user.usd == pytest.approx(5.0)
    assert call_lines("", [user, judge]) == [
        "            at most 10 calls of user to hosted_vllm/a: 3 M tokens in, 1 M out, $5.00",
        "            at most 5 calls of judge to hosted_vllm/nobody-knows-it: 1 M tokens in, 1 M out, price unknown",
    ]
    assert dollar_lines({"steps": (40, [user]), "evaluations": (2, [user])}) == [
        "dollars     at most $210.00 for 40 steps and 2 evaluations"
    ]
    lines = dollar_lines({"steps": (40, [user, judge]), "evaluations": (0, [])})
    assert lines[0] == "dollars     at most $200.00 for 40 steps, without simulators.judge"
    assert "set simulators.judge.input_usd_per_mtoken and output_usd_per_mtoken" in lines[1]


def test_prices_come_from_litellms_table_and_the_dearest_deployment_counts() -> None:
    listed = Calls("simulators.user", priced("gpt-4o-mini", None, None), 1, 1e6, 1e6)
    assert listed.usd is not None
    assert listed.usd > 0
    dear = DeploymentSection(model="x/y", input_usd_per_mtoken=100, output_usd_per_mtoken=100)
    section = priced("hosted_vllm/a", 1.0, 1.0, deployments=[dear.model_dump()])
    assert Calls("simulators.user", section, 1, 1e6, 1e6).usd == pytest.approx(200)
    unknown = priced("hosted_vllm/a", 1.0, 1.0, deployments=[{"model": "hosted_vllm/nobody-knows-it"}])
    assert Calls("simulators.user", unknown, 1, 1e6, 1e6).usd is None


def test_the_second_judge_reads_its_share_of_what_the_first_read() -> None:
    found = figures(step_calls(rl(SECOND, "reward.second_judge_share=0.25"), LENGTHS))
    calls, tokens_in, _ = found["simulators.judge"]
    futures = 2 * 3 * 2
    opening = futures * (PROMPT + 7 + 20)
    assert found["reward.second_judge"] == (
        (calls + futures) / 4,
        (tokens_in + opening) / 4,
        (calls + futures) / 4 * 8,
    )
    assert "reward.second_judge" not in figures(evaluation_calls(rl(SECOND), LENGTHS, 10))
    more = figures(
        step_calls(rl(SECOND, "reward.second_judge_share=0.25", "reward.metric_weights.pass_rate=1"), LENGTHS)
    )
    assert more["reward.second_judge"] == found["reward.second_judge"]  # it extracts nothing
    assert more["simulators.judge"][0] == calls + futures


def test_auto_futures_are_planned_at_their_bound() -> None:
    auto = figures(step_calls(rl("rollout.num_repeat_rollouts=auto", "rollout.auto_futures=2"), LENGTHS))
    assert auto == figures(step_calls(rl(), LENGTHS))
