"""Nested deadlines: where an inner one is longer than its outer one, the outer one ends work that could go on.

    driver.group_timeout_s >= driver.future_timeout_s > an LLM's deadline_s >= its timeout_s
    driver.future_timeout_s > engine.health_timeout_s
    evaluation.timeout_s    > an LLM's deadline_s, engine.health_timeout_s
    sync.timeout_s, parallel.collective_timeout_s > run.stopped_timeout_s

Other deadlines are derived, so they fit by construction: DriverSection.request_timeout_s and step_timeout_s,
EngineSection.wait_s and work_timeout_on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from collab_megatron.config.sections import (
    DriverSection,
    EngineSection,
    EvaluationSection,
    LLMSection,
    ParallelSection,
    RunSection,
    SyncSection,
)


class Deadline(NamedTuple):
    """A key of the config and its value."""

    key: str
    seconds: float


class Rule(NamedTuple):
    """`outer` must be longer than `inner`."""

    outer: Deadline
    inner: Deadline
    why: str
    may_be_equal: bool = False


def check_timeouts(
    *,
    run: RunSection | None = None,
    parallel: ParallelSection | None = None,
    sync: SyncSection | None = None,
    driver: DriverSection | None = None,
    engine: EngineSection | None = None,
    evaluation: EvaluationSection | None = None,
    llms: Mapping[str, LLMSection] | None = None,
) -> None:
    """Raises ValueError for the first violated rule, with both keys and values.

    llms: key in the config -> an LLM that conversations wait for.
    """
    rules = [*_of_processes(run, parallel, sync), *_of_llms(driver, evaluation, llms or {})]
    if engine is not None:
        rules += _of_health(driver, evaluation, engine)
    if driver is not None:
        rules += _of_trees(driver)
    for outer, inner, why, may_be_equal in rules:
        if inner.seconds > outer.seconds or (inner.seconds == outer.seconds and not may_be_equal):
            raise ValueError(
                f"{outer.key}={outer.seconds:g} must be {'at least' if may_be_equal else 'longer than'} "
                f"{inner.key}={inner.seconds:g}, since {why}: raise the first or lower the second"
            )


def _of_trees(driver: DriverSection) -> Iterator[Rule]:
    group = Deadline("driver.group_timeout_s", driver.group_timeout_s)
    future = Deadline("driver.future_timeout_s", driver.future_timeout_s)
    yield Rule(group, future, "a tree waits for its futures", may_be_equal=True)


def _of_llms(
    driver: DriverSection | None, evaluation: EvaluationSection | None, llms: Mapping[str, LLMSection]
) -> Iterator[Rule]:
    for place, section in llms.items():
        call = Deadline(f"{place}.deadline_s", section.deadline_s)
        attempt = Deadline(f"{place}.timeout_s", section.timeout_s)
        yield Rule(call, attempt, "a call consists of attempts", may_be_equal=True)
        if driver is not None:
            future = Deadline("driver.future_timeout_s", driver.future_timeout_s)
            yield Rule(future, call, "a future waits for several calls")
        if evaluation is not None:
            whole = Deadline("evaluation.timeout_s", evaluation.timeout_s)
            yield Rule(whole, call, "an evaluation waits for many calls")


def _of_health(
    driver: DriverSection | None, evaluation: EvaluationSection | None, engine: EngineSection
) -> Iterator[Rule]:
    health = Deadline("engine.health_timeout_s", engine.health_timeout_s)
    if driver is not None:
        future = Deadline("driver.future_timeout_s", driver.future_timeout_s)
        yield Rule(future, health, "a hung engine must be found before its futures reach their deadline")
    if evaluation is not None:
        whole = Deadline("evaluation.timeout_s", evaluation.timeout_s)
        yield Rule(whole, health, "a hung engine must be found before the evaluation reaches its deadline")


def _of_processes(run: RunSection | None, parallel: ParallelSection | None, sync: SyncSection | None) -> Iterator[Rule]:
    if run is None:
        return
    stopped = Deadline("run.stopped_timeout_s", run.stopped_timeout_s)
    if parallel is not None:
        collective = Deadline("parallel.collective_timeout_s", parallel.collective_timeout_s)
        yield Rule(collective, stopped, "its peers must wait until the stopped rank is found")
    if sync is not None:
        whole = Deadline("sync.timeout_s", sync.timeout_s)
        yield Rule(whole, stopped, "a stopped engine must be found before the sync reaches its deadline")
