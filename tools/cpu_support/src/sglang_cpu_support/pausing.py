"""A paused scheduler sleeps until a request comes, instead of asking for one in a loop.

`--sleep-on-idle` covers a scheduler without requests, not one that is paused (sglang 0.5.23, srt/managers/scheduler.py,
event_loop_normal). During a weight sync every server is paused: on a machine without a core to spare, the loops take
the time from the trainer that sends and from the servers' own HTTP side.
"""

from __future__ import annotations

from typing import Any


def after_paused_step(result: None, scheduler: Any) -> None:
    """After a step of the paused loop of an sglang Scheduler: wait for a request, at most a second. Its ranks above 0
    wait for rank 0's broadcast already."""
    if scheduler.idle_sleeper is not None:
        scheduler.idle_sleeper.maybe_sleep()


def install() -> None:
    """Hook SGLang's scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    step = "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine"
    HookRegistry.register(step, after_paused_step, HookType.AFTER)
