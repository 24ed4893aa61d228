"""What --dry-run says of layout, memory and work; nothing of it starts a process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import UserError
from collab_megatron.launch.cli import parse_arguments
from collab_megatron.launch.cost import Lengths, step_calls
from collab_megatron.launch.node import Node, parse_node
from collab_megatron.launch.plan import rl_plan
from collab_megatron.model.spec import model_spec
from tests.conftest import REPOSITORY

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}

NODE = Node(gpus=0, gpu_bytes=None, host_bytes=None)


@pytest.fixture
def planned() -> Callable[..., list[str]]:
    """The plan's lines for a model of eight billion parameters on GPUs, with overrides."""

    def lines(*overrides: str, node: Node = NODE) -> list[str]:
        sound = [
            *("model.path=m", "data.train=a", "data.validation=b", "model.dtype=bfloat16"),
            *("parallel.device=cuda", "parallel.tensor=1", "parallel.data=1", "rollout.max_new_tokens=1000"),
        ]
        config = load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", [*sound, *overrides])
        calls = {"steps": (config.train.steps, step_calls(config, Lengths())), "evaluations": (0, [])}
        return rl_plan(config, model_spec(LLAMA), node=node, calls=calls).splitlines()

    return lines


def line(lines: list[str], start: str) -> str:
    (found,) = [text for text in lines if text.startswith(start)]
    return found


def test_one_line_for_stages_that_are_alike(planned: Callable[..., list[str]]) -> None:
    lines = planned("parallel.pipeline=4", "parallel.tensor=2", "algorithm.kl_coef=0")
    assert line(lines, "trainer").endswith("8 ranks on cuda (parallel.device): tensor 2 x pipeline 4")
    heading = next(number for number, text in enumerate(lines) if text.split()[:1] == ["stage"])
    assert lines[heading].split() == ["stage", "weights", "gradients", "optimizer", "activations", "working", "device"]
    stages = [text.split()[0] for text in lines[heading + 1 : heading + 5]]
    assert stages == ["0", "1", "2", "3"]  # fewer micro-batches are in flight on each
    assert lines[heading + 1].split()[1:3] == ["2.1", "GB"]
    assert "no parallelism" in line(planned(), "trainer")


def test_reference_and_offload_have_columns_where_they_hold_something(planned: Callable[..., list[str]]) -> None:
    heading = next(text for text in planned() if "stage" in text.split()[:1])
    assert heading.split()[-2:] == ["reference", "device"]
    changes = ("algorithm.reference=swap", "optimizer.cpu_offload=1.0")
    heading = next(text for text in planned(*changes) if "stage" in text.split()[:1])
    assert heading.split()[1:] == ["weights", "gradients", "activations", "working", "device", "host"]


def algorithm_of(lines: list[str]) -> list[str]:
    """The algorithm's lines of a plan."""
    first = next(number for number, text in enumerate(lines) if text.startswith("algorithm "))
    more = [text for text in lines[first:] if not text.startswith(("algorithm ", " "))]
    return [text[12:] for text in lines[first : lines.index(more[0])]]


def test_a_name_is_shown_with_its_pieces(planned: Callable[..., list[str]]) -> None:
    assert algorithm_of(planned()) == [
        "grpo: reward minus the group's mean, divided by the group's std + 0.05",
        "groups whose rewards have a std below 0.01 are kept with advantage 0",
        "each token's ratio, clipped to [0.8, 1.2], mean over tokens",
        "KL k3 x 0.005 in the loss; importance weight of each token, at most 2",
    ]
    assert algorithm_of(planned("algorithm=dapo", "algorithm.kl_coef=0", "driver.refill_groups=4")) == [
        "dapo: reward minus the group's mean, divided by the group's std + 0.05",
        "a reply loses up to 1 of reward in the last 200 of 1000 tokens",
        "groups whose rewards have a std below 0.01 are not trained, and up to 4 a step replaced",
        "each token's ratio, clipped to [0.8, 1.28], mean over tokens",
        "no KL; importance weight of each token, at most 2",
    ]
    masked = ("algorithm.importance=sequence", "algorithm.importance_beyond=mask", "algorithm.importance_floor=0.5")
    assert algorithm_of(planned("algorithm=gspo", *masked))[-2:] == [
        "each reply's mean ratio, clipped to [0.9997, 1.0004], mean over each reply's tokens, then over replies",
        "KL k3 x 0.005 in the loss; importance weight of each reply, 0 outside [0.5, 2]",
    ]
    assert algorithm_of(planned("algorithm=reinforce_pp", "algorithm.importance=none")) == [
        "reinforce_pp: reward minus the mean over the step's tokens, divided by the std over the step's tokens",
        "each token's ratio, clipped to [0.8, 1.2], mean over tokens",
        "KL k1 x 0.005 in the reward; no importance weights",
    ]
    cispo = algorithm_of(planned("algorithm=cispo", "algorithm.aggregation=constant", "algorithm.entropy_coef=0.01"))
    assert cispo[-2:] == [
        "each token's ratio, clipped to [0, 1.2], as the weight of its log-prob, sum over tokens / (replies x 1000)",
        "KL k3 x 0.005 in the loss, entropy bonus x 0.01; importance weight of each token, at most 2",
    ]


def test_later_turns_are_trained_as_conversations_or_one_by_one(planned: Callable[..., list[str]]) -> None:
    """Two prompts of two replies with three futures of two more policy turns."""
    shape = ("rollout.prompts_per_step=2", "rollout.num_replies=2", "rollout.num_repeat_rollouts=3")
    turns = (
        "rollout.max_user_turns=2",
        "rollout.max_assistant_turns=3",
        "train.micro_batch_tokens=1",
        "online_dpo=null",
    )
    tree = (*shape, *turns, "algorithm.credit=tree")
    assert "at most 4 micro-batches" in line(planned(*shape, *turns), "work")
    assert "at most 12 micro-batches" in line(planned(*tree), "work")
    assert "at most 28 micro-batches" in line(planned(*tree, "algorithm=gspo"), "work")
    assert algorithm_of(planned(*tree, "algorithm=dr_grpo", "algorithm.tree_baseline=group"))[1] == (
        "later policy turns are trained too: their return minus the mean of the group's other conversations"
    )


def test_a_micro_batch_is_at_least_the_longest_sample(planned: Callable[..., list[str]]) -> None:
    lines = planned("train.micro_batch_tokens=100", "rollout.max_prompt_tokens=3000")
    assert "a micro-batch of 4,000 tokens" in line(lines, "memory")
    assert line(lines, "work").startswith("work        at most 128 micro-batches a data rank and ")


def test_room_is_told_where_a_gpus_memory_is_known(planned: Callable[..., list[str]]) -> None:
    assert not [text for text in planned() if text.startswith("room")]
    node = parse_node("8x80")
    assert line(planned(node=node), "room").startswith("room        the GPU has 80 GB: ")
    assert line(planned(node=node), "room").endswith(" too little")
    roomy = planned("parallel.tensor=8", "optimizer.distributed=true", node=node)
    assert line(roomy, "room").endswith(" free")


def test_the_engine_says_what_a_token_costs(planned: Callable[..., list[str]]) -> None:
    told = line(planned("engine.max_total_tokens=100000"), "engine")
    assert told.endswith("per rank weights 15 GB, KV cache 12 GB (100,000 tokens, 128 kB a token)")
    told = line(planned("engine.max_total_tokens=null", "engine.mem_fraction=0.8"), "engine")
    assert told.endswith("KV cache 128 kB a token, up to 80% of the memory with the weights")


def test_servers_and_what_a_sync_sends_them(planned: Callable[..., list[str]]) -> None:
    lines = planned("engine.count=3", "engine.tensor=2")
    assert line(lines, "engine").startswith(
        "engine      3 SGLang servers at tensor parallel 2, disaggregated; per rank "
    )
    assert line(lines, "sync") == "sync        broadcast, 15 GB per sync to 3 servers, in buckets of at most 512 MB"
    assert "1 SGLang server at tensor parallel 1, colocated" in line(planned("engine.placement=colocated"), "engine")
    assert line(planned("engine.placement=colocated"), "sync").startswith(
        "sync        ipc, 15 GB per sync to 1 server,"
    )
    lines = planned("engine.urls=[http://a:1, http://b:2]", "sync.transport=disk")
    assert line(lines, "engine") == "engine      the SGLang servers at http://a:1, http://b:2, disaggregated"
    assert line(lines, "sync") == "sync        disk, 15 GB per sync to 2 servers"


def test_how_far_sampling_runs_ahead_and_where_the_money_ends(planned: Callable[..., list[str]]) -> None:
    lines = planned(
        "driver={max_staleness: 1, oversample_prompts: 4, shards: 2}", "budget={soft_usd: 10, hard_usd: 20}"
    )
    assert "driver      2 processes, at most 20 trees in flight: tokens at most 1 update old" in lines
    assert "budget      warns at $10.00, stops at $20.00" in lines
    lines = planned()
    assert "driver      1 process, at most 16 trees in flight: strictly on-policy" in lines
    assert "budget      none (budget.hard_usd)" in lines


def test_the_device_is_told_with_its_reason(planned: Callable[..., list[str]]) -> None:
    auto = "parallel.device=auto"
    assert "1 rank on cuda (--gpus): " in line(planned(auto, node=parse_node("1x24")), "trainer")
    assert "1 rank on cpu (parallel.device=auto: no GPU found): " in line(planned(auto), "trainer")
    assert not any(text.startswith("not checked") for text in planned())
    assert line(planned(node=parse_node("1x24")), "not checked").endswith(": this is not that node")


def test_a_node_that_is_not_there_is_for_planning_only() -> None:
    found = parse_arguments("", ["a.yaml", "--dry-run", "--gpus", "8x80"]).node
    assert found == Node(gpus=8, gpu_bytes=80 * 2**30, host_bytes=None, here=False)
    assert parse_arguments("", ["a.yaml", "--dry-run"]).node is None
    with pytest.raises(UserError, match="add --dry-run"):
        parse_arguments("", ["a.yaml", "--gpus", "8x80"])
    for text in ("8", "0x80", "8x", "8x80GB"):
        with pytest.raises(UserError, match="write 8x80 for 8 GPUs of 80 GB each"):
            parse_node(text)


def test_several_nodes_are_for_planning_only() -> None:
    found = parse_arguments("", ["a.yaml", "--dry-run", "--gpus", "8x80", "--nodes", "3"]).node
    assert found is not None
    assert [(host.name, len(host.gpus)) for host in found.hosts] == [("node1", 8), ("node2", 8), ("node3", 8)]
    assert (found.gpus, found.gpu_bytes, found.here) == (8, 80 * 2**30, False)
    named = parse_arguments("", ["a.yaml", "--dry-run", "--gpus", "8x80", "--hosts", "a,b:4,c:0"]).node
    assert named is not None
    assert [(host.name, len(host.gpus)) for host in named.hosts] == [("a", 8), ("b", 4), ("c", 0)]
    for option in (("--nodes", "3"), ("--hosts", "a,b")):
        with pytest.raises(UserError, match=f"{option[0]} plans for another machine.*add --dry-run"):
            parse_arguments("", ["a.yaml", *option])


def test_overrides_may_stand_on_either_side_of_an_option() -> None:
    found = parse_arguments("", ["a.yaml", "x.y=1", "--dry-run", "x.z=2"])
    assert (found.overrides, found.dry_run) == (["x.y=1", "x.z=2"], True)
    found = parse_arguments("", ["a.yaml", "x.y=1", "--models", "sft", "b+p", "x.z=2"], several_models=True)
    assert (found.models, found.overrides) == (["sft", "b+p"], ["x.y=1", "x.z=2"])
    assert parse_arguments("", ["a.yaml", "--dry-run"], several_models=True).models == []
    with pytest.raises(UserError, match="names no model"):
        parse_arguments("", ["a.yaml", "--models", "x.y=1"], several_models=True)


def test_online_dpo_takes_the_place_of_the_algorithm(planned: Callable[..., list[str]]) -> None:
    lines = planned("online_dpo={beta: 0.2, min_gap: 0.5}", "algorithm.kl_coef=0")
    assert line(lines, "algorithm").endswith("online DPO, beta 0.2: the best reply of each group against its worst")
    assert any("a gap of at most 0.5, give no pair" in text for text in lines)
    assert not any("clipped" in text for text in lines)
    assert any("reference" in text for text in lines)  # a second model, without a KL too
    assert not any("reference" in text for text in planned("algorithm.kl_coef=0"))
