"""pass_rate: a judge extracts the code, the task's tests run on it in the sandbox."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.rewards import Scorer, make_scorer
from collab_megatron.rollout.rewards.scorer import DETAILS
from collab_megatron.rollout.sandbox import sandbox as module
from collab_megatron.rollout.sandbox import unit_tests
from collab_megatron.types import LLMRequest, Message, ScoredConversation, T, Task

UNITTEST = """
import unittest
class TestCases(unittest.TestCase):
    def test_one(self):
        self.assertEqual(double(2), 4)
    def test_zero(self):
        self.assertEqual(double(0), 0)
    @unittest.expectedFailure
    def test_odd(self):
        self.assertEqual(double(1), 3)
    def test_text(self):
        self.assertEqual(double("a"), "aa")
"""
GOOD = "def double(x):\n    return 2 * x"


class FakeJudge:
    """Extracts `code`."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.prompts: list[str] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        self.prompts.append(request.messages[0].content)
        return [request.parse(json.dumps({"thought": "", "found": bool(self.code), "text": self.code}))]


@pytest.fixture(scope="module")
def mode() -> str:
    try:
        module.Sandbox(module.SandboxLimits())
    except UserError as error:
        pytest.skip(str(error))
    return "isolated"


def scorer_of(judge: FakeJudge, mode: str, **settings: Any) -> Scorer:
    return make_scorer({"pass_rate": 1.0}, judge, settings={"pass_rate": {"sandbox": mode, **settings}})


def score(
    code: str, mode: str, tests: Any = UNITTEST, entry_point: str = "double", **settings: Any
) -> tuple[float, Mapping[str, Any]]:
    messages = (Message("user", "double it"), Message("assistant", f"Here:\n{code}"))
    metadata = {"test": tests, "entry_point": entry_point}
    talk = ScoredConversation(Task("t", messages[:1], "double a value", "", metadata=metadata), messages, 1, 5)

    async def main() -> tuple[float, Mapping[str, Any]]:
        details: dict[str, Mapping[str, Any]] = {}
        DETAILS.set(details)
        scores = await scorer_of(FakeJudge(code), mode, **settings).score(talk)
        return scores["pass_rate"], details["pass_rate"]

    return asyncio.run(main())


def test_code_that_passes_and_code_that_does_not(mode: str) -> None:
    value, details = score(GOOD, mode)
    assert (value, details["tests"], details["passed"], details["errors"]) == (1.0, 4, 4, [])
    assert details["extracted"] == GOOD
    half = "def double(x):\n    print('noise')\n    return x + x if isinstance(x, int) else 1 / 0"
    value, details = score(half, mode)
    assert (value, details["tests"], details["passed"]) == (0.0, 4, 3)
    assert details["errors"] == ["ZeroDivisionError: division by zero"]
    assert score(half, mode, score="share")[0] == 0.75


@pytest.mark.parametrize(
    ("tests", "good"),
    [
        ("def check(candidate):\n    assert candidate(3) == 6", True),
        ("def check(candidate):\n    assert candidate(3) == 7", False),
        ("assert double(3) == 6", True),
        ("assert double(3) == 7, 'seven'", False),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.skipTest('why')", False),
        ("this is no Python", False),
        ("def test_three():\n    assert double(3) == 6", True),
        ("def test_three():\n    assert double(3) == 7, 'seven'", False),
    ],
)
def test_other_forms_of_tests(tests: str, good: bool) -> None:
    """Of the runner alone, without a sandbox: the code is ours."""
    total, passed, errors = unit_tests.run(GOOD, tests, "double")
    assert (total, passed) == (1, int(good))
    assert bool(errors) is not (good or "skipTest" in tests)


@pytest.mark.parametrize(
    ("tests", "entry_point"),
    [
        ("def check(candidate):\n    assert candidate(3) == 6", ""),
        ("def helper():\n    assert double(3) == 6", "double"),
        ("import unittest\nNAME = 'double'\n'''tests'''", "double"),
    ],
)
def test_tests_that_call_nothing_are_no_score(tests: str, entry_point: str) -> None:
    with pytest.raises(SimulatorError, match="call nothing"):
        score("1 / 0", "unsafe", tests, entry_point)


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "syntax": "def double(",
    "its own tests": "import unittest\nclass Mine(unittest.TestCase):\n    def test(self): pass",
    "a forged result": 'import os\nos.write(1, b\'{"token": "x", "total": 1, "passed": 1}\')\nos._exit(0)',
    "a forged result on every descriptor": (
        'import os\nfor fd in range(3, 20):\n    try: os.write(fd, b\'{"total": 1, "passed": 1}\')\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "an empty class of that name": "class TestCases: pass",
}


@pytest.mark.parametrize("name", CHEATS)
def test_code_that_avoids_the_tests_passes_nothing(mode: str, name: str) -> None:
    value, details = score(CHEATS[name], mode)
    assert value == 0.0
    assert details.get("passed", 0) in (0, 1)  # of 4: the expected failure passes
    assert details.get("tests", 4) in (1, 4)


@pytest.mark.slow
def test_what_goes_wrong_in_the_sandbox_is_a_zero_with_the_reason(mode: str) -> None:
    assert score("while True: pass", mode, timeout_s=1.0)[1]["ended"] == "timeout"
    assert score("while True: print('x' * 65536)", mode, output_mb=1)[1]["ended"] == "output"
    value, details = score("import os; os._exit(0)", mode)
    assert (value, details["ended"]) == (0.0, "the code ended the process")
    value, details = score("kept = bytearray(1 << 30)", mode, memory_mb=256)
    assert (value, details["errors"]) == (0.0, ["MemoryError: "])


def test_no_code_is_a_zero_and_no_tests_are_no_score(mode: str) -> None:
    value, details = score("", mode)
    assert (value, details) == (0.0, {"found": False, "verbatim": False, "extracted": ""})
    for tests in (None, " ", 7):
        with pytest.raises(SimulatorError, match="metric pass_rate has no score: single_turn_metadata has no tests"):
            score(GOOD, mode, tests=tests)


def test_a_sandbox_that_breaks_later_is_no_score(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = module._launch

    def broken(*arguments: Any) -> list[str]:
        return (
            launch(*arguments) if arguments[4] == ("-I", "-c", "pass") else ["/bin/sh", "-c", "echo full >&2; exit 12"]
        )

    monkeypatch.setattr(module, "_launch", broken)
    with pytest.raises(SimulatorError, match="metric pass_rate has no score: the sandbox cannot be made: full"):
        score(GOOD, mode)


def test_a_machine_without_isolation_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> list[str]:
        return ["/bin/sh", "-c", "echo no namespaces >&2; exit 12"]

    monkeypatch.setattr(module, "_launch", refuse)
    module.isolation.cache_clear()
    with pytest.raises(UserError, match=r"no namespaces.*set reward\.settings\.pass_rate\.sandbox=unsafe"):
        scorer_of(FakeJudge(""), "isolated")
    scorer_of(FakeJudge(""), "unsafe")
    make_scorer({"pass_rate": 1.0}, FakeJudge(""), here=False)  # a plan for another machine
    with pytest.raises(UserError, match=r"reward\.settings\.pass_rate\.sandbox"):
        scorer_of(FakeJudge(""), "safe")
    with pytest.raises(UserError, match="not a Python interpreter that runs"):
        scorer_of(FakeJudge(""), "unsafe", python=str(Path("/bin/false")))
