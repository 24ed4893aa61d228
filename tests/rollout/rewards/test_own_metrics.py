"""Metrics of the user's own: the example of docs/rewards.md, modules next to the config, settings, wrong scores."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from collab_megatron.config import RLConfig, dump_config, load_config
from collab_megatron.config.sections import Section
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.rewards import MetricContext, Scorer, conversation_reward, make_scorer, register_metric
from collab_megatron.rollout.rewards.registry import _FACTORIES
from collab_megatron.types import LLMRequest, Message, ScoredConversation, T, Task
from tests.conftest import REPOSITORY

PROMPT = (Message("user", "a table"),)
TALK = ScoredConversation(Task("t", PROMPT, "a table", "BOOK"), (*PROMPT, Message("assistant", "yes, one")), 1, 2)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers and imports is forgotten after it."""
    monkeypatch.setattr("collab_megatron.rollout.rewards.registry._FACTORIES", dict(_FACTORIES))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


class Given:
    """A metric that gives `value`, awaited or not."""

    name = "given"

    def __init__(self, value: Any, *, plain: bool = True) -> None:
        self._value, self._plain = value, plain

    def score(self, conversation: ScoredConversation) -> Any:
        return self._value if self._plain else asyncio.sleep(0, self._value)


@pytest.mark.parametrize("plain", [True, False])
def test_a_score_may_be_awaited_or_not(plain: bool) -> None:
    for value in (0.25, 1, True, np.float32(0.25), np.int64(3)):
        scores = asyncio.run(Scorer([Given(value, plain=plain)], {"given": 1.0}).score(TALK))
        assert scores == {"given": float(value)}
        assert type(scores["given"]) is float


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "returned nan: return a finite number"),
        (float("-inf"), "returned -inf: return a finite number"),
        (None, r"returned a NoneType \(None\), not a number"),
        ("0.5", r"returned a str \('0.5'\), not a number"),
        ({"score": 1}, "returned a dict"),
    ],
)
def test_what_is_no_score_is_a_failure_with_the_metrics_name(plain: bool, value: Any, words: str) -> None:
    with pytest.raises(SimulatorError, match=f"metric given {words}"):
        asyncio.run(Scorer([Given(value, plain=plain)], {"given": 1.0}).score(TALK))


def test_nan_is_no_reward() -> None:
    with pytest.raises(ValueError, match="metric given is NaN"):
        conversation_reward({"given": float("nan")}, {"given": 1.0})
    assert conversation_reward({"given": float("inf")}, {"given": 1.0}) == 1.0


def test_a_bug_in_a_metric_names_the_metric() -> None:
    class Broken:
        name = "broken"

        def score(self, conversation: ScoredConversation) -> float:
            return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(Scorer([Broken()], {"broken": 1.0}).score(TALK))
    assert "in metric broken" in caught.value.__notes__


def write_config(folder: Path, reward: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = {
        "model": {"path": "m"},
        "data": {"train": "t.parquet"},
        "simulators": {"user": {"model": "m"}, "judge": {"model": "m"}},
        "reward": reward,
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


ONES = """
from collab_megatron.rollout.rewards import register_metric
{imports}

class Ones:
    name = "ones"
    def score(self, conversation):
        return {value}

register_metric("ones")(lambda context: Ones())
"""


ONES_ALONE = ONES.format(imports="", value="1.0")


@pytest.mark.parametrize(
    ("entry", "files"),
    [
        ("my_ones", {"my_ones.py": ONES_ALONE}),
        ("more/other.py", {"more/other.py": ONES_ALONE}),
        ("my_pack", {"my_pack/__init__.py": "from . import ones", "my_pack/ones.py": ONES_ALONE}),
        (
            "my_ones",
            {"my_ones.py": ONES.format(imports="import helper_of_ones", value="helper_of_ones.ONE"),
             "helper_of_ones.py": "ONE = 1.0"},
        ),
    ],
)  # fmt: skip
def test_a_module_next_to_the_config_is_found_from_anywhere(entry: str, files: dict[str, str], tmp_path: Path) -> None:
    """The driver reads a resolved copy of the config, in another folder and from another working directory."""
    folder = tmp_path / "conf"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    base = write_config(folder, {"metric_modules": [entry], "metric_weights": {"ones": 0.5}})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "top.yaml").write_text(f"extends: {base}\n")
    resolved = elsewhere / "resolved.yaml"
    resolved.write_text(dump_config(load_config(RLConfig, elsewhere / "top.yaml")))
    code = (
        "import sys, asyncio, json\n"
        "from pathlib import Path\n"
        "from collab_megatron.config import RLConfig, load_config\n"
        "from collab_megatron.rollout.rewards import make_scorer\n"
        "reward = load_config(RLConfig, Path(sys.argv[1])).reward\n"
        "for _ in range(2):\n"  # preflight and run: the second must not register again
        "    scorer = make_scorer(reward.metric_weights, None, metric_modules=reward.metric_modules)\n"
        "print(asyncio.run(scorer.score(None)))\n"
    )
    command = [sys.executable, "-c", code, str(resolved)]
    ran = subprocess.run(
        command, cwd=elsewhere, env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "{'ones': 1.0}", ran.stderr


def test_an_override_counts_from_the_configs_folder(tmp_path: Path) -> None:
    path = write_config(tmp_path / "conf", {})
    (tmp_path / "conf" / "mine.py").write_text("")
    config = load_config(RLConfig, path, ["reward.metric_modules=[mine, json, more.dots]"])
    assert config.reward.metric_modules == (str(tmp_path / "conf" / "mine.py"), "json", "more.dots")


@pytest.mark.parametrize(
    ("text", "words"), [("import nothing_of_this_name", "nothing_of_this_name"), ("def (", "invalid syntax")]
)
def test_a_module_that_cannot_be_imported(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(text)
    for _ in range(2):
        with pytest.raises(UserError, match=f"bad.py cannot be imported .*{words}"):
            make_scorer({"ones": 1.0}, None, metric_modules=[str(tmp_path / "bad.py")])
    with pytest.raises(UserError, match=r"none\.py cannot be imported"):
        make_scorer({"ones": 1.0}, None, metric_modules=[str(tmp_path / "none.py")])


class Limit(Section):
    words: int = 5


def test_settings_are_typed_and_refused_where_they_are_wrong() -> None:
    seen: list[Limit] = []

    @register_metric("limited")
    def limited(context: MetricContext) -> Any:
        seen.append(context.settings(Limit))
        metric = Given(0.0)
        metric.name = "limited"
        return metric

    register_metric("given")(lambda context: Given(0.0))
    weights = {"limited": 1.0, "given": 1.0}
    make_scorer(weights, None)
    make_scorer(weights, None, settings={"limited": {"words": 7}})
    assert seen == [Limit(), Limit(words=7)]
    wrong: list[tuple[dict[str, dict[str, Any]], str]] = [
        ({"limited": {"word": 7}}, r"unknown key 'reward\.settings\.limited\.word'; known keys here: words"),
        ({"limited": {"words": "many"}}, r"'reward\.settings\.limited\.words': .*integer.*got 'many'"),
        ({"given": {"words": 7}}, r"reward\.settings\.given: metric given takes no settings"),
        ({"limted": {}}, r"reward\.settings: unknown metric 'limted'"),
    ]
    for settings, words in wrong:
        with pytest.raises(UserError, match=words):
            make_scorer(weights, None, settings=settings)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda context: None, "returned a NoneType without a `score` method"),
        (lambda context: Given(0.0), "is named 'given'; set name = 'odd' on Given"),
    ],
)
def test_a_factory_that_makes_no_metric(factory: Callable[[MetricContext], Any], words: str) -> None:
    register_metric("odd")(factory)
    with pytest.raises(UserError, match=f"metric odd: .*{words}"):
        make_scorer({"odd": 1.0}, None)


def test_a_weight_is_a_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finite number"):
        load_config(RLConfig, write_config(tmp_path, {"metric_weights": {"accuracy": float("nan")}}))


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "rewards.md").read_text()
    module, test = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_metrics.py").write_text(module)
    reward = load_config(RLConfig, write_config(tmp_path, yaml.safe_load(example)["reward"])).reward

    class Judge:
        async def complete(self, request: LLMRequest[T]) -> list[T]:
            return [request.parse("1")]

    scorer = make_scorer(reward.metric_weights, Judge(), metric_modules=reward.metric_modules, settings=reward.settings)
    assert asyncio.run(scorer.score(TALK)) == {"brevity": pytest.approx(1 - 2 / 60), "kindness": 1.0}
    own: dict[str, Any] = {}
    exec(compile(test, "rewards.md", "exec"), own)
    (check,) = [value for name, value in own.items() if name.startswith("test_")]
    check()


def test_a_failed_call_in_a_task_group_is_that_failure() -> None:
    class Grouped:
        name = "given"

        async def fail(self) -> None:
            raise SimulatorError("no judge")

        async def score(self, conversation: ScoredConversation) -> float:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.fail())
            return 0.0

    with pytest.raises(SimulatorError, match="no judge"):
        asyncio.run(Scorer([Grouped()], {"given": 1.0}).score(TALK))
