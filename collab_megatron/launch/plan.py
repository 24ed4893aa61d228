"""The plan of a run, from config, data and node: ranks, memory per rank, work, LLM calls and dollars per step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from collab_megatron.config import BuildDatasetConfig, DPOConfig, EvaluateConfig, RLConfig, SupervisedConfig
from collab_megatron.config.roles import own_metrics
from collab_megatron.config.sections import ParallelSection, RewardSection
from collab_megatron.launch.algorithm_lines import algorithm_lines, online_dpo_lines
from collab_megatron.launch.cost import Calls, call_lines, dollar_lines
from collab_megatron.launch.node import Node
from collab_megatron.model.flops import train_flops
from collab_megatron.model.memory import RankMemory, Reference, engine_memory, size_of, trainer_memory
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import parameter_count
from collab_megatron.rollout.replay import RecordSize
from collab_megatron.types import Task

COLUMNS = ("weights", "gradients", "optimizer", "activations", "working", "reference", "device", "host")


def rl_plan(config: RLConfig, spec: ModelSpec, *, node: Node, calls: Mapping[str, tuple[int, Sequence[Calls]]]) -> str:
    """The plan as text. calls: for `steps` and `evaluations`, their number and the calls of one (cost.py)."""
    rollout = config.rollout
    replies = rollout.prompts_per_step * rollout.num_replies
    simulated = rollout.prompts_per_step * rollout.tree_futures if rollout.first_futures else 0
    turns = replies + simulated * min(rollout.max_user_turns, rollout.max_assistant_turns - 1)
    sequences = replies
    if config.algorithm.credit == "tree":
        sequences = max(replies, simulated) if config.algorithm.merges_turns else turns
    steps, evaluations = calls["steps"], calls["evaluations"]
    lines = [
        *_training_lines(spec, config, node, samples=sequences, longest=longest_sequence(config)),
        *_engine_lines(spec, config, node.device(config.parallel)),
        f"per step    {rollout.prompts_per_step} prompts x {rollout.num_replies} replies = {replies} replies, "
        f"{simulated} futures, at most {turns} policy turns of {rollout.max_new_tokens} tokens",
        *call_lines("", steps[1]),
        *(call_lines("evaluation", evaluations[1]) if evaluations[0] else []),
        *dollar_lines(calls),
        *_own_metric_lines(config.reward),
        *_algorithm_lines(config),
        *_driver_lines(config),
        f"training    {_count(config.train.steps, 'step')}",
        *_not_here(node, "the disk, ports, engine.python, addresses of the LLM services"),
    ]
    return "\n".join(lines)


def replay_plan(config: RLConfig, spec: ModelSpec, *, node: Node, size: RecordSize) -> str:
    """The plan of RL on a record, as text."""
    steps, importance = config.train.steps, config.algorithm.importance
    corrected = f"importance {importance}, {config.algorithm.importance_beyond} at {config.algorithm.importance_cap:g}"
    if config.online_dpo is not None:
        corrected = "online_dpo compares pairs of any policy"
    elif importance == "none":
        corrected = "nothing corrects for that (algorithm.importance=none)"
    lines = [
        *_training_lines(spec, config, node, samples=math.ceil(size.samples / size.steps), longest=size.longest),
        f"replays     {size.path}: {_count(size.steps, 'step')}, {size.trees:,} trees, {size.samples:,} policy turns; "
        "no engines, no driver, no LLM calls, no held-out conversations",
        f"off-policy  other weights may have sampled them: {corrected}",
        *_algorithm_lines(config),
        f"training    {_count(steps, 'step')}, {steps / size.steps:.3g} times the record",
        *_not_here(node, "the disk"),
    ]
    return "\n".join(lines)


def collect_plan(config: RLConfig, spec: ModelSpec, *, node: Node, prompts: int, calls: Sequence[Calls]) -> str:
    """The plan of conversation trees without training, as text. prompts: usable ones; calls: of a step."""
    rollout, steps = config.rollout, config.train.steps
    lines = [
        _model_line(spec, config.model.dtype),
        *_engine_memory_lines(spec, config),
        f"grows       {_count(steps, 'step')} of {rollout.prompts_per_step} trees from {prompts:,} prompts; per tree "
        f"{rollout.num_replies} replies with up to {rollout.most_futures if rollout.first_futures else 0} futures each "
        f"on {node.chosen(config.parallel)}",
        *call_lines("per step", calls),
        *dollar_lines({"step" if steps == 1 else "steps": (steps, calls)}),
        *_own_metric_lines(config.reward),
        _budget_line(config),
        f"writes      {config.run.conversations_dir}",
        *_not_here(node, "ports, engine.python, addresses of the LLM services"),
    ]
    return "\n".join(lines)


def evaluate_plan(
    config: EvaluateConfig, specs: Mapping[str, ModelSpec], *, node: Node, tasks: int, calls: Sequence[Calls]
) -> str:
    """The plan as text. specs: path -> model that SGLang serves; tasks: number of held-out tasks; calls: of the
    evaluation."""
    chosen = min(tasks, config.evaluation.num_tasks)
    served = [[_model_line(spec, config.model.dtype), *_engine_memory_lines(spec, config)] for spec in specs.values()]
    users = [f"users       simulators.user, {', '.join(config.evaluation.users)}"] if config.evaluation.users else []
    lines = [
        *([f"models      {', '.join(config.models)}"] if config.models else []),
        *(line for lines in served for line in lines),
        f"plays       {chosen:,} of {tasks:,} held-out tasks, at most {config.evaluation.max_assistant_turns} policy "
        f"turns of {config.rollout.max_new_tokens} tokens each, on {node.chosen(config.parallel)}",
        *users,
        *call_lines("calls", calls),
        *dollar_lines({"evaluation": (1, calls)}),
        *_own_metric_lines(config.reward),
        *_not_here(node, "ports, engine.python, addresses of the LLM services"),
    ]
    return "\n".join(lines)


def build_plan(config: BuildDatasetConfig, tasks: Sequence[Task], calls: Sequence[Calls]) -> str:
    """The plan as text. tasks: the problems to grow conversations from."""
    served = [] if config.model is None else [f"assistant   SGLang serves {config.model.path} during the build"]
    proactive = f" ({config.num_proactive_candidates} proactive)" if config.num_proactive_candidates else ""
    lines = [
        f"grows       {len(tasks):,} conversations of at most {config.max_total_turns} assistant turns: "
        f"{config.num_candidate_responses} candidates{proactive} x {config.num_repeat_rollouts} futures at each turn",
        *served,
        *call_lines("calls", calls),
        *dollar_lines({"build": (1, calls)}),
        *_own_metric_lines(config.reward),
    ]
    return "\n".join(lines)


def longest_sequence(config: RLConfig) -> int:
    """The most tokens of a trained sequence: a prompt with a reply, or with algorithm.credit: tree a conversation."""
    rollout = config.rollout
    if config.algorithm.credit == "reply":
        return rollout.max_prompt_tokens + rollout.max_new_tokens
    turns = min(rollout.max_user_turns, rollout.max_assistant_turns - 1)
    each = rollout.max_new_tokens + config.simulators.user.max_tokens
    return rollout.max_prompt_tokens + rollout.max_new_tokens + turns * each


def reference_of(config: RLConfig | SupervisedConfig) -> Reference:
    """Where the reference model lives."""
    if isinstance(config, DPOConfig):
        return config.dpo.reference
    return config.algorithm.reference if isinstance(config, RLConfig) and config.needs_reference else "none"


def _own_metric_lines(reward: RewardSection) -> list[str]:
    own = own_metrics(reward)
    return [f"            calls of your own metrics ({', '.join(own)}) are not counted"] if own else []


def _not_here(node: Node, what: str) -> list[str]:
    return [] if node.here else [f"not checked {what}: this is not that node"]


def _algorithm_lines(config: RLConfig) -> list[str]:
    if config.online_dpo is not None:
        return online_dpo_lines(config.online_dpo, config.algorithm)
    return algorithm_lines(config.algorithm, config.rollout, config.driver)


def _driver_lines(config: RLConfig) -> list[str]:
    """Driver processes, trees in flight, staleness, and the budget."""
    driver, prompts = config.driver, config.rollout.prompts_per_step
    beyond = driver.oversample_prompts or prompts
    trees = prompts * driver.max_staleness + beyond
    updates = _count(driver.max_staleness, "update")
    policy = f"tokens at most {updates} old" if driver.max_staleness else "strictly on-policy"
    lines = [f"driver      {_count(driver.shards, 'process', 'es')}, at most {trees} trees in flight: {policy}"]
    return [*lines, _budget_line(config)]


def _budget_line(config: RLConfig) -> str:
    budget = config.budget
    caps = [
        f"{kind} at {said}"
        for kind, said in (
            ("warns", _cap(budget.soft_usd, budget.soft_calls)),
            ("stops", _cap(budget.hard_usd, budget.hard_calls)),
        )
        if said
    ]
    return f"budget      {', '.join(caps) if caps else 'none (budget.hard_usd)'}"


def _cap(usd: float | None, calls: int | None) -> str:
    said = [f"${usd:,.2f}" if usd is not None else "", f"{calls:,} calls" if calls is not None else ""]
    return " or ".join(filter(None, said))


def supervised_plan(config: SupervisedConfig, spec: ModelSpec, *, node: Node) -> str:
    """The plan as text."""
    replies, row = (2, "pair") if isinstance(config, DPOConfig) else (1, "conversation")
    lines = _training_lines(spec, config, node, samples=config.batch_size * replies, longest=config.max_tokens)
    lines.append(f"training    {_count(config.train.steps, 'step')} of {_count(config.batch_size, row)}")
    return "\n".join([*lines, *_not_here(node, "the disk")])


def stages_of(config: RLConfig | SupervisedConfig, spec: ModelSpec, device: str) -> list[RankMemory]:
    """Bytes of a rank of each pipeline stage."""
    longest = longest_sequence(config) if isinstance(config, RLConfig) else config.max_tokens
    return trainer_memory(
        spec,
        dtype=config.model.dtype,
        parallel=config.parallel,
        optimizer=config.optimizer,
        train=config.train,
        reference=reference_of(config),
        device=device,
        tokens=max(config.train.micro_batch_tokens, longest),  # a longer sample is a micro-batch of its own
    )


def _model_line(spec: ModelSpec, dtype: str) -> str:
    return f"model       {spec.architecture}, {parameter_count(spec):,} parameters, {dtype}"


def _training_lines(
    spec: ModelSpec, config: RLConfig | SupervisedConfig, node: Node, *, samples: int, longest: int
) -> list[str]:
    """samples: trained per step, over all data ranks; longest: tokens of the longest sample."""
    parallel, train = config.parallel, config.train
    tokens = max(train.micro_batch_tokens, longest)
    stages = stages_of(config, spec, node.device(parallel))
    rows = max(1, train.micro_batch_tokens // longest)
    micro_batches = math.ceil(math.ceil(samples / parallel.data) / rows)
    petaflop = train_flops(spec, [longest] * samples) / 1e15
    return [
        _model_line(spec, config.model.dtype),
        f"trainer     {_count(parallel.world_size, 'rank')} on {node.chosen(parallel)}: {_layout(parallel)}",
        f"memory      per rank, a micro-batch of {tokens:,} tokens, recompute {train.recompute}",
        *_table(stages),
        *_room(stages, node.gpu_bytes if node.device(parallel) == "cuda" else None),
        f"work        at most {_count(micro_batches, 'micro-batch', 'es')} a data rank and {petaflop:,.2g} PFLOP of "
        "training per step",
    ]


def _layout(parallel: ParallelSection) -> str:
    """`tensor 2 x pipeline 4 x data 2`, and other settings that change memory; axes of one rank are left out."""
    axes = [(axis, getattr(parallel, axis)) for axis in ("tensor", "pipeline", "context", "data")]
    said = " x ".join(f"{axis} {size}" for axis, size in axes if size > 1) or "no parallelism"
    more = [
        f"{parallel.interleave} chunks a stage" if parallel.interleave > 1 else "",
        f"experts over {parallel.expert}" if parallel.expert > 1 else "",
        "sequence parallel" if parallel.sequence_parallel and parallel.tensor > 1 else "",
    ]
    return ", ".join([said, *filter(None, more)])


def _table(stages: Sequence[RankMemory]) -> list[str]:
    """A heading and one line for every run of equal pipeline stages; empty columns are left out."""
    columns = [name for name in COLUMNS if any(getattr(stage, name) for stage in stages)]
    lines = ["".join([" " * 12, f"{'stage':<10}", *(f"{name:>13}" for name in columns)])]
    for _, run in groupby(stages, key=lambda stage: [getattr(stage, name) for name in columns]):
        alike = list(run)
        first, last = alike[0].stage, alike[-1].stage
        label = f"{first}" if first == last else f"{first}-{last}"
        amounts = (f"{_amount(getattr(alike[0], name)):>13}" for name in columns)
        lines.append("".join([" " * 12, f"{label:<10}", *amounts]))
    return lines


def _room(stages: Sequence[RankMemory], there: int | None) -> list[str]:
    """Compare the need with a GPU of `there` bytes; None: no GPU."""
    if there is None:
        return []
    needed = max(stage.device for stage in stages)
    said = f"{_amount(there - needed)} free" if needed <= there else f"{_amount(needed - there)} too little"
    return [f"room        the GPU has {_amount(there)}: {said}"]


def _engine_lines(spec: ModelSpec, config: RLConfig, device: str) -> list[str]:
    """Servers, memory of one of their ranks, and bytes of one weight sync."""
    engine, sync, size = config.engine, config.sync, size_of(config.model.dtype)
    sent = parameter_count(spec) * size
    transport = sync.transport_for(engine.placement)
    update = f"sync        {transport}, {_amount(sent)} per sync to {_count(engine.servers, 'server')}"
    if transport != "disk":
        update += f", in buckets of at most {sync.bucket_mb_on(device):,} MB"
    return [*_engine_memory_lines(spec, config), update]


def _engine_memory_lines(spec: ModelSpec, config: RLConfig | EvaluateConfig) -> list[str]:
    engine = config.engine
    if engine.urls:
        return [f"engine      the SGLang servers at {', '.join(engine.urls)}, {engine.placement}"]
    memory = engine_memory(spec, dtype=config.model.dtype, engine=engine)
    per_token = f"{_amount(memory.kv_per_token)} a token"
    if memory.kv_cache is not None:
        cache = f"KV cache {_amount(memory.kv_cache)} ({engine.max_total_tokens:,} tokens, {per_token})"
    else:
        share = f"{engine.mem_fraction:.0%}" if engine.mem_fraction else "SGLang's choice"
        cache = f"KV cache {per_token}, up to {share} of the memory with the weights"
    return [
        f"engine      {_count(engine.count, 'SGLang server')} at tensor parallel {engine.tensor}, {engine.placement}; "
        f"per rank weights {_amount(memory.weights)}, {cache}"
    ]


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _amount(size: int) -> str:
    """Bytes with a unit, in three or four digits."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20)):
        if abs(size) >= 10 * scale:
            return f"{size / scale:,.0f} {unit}"
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:,.0f} kB"
