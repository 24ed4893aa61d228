"""Judges by metric, what the judge of interactivity sees, and free arguments of an LLM call."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from collab_megatron.config import RLConfig, dump_config, load_config
from collab_megatron.config.roles import llm_roles, shipped_judges
from collab_megatron.config.sections import BudgetSection, LLMSection, SimulatorsSection, UserSection
from collab_megatron.errors import UserError
from collab_megatron.launch.cost import Lengths, step_calls
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.lineage import lineage_of
from collab_megatron.rollout.llm import Gateway
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.rewards import configured_scorer, make_scorer
from collab_megatron.rollout.rewards.interactivity import MARKS
from collab_megatron.types import CallRecord, LLMRequest, Message, ScoredConversation, T, Task
from tests.conftest import REPOSITORY
from tests.rollout.llm.calls import HELLO, closed_port, config_for, good, hello, use_role
from tests.rollout.llm.misbehaving import MisbehavingEndpoint

PROMPT = (Message("user", "a table"),)
HIDDEN = "a table for 4 under judy"
TALK = ScoredConversation(Task("t", PROMPT, HIDDEN, "BOOK"), (*PROMPT, Message("assistant", "at what time?")), 1, 2)
FREE = {"input_usd_per_mtoken": 0, "output_usd_per_mtoken": 0}


class Judge:
    """Gives full marks and keeps what it saw."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        self.prompts.append(request.messages[0].content)
        return [request.parse(json.dumps({"correct": True, **dict.fromkeys(MARKS, 1.0)}))]


def seen(weights: dict[str, float], **options: Any) -> str:
    judge = Judge()
    asyncio.run(make_scorer(weights, judge, **options).score(TALK))
    (prompt,) = judge.prompts
    return prompt


def test_the_judge_of_interactivity_sees_the_request_or_the_chat_alone(tmp_path: Path) -> None:
    weights = {"interactivity": 1.0}
    assert HIDDEN in seen(weights)
    alone = seen(weights, interactivity_sees="chat")
    assert HIDDEN not in alone
    assert "at what time?" in alone
    assert all(mark in alone for mark in MARKS)
    own = tmp_path / "own.txt"
    own.write_text("$chat")
    assert HIDDEN not in seen(weights, prompt_files={"interactivity": own})  # a prompt file may leave $request out
    own.write_text("$request $chat")
    with pytest.raises(UserError, match=r"unknown name \$request"):
        seen(weights, prompt_files={"interactivity": own}, interactivity_sees="chat")
    own.write_text("$reference $chat")
    assert HIDDEN not in seen({"accuracy": 1.0}, prompt_files={"accuracy": own})


def config(tmp_path: Path, **changes: Any) -> RLConfig:
    raw: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": "t.parquet"},
        "simulators": {"user": {"model": "u", "api_key_env": None}, "judge": {"model": "j", "api_key_env": None}},
        "reward": {"metric_weights": {"accuracy": 1.0, "interactivity": 1.0}},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        raw[section][key] = value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_config(RLConfig, path)


def test_judges_are_cold_and_users_are_not(tmp_path: Path) -> None:
    loaded = config(tmp_path, reward__judges={"accuracy": {"model": "a"}})
    assert loaded.simulators.user.temperature == 1.0
    assert loaded.simulators.judge is not None
    assert loaded.simulators.judge.temperature == loaded.reward.judges["accuracy"].temperature == 0.0
    plain = LLMSection(model="j", max_tokens=7)
    judge = SimulatorsSection(user=UserSection(model="u"), judge=plain).judge
    assert judge is not None
    assert (judge.max_tokens, judge.temperature) == (7, 0.0)


def test_a_metric_may_have_a_judge_of_its_own(tmp_path: Path) -> None:
    """Every LLM is asked for what it judges, with its own counters and costs."""
    answer = json.dumps({"correct": True, **dict.fromkeys(MARKS, 0.5)})
    with MisbehavingEndpoint(lambda body: answer) as one, MisbehavingEndpoint(lambda body: answer) as other:

        async def main() -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
            judge = {"model": "hosted_vllm/judge", "api_base": one.url, "api_key_env": None, **FREE}
            own = {"model": "hosted_vllm/own", "api_base": other.url, "api_key_env": None, "input_usd_per_mtoken": 1e6}
            loaded = config(
                tmp_path,
                simulators__judge=judge,
                simulators__user={"model": "hosted_vllm/u", "api_key_env": None, **FREE},
                reward__judges={"accuracy": {**own, "output_usd_per_mtoken": 0}, "token_amount": own},
            )
            roles = llm_roles(loaded.simulators, loaded.reward)
            assert set(roles) == {"user", "judge", "judge-accuracy"}  # token_amount has no weight
            gateway = Gateway(roles, 1, budget=BudgetSection(hard_usd=5.0))
            await gateway.check_reachable()
            scores = await configured_scorer(loaded.reward, loaded.simulators, gateway).score(TALK)
            budget = gateway.budget.metrics()
            await gateway.close()
            return scores, gateway.snapshot().metrics(), budget

        scores, counted, budget = asyncio.run(main())
        assert [sum(endpoint.counts.values()) for endpoint in (one, other)] == [1, 1]
    assert scores == {"accuracy": 1.0, "interactivity": 0.5}
    assert counted["simulator/judge-accuracy/calls"] == counted["simulator/judge/calls"] == 1
    assert budget["budget/judge-accuracy/hosted_vllm/own/usd_to_date"] == budget["budget/usd_to_date"] > 5.0
    assert budget["budget/hard_share"] > 1.0


def test_a_document_is_extracted_by_the_role_for_it(tmp_path: Path) -> None:
    """Over HTTP, with counters and a record of the call under the role's and the extraction's names."""
    answer = json.dumps({"thought": "the last turn", "found": True, "text": "at what time?"})
    with MisbehavingEndpoint(lambda body: answer) as endpoint:

        async def main() -> tuple[dict[str, float], dict[str, float], list[CallRecord]]:
            llm = {"model": "hosted_vllm/m", "api_base": endpoint.url, "api_key_env": None, **FREE}
            loaded = config(
                tmp_path,
                simulators__user=llm,
                simulators__judge={**llm, "api_base": closed_port()},
                simulators__roles={"extractor": llm},
                reward__metric_weights={"bleu_score": 1.0, "turn_count": -0.1},
            )
            gateway = Gateway(llm_roles(loaded.simulators, loaded.reward), 1)
            calls: list[CallRecord] = []
            CALLS.set(calls)
            talk = replace(TALK, task=replace(TALK.task, ground_truth="at what time?"))
            scores = await configured_scorer(loaded.reward, loaded.simulators, gateway).score(talk)
            await gateway.close()
            return scores, gateway.snapshot().metrics(), calls

        scores, counted, (call,) = asyncio.run(main())
    assert scores == {"bleu_score": pytest.approx(1.0), "turn_count": 1.0}
    assert (counted["simulator/extractor/calls"], counted["simulator/judge/calls"]) == (1, 0)
    assert (call.role, call.metric, call.thought) == ("extractor", "extraction", "the last turn")


def test_mistakes_about_a_metrics_own_judge_name_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    own = {"model": "gpt-4o-mini", "api_key_env": None}

    def gateway(budget: BudgetSection | None = None, **judge: Any) -> Gateway:
        loaded = config(
            tmp_path, simulators__judge=None, reward__judges={"accuracy": own | judge, "interactivity": own}
        )
        roles = llm_roles(loaded.simulators.model_copy(update={"user": UserSection(**own)}), loaded.reward)
        return Gateway(roles, 1, budget=budget)

    with pytest.raises(UserError, match=r"^reward\.judges\.accuracy needs an API key: .*NO_SUCH_KEY"):
        gateway(api_key_env="NO_SUCH_KEY")
    with pytest.raises(UserError, match=r"budget\.hard_usd cannot count what reward\.judges\.accuracy costs"):
        gateway(BudgetSection(hard_usd=1), model="hosted_vllm/m")
    with pytest.raises(UserError, match=r"^reward\.judges\.accuracy\.api_base http.*nothing answers"):
        asyncio.run(gateway(api_base=closed_port()).check_reachable())
    with pytest.raises(UserError, match=r"interactivity needs an LLM judge: .* or reward\.judges\.interactivity"):
        config(tmp_path, simulators__judge=None, reward__judges={"accuracy": own})
    with pytest.raises(UserError, match="two prompts for one judge"):
        config(
            tmp_path,
            reward__accuracy_prompt_file="a.txt",
            reward__judges={"accuracy": {**own, "prompt_file": "b.txt"}},
        )
    with pytest.raises(UserError, match=r"unknown key 'reward\.judges\.accuracy\.modle'; did you mean 'model'"):
        config(tmp_path, reward__judges={"accuracy": {**own, "modle": "x"}})
    with pytest.raises(UserError, match=r"reward\.judges: unknown metric 'acuracy'"):
        make_scorer({"token_amount": 1.0}, None, judges={"acuracy": Judge()})


def test_the_plan_and_the_lineage_know_the_judges(tmp_path: Path, tiny_model: Path) -> None:
    def load(*overrides: str) -> RLConfig:
        (tmp_path / "t.parquet").write_bytes(b"rows")
        sound = [f"model.path={tiny_model}", f"data.train={tmp_path / 't.parquet'}", "train.eval_interval=0"]
        return load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", [*sound, *overrides])

    own = "reward.judges.interactivity={model: own-judge}"
    config = load(own, "reward.accuracy_verifier=judge")
    asked = {item.place: item.section.model for item in step_calls(config, Lengths())}
    assert asked["reward.judges.interactivity"] == "own-judge"
    assert asked["simulators.judge"] == "hosted_vllm/desk-judge"
    assert set(shipped_judges(load().reward, load().simulators)) == {"interactivity"}
    names = [
        lineage_of(load(*more))
        for more in (
            (),
            (own,),
            (own, "reward.judges.interactivity.max_tokens=9"),
            ("reward.interactivity_sees=chat",),
            ("simulators.user.extra={top_p: 0.9}",),
        )
    ]
    assert len(set(names)) == len(names)
    assert lineage_of(load(own, "reward.judges.interactivity.api_base=http://127.0.0.1:1/v1")) == names[1]


def test_extra_arguments_reach_the_provider_and_the_journals_key(tmp_path: Path) -> None:
    def texts(extra: dict[str, Any]) -> str:
        (text,), _ = use_role(config_for(endpoint.url, extra=extra), lambda role: role.complete(HELLO), journal=book)
        return str(text)

    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> str:
        bodies.append(body)
        return f"{good(body)} {len(bodies)}"

    with (
        MisbehavingEndpoint(answer) as endpoint,
        closing(Journal(tmp_path / "journal.sqlite", replay="auto", lineage="test")) as book,
    ):
        none, some = texts({}), texts({"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": False}})
        assert (texts({}), texts({"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": False}})) == (none, some)
        other = texts({"top_p": 0.8})
    assert len({none, some, other}) == 3
    assert [body.get("top_p") for body in bodies] == [None, 0.9, 0.8]
    assert bodies[1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_greedy_judge_that_gave_no_usable_reply_is_asked_again_warmer() -> None:
    temperatures: list[float] = []

    def answer(body: dict[str, Any]) -> str:
        temperatures.append(body["temperature"])
        return "no JSON" if body["temperature"] == 0 else "7"

    with MisbehavingEndpoint(answer) as endpoint:
        config = config_for(endpoint.url, temperature=0.0)
        (number,), usage = use_role(config, lambda role: role.complete(hello(parse=int)))
    assert number == 7
    assert temperatures == [0, 0.5]
    assert usage.unreadable == 1


SECRET = "sk-abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.mark.parametrize(
    ("extra", "path"),
    [
        ({"api_key": "x"}, "extra.api_key"),
        ({"Authorization": "x"}, "extra.Authorization"),
        ({"extra_headers": {"x": "y"}}, "extra.extra_headers.x"),
        ({"token": "x"}, "extra.token"),
        ({"extra_body": {"apiKey": "x"}}, "extra.extra_body.apiKey"),
        ({"aws_secret_access_key": "x"}, "extra.aws_secret_access_key"),
        ({"azure_ad_token": "x"}, "extra.azure_ad_token"),
        ({"user": SECRET}, "extra.user"),
        ({"extra_body": {"a": [1, SECRET]}}, "extra.extra_body.a.1"),
        ({"user": "Bearer abc"}, "extra.user"),
        ({"user": f" token {SECRET}"}, "extra.user"),
        ({"proxy": "http://me:hidden@proxy"}, "extra.proxy"),
        ({"ACCESSTOKEN": "x"}, "extra.ACCESSTOKEN"),
        ({"user": "Zm9vYmFyMTIzNDU2Nzg5QUJDREVGR0hJSktM"}, "extra.user"),
    ],
)
def test_secrets_are_refused_and_not_quoted(tmp_path: Path, extra: dict[str, Any], path: str) -> None:
    for place in ("simulators__judge", "simulators__user"):
        with pytest.raises(UserError, match=rf"{path} looks like a secret.*name that in api_key_env") as caught:
            config(tmp_path, **{place: {"model": "j", "extra": extra}})
        assert f"{place.replace('__', '.')}.extra: " in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "instead"),
    [("model", "use model"), ("temperature", "use temperature"), ("seed", "run.seed"), ("timeout", "timeout_s")],
)
def test_arguments_with_a_key_of_their_own_are_refused(tmp_path: Path, key: str, instead: str) -> None:
    with pytest.raises(UserError, match=rf"simulators\.user\.extra: extra\.{key} is set by another key: .*{instead}"):
        config(tmp_path, simulators__user={"model": "u", "extra": {key: 1}})


def test_harmless_arguments_pass_and_survive_a_dump(tmp_path: Path) -> None:
    extra = {
        "top_p": 0.9,
        "reasoning_effort": "low",
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop": ["\n\n"],
        "logit_bias": {"15": -100},
        "user": "run-2025-01-collab-megatron-team",
        "prompt_cache_key": "collab",
    }
    loaded = config(tmp_path, simulators__user={"model": "u", "extra": extra})
    (tmp_path / "resolved.yaml").write_text(dump_config(loaded))
    assert load_config(RLConfig, tmp_path / "resolved.yaml").simulators.user.extra == extra
    with pytest.raises(UserError, match="a value that JSON does not support"):
        config(tmp_path, simulators__user={"model": "u", "extra": {"top_p": float("nan")}})
