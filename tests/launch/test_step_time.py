"""The time model: every term against its formula, alone, where the other terms are made zero."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError
from collab_megatron.launch.hosts import Host, equal_hosts
from collab_megatron.launch.placement import place
from collab_megatron.launch.step_time import Assumed, StepTime, _Engines, step_time
from collab_megatron.model.flops import forward_flops
from collab_megatron.model.hardware import Hardware, from_probe, gpu
from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.model.tables import parameter_count
from tests.conftest import REPOSITORY

PLANS = REPOSITORY / "conf" / "plan"
H100 = gpu("H100")
ONLY_FLOPS = replace(H100, memory=inf, link=inf, network=inf, hop_s=0.0, far_hop_s=0.0)
ASSUMED = Assumed(prompt_tokens=2048, gpu_bytes=80 * 2**30)
REPLIES, PROMPT, REPLY = 16 * 8, 2048, 1024  # of qwen2.5_7b_rl.yaml


def shape(name: str) -> ModelSpec:
    return model_spec(json.loads((PLANS / f"{name}.json").read_text()))


QWEN = shape("qwen2.5_7b")


def config_of(*overrides: str, name: str = "qwen2.5_7b_rl") -> RLConfig:
    return load_config(RLConfig, PLANS / f"{name}.yaml", list(overrides))


def timed(
    *overrides: str,
    hardware: Hardware = H100,
    hosts: tuple[Host, ...] = equal_hosts(1, 8),
    assumed: Assumed = ASSUMED,
) -> StepTime:
    config = config_of(*overrides)
    device = "cpu" if hardware.shares_device else "cuda"
    placement = place(hosts, config.parallel, config.engine, device=device, shards=1)
    return step_time(config, QWEN, hardware, placement, assumed)


def test_a_synchronous_step_is_the_sum_and_an_asynchronous_one_the_longer_side() -> None:
    found = timed()
    assert found.step_s == pytest.approx(sum(found.phases.values()))
    assert found.bottleneck == max(found.phases, key=lambda name: found.phases[name])
    ahead = timed("driver.max_staleness=1")
    assert ahead.phases == found.phases
    assert ahead.step_s == pytest.approx(max(found.rollout_s, found.trainer_s))
    slow = timed("driver.max_staleness=1", hardware=replace(H100, gemm_share=0.001))
    assert slow.trainer_s > slow.rollout_s
    assert slow.bottleneck == "update"


def test_an_update_is_three_forward_passes_of_flops() -> None:
    forward = forward_flops(QWEN, [PROMPT + REPLY] * REPLIES, REPLY * REPLIES)
    each = forward / (4 * H100.flops * H100.gemm_share)
    plain = timed("train.recompute=none", hardware=ONLY_FLOPS)
    assert plain.phases["update"] == pytest.approx(3 * each)
    assert plain.phases["logprobs"] == pytest.approx(each)  # the reference
    assert timed("train.recompute=full", hardware=ONLY_FLOPS).phases["update"] == pytest.approx(4 * each)
    some = timed("train.recompute=selective", hardware=ONLY_FLOPS).phases["update"]
    assert 3 * each < some < 4 * each
    none = timed("algorithm.kl_coef=0", hardware=ONLY_FLOPS)
    assert none.phases["logprobs"] == 0
    old = timed("algorithm.mini_batches=2", hardware=ONLY_FLOPS)
    assert old.phases["logprobs"] == pytest.approx(2 * each)  # and the policy at the start of the step


def test_a_pipeline_waits_at_both_ends() -> None:
    flat = timed("train.recompute=none", hardware=ONLY_FLOPS).phases["update"]
    staged = timed("train.recompute=none", "parallel.tensor=2", "parallel.pipeline=2", hardware=ONLY_FLOPS)
    micro_batches = REPLIES * (PROMPT + REPLY) / 16384
    assert staged.phases["update"] == pytest.approx(flat * (1 + 1 / micro_batches))


def test_twice_the_rates_halve_an_update() -> None:
    one = replace(H100, hop_s=0.0, far_hop_s=0.0)
    two = replace(one, flops=2 * H100.flops, memory=2 * H100.memory, link=2 * H100.link, network=2 * H100.network)
    update_s = timed(hardware=one).phases["update"]
    assert timed(hardware=two).phases["update"] == pytest.approx(update_s / 2)


def test_a_layer_that_crosses_nodes_waits_for_the_network() -> None:
    hosts = (Host("a", ("0", "1")), Host("b", ("0", "1")), Host("c", tuple("0123")))
    near = timed()
    far = timed("parallel.tensor_across_nodes=true", hosts=hosts)
    assert far.phases["update"] > 2 * near.phases["update"]


def test_the_slowest_reply_decides_how_many_rounds_there_are() -> None:
    hardware = replace(H100, flops=inf, memory=inf, hop_s=0.0, round_s=0.01)
    found = timed("rollout.num_repeat_rollouts=0", hardware=hardware)
    assert found.phases["sampling"] == pytest.approx(2048 * 0.01)
    # 64 replies on each server, 8 at a time, of 1024 tokens: eight waves
    queue = timed("rollout.num_repeat_rollouts=0", "engine.max_running_requests=8", hardware=hardware)
    assert queue.phases["sampling"] == pytest.approx(8 * 1024 * 0.01)
    assert timed(hardware=hardware).phases["sampling"] == pytest.approx(3 * 2048 * 0.01)  # two more turns


def test_a_round_reads_only_the_experts_of_its_tokens() -> None:
    spec = shape("qwen3_235b")
    engines = _Engines(config_of(name="qwen3_235b_rl"), spec, H100, ASSUMED)
    assert 20e9 < engines._weights_read(1) / 2 < 23e9  # the 22 billion of its name
    whole = parameter_count(spec) - spec.hidden * spec.vocab
    assert engines._weights_read(10_000) / 2 == pytest.approx(whole, rel=1e-3)


def test_calls_come_in_waves() -> None:
    futures = REPLIES * 3
    users = timed("simulators.user.max_concurrency=64").phases["users"]
    assert users == pytest.approx(2 * (6 * (1 + 100 / 80) + futures * 0.004))
    assert timed("simulators.user.max_concurrency=384").phases["users"] == pytest.approx(2 * (2.25 + futures * 0.004))
    local = timed("simulators.user.api_base=http://127.0.0.1:9/v1").phases["users"]
    assert local == pytest.approx(2 * futures * 0.004)
    assert timed("rollout.num_repeat_rollouts=0").phases["users"] == 0
    auto = ("rollout.num_repeat_rollouts=auto", "rollout.auto_futures=2")
    assert timed(*auto).phases == timed("rollout.num_repeat_rollouts=2").phases


def test_weights_go_over_the_network_where_engines_are_on_other_nodes() -> None:
    sent = 2 * parameter_count(QWEN)
    near = timed().phases["weight_sync"]
    far = timed(hosts=equal_hosts(2, 4)).phases["weight_sync"]
    assert far - near == pytest.approx(sent / H100.sync_share * (1 / H100.network - 1 / H100.link))
    unproved = timed("sync.verify_every=0").phases["weight_sync"]
    assert near - unproved == pytest.approx(0.2 * sent / H100.checksums)


def test_ranks_of_a_cpu_share_its_cores() -> None:
    cpu = from_probe(flops=2e11, memory=2e10)
    one, two = (
        timed(f"parallel.tensor={ranks}", "parallel.device=cpu", hardware=replace(cpu, link=inf, hop_s=0.0))
        for ranks in (1, 2)
    )
    assert two.phases["logprobs"] == pytest.approx(one.phases["logprobs"])


def test_an_unknown_device_is_one_sentence() -> None:
    with pytest.raises(UserError, match="--device V100 is not known: it may be H100"):
        gpu("V100")
    assert gpu("h200").memory > gpu("H100").memory
