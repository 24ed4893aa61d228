"""pass_rate: whether the conversation's final code passes the task's tests.

An LLM extracts the code; the tests of `single_turn_metadata` run on it in a sandbox (rollout/sandbox/). Code that
fails, runs out of time or memory, or was never delivered scores 0; a task without tests and a broken sandbox are no
score.
"""

from __future__ import annotations

import ast
import json
import secrets
from pathlib import Path
from typing import Any, Literal

from collab_megatron.config.sections import Positive, Seconds, Section
from collab_megatron.rollout.rewards.extraction import Extractor
from collab_megatron.rollout.sandbox.sandbox import Sandbox, SandboxLimits, SandboxRun
from collab_megatron.types import NoScore, Score, ScoredConversation

RUNNER = Path(__file__).parents[1] / "sandbox" / "unit_tests.py"


class PassRateSettings(Section):
    """reward.settings.pass_rate"""

    # isolated: refuse to start where programs cannot be cut off from the machine; unsafe: run them with limits only
    sandbox: Literal["isolated", "unsafe"] = "isolated"
    python: Path | None = None  # interpreter with the packages of the tasks, such as that of a venv; None: ours
    score: Literal["all", "share"] = "all"  # all: 1 if every test passes, else 0; share: of the tests that pass
    tests_key: str = "test"  # in single_turn_metadata: the source of the tests
    entry_point_key: str = "entry_point"  # in single_turn_metadata: the function that they test
    timeout_s: Seconds = 20.0  # of one run, and of its processor time
    memory_mb: Positive = 2048  # address space of each process, and memory of all processes of a run together
    processes: Positive = 64  # of a run, threads included
    disk_mb: Positive = 64  # of the temporary directory, which is in memory
    output_mb: Positive = 8  # what a run may print
    max_concurrency: Positive | None = None  # runs at a time in one process; None: one per core


class PassRate:
    """Implements types.Metric with an LLM that extracts. With `here`, raises UserError where programs cannot be
    isolated."""

    name = "pass_rate"

    def __init__(self, extractor: Extractor, settings: PassRateSettings, *, here: bool = True) -> None:
        self._extractor, self._settings = extractor, settings
        self._sandbox = Sandbox(
            SandboxLimits(
                time_s=settings.timeout_s,
                memory_mb=settings.memory_mb,
                processes=settings.processes,
                disk_mb=settings.disk_mb,
                output_mb=settings.output_mb,
            ),
            python=settings.python,
            unsafe=settings.sandbox == "unsafe",
            max_concurrency=settings.max_concurrency,
            setting="reward.settings.pass_rate.sandbox",
            tried=here,
        )

    async def score(self, conversation: ScoredConversation) -> Score | NoScore:
        """Waits for the extraction and the run. Raises SimulatorError."""
        metadata = conversation.task.metadata
        tests = metadata.get(self._settings.tests_key)
        if not isinstance(tests, str) or not tests.strip():
            return NoScore(f"single_turn_metadata has no tests at {self._settings.tests_key!r}")
        entry_point = metadata.get(self._settings.entry_point_key)
        entry_point = entry_point if isinstance(entry_point, str) else ""
        if not tests_something(tests, entry_point):
            needs = self._settings.entry_point_key
            return NoScore(f"the tests call nothing: no test case or function, and no check() with {needs!r}")
        code = await self._extractor.extract(conversation)
        if not code.text:
            return Score(0.0, code.details)
        return await self._tested(code.text, tests, entry_point, code.details)

    async def _tested(self, code: str, tests: str, entry_point: str, details: dict[str, Any]) -> Score | NoScore:
        token = secrets.token_hex(8)
        given = {"code": code, "tests": tests, "entry_point": entry_point, "token": token}
        run = await self._sandbox.run(("-c", RUNNER.read_text("utf-8")), json.dumps(given).encode())
        if run.ended == "no_sandbox":
            return NoScore(f"the sandbox cannot be made: {run.output.strip()}", details)
        found = read_result(run, token)
        if found is None:
            how = "the code ended the process" if run.ended == "ended" else run.ended
            return Score(0.0, {**details, "ended": how, "output": run.output[-1000:]})
        total, passed = found["total"], found["passed"]
        share = passed / total if total else 0.0
        value = share if self._settings.score == "share" else float(share == 1.0)
        return Score(value, {**details, "tests": total, "passed": passed, "errors": found["errors"]})


def tests_something(tests: str, entry_point: str) -> bool:
    """Whether a task's tests can fail for code that only runs: they define classes, `check` for an entry point or
    functions `test...`, or have statements of their own. Tests that Python cannot read do fail."""
    try:
        statements = ast.parse(tests).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    for statement in statements:
        match statement:
            case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(value=ast.Constant()):
                continue
            case ast.Assign(value=ast.Constant()) | ast.AnnAssign():
                continue
            case ast.FunctionDef(name=name):
                if name.startswith("test") or (name == "check" and entry_point):
                    return True
            case ast.AsyncFunctionDef():
                continue
            case _:
                return True
    return False


def read_result(run: SandboxRun, token: str) -> dict[str, Any] | None:
    """The runner's result; None if it left none, or the code wrote something else in its place."""
    try:
        found = json.loads(run.result)
        if run.ended == "ended" and found["token"] == token and 0 <= int(found["passed"]) <= int(found["total"]):
            return dict(found)
    except (ValueError, TypeError, KeyError):
        return None
    return None
