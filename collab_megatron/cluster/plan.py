"""What a run will take, from the config alone: ranks, bytes of each, work, calls and dollars per step."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from itertools import groupby

from collab_megatron.cluster.memory import RankMemory, Reference, engine_memory, size_of, trainer_memory
from collab_megatron.cluster.preflight import check_placement, device_of
from collab_megatron.config import RLConfig, SFTConfig
from collab_megatron.config.entry import shipped_judges
from collab_megatron.config.sections import LLMSection, ParallelSection
from collab_megatron.convert.layout import check_layout, read_hf_config
from collab_megatron.convert.source import resolve_model_folder
from collab_megatron.convert.spec import ModelSpec, model_spec
from collab_megatron.convert.tables import parameter_count
from collab_megatron.monitor.flops import train_flops

COLUMNS = ("weights", "gradients", "optimizer", "activations", "working", "reference", "device", "host")


def rl_plan(config: RLConfig) -> str:
    """Some lines of text. Raises UserError for a model, layout or placement of engines that cannot be."""
    spec = _spec(config.model.path, config.parallel)
    check_placement(config)
    rollout = config.rollout
    replies = rollout.prompts_per_step * rollout.num_replies
    futures = replies * max(rollout.num_repeat_rollouts, 1)
    simulated = futures if rollout.num_repeat_rollouts else 0
    user_calls = simulated * min(rollout.max_user_turns, rollout.max_assistant_turns - 1)
    reference: Reference = config.algorithm.reference if config.algorithm.kl_coef else "none"
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    lines = [
        *_training_lines(spec, config, reference, samples=replies, longest=longest),
        *_engine_lines(spec, config),
        f"per step    {rollout.prompts_per_step} prompts x {rollout.num_replies} replies = {replies} replies, "
        f"{simulated} futures, at most {replies + user_calls} policy turns of {rollout.max_new_tokens} tokens",
        f"user calls  at most {user_calls} per step{_cost(config.simulators.user, user_calls)}",
    ]
    judges = [judge for judge in shipped_judges(config.reward, config.simulators).values() if judge is not None]
    for judge in (judge for place, judge in enumerate(judges) if judge not in judges[:place]):
        judge_calls = futures * judges.count(judge)
        lines.append(f"judge calls {judge_calls} per step{_cost(judge, judge_calls)}")
    lines += [*_driver_lines(config), f"training    {config.train.steps} steps"]
    return "\n".join(lines)


def _driver_lines(config: RLConfig) -> list[str]:
    """How far sampling runs ahead, on how many processes, and where the money ends."""
    driver, prompts = config.driver, config.rollout.prompts_per_step
    beyond = driver.oversample_prompts or prompts
    trees = prompts * driver.max_staleness + beyond
    updates = _count(driver.max_staleness, "update")
    policy = f"tokens at most {updates} old" if driver.max_staleness else "strictly on-policy"
    lines = [f"driver      {_count(driver.shards, 'process', 'es')}, at most {trees} trees under way: {policy}"]
    budget = config.budget
    caps = [
        f"{kind} at {said}"
        for kind, said in (
            ("warns", _cap(budget.soft_usd, budget.soft_calls)),
            ("stops", _cap(budget.hard_usd, budget.hard_calls)),
        )
        if said
    ]
    return [*lines, f"budget      {', '.join(caps) if caps else 'none (budget.hard_usd)'}"]


def _cap(usd: float | None, calls: int | None) -> str:
    said = [f"${usd:,.2f}" if usd is not None else "", f"{calls:,} calls" if calls is not None else ""]
    return " or ".join(filter(None, said))


def sft_plan(config: SFTConfig) -> str:
    """Some lines of text. Raises UserError for a model or layout that cannot be trained."""
    spec = _spec(config.model.path, config.parallel)
    lines = _training_lines(spec, config, "none", samples=config.batch_size, longest=config.max_tokens)
    lines.append(f"training    {config.train.steps} steps of {config.batch_size} conversations")
    return "\n".join(lines)


def _spec(path: str, parallel: ParallelSection) -> ModelSpec:
    hf_config = read_hf_config(resolve_model_folder(path))
    check_layout(hf_config, parallel)
    return model_spec(hf_config)


def _training_lines(
    spec: ModelSpec, config: RLConfig | SFTConfig, reference: Reference, *, samples: int, longest: int
) -> list[str]:
    """`samples` of at most `longest` tokens are trained per step, over all data ranks."""
    parallel, train, dtype = config.parallel, config.train, config.model.dtype
    device = device_of(parallel)
    tokens = max(train.micro_batch_tokens, longest)  # a sample longer than a micro-batch is one of its own
    stages = trainer_memory(
        spec,
        dtype=dtype,
        parallel=parallel,
        optimizer=config.optimizer,
        train=train,
        reference=reference,
        device=device,
        tokens=tokens,
    )
    rows = max(1, train.micro_batch_tokens // longest)
    micro_batches = math.ceil(math.ceil(samples / parallel.data) / rows)
    petaflop = train_flops(spec, [longest] * samples) / 1e15
    return [
        f"model       {spec.architecture}, {parameter_count(spec):,} parameters, {dtype}",
        f"trainer     {parallel.world_size} ranks on {device}: {_layout(parallel)}",
        f"memory      per rank, a micro-batch of {tokens:,} tokens, recompute {train.recompute}",
        *_table(stages),
        *_room(stages, device),
        f"work        at most {micro_batches} micro-batches a data rank and {petaflop:,.2g} PFLOP of training per step",
    ]


def _layout(parallel: ParallelSection) -> str:
    """`tensor 2 x pipeline 4 x data 2`, and what else bears on memory; an axis of one rank goes unsaid."""
    axes = [(axis, getattr(parallel, axis)) for axis in ("tensor", "pipeline", "context", "data")]
    said = " x ".join(f"{axis} {size}" for axis, size in axes if size > 1) or "no axis divided"
    more = [
        f"{parallel.interleave} chunks a stage" if parallel.interleave > 1 else "",
        f"experts over {parallel.expert}" if parallel.expert > 1 else "",
        "sequence parallel" if parallel.sequence_parallel and parallel.tensor > 1 else "",
    ]
    return ", ".join([said, *filter(None, more)])


def _table(stages: Sequence[RankMemory]) -> list[str]:
    """A heading and one line for every run of pipeline stages that hold the same; columns of nothing are left out."""
    columns = [name for name in COLUMNS if any(getattr(stage, name) for stage in stages)]
    lines = ["".join([" " * 12, f"{'stage':<10}", *(f"{name:>13}" for name in columns)])]
    for _, run in groupby(stages, key=lambda stage: [getattr(stage, name) for name in columns]):
        alike = list(run)
        first, last = alike[0].stage, alike[-1].stage
        label = f"{first}" if first == last else f"{first}-{last}"
        amounts = (f"{_amount(getattr(alike[0], name)):>13}" for name in columns)
        lines.append("".join([" " * 12, f"{label:<10}", *amounts]))
    return lines


def _room(stages: Sequence[RankMemory], device: str) -> list[str]:
    """What a GPU has beyond that, where there is one to ask."""
    there = gpu_bytes() if device == "cuda" else None
    if there is None:
        return []
    needed = max(stage.device for stage in stages)
    said = f"{_amount(there - needed)} to spare" if needed <= there else f"{_amount(needed - there)} too few"
    return [f"room        the GPU has {_amount(there)}: {said}"]


def gpu_bytes() -> int | None:
    """Memory of this machine's first GPU, by nvidia-smi; None where there is none. torch stays out of the launcher."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(said.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _engine_lines(spec: ModelSpec, config: RLConfig) -> list[str]:
    """Which servers there are, what a rank of them holds, and what every sync sends them."""
    engine, sync, size = config.engine, config.sync, size_of(config.model.dtype)
    sent = parameter_count(spec) * size
    transport = sync.transport_for(engine.placement)
    update = f"sync        {transport}, {_amount(sent)} per update to {_count(engine.servers, 'server')}"
    if transport != "disk":
        update += f", in buckets of at most {sync.bucket_mb_on(device_of(config.parallel)):,} MB"
    if engine.urls:
        return [f"engine      the SGLang servers at {', '.join(engine.urls)}, {engine.placement}", update]
    memory = engine_memory(spec, dtype=config.model.dtype, engine=engine)
    per_token = f"{_amount(memory.kv_per_token)} a token"
    if memory.kv_cache is not None:
        cache = f"KV cache {_amount(memory.kv_cache)} ({engine.max_total_tokens:,} tokens, {per_token})"
    else:
        share = f"{engine.mem_fraction:.0%}" if engine.mem_fraction else "SGLang's own choice"
        cache = f"KV cache {per_token}, up to {share} of the memory with the weights"
    return [
        f"engine      {_count(engine.count, 'SGLang server')} at tensor parallel {engine.tensor}, {engine.placement}; "
        f"per rank weights {_amount(memory.weights)}, {cache}",
        update,
    ]


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def _amount(size: int) -> str:
    """Bytes in the unit that leaves three or four digits."""
    for unit, scale in (("GB", 2**30), ("MB", 2**20)):
        if abs(size) >= 10 * scale:
            return f"{size / scale:,.0f} {unit}"
        if abs(size) >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:,.0f} kB"


def _cost(section: LLMSection, calls: int) -> str:
    """What one call may cost at most is its output limit; the input is not known before the chat is."""
    if section.output_usd_per_mtoken is None:
        return f" to {section.model}"
    dollars = calls * section.max_tokens * section.output_usd_per_mtoken / 1e6
    return f" to {section.model}, at most ${dollars:.2f} of output"
