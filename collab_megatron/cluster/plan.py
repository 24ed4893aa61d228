"""What a run will take, from the config alone: processes, memory per rank, calls and dollars per step."""

from __future__ import annotations

import math

from collab_megatron.cluster.preflight import device_of
from collab_megatron.config import RLConfig, SFTConfig
from collab_megatron.config.sections import LLMSection, OptimizerSection, ParallelSection
from collab_megatron.convert.layout import check_layout, read_hf_config
from collab_megatron.convert.source import resolve_model_folder
from collab_megatron.convert.spec import ModelSpec, model_spec
from collab_megatron.convert.tables import parameter_count

ADAM_BYTES = 8  # two fp32 moments


def rl_plan(config: RLConfig) -> str:
    """A few lines of text. Raises UserError for a model or layout that cannot be trained."""
    spec = _spec(config.model.path, config.parallel)
    rollout = config.rollout
    replies = rollout.prompts_per_step * rollout.num_replies
    futures = replies * max(rollout.num_repeat_rollouts, 1)
    simulated = futures if rollout.num_repeat_rollouts else 0
    user_calls = simulated * min(rollout.max_user_turns, rollout.max_assistant_turns - 1)
    judged = [
        name
        for name in config.reward.metric_weights
        if name == "interactivity" or (name == "accuracy" and config.reward.accuracy_verifier == "judge")
    ]
    judge_calls = futures * len(judged)
    copies = 1 + (config.algorithm.kl_coef > 0)
    lines = [
        *_training_lines(spec, config.parallel, config.model.dtype, config.optimizer, copies),
        f"engine      one SGLang server at tensor parallel {config.engine.tensor}",
        f"per step    {rollout.prompts_per_step} prompts x {rollout.num_replies} replies = {replies} replies, "
        f"{simulated} futures, at most {replies + user_calls} policy turns of {rollout.max_new_tokens} tokens",
        f"user calls  at most {user_calls} per step{_cost(config.simulators.user, user_calls)}",
    ]
    if judge_calls and config.simulators.judge is not None:
        lines.append(f"judge calls {judge_calls} per step{_cost(config.simulators.judge, judge_calls)}")
    lines.append(f"training    {config.train.steps} steps")
    return "\n".join(lines)


def sft_plan(config: SFTConfig) -> str:
    """A few lines of text. Raises UserError for a model or layout that cannot be trained."""
    spec = _spec(config.model.path, config.parallel)
    lines = _training_lines(spec, config.parallel, config.model.dtype, config.optimizer, copies=1)
    lines.append(f"training    {config.train.steps} steps of {config.batch_size} conversations")
    return "\n".join(lines)


def _spec(path: str, parallel: ParallelSection) -> ModelSpec:
    hf_config = read_hf_config(resolve_model_folder(path))
    check_layout(hf_config, parallel)
    return model_spec(hf_config)


def _training_lines(
    spec: ModelSpec, parallel: ParallelSection, dtype: str, optimizer: OptimizerSection, copies: int
) -> list[str]:
    params = parameter_count(spec)
    share = math.ceil(params / parallel.tensor)  # norms are not split; negligible
    width = 2 if dtype == "bfloat16" else 4
    master = 4 if dtype == "bfloat16" else 0
    state = (ADAM_BYTES + master) / (parallel.data if optimizer.distributed else 1)
    per_rank = {
        "weights": share * width * copies,
        "gradients": share * 4,
        "optimizer": round(share * state),
    }
    shown = ", ".join(f"{name} {size / 2**20:,.0f} MB" for name, size in per_rank.items())
    return [
        f"model       {spec.architecture}, {params:,} parameters, {dtype}",
        f"trainer     {parallel.world_size} ranks on {device_of(parallel)}: tensor {parallel.tensor} "
        f"x data {parallel.data}",
        f"per rank    {shown} ({sum(per_rank.values()) / 2**20:,.0f} MB without activations)",
    ]


def _cost(section: LLMSection, calls: int) -> str:
    """What one call may cost at most is its output limit; the input is not known before the chat is."""
    if section.output_usd_per_mtoken is None:
        return f" to {section.model}"
    dollars = calls * section.max_tokens * section.output_usd_per_mtoken / 1e6
    return f" to {section.model}, at most ${dollars:.2f} of output"
