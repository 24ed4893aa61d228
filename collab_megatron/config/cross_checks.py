"""Checks that compare two or more sections of a config. Each raises ValueError with a sentence that names both keys."""

from __future__ import annotations

from collections.abc import Mapping

from collab_megatron.config.roles import PAIR_JUDGE, compared_metrics, shipped_judges
from collab_megatron.config.sections import (
    AlgorithmSection,
    ComparedModelSection,
    ComparisonSection,
    DataSection,
    DriverSection,
    EngineSection,
    OptimizerSection,
    ParallelSection,
    PreferenceSection,
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
    if reward.second_judge is not None and not compared_metrics(reward, simulators):
        raise ValueError(
            "reward.second_judge has no scores to compare, because no judge scores a metric of reward.metric_weights: "
            "remove it"
        )
    if reward.second_judge is not None and reward.second_judge.prompt_file is not None:
        raise ValueError(
            "reward.second_judge.prompt_file is not used, because the second judge gets the prompts of the first: "
            "remove it"
        )
    accuracy = reward.judges.get("accuracy")
    if reward.accuracy_prompt_file is not None and accuracy is not None and accuracy.prompt_file is not None:
        raise ValueError(
            "reward.accuracy_prompt_file and reward.judges.accuracy.prompt_file name two prompts for one judge: remove "
            "one of them"
        )


def check_comparison(
    models: Mapping[str, ComparedModelSection],
    compare: ComparisonSection,
    simulators: SimulatorsSection,
    engine: EngineSection,
) -> None:
    """The baseline is one of the models, a judge is there for their pairs, and servers of the user's own have one
    model."""
    served = {row.path for row in models.values() if row.api is None}
    if engine.urls and len(served) > 1:
        raise ValueError(
            f"engine.urls serve one model, and `models` has {len(served)} different ones: leave engine.urls out, so "
            "that each is started in turn"
        )
    if compare.baseline is not None and compare.baseline not in models:
        names = ", ".join(models) or "none"
        raise ValueError(f"compare.baseline={compare.baseline} is not one of models ({names}): name one of them")
    if compare.judged_pairs and len(models) < 2:
        raise ValueError(
            f"compare.judged_pairs={compare.judged_pairs} compares two models, and `models` has {len(models)}: name "
            "more, or set compare.judged_pairs=0"
        )
    if compare.judged_pairs and simulators.judge is None and PAIR_JUDGE not in simulators.roles:
        raise ValueError(
            "compare.judged_pairs needs an LLM judge: set simulators.judge, or simulators.roles.pair_judge"
        )


def check_ranks(parallel: ParallelSection, samples: int, what: str) -> None:
    """Every data rank has samples, and one step holds them all. `what`: the keys that make `samples`."""
    if samples > MOST_SAMPLES:
        raise ValueError(f"{what} makes {samples:,} samples in a step, more than {MOST_SAMPLES:,}: lower it")
    if parallel.data > samples:
        raise ValueError(
            f"parallel.data={parallel.data} leaves data ranks without one of the {samples:,} samples of a step "
            f"({what}): lower it"
        )


def check_credit(algorithm: AlgorithmSection, rollout: RolloutSection, online: PreferenceSection | None) -> None:
    if algorithm.credit == "tree" and not (
        rollout.first_futures and rollout.max_user_turns and rollout.max_assistant_turns > 1
    ):
        raise ValueError(
            "algorithm.credit=tree trains the later policy turns of futures, and there are none: raise "
            "rollout.num_repeat_rollouts, max_user_turns and max_assistant_turns, or set algorithm.credit=reply"
        )
    if algorithm.credit == "tree" and online is not None:
        raise ValueError(
            "algorithm.credit=tree trains the later policy turns of futures, but online_dpo trains pairs of replies: "
            "set algorithm.credit=reply"
        )


def check_schedule(optimizer: OptimizerSection, steps: int) -> None:
    if optimizer.schedule != "constant" and optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves no optimizer step of {steps} for the decay: "
            "lower it, or set optimizer.schedule=constant"
        )


def check_packing(parallel: ParallelSection, train: TrainSection) -> None:
    if train.packing and parallel.context > 1:
        raise ValueError(
            "train.packing does not work with parallel.context > 1 yet: set train.packing=false or parallel.context=1"
        )


def check_pairs(parallel: ParallelSection) -> None:
    if parallel.context > 1:
        raise ValueError(
            f"DPO does not work with parallel.context={parallel.context} yet, because a rank sees parts of replies "
            "only: set parallel.context=1"
        )


def check_engine(engine: EngineSection) -> None:
    if engine.urls and engine.count > 1:
        raise ValueError("engine.urls names running servers and engine.count starts new ones: set only one of them")
    if engine.port and engine.port + engine.count - 1 > MAX_PORT:
        raise ValueError(
            f"engine.port={engine.port} leaves too few ports for engine.count={engine.count} servers: lower it"
        )
    for url in engine.urls:
        if not _host(url):
            raise ValueError(
                f"engine.urls: {shown_address(url)!r} is not of the form http://HOST:PORT: correct the address"
            )
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise ValueError("engine.urls names a server twice: name each once")


def check_validation(data: DataSection, train: TrainSection) -> None:
    if train.eval_interval and data.validation is None:
        raise ValueError("train.eval_interval is set but data.validation is not: name a parquet file of held-out rows")


def check_driver(driver: DriverSection, rollout: RolloutSection, engine: EngineSection, sync: SyncSection) -> None:
    prompts = rollout.prompts_per_step
    if driver.shards > prompts:
        raise ValueError(
            f"driver.shards={driver.shards} leaves shards without one of the {prompts} prompts of a step: lower it"
        )
    if driver.oversample_prompts and not driver.max_staleness:
        raise ValueError("driver.oversample_prompts keeps trees for the next step: set driver.max_staleness=1")
    if driver.oversample_prompts > prompts:
        raise ValueError(
            f"driver.oversample_prompts={driver.oversample_prompts} is more than the {prompts} prompts of a step: "
            "lower it; driver.max_staleness adds whole batches"
        )
    if driver.max_staleness and engine.placement == "colocated":
        raise ValueError(
            "driver.max_staleness > 0 needs engines that sample during training: set engine.placement=disaggregated"
        )
    if driver.max_staleness and sync.pause == "abort":
        raise ValueError(
            "sync.pause=abort would lose replies that are sampled across an update: set driver.max_staleness=0, or "
            "another sync.pause"
        )
    if driver.refill_groups > prompts:
        raise ValueError(
            f"driver.refill_groups={driver.refill_groups} is more than the {prompts} prompts of a step: lower it"
        )
    if driver.min_futures > max(rollout.first_futures, 1):
        raise ValueError(
            f"driver.min_futures={driver.min_futures} is larger than "
            f"rollout.num_repeat_rollouts={rollout.num_repeat_rollouts}, so no reply would have a reward: lower it"
        )
    if driver.order == "prompt" and driver.oversample_prompts:
        raise ValueError("driver.order=prompt waits for every prompt of a step: set driver.oversample_prompts=0")


def check_transport(engine: EngineSection, sync: SyncSection) -> None:
    """IPC handles work on one machine only."""
    far = [url for url in engine.urls if not _is_loopback(_host(url))]
    if far and sync.transport_for(engine.placement) == "ipc":
        raise ValueError(
            f"sync.transport=ipc reaches engines on this machine only, but {far[0]} is not a loopback address: set "
            "sync.transport=broadcast or disk, and engine.placement=disaggregated"
        )


def _host(url: str) -> str:
    """Empty for an address without a host."""
    found = host_and_port(url)
    return found[0] if found else ""


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
