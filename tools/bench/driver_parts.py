"""The measurements of tools/bench/driver.py, one function per part, and their processes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collab_megatron.config import dump_config
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.files import publish_json, publish_text
from collab_megatron.launch.supervisor import Supervisor
from tools.bench.driver_litellm import MANY_CONNECTIONS
from tools.bench.driver_loads import FULL, MEMORY, SMALL, Load, Plan, lower_bound, make_config, same_calls
from tools.bench.driver_process import READY_S, Driver, StandInsClient

CHILD_S = 900.0
BUSY_STEPS = 2  # the faster one counts

Figures = dict[str, Any]

MEANING = {
    "futures": "conversations of the main step",
    "wall_s": "the driver, no failures",
    "lower_bound_s": "the shortest possible",
    "ratio": "wall_s / lower_bound_s",
    "recipe_wall_s": "the recipe's control flow, same calls",
    "recipe_ratio": "recipe_wall_s / wall_s",
    "failing_wall_s": "the driver, some calls failing once",
    "failing_recipe_wall_s": "the recipe, the same calls failing once",
    "failing_recipe_ratio": "failing_recipe_wall_s / failing_wall_s",
    "async_speedup": "max_staleness 1 against 0",
    "same_calls": "whether driver and recipe made the same calls, so that they can be compared",
    "failing_same_calls": "the same with failures",
    "own_ms_per_turn": "driver CPU beyond bare LiteLLM, for each policy turn, user turn and verdict",
    "litellm_ms_per_call": "bare LiteLLM CPU for each call",
    "two_shard_speedup": "two driver processes against one, without latencies",
}
NULL = dict.fromkeys(MEANING)


@dataclass(frozen=True)
class DriverBench:
    """The shared state of all parts."""

    folder: Path
    model: Path
    supervisor: Supervisor
    environment: dict[str, str]
    stand_ins: StandInsClient

    def driver(self, load: Load, name: str, *, shards: int = 1, max_staleness: int = 0) -> Driver:
        config = make_config(
            load,
            self.folder / name,
            model=self.model,
            url=self.stand_ins.url,
            shards=shards,
            max_staleness=max_staleness,
        )
        return Driver(config, self.supervisor, self.environment, self.stand_ins)

    def child(self, name: str, *arguments: str) -> Any:
        """Run `tools.bench.NAME` to its end; returns its JSON output."""
        output = self.folder / f"{name}.json"
        argv = [
            sys.executable,
            "-m",
            f"tools.bench.{name}",
            *arguments,
            "--url",
            self.stand_ins.url,
            "--json",
            str(output),
        ]
        child = self.supervisor.start(name, argv, self.environment | MANY_CONNECTIONS)
        self.supervisor.wait_for([child], timeout_s=CHILD_S)
        return json.loads(output.read_text())


@contextmanager
def bench(repository: Path) -> Iterator[DriverBench]:
    """A temporary folder with the tokenizer, and the stand-ins."""
    with (
        tempfile.TemporaryDirectory(prefix="bench_driver_") as work,
        Supervisor(Path(work) / "logs") as supervisor,
    ):
        folder = Path(work)
        build_tokenizer().save_pretrained(folder / "model")
        environment = {"PYTHONPATH": str(repository), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        ready = folder / "stand-ins.address"
        argv = [sys.executable, "-m", "tools.bench.driver_servers", "--ready-file", str(ready)]
        url = supervisor.wait_for_file(ready, supervisor.start("stand-ins", argv, environment), timeout_s=READY_S)
        with closing(StandInsClient(url.strip())) as stand_ins:
            yield DriverBench(folder, folder / "model", supervisor, environment, stand_ins)


def run_parts(parts: Sequence[str], repository: Path, *, small: bool, shards: int) -> Figures:
    """All figures; those of other parts are None."""
    plan = SMALL if small else FULL
    figures: Figures = {**NULL, "cores": os.cpu_count(), "driver_processes": shards}
    with bench(repository) as shared:
        if "main" in parts:
            figures |= measure_main(shared, plan, shards, recipe="recipe" in parts)
        if "ahead" in parts:
            figures |= measure_ahead(shared, plan)
        if "shards" in parts:
            figures |= measure_shards(shared, plan)
    return figures


def measure_main(shared: DriverBench, plan: Plan, shards: int, *, recipe: bool) -> Figures:
    """Wall times with and without failures, the bound, the driver's own CPU time; and the recipe's wall times."""
    load, stand_ins = plan.main, shared.stand_ins
    say(f"bare LiteLLM: {plan.bare_calls} calls")
    stand_ins.begin({})
    litellm_ms = shared.child("driver_litellm", "--calls", str(plan.bare_calls))["cpu_ms"]
    say(f"the driver: {load.conversations} futures")
    with shared.driver(load, "main", shards=shards) as driver:
        stand_ins.begin(load.settings())
        before_s = driver.cpu_s()
        _, wall_s = driver.next_batch(0, 0)
        cpu_s = driver.cpu_s() - before_s
        trace = stand_ins.trace()
    say(f"it took {wall_s:.1f} s; the same calls, some of them failing once")
    with shared.driver(
        load, "failing", shards=shards
    ) as driver:  # a new run, without a journal that could answer for the endpoint
        stand_ins.begin(load.settings(fail_share=plan.fail_share))
        _, failing_wall_s = driver.next_batch(0, 0)
        failing_trace = stand_ins.trace()
    bound = lower_bound(
        trace,
        turn_s=load.turn_s,
        capacity=load.capacity,
        concurrency={"user": load.concurrency, "judge": load.concurrency},
        litellm_ms=litellm_ms,
        processes=shards,
    )
    num_calls = len(trace["calls"])
    figures: Figures = {
        "futures": load.conversations,
        "wall_s": wall_s,
        "lower_bound_s": bound.seconds,
        "ratio": wall_s / bound.seconds,
        "failing_wall_s": failing_wall_s,
        "own_ms_per_turn": (cpu_s * 1000 - num_calls * litellm_ms) / load.turns,
        "litellm_ms_per_call": litellm_ms,
        "bounds": asdict(bound),
        "turns": load.turns,
        "calls": num_calls,
        "failures": failing_trace["failures"],
        "driver_cpu_s": cpu_s,
        "peak_calls_in_flight": trace["peak_in_flight"],
        "stand_ins_cpu_us_per_request": trace["cpu_s"] / trace["requests"] * 1e6,
    }
    if recipe:
        say("the recipe's control flow, the same calls without and with failures")
        plain, failing = run_recipe(shared, plan)
        figures |= compare_with_recipe("", wall_s, trace, plain)
        figures |= compare_with_recipe("failing_", failing_wall_s, failing_trace, failing)
    return figures


def run_recipe(shared: DriverBench, plan: Plan) -> list[Figures]:
    """The figures of driver_recipe.py for a step without failures and one with failures."""
    folder = shared.folder / "recipe"
    config = make_config(plan.main, folder, model=shared.model, url=shared.stand_ins.url)
    publish_text(folder / "resolved.yaml", dump_config(config))
    for name, fail_share in (("plain", 0.0), ("failing", plan.fail_share)):
        publish_json(folder / f"{name}.json", plan.main.settings(fail_share=fail_share))
    shared.stand_ins.begin({})  # a warm-up without latencies
    arguments = [str(folder / "resolved.yaml"), "--failure-wait-s", str(plan.failure_wait_s)]
    arguments += ["--settings", str(folder / "plain.json"), str(folder / "failing.json")]
    figures: list[Figures] = shared.child("driver_recipe", *arguments)
    return figures


def compare_with_recipe(prefix: str, wall_s: float, trace: Figures, recipe: Figures) -> Figures:
    """The recipe's figures, compared with the driver's wall time and trace."""
    return {
        f"{prefix}recipe_wall_s": recipe["wall_s"],
        f"{prefix}recipe_ratio": recipe["wall_s"] / wall_s,
        f"{prefix}recipe_futures": recipe["futures"],
        f"{prefix}recipe_cpu_s": recipe["cpu_s"],
        f"{prefix}same_calls": same_calls(trace, recipe["trace"]),
    }


def measure_ahead(shared: DriverBench, plan: Plan) -> Figures:
    """Steps with training between them, strictly on-policy and one batch ahead."""
    say(f"{plan.steps_ahead} steps, max_staleness 0")
    with shared.driver(plan.ahead, "staleness-0") as driver:
        sync_s, waits_s = run_steps(driver, plan.ahead, plan.steps_ahead, train_s=None)
    train_s = sum(waits_s) / len(waits_s)
    say(f"{plan.steps_ahead} steps, max_staleness 1, training steps of {train_s:.2f} s")
    with shared.driver(plan.ahead, "staleness-1", max_staleness=1) as driver:
        async_s, _ = run_steps(driver, plan.ahead, plan.steps_ahead, train_s=train_s)
    return {"async_speedup": sync_s / async_s, "sync_wall_s": sync_s, "async_wall_s": async_s, "train_s": train_s}


def run_steps(driver: Driver, load: Load, steps: int, *, train_s: float | None) -> tuple[float, list[float]]:
    """(seconds from the first delivery to the end of the last training step, seconds waited for each batch). With
    `train_s` None a step trains as long as its batch took."""
    driver.stand_ins.begin(load.settings())
    waits_s = []
    start = 0.0
    for step in range(steps):
        driver.stand_ins.set_version(step)
        _, wait_s = driver.next_batch(step, step)
        waits_s.append(wait_s)
        if step == 0:
            start = time.monotonic()
        time.sleep(wait_s if train_s is None else train_s)
    return time.monotonic() - start, waits_s


def measure_shards(shared: DriverBench, plan: Plan) -> Figures:
    """One driver process and two, with CPU time as the only limit."""
    walls_s = {}
    for shards in (1, 2):
        say(f"{plan.busy.conversations} futures without latencies, {shards} driver process{'es' * (shards > 1)}")
        with shared.driver(plan.busy, f"shards-{shards}", shards=shards) as driver:
            waits_s = []
            for step in range(BUSY_STEPS):
                driver.stand_ins.begin(plan.busy.settings(version=step))
                waits_s.append(driver.next_batch(step, step)[1])
            walls_s[shards] = min(waits_s)
    return {"two_shard_speedup": walls_s[1] / walls_s[2], "one_shard_s": walls_s[1], "two_shards_s": walls_s[2]}


def run_memory(conversations: int, repository: Path) -> Figures:
    """Resident memory of one driver process over many short conversations."""
    steps = max(3, -(-conversations // MEMORY.conversations))
    rss_mb = []
    with bench(repository) as shared, shared.driver(MEMORY, "memory") as driver:
        for step in range(steps):
            driver.stand_ins.begin(
                MEMORY.settings(version=step)
            )  # a new trace, so that the stand-ins' memory does not grow either
            driver.next_batch(step, step)
            rss_mb.append(driver.rss_mb())
            if step % max(1, steps // 20) == 0:
                say(f"{(step + 1) * MEMORY.conversations} conversations: {rss_mb[-1]:.0f} MB")
    first_third, end = rss_mb[steps // 3], rss_mb[-1]
    return {
        "conversations": steps * MEMORY.conversations,
        "rss_mb_first_third": first_third,
        "rss_mb_end": end,
        "growth_mb": end - first_third,
    }


def say(what: str) -> None:
    print(f"... {what}", flush=True)


def table(figures: Figures) -> str:
    """For people."""
    return "\n".join(f"{name:30s} {_cell(value):>12s}  {MEANING.get(name, '')}" for name, value in figures.items())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(item)}" for name, item in value.items())
    return "-" if value is None else str(value)
