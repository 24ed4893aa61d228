"""Checks that compare two or more sections of a config. Each raises ValueError with a sentence that names both keys."""

from __future__ import annotations

from collab_megatron.config.roles import shipped_judges
from collab_megatron.config.sections import (
    DataSection,
    DriverSection,
    EngineSection,
    OptimizerSection,
    ParallelSection,
    RewardSection,
    RolloutSection,
    SimulatorsSection,
    SyncSection,
    TrainSection,
)
from collab_megatron.config.sections.addresses import host_and_port
from collab_megatron.config.sections.extra import shown_address

MAX_PORT = 65535
MOST_SAMPLES = 2**20  # of a step: the plan and the trainer hold them all at once


def check_metrics(reward: RewardSection, simulators: SimulatorsSection) -> None:
    lacking = [name for name, judge in shipped_judges(reward, simulators).items() if judge is None]
    if lacking:
        raise ValueError(f"{lacking[0]} needs an LLM judge: set simulators.judge, or reward.judges.{lacking[0]}")
    accuracy = reward.judges.get("accuracy")
    if reward.accuracy_prompt_file is not None and accuracy is not None and accuracy.prompt_file is not None:
        raise ValueError(
            "reward.accuracy_prompt_file and reward.judges.accuracy.prompt_file name two prompts for one judge: remove "
            "one of them"
        )


def check_ranks(parallel: ParallelSection, samples: int, what: str) -> None:
    """Work for all, in numbers that one step can hold. `what`: where `samples` stand in the config."""
    if samples > MOST_SAMPLES:
        raise ValueError(f"{what} makes {samples:,} samples in a step, more than {MOST_SAMPLES:,}: lower it")
    if parallel.data > samples:
        raise ValueError(
            f"parallel.data={parallel.data} leaves data ranks without any of the {samples:,} samples of a step "
            f"({what}): lower it"
        )


def check_schedule(optimizer: OptimizerSection, steps: int) -> None:
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves nothing of {steps} optimizer steps to decay over: "
            "lower it, or set optimizer.schedule=constant"
        )


def check_packing(parallel: ParallelSection, train: TrainSection) -> None:
    if train.packing and parallel.context > 1:
        raise ValueError("train.packing and parallel.context > 1 do not go together yet: set one of them back")


def check_engine(engine: EngineSection) -> None:
    if engine.urls and engine.count > 1:
        raise ValueError("engine.urls names servers that run, engine.count starts some: set one of the two only")
    if engine.port and engine.port + engine.count - 1 > MAX_PORT:
        raise ValueError(f"engine.port={engine.port} leaves no ports for engine.count={engine.count} servers: lower it")
    for url in engine.urls:
        if not _host(url):
            raise ValueError(f"engine.urls: {shown_address(url)!r} is no address of the form http://HOST:PORT")
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise ValueError("engine.urls names a server twice: name each once")


def check_validation(data: DataSection, train: TrainSection) -> None:
    if train.eval_interval and data.validation is None:
        raise ValueError("train.eval_interval is set but data.validation is not: name a validation parquet")


def check_driver(driver: DriverSection, rollout: RolloutSection, engine: EngineSection, sync: SyncSection) -> None:
    prompts = rollout.prompts_per_step
    if driver.shards > prompts:
        raise ValueError(f"driver.shards={driver.shards} leaves shards without any of {prompts} prompts: lower it")
    if driver.oversample_prompts and not driver.max_staleness:
        raise ValueError("driver.oversample_prompts carries trees over to the next step: set driver.max_staleness to 1")
    if driver.oversample_prompts > prompts:
        raise ValueError("driver.oversample_prompts is more than a batch: raise driver.max_staleness instead")
    if driver.max_staleness and engine.placement == "colocated":
        raise ValueError(
            "driver.max_staleness needs engines that sample while the trainer trains: set "
            "engine.placement=disaggregated"
        )
    if driver.max_staleness and sync.pause == "abort":
        raise ValueError("sync.pause=abort would lose what is sampled across an update: set driver.max_staleness=0")
    if driver.refill_groups > prompts:
        raise ValueError("driver.refill_groups is more than a batch: lower it")
    if driver.min_futures > max(rollout.num_repeat_rollouts, 1):
        raise ValueError("driver.min_futures is larger than rollout.num_repeat_rollouts: no reply could have a reward")
    if driver.order == "prompt" and driver.oversample_prompts:
        raise ValueError("driver.order=prompt waits for every prompt of a step: set driver.oversample_prompts to 0")


def check_transport(engine: EngineSection, sync: SyncSection) -> None:
    """Memory of one machine cannot be handed to another."""
    far = [url for url in engine.urls if not _is_loopback(_host(url))]
    if far and sync.transport_for(engine.placement) == "ipc":
        raise ValueError(
            f"sync.transport=ipc reaches engines on this machine only, and {far[0]} is not a loopback address: set "
            "sync.transport=broadcast or disk, and engine.placement=disaggregated"
        )


def _host(url: str) -> str:
    """Empty where there is none."""
    found = host_and_port(url)
    return found[0] if found else ""


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
