"""The loads of tools/bench/driver.py (trees, latencies, engine), the driver's config and data, and the time bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collab_megatron.config import RLConfig
from collab_megatron.data.parquet import write_tasks
from collab_megatron.types import Message, Task
from tools.bench.driver_litellm import PROVIDER
from tools.bench.driver_servers import WORDS

TIMEOUT_S = 300.0  # above the slowest latency that is drawn
WARM_UP_TASKS = 2
OPENING = "i need a room for two people near the station from friday to sunday, please name one that is free, number"
REQUEST = (
    "rent a single room near the station for two people from friday to sunday, under seven nights, with seating for "
    "four guests in the garage and a table at noon; the name is fatima and the reminder is set for thursday morning, "
    "bring the groceries and the cake for the party, and the taxi to the museum leaves at nine from the harbor, number"
)


@dataclass(frozen=True)
class Load:
    """One measurement: the trees of a step, the latencies and the engine."""

    prompts: int
    replies: int
    futures: int
    median_s: float  # of the API latencies; 0: none
    user_turns: int = 2
    sigma: float = 0.8
    concurrency: int = 1024  # calls in flight of the user simulator, and as many of the judge
    capacity: float = 40_000.0  # engine tokens/s in all
    sequence_rate: float = 120.0  # engine tokens/s of one sequence
    reply_tokens: int = 41
    seed: int = 1

    @property
    def conversations(self) -> int:
        """Futures of a step."""
        return self.prompts * self.replies * self.futures

    @property
    def turns(self) -> int:
        """Turns of a step: every policy turn, the replies among them, every user turn, every verdict."""
        return self.prompts * self.replies + self.conversations * (2 * self.user_turns + 1)

    @property
    def turn_s(self) -> float:
        """Seconds of a policy turn that has the engine for itself."""
        return self.reply_tokens / min(self.sequence_rate, self.capacity)

    def settings(self, *, fail_share: float = 0.0, version: int = 0) -> dict[str, Any]:
        """For the stand-ins."""
        return {
            "seed": self.seed,
            "median_s": self.median_s,
            "sigma": self.sigma,
            "fail_share": fail_share,
            "capacity": self.capacity,
            "sequence_rate": self.sequence_rate,
            "reply_tokens": self.reply_tokens,
            "version": version,
        }


@dataclass(frozen=True)
class Plan:
    """All loads of a run of the benchmark."""

    main: Load  # wall times against the bound and the recipe
    ahead: Load  # max_staleness
    steps_ahead: int
    busy: Load  # no latencies: how far shards reach
    bare_calls: int
    fail_share: float
    failure_wait_s: float  # of the recipe


FULL = Plan(
    main=Load(128, 8, 3, median_s=2.0, concurrency=4096),  # 1024 would let chains wait for others to begin
    # fewer concurrent calls than futures: the work decides the length of a step, not one chain, so steps are alike
    ahead=Load(24, 4, 2, median_s=0.2, concurrency=64, sequence_rate=1000.0),
    steps_ahead=12,
    busy=Load(16, 8, 3, median_s=0.0, capacity=1e9, sequence_rate=1e9),
    bare_calls=2000,
    fail_share=0.02,
    failure_wait_s=60.0,
)
SMALL = Plan(
    main=Load(4, 2, 2, median_s=0.05, sequence_rate=1000.0),
    ahead=Load(2, 2, 1, median_s=0.1, sequence_rate=1000.0),
    steps_ahead=3,
    busy=Load(4, 2, 2, median_s=0.0, capacity=1e9, sequence_rate=1e9),
    bare_calls=100,
    fail_share=0.1,
    failure_wait_s=60.0 * 0.05 / 2.0,  # as much shorter as the latencies are
)
MEMORY = Load(32, 4, 1, median_s=0.0, user_turns=1, capacity=1e9, sequence_rate=1e9)


def make_config(
    load: Load, folder: Path, *, model: Path, url: str, shards: int = 1, max_staleness: int = 0
) -> RLConfig:
    """The driver's config for a run in `folder`; writes its data there. Every step plays every training task."""
    write_tasks(folder / "train.parquet", (make_task("train", i) for i in range(load.prompts)))
    write_tasks(folder / "validation.parquet", (make_task("validation", i) for i in range(WARM_UP_TASKS)))

    def role(name: str) -> dict[str, Any]:
        return {
            "model": f"{PROVIDER}/{name}",
            "api_base": f"{url}/v1",
            "api_key_env": None,
            "max_tokens": 256,
            "timeout_s": TIMEOUT_S,
            "deadline_s": TIMEOUT_S,
            "max_concurrency": load.concurrency,
            "input_usd_per_mtoken": 0.0,
            "output_usd_per_mtoken": 0.0,
        }

    return RLConfig.model_validate(
        {
            "run": {"dir": str(folder), "seed": load.seed},
            "model": {"path": str(model)},
            "data": {"train": str(folder / "train.parquet"), "validation": str(folder / "validation.parquet")},
            # one request for each call, as the recipe has it: the bench compares control flows, not numbers of calls
            "simulators": {
                "user": {**role("user"), "first_turns_together": False},
                "judge": {**role("judge"), "answer_once": False},
            },
            "reward": {"metric_weights": {"interactivity": 1.0, "token_amount": -0.1}},
            "rollout": {
                "prompts_per_step": load.prompts,
                "num_replies": load.replies,
                "num_repeat_rollouts": load.futures,
                "equal_replies": "apart",
                "max_user_turns": load.user_turns,
                "max_assistant_turns": load.user_turns + 1,
                "max_new_tokens": 64,
            },
            "engine": {"max_concurrency": load.concurrency},
            "evaluation": {"num_tasks": WARM_UP_TASKS},
            "driver": {"shards": shards, "max_staleness": max_staleness},
        }
    )


def make_task(split: str, index: int) -> Task:
    """A task in the demo's words, different from all others."""
    number = " ".join(WORDS[int(digit, 16)] for digit in f"{index:04x}")
    opening, request = f"{OPENING} {number} {split}", f"{REQUEST} {number} {split}"
    return Task(f"{split}-{index}", (Message("user", opening),), request, "the room is free", metadata={})


@dataclass(frozen=True)
class Bound:
    """Four lower bounds for any control flow, in seconds."""

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
    """Whether two flows made the same calls, and so had the same latencies."""
    return {call["name"] for call in left["calls"]} == {call["name"] for call in right["calls"]}
