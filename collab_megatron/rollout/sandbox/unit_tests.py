"""Runner of a task's tests on a model's code; a script, run inside the sandbox.

In: one JSON object with `code`, `tests`, `entry_point` and `token`. Out: one JSON line with the token, and how many
tests there are and passed. Code and tests run in one module, as BigCodeBench runs them. The tests are its
unittest.TestCase classes; else `check(candidate)`, called with the entry point as in HumanEval; else its functions
`test...()`, as for pytest without fixtures; else their statements.

What code and tests print goes to standard error. Code that ends the process leaves no result, so it passes nothing.
Only classes that the tests define count, not those of the code.
"""

from __future__ import annotations

import json
import os
import sys
import unittest
from types import FunctionType, ModuleType
from typing import Any

NAME = "solution"
MOST_ERRORS = 5
ERROR_CHARS = 300


def main() -> None:
    given = json.loads(sys.stdin.buffer.read())
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    total, passed, errors = run(given["code"], given["tests"], given["entry_point"])
    found = {"token": given["token"], "total": total, "passed": passed, "errors": errors[:MOST_ERRORS]}
    print(json.dumps(found), file=results, flush=True)
    os._exit(0)  # threads of the code do not hold the result up


def run(code: str, tests: str, entry_point: str) -> tuple[int, int, list[str]]:
    """(tests, those that passed, first lines of errors)."""
    module = ModuleType(NAME)
    module.__dict__.update(__file__=f"{NAME}.py", os=os, sys=sys)  # tests of BigCodeBench use them without an import
    sys.modules[NAME] = module
    names = module.__dict__
    try:
        exec(compile(code, f"{NAME}.py", "exec"), names)
        before = set(map(id, names.values()))
        exec(compile(tests, "tests.py", "exec"), names)
    except BaseException as error:  # noqa: BLE001 - SystemExit too: whatever the code raises is its failure
        return 1, 0, [_words(error)]
    cases = [
        value
        for value in names.values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase) and id(value) not in before
    ]
    if cases:
        return _run_cases(cases)
    check = names.get("check")
    if callable(check) and id(check) not in before and entry_point:
        try:
            check(names[entry_point])
        except BaseException as error:  # noqa: BLE001 - as above
            return 1, 0, [_words(error)]
    elif functions := [
        value
        for name, value in names.items()
        if name.startswith("test") and isinstance(value, FunctionType) and id(value) not in before
    ]:
        return _run_functions(functions)
    return 1, 1, []


def _run_functions(functions: list[FunctionType]) -> tuple[int, int, list[str]]:
    errors = []
    for function in functions:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - as above
            errors.append(_words(error))
    return len(functions), len(functions) - len(errors), errors


def _run_cases(cases: list[type[unittest.TestCase]]) -> tuple[int, int, list[str]]:
    total, passed, errors = 0, 0, []
    loader = unittest.TestLoader()
    for suite in map(loader.loadTestsFromTestCase, cases):
        result = _Result()
        total += suite.countTestCases()
        suite.run(result)
        passed += result.passed
        errors += [text.strip().splitlines()[-1][:ERROR_CHARS] for _, text in (*result.errors, *result.failures)]
    return total, passed, errors


class _Result(unittest.TestResult):
    """Counts what passed; a skipped test is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0

    def addSuccess(self, _test: unittest.TestCase) -> None:
        self.passed += 1

    def addExpectedFailure(self, _test: unittest.TestCase, _error: Any) -> None:
        self.passed += 1


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:ERROR_CHARS]


if __name__ == "__main__":
    main()
