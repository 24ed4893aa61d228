"""From the stand-ins' trace to the shortest time that any driver could take for these calls. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """Four times that no control flow can go below, in seconds."""

    longest_chain_s: float  # first reply, users and policy turns in turn, verdict
    engine_s: float  # tokens / capacity
    api_s: float  # latencies / allowed concurrency, of the role that needs longer
    litellm_s: float  # bare CPU time of the calls / driver processes

    @property
    def seconds(self) -> float:
        return max(asdict(self).values())


def lower_bound(
    trace: Mapping[str, Any],
    *,
    turn_s: float,
    capacity: float,
    concurrency: Mapping[str, int],
    litellm_ms: float,
    processes: int,
) -> Bound:
    """`turn_s` is what the engine needs for one turn that has it alone, `concurrency` the calls in flight of a role."""
    calls = trace["calls"]
    work = {
        role: sum(call["latency_s"] for call in calls if call["role"] == role) / allowed
        for role, allowed in concurrency.items()
    }
    return Bound(
        longest_chain_s=max(chains_s(calls, turn_s)),
        engine_s=trace["engine"]["tokens"] / capacity,
        api_s=max(work.values()),
        litellm_s=len(calls) * litellm_ms / 1000 / processes,
    )


def chains_s(calls: Sequence[Mapping[str, Any]], turn_s: float) -> list[float]:
    """Seconds of every conversation that was judged, if it had everything for itself: a policy turn stands before each
    user turn and before the verdict."""
    users = {call["name"]: call for call in calls if call["role"] == "user"}
    seconds = []
    for verdict in calls:
        if verdict["role"] != "judge":
            continue
        total, parent = turn_s + verdict["latency_s"], verdict["parent"]
        while parent:
            total += turn_s + users[parent]["latency_s"]
            parent = users[parent]["parent"]
        seconds.append(total)
    return seconds


def same_calls(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two flows were asked the same: then they had the same latencies."""
    return {call["name"] for call in left["calls"]} == {call["name"] for call in right["calls"]}
