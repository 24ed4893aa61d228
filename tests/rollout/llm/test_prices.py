"""A price is typed or listed or unknown; a cap in dollars takes no unknown one."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.config.sections import BudgetSection, DeploymentSection, LLMSection, SimulatorSection, UserSection
from collab_megatron.data.parquet import write_tasks
from collab_megatron.errors import UserError
from collab_megatron.launch.preflight import check_rl
from collab_megatron.rollout.llm import Gateway
from collab_megatron.rollout.llm.litellm_api import Endpoint, LiteLLMApi
from collab_megatron.rollout.llm.prices import Price, listed_price, load_litellm, price
from tests.conftest import DESK_KEY, ONE_USER, REPOSITORY, Server
from tests.rollout.fakes import TASK

FREE: dict[str, Any] = {"input_usd_per_mtoken": 0, "output_usd_per_mtoken": 0}


def llm(model: str, **more: Any) -> LLMSection:
    return LLMSection(model=model, api_key_env=None, **more)


def test_a_price_is_typed_listed_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *where, **options: pytest.fail(f"asks {where}"))
    listed = price(llm("openai/gpt-4o-mini"))
    assert listed is not None
    assert listed == price(llm("gpt-4o-mini"))
    assert listed.source == "litellm"
    assert listed.input_usd_per_mtoken == pytest.approx(0.15)
    assert listed.output_usd_per_mtoken == pytest.approx(0.6)
    assert listed.cost_usd(2_000_000, 1_000_000) == pytest.approx(0.9)
    assert price(llm("gpt-4o-mini", **FREE)) == Price(0.0, 0.0, "config")
    assert price(llm("gpt-4o-mini", output_usd_per_mtoken=7)) == Price(listed.input_usd_per_mtoken, 7.0, "config")
    assert price(DeploymentSection(model="gpt-4o-mini")) == listed
    for unknown in ("hosted_vllm/m", "openai/some-own-model", "ollama/nobody-knows", "huggingface/a/b"):
        assert price(llm(unknown)) is None
        assert price(llm(unknown, input_usd_per_mtoken=1)) is None  # half a price counts half the cost
    # a gateway registers models that LiteLLM does not know, at 0 dollars: that is not a price and hides none
    Gateway({"user": llm("hosted_vllm/m"), "judge": llm("openai/gpt-4o-mini", **FREE)}, 1)
    assert price(llm("hosted_vllm/m")) is None
    assert price(llm("openai/gpt-4o-mini")) == listed


def test_a_cap_in_dollars_refuses_an_unknown_price_by_its_place() -> None:
    cap = BudgetSection(hard_usd=1.0)
    typed = llm("hosted_vllm/m", **FREE)
    other = DeploymentSection(model="hosted_vllm/other", api_key_env=None)
    part = SimulatorSection(model="hosted_vllm/part", api_key_env=None)
    unpriced: list[tuple[dict[str, LLMSection], str]] = [
        ({"user": llm("hosted_vllm/m")}, "user"),
        ({"user": typed, "judge": llm("hosted_vllm/m")}, "judge"),
        ({"user": typed.model_copy(update={"deployments": (other,)})}, "user.deployments.0"),
        ({"user": UserSection(model="gpt-4o-mini", api_key_env=None, mixture=(part,))}, "user.mixture.0"),
        ({"user": llm("hosted_vllm/m", input_usd_per_mtoken=1)}, "user"),
    ]
    for roles, place in unpriced:
        wanted = rf"budget.hard_usd cannot count .*simulators\.{place} costs.* set simulators\.{place}\.input_usd"
        with pytest.raises(UserError, match=wanted):
            Gateway(roles, 1, budget=cap)
        Gateway(roles, 1, budget=BudgetSection(hard_calls=1))
    with pytest.raises(UserError, match=r"budget\.soft_usd"):
        Gateway({"user": llm("hosted_vllm/m")}, 1, budget=BudgetSection(soft_usd=1.0))
    Gateway({"user": typed, "judge": llm("gpt-4o-mini")}, 1, budget=cap)


def test_a_listed_price_counts_where_litellm_reckons_nothing() -> None:
    endpoint = Endpoint(llm("gpt-4o-mini"), None, price(llm("gpt-4o-mini")), takes_schema=False)
    for nothing in ({}, {"response_cost": None}, {"response_cost": 0.0}):
        cost_usd = LiteLLMApi._cost_usd(endpoint, SimpleNamespace(_hidden_params=nothing), 100, 10)
        assert cost_usd == pytest.approx((100 * 0.15 + 10 * 0.6) / 1e6)
    assert LiteLLMApi._cost_usd(endpoint, SimpleNamespace(_hidden_params={"response_cost": 2.0}), 100, 10) == 2.0


def test_the_check_before_a_run_knows_the_budget(
    tmp_path: Path, tiny_model: Path, desk: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DESK_API_KEY", DESK_KEY)
    write_tasks(tmp_path / "tasks.parquet", [TASK])
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"model.path={tiny_model}",
        f"data={{train: {tmp_path / 'tasks.parquet'}, validation: {tmp_path / 'tasks.parquet'}}}",
        f"simulators.user.api_base={desk.url}",
        f"simulators.judge.api_base={desk.url}",
        *ONE_USER,
        "budget.hard_usd=5",
    ]
    demo = REPOSITORY / "conf" / "demo_rl.yaml"
    check_rl(load_config(RLConfig, demo, overrides))
    with pytest.raises(UserError, match=r"simulators\.judge costs"):
        check_rl(load_config(RLConfig, demo, [*overrides, "simulators.judge.input_usd_per_mtoken=null"]))


def test_a_model_that_nobody_knows_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    litellm = load_litellm()
    litellm.suppress_debug_info = False  # as it is in a fresh process
    assert listed_price("nobody/has-this-model") is None
    assert capfd.readouterr().out == ""
