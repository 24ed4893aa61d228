"""Seconds of an RL step by phase, before a run, from FLOPs, bytes, bandwidths and latencies. Pure.

    sampling       engines: prefill of new tokens, then rounds of one token for each running request
    users, judges  what the LLM APIs take: waves of calls, as many at a time as max_concurrency allows
    logprobs       forward passes of reference and old policy
    update         forward, backward, recomputation, pipeline bubble, collectives, optimizer
    weight_sync    the weights' bytes to the engines, a share of them read again for the checksums

Every phase is a sum of terms; nothing overlaps inside a phase, and a synchronous step is the sum of its phases. With
driver.max_staleness the engines sample while the trainer works: the longer of the two sides counts. The whole batch
goes through the turns of a future together, so the wait for the slowest reply is in every turn. A term is

    work / (devices x rate x share)

with rates and shares of model/hardware.py. Not counted: evaluations, checkpoints, failures, unequal data ranks, equal
replies that share their futures. `num_repeat_rollouts: auto` counts as auto_futures of every reply.

Legend: S sequences, b running requests of a server, c their limit, size bytes of an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from urllib.parse import urlsplit

from collab_megatron.config import RLConfig
from collab_megatron.config.roles import user_places
from collab_megatron.config.sections import LLMSection
from collab_megatron.launch.cost import judges
from collab_megatron.launch.placement import Placement
from collab_megatron.model.flops import forward_flops, matmul_parameters
from collab_megatron.model.hardware import Hardware
from collab_megatron.model.memory import engine_memory, size_of, stage_parameters
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import parameter_count

FP32 = 4
ELEMENTWISE = (12, 6)
"""Times that a layer's forward pass moves its hidden states and its MLP columns through memory: norms, residuals,
rotation, activation. An estimate."""
DEFAULT_CACHE = 0.85  # of a GPU, for weights and KV cache of a server, where the config leaves it to SGLang
CALL_CPU_S = 0.004  # LiteLLM's processor time of a call (docs/benchmarks.md)
OPTIMIZER_BYTES = 34  # per parameter: gradient, master weight and two moments read; these three and the weight written


@dataclass(frozen=True)
class Assumed:
    """What a config cannot tell. Tokens are means."""

    prompt_tokens: float  # of the chat before the trained reply
    reply_share: float = 0.5  # of rollout.max_new_tokens, that a policy turn has on average
    user_tokens: float = 100.0  # of a user turn
    judge_tokens: float = 300.0  # that a judge writes
    api_wait_s: float = 1.0  # until an API's first token
    api_tokens_per_s: float = 80.0  # of one answer
    gpu_usd_per_hour: float = 2.5
    gpu_bytes: int | None = None  # of a GPU, for the size of the KV cache; None: no GPU


@dataclass(frozen=True)
class StepTime:
    """Seconds by phase, and what the sum makes of them."""

    phases: dict[str, float]
    overlaps: bool  # whether sampling and training run at the same time (driver.max_staleness)

    @property
    def rollout_s(self) -> float:
        """What the dashboard shows as time_s/wait_for_rollout in a synchronous run."""
        return sum(self.phases[name] for name in ("sampling", "users", "judges"))

    @property
    def trainer_s(self) -> float:
        return sum(self.phases[name] for name in ("logprobs", "update", "weight_sync"))

    @property
    def step_s(self) -> float:
        return max(self.rollout_s, self.trainer_s) if self.overlaps else self.rollout_s + self.trainer_s

    @property
    def bottleneck(self) -> str:
        """The longest phase; of an asynchronous step, of the longer side."""
        names = list(self.phases)
        if self.overlaps:
            names = ["sampling", "users", "judges"] if self.rollout_s > self.trainer_s else names[3:]
        return max(names, key=lambda name: self.phases[name])


def step_time(
    config: RLConfig, spec: ModelSpec, hardware: Hardware, placement: Placement, assumed: Assumed
) -> StepTime:
    """The time of one step."""
    rollout = config.rollout
    replies = rollout.prompts_per_step * rollout.num_replies
    judged = rollout.prompts_per_step * rollout.tree_futures  # a reply without a future is judged itself
    futures = judged if rollout.first_futures else 0
    turns = min(rollout.max_user_turns, rollout.max_assistant_turns - 1) if futures else 0
    reply = rollout.max_new_tokens * assumed.reply_share
    engines = _Engines(config, spec, hardware, assumed)
    sampling = engines.turn(replies, rollout.prompts_per_step * assumed.prompt_tokens, assumed.prompt_tokens, reply)
    context = assumed.prompt_tokens + reply
    for _ in range(turns):
        context += assumed.user_tokens
        sampling += engines.turn(futures, futures * assumed.user_tokens, context, reply)
        context += reply
    trainer = _Trainer(config, spec, hardware, placement, assumed)
    return StepTime(
        {
            "sampling": sampling,
            "users": turns * _users_s(config, futures, assumed),
            "judges": _judges_s(config, judged, assumed),
            "logprobs": trainer.logprobs_s(),
            "update": trainer.update_s(),
            "weight_sync": _sync_s(config, spec, hardware, placement),
        },
        overlaps=config.driver.max_staleness > 0,
    )


class _Engines:
    """Time in the SGLang servers."""

    def __init__(self, config: RLConfig, spec: ModelSpec, hardware: Hardware, assumed: Assumed) -> None:
        self.engine, self.spec, self.hardware = config.engine, spec, hardware
        self.longest = config.rollout.max_new_tokens
        self.memory = engine_memory(spec, dtype=config.model.dtype, engine=config.engine)
        self.size = size_of(config.model.dtype)
        self.gpu_bytes = assumed.gpu_bytes

    def turn(self, sequences: float, new_tokens: float, context: float, reply: float) -> float:
        """One policy turn of S sequences: prefill of `new_tokens` (the rest is cached), then `reply` tokens each after
        `context` tokens."""
        engine, hardware = self.engine, self.hardware
        mine = math.ceil(sequences / engine.servers)  # of a server
        limit = self._limit(context + reply)
        rounds = max(self.longest, mine * reply / min(mine, limit))  # the slowest reply, or the queue
        running = mine * reply / rounds
        ranks = hardware.scaled(engine.tensor)
        prefill = forward_flops(self.spec, [round(context)]) / max(1.0, context) * new_tokens / engine.servers
        prefill /= ranks * hardware.flops * hardware.gemm_share
        return self._serial(prefill) + self._serial(rounds * self._round_s(running, context + reply / 2))

    def _serial(self, seconds: float) -> float:
        """Servers that share a device take turns on it."""
        return seconds * self.engine.servers if self.hardware.shares_device else seconds

    def _limit(self, length: float) -> float:
        """Requests that run at a time: by the config, and by the KV cache."""
        engine, per_token = self.engine, max(1, self.memory.kv_per_token)
        limits = [float(engine.max_concurrency)]
        if engine.max_running_requests is not None:
            limits.append(engine.max_running_requests)
        tokens: float | None = engine.max_total_tokens
        if tokens is None and self.gpu_bytes is not None:
            share = engine.mem_fraction or DEFAULT_CACHE
            tokens = max(0.0, share * self.gpu_bytes - self.memory.weights) / per_token
        if tokens is not None:
            limits.append(tokens / max(1.0, length))
        return max(1.0, min(limits))

    def _round_s(self, running: float, context: float) -> float:
        """One token for each of b running requests."""
        spec, hardware = self.spec, self.hardware
        ranks = hardware.scaled(self.engine.tensor)
        flops = (
            2.0 * matmul_parameters(spec) * running + 4.0 * spec.layers * spec.heads * spec.head_dim * context * running
        )
        read = self._weights_read(running) + running * context * self.memory.kv_per_token * self.engine.tensor
        model = flops / (ranks * hardware.flops * hardware.decode_share)
        model += read / (ranks * hardware.memory * hardware.memory_share)
        hops = 2 * spec.layers if self.engine.tensor > 1 else 0
        return model / hardware.engine_share + hops * hardware.hop_s + hardware.round_s

    def _weights_read(self, running: float) -> float:
        """Bytes of weights that a round reads: of experts only those that a token of the round was routed to."""
        spec = self.spec
        whole = float(parameter_count(spec))
        if spec.experts:
            experts = spec.layers * spec.experts * 3 * spec.hidden * spec.expert_ffn
            missed = (1 - spec.experts_per_token / spec.experts) ** max(1.0, running)
            whole -= experts * missed
        return (whole - spec.hidden * spec.vocab * (0 if spec.tied else 1)) * self.size


class _Trainer:
    """Time in the trainer ranks."""

    def __init__(
        self, config: RLConfig, spec: ModelSpec, hardware: Hardware, placement: Placement, assumed: Assumed
    ) -> None:
        self.config, self.spec, self.hardware = config, spec, hardware
        self.size = size_of(config.model.dtype)
        across = placement.across_nodes(config.parallel)
        self.rate = {
            axis: hardware.network if axis in across else hardware.link for axis in ("tensor", "context", "data")
        }
        self.hop_s = {axis: hardware.far_hop_s if axis in across else hardware.hop_s for axis in self.rate}
        rollout = config.rollout
        prompts, replies = rollout.prompts_per_step, rollout.prompts_per_step * rollout.num_replies
        reply = round(rollout.max_new_tokens * assumed.reply_share)
        prompt = round(assumed.prompt_tokens)
        shared = config.train.share_prompts and hardware.shares_device and config.parallel.context == 1
        self.trained = replies * reply
        self.tokens = (prompts if shared else replies) * prompt + self.trained
        each = forward_flops(spec, [prompt + reply], reply)
        alone = forward_flops(spec, [prompt], 0) if prompt else 0.0
        self.forward = replies * each - ((replies - prompts) * alone if shared else 0.0)

    def logprobs_s(self) -> float:
        algorithm = self.config.algorithm
        compares = self.config.online_dpo is None and (algorithm.mini_batches > 1 or algorithm.kl_in_reward)
        passes = self.config.needs_reference + compares
        return passes * self._passes_s(1.0)

    def update_s(self) -> float:
        recomputed = {"none": 0.0, "selective": self._mlp_share(), "full": 1.0}[self.config.train.recompute]
        return self._passes_s(3.0 + recomputed) + self._gradients_s() + self._optimizer_s()

    def _passes_s(self, forwards: float) -> float:
        """`forwards` passes over the step's samples; a backward pass counts as two."""
        parallel, hardware, spec = self.config.parallel, self.hardware, self.spec
        ranks = hardware.scaled(parallel.world_size)
        hidden, mlp = ELEMENTWISE
        columns = spec.experts_per_token * spec.expert_ffn if spec.experts else spec.ffn
        moved = self.tokens * spec.layers * (hidden * spec.hidden + mlp * columns) * self.size
        moved += 3 * FP32 * self.trained * spec.vocab
        seconds = self.forward / (ranks * hardware.flops * hardware.gemm_share)
        seconds += moved / (ranks * hardware.memory * hardware.memory_share)
        return forwards * (seconds * self._bubble() + self._collectives_s())

    def _bubble(self) -> float:
        """Pipeline stages wait at both ends of a batch."""
        parallel = self.config.parallel
        micro = self._micro_batches() * parallel.interleave
        return 1 + (parallel.pipeline - 1) / micro

    def _micro_batches(self) -> int:
        return max(1, math.ceil(self.tokens / self.config.parallel.data / self.config.train.micro_batch_tokens))

    def _collectives_s(self) -> float:
        """Of one forward pass, on a rank: two all-reduces of the hidden states in each layer (tensor), keys and values
        of the other ranks (context), tokens to their experts and back (expert)."""
        parallel, spec = self.config.parallel, self.spec
        layers = spec.layers / parallel.pipeline
        tokens = self.tokens / parallel.data / parallel.context
        calls = layers * self._micro_batches()
        seconds = 0.0
        if parallel.tensor > 1:
            sent = 2 * 2 * (parallel.tensor - 1) / parallel.tensor * tokens * spec.hidden * self.size
            seconds += layers * sent / self.rate["tensor"] + 2 * calls * self.hop_s["tensor"]
        if parallel.context > 1:
            sent = (parallel.context - 1) * tokens * 2 * spec.kv_heads * spec.head_dim * self.size / parallel.tensor
            seconds += layers * sent / self.rate["context"] + calls * self.hop_s["context"]
        if parallel.expert > 1:
            axis = "data" if parallel.expert > parallel.tensor * parallel.context else "tensor"
            own = tokens / parallel.tensor  # sequence parallel
            sent = 2 * spec.experts_per_token * own * spec.hidden * self.size * (parallel.expert - 1) / parallel.expert
            seconds += layers * sent / self.rate[axis] + 2 * calls * self.hop_s[axis]
        return seconds

    def _gradients_s(self) -> float:
        """fp32 gradients to the data ranks, and the new weights back, of each optimizer step."""
        parallel = self.config.parallel
        if parallel.data * parallel.context == 1:
            return 0.0
        dense, experts = self._largest_stage()
        sent = (FP32 + self.size) * dense
        if parallel.tensor * parallel.context * parallel.data > parallel.expert:
            sent += (FP32 + self.size) * experts
        return self._optimizer_steps() * sent / self.rate["data"]

    def _optimizer_s(self) -> float:
        parallel, hardware = self.config.parallel, self.hardware
        dense, experts = self._largest_stage()
        copies = parallel.data * parallel.context
        device = "cpu" if hardware.shares_device else "cuda"
        held = dense + experts
        if self.config.optimizer.shards_state(device=device, copies=copies):
            ranks = parallel.tensor * parallel.context * parallel.data
            held = math.ceil(dense / copies) + math.ceil(experts * parallel.expert / ranks)
        if hardware.shares_device:
            held *= parallel.world_size
        return self._optimizer_steps() * held * OPTIMIZER_BYTES / (hardware.memory * hardware.memory_share)

    def _optimizer_steps(self) -> int:
        return self.config.algorithm.mini_batches

    def _largest_stage(self) -> tuple[int, int]:
        parallel = self.config.parallel
        return max((stage_parameters(self.spec, parallel, stage) for stage in range(parallel.pipeline)), key=sum)

    def _mlp_share(self) -> float:
        spec = self.spec
        width = spec.experts_per_token * spec.expert_ffn if spec.experts else spec.ffn
        return 3 * spec.hidden * width * spec.layers / matmul_parameters(spec)


def _users_s(config: RLConfig, futures: int, assumed: Assumed) -> float:
    """One user turn of every future."""
    places = list(user_places(config.simulators.user).values())
    weight = sum(section.weight for section in places)
    each = [_waves_s(futures * section.weight / weight, section, assumed.user_tokens, assumed) for section in places]
    return max(each) + futures * CALL_CPU_S / config.driver.shards


def _judges_s(config: RLConfig, conversations: int, assumed: Assumed) -> float:
    """The judges of all conversations, which work at the same time."""
    asked = [section for _, section in judges(config.reward, config.simulators).values()]
    each = [_waves_s(conversations, section, assumed.judge_tokens, assumed) for section in asked]
    return max(each, default=0.0) + len(asked) * conversations * CALL_CPU_S / config.driver.shards


def _waves_s(calls: float, section: LLMSection, tokens: float, assumed: Assumed) -> float:
    """Calls to one role, `max_concurrency` at a time. A service on this machine (the demo's) answers at once."""
    host = urlsplit(str(section.api_base or "")).hostname or ""
    if host in ("localhost", "::1") or host.startswith("127."):
        return 0.0
    answer = assumed.api_wait_s + min(tokens, section.max_tokens) / assumed.api_tokens_per_s
    return math.ceil(calls / section.max_concurrency) * answer


def _sync_s(config: RLConfig, spec: ModelSpec, hardware: Hardware, placement: Placement) -> float:
    """The pipeline stages send one after the other, each through one device; the first and every n-th sync reads all
    weights again, the others 1/n of them."""
    sync = config.sync
    sent = parameter_count(spec) * size_of(config.model.dtype)
    transport = sync.transport_for(config.engine.placement)
    if transport == "disk":
        travel = 2 * sent / hardware.disk
    else:
        inside = transport == "ipc" or all(placement.near_trainer(engine) for engine in placement.engines)
        if transport == "ipc" and "pipeline" in placement.across_nodes(config.parallel):
            inside = False  # every rank gathers the layers of all stages
        travel = sent / ((hardware.link if inside else hardware.network) * hardware.sync_share)
    proved = min(1.0, 2 / sync.verify_every) if sync.verify_every else 0.0
    return hardware.sync_s + travel + proved * sent / hardware.checksums
