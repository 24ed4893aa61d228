"""Time, GPU dollars and API dollars of an RL run, before it is started, from the config and the shape of the model.

    python tools/plan_run.py conf/math_hard.yaml --nodes 1 --gpus 8x80
    python tools/plan_run.py conf/plan/llama3.1_70b_rl.yaml --shape conf/plan/llama3.1_70b.json --nodes 16 --gpus 8x80
    python tools/plan_run.py conf/demo_rl.yaml --device cpu       # measures this machine first (seconds)

Prints the map of the nodes, memory against that of a GPU, seconds of a step by phase, the bottleneck, and the cost of
the run. The model of the time is collab_megatron/launch/step_time.py with the devices of model/hardware.py; the lines
under `assumed` are what neither knows. It starts nothing and needs neither weights nor a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from collab_megatron.config import RLConfig, load_config
from collab_megatron.data.parquet import read_task_files
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.launch.cost import Calls, Lengths, dollar_lines, lengths_of, step_calls
from collab_megatron.launch.machine_checks import check_placement
from collab_megatron.launch.node import Node, parse_node, several, this_node
from collab_megatron.launch.placement import Placement, place
from collab_megatron.launch.placement_map import placement_lines
from collab_megatron.launch.plan import stages_of
from collab_megatron.launch.step_time import Assumed, StepTime, step_time
from collab_megatron.launch.threads import usable_cores
from collab_megatron.model.folder import read_hf_config, resolve_model_folder
from collab_megatron.model.hardware import Hardware, from_probe, gpu
from collab_megatron.model.layout import check_layout
from collab_megatron.model.memory import engine_memory
from collab_megatron.model.spec import ModelSpec, model_spec

PROBE_TOKENS, PROBE_WIDTH, PROBE_ROUNDS = 2048, 1024, 5
PROBE_BYTES = 2**28
REQUEST_TOKENS = 300.0  # of the hidden request, where the data cannot be read
HOUR_S = 3600.0


@dataclass(frozen=True)
class RunPlan:
    """The figures of one run."""

    hardware: str
    gpus: int
    step_s: float
    phases: dict[str, float]
    bottleneck: str
    steps: int
    hours: float
    gpu_usd: float
    api_usd: float | None  # None: a price is unknown
    trainer_bytes: int  # largest pipeline stage, per rank
    engine_bytes: int  # weights, per rank
    fits: bool


def make_plan(
    config: RLConfig,
    spec: ModelSpec,
    hardware: Hardware,
    placement: Placement,
    assumed: Assumed,
    calls: Sequence[Calls],
) -> tuple[RunPlan, StepTime]:
    """calls: of one step."""
    timed = step_time(config, spec, hardware, placement, assumed)
    steps = config.train.steps
    hours = steps * timed.step_s / HOUR_S
    gpus = sum(len(host.gpus) for host in placement.hosts) if not hardware.shares_device else 0
    device = "cpu" if hardware.shares_device else "cuda"
    trainer = max(stage.device for stage in stages_of(config, spec, device))
    engine = engine_memory(spec, dtype=config.model.dtype, engine=config.engine).weights
    known = [item.usd for item in calls]
    api = None if None in known else steps * sum(usd for usd in known if usd is not None)
    has = assumed.gpu_bytes
    needed = trainer + engine if config.engine.placement == "colocated" else max(trainer, engine)
    plan = RunPlan(
        hardware=hardware.name,
        gpus=gpus,
        step_s=timed.step_s,
        phases=timed.phases,
        bottleneck=timed.bottleneck,
        steps=steps,
        hours=hours,
        gpu_usd=hours * gpus * assumed.gpu_usd_per_hour,
        api_usd=api,
        trainer_bytes=trainer,
        engine_bytes=engine,
        fits=has is None or needed <= has,
    )
    return plan, timed


def plan_lines(plan: RunPlan, timed: StepTime, assumed: Assumed, hardware: Hardware) -> list[str]:
    """The figures for people."""
    gib = 2**30
    room = "" if assumed.gpu_bytes is None else f" of {assumed.gpu_bytes / gib:.0f} GB"
    fits = "" if plan.fits else ": does not fit, so the times below are of no use"
    lines = [
        f"memory      a trainer rank {plan.trainer_bytes / gib:.1f} GB{room}, an engine rank "
        f"{plan.engine_bytes / gib:.1f} GB of weights{fits}",
        f"step        {plan.step_s:,.2f} s; the longest phase is {plan.bottleneck}"
        + (" (sampling and training overlap)" if timed.overlaps else ""),
    ]
    for name, seconds in plan.phases.items():
        share = seconds / max(1e-9, sum(plan.phases.values()))
        lines.append(f"            {name:<12} {seconds:10,.2f} s {share:6.0%}")
    lines.append(f"run         {plan.steps:,} steps in {plan.hours:,.1f} h")
    if plan.gpus:
        lines.append(
            f"GPUs        {plan.gpus:,} x {plan.hours:,.1f} h at ${assumed.gpu_usd_per_hour:g} an hour: "
            f"${plan.gpu_usd:,.0f}"
        )
        if plan.api_usd is not None:
            lines.append(f"in all      at most ${plan.gpu_usd + plan.api_usd:,.0f} for GPUs and APIs")
    lines += [
        f"assumed     {assumed.prompt_tokens:,.0f} tokens of prompt, replies of {assumed.reply_share:.0%} of "
        f"rollout.max_new_tokens, user turns of {assumed.user_tokens:g}, judges' answers of {assumed.judge_tokens:g}",
        f"            an API answers after {assumed.api_wait_s:g} s with {assumed.api_tokens_per_s:g} tokens/s",
        f"            {hardware.name}: {hardware.flops / 1e12:,.3g} TFLOP/s (x {hardware.gemm_share:g} in training, "
        f"x {hardware.decode_share:g} in decoding), memory {hardware.memory / 1e9:,.3g} GB/s (x "
        f"{hardware.memory_share:g})",
        f"            links {hardware.link / 1e9:,.3g} GB/s, network {hardware.network / 1e9:,.3g} GB/s of a device, "
        f"x {hardware.sync_share:g} in a weight sync; {hardware.round_s * 1e3:g} ms of an engine's round are fixed",
        "            not counted: evaluations, checkpoints, failures, unequal ranks",
    ]
    return lines


def measure_cpu() -> Hardware:
    """The fp32 rates of this machine, each the best of a few rounds."""
    import torch

    left, right = torch.randn(PROBE_TOKENS, PROBE_WIDTH), torch.randn(PROBE_WIDTH, PROBE_WIDTH)
    source, target = torch.zeros(PROBE_BYTES // 4), torch.zeros(PROBE_BYTES // 4)
    gemm_s, copy_s, before = [], [], torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    for _ in range(PROBE_ROUNDS):
        began = time.perf_counter()
        torch.mm(left, right)
        gemm_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        target.copy_(source)
        copy_s.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    flops = 2.0 * PROBE_TOKENS * PROBE_WIDTH * PROBE_WIDTH / min(gemm_s)
    return from_probe(flops=flops, memory=2.0 * PROBE_BYTES / min(copy_s))


def lengths(config: RLConfig, prompt_tokens: float | None) -> tuple[Lengths, bool]:
    """Mean lengths of the training data, and whether it could be read; else what the command line assumes."""
    if all(file.exists() for file in config.data.train_files):
        found = lengths_of(read_task_files(config.data.train_files)[0])
        return (found if prompt_tokens is None else replace(found, chat=prompt_tokens)), True
    chat = config.rollout.max_prompt_tokens / 4 if prompt_tokens is None else prompt_tokens
    return Lengths(chat=chat, request=REQUEST_TOKENS), False


def read_spec(config: RLConfig, shape: Path | None) -> dict[str, Any]:
    """The config.json of the model, or the file that --shape names. Raises UserError."""
    if shape is None:
        return dict(read_hf_config(resolve_model_folder(config.model.path, weights=False)))
    try:
        found = json.loads(shape.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--shape {shape} cannot be read as JSON ({error}): name a model's config.json") from None
    if not isinstance(found, dict):
        raise UserError(f"--shape {shape} holds no JSON object: name a model's config.json")
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/plan_run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a config of train_rl")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nodes", type=int, metavar="N", help="number of nodes; default: 1")
    parser.add_argument("--gpus", metavar="COUNTxGB", help="of each node, such as 8x80; default: this machine's")
    parser.add_argument("--hosts", metavar="NAME:GPUS,...", help="in place of --nodes: nodes by name")
    parser.add_argument("--device", default="H100", help="H100, H200, B200, A100, or cpu: this machine, measured")
    parser.add_argument("--shape", type=Path, help="a config.json in place of the one of model.path")
    parser.add_argument("--prompt-tokens", type=float, help="mean tokens of the chats; default: the data's")
    parser.add_argument("--reply-share", type=float, default=0.5, help="mean reply / rollout.max_new_tokens")
    parser.add_argument("--api-wait-s", type=float, default=1.0, help="until an API's first token")
    parser.add_argument("--api-tokens-per-s", type=float, default=80.0, help="of one API answer")
    parser.add_argument("--gpu-usd", type=float, default=2.5, help="dollars of a GPU and hour")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_intermixed_args(argv)
    for name in ("prompt_tokens", "reply_share", "api_wait_s", "api_tokens_per_s", "gpu_usd"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number from 0 up")
    if not 0 < args.reply_share <= 1 or args.api_tokens_per_s == 0:
        raise UserError("--reply-share must be above 0 and at most 1, and --api-tokens-per-s above 0: correct it")
    return args


def node_of(args: argparse.Namespace) -> Node:
    """The nodes that the command line describes."""
    node = parse_node(args.gpus) if args.gpus is not None else this_node()
    if args.device != "cpu" and not node.gpus:
        raise UserError("this machine has no GPU to plan for: add --gpus 8x80, or --device cpu")
    nodes = 1 if args.nodes is None and args.hosts is None else args.nodes
    return several(node, nodes, args.hosts)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    config = load_config(RLConfig, args.config, args.overrides)
    raw = read_spec(config, args.shape)
    check_layout(raw, config.parallel)
    spec, node = model_spec(raw), node_of(args)
    device = "cpu" if args.device == "cpu" else "cuda"
    check_placement(config, device)
    placement = place(node.hosts, config.parallel, config.engine, device=device, shards=config.driver.shards)
    hardware = measure_cpu() if device == "cpu" else gpu(args.device)
    means, read = lengths(config, args.prompt_tokens)
    if not read:
        print(f"data.train is not here: prompts of {means.chat:g} tokens and requests of {means.request:g} are assumed")
    assumed = Assumed(
        prompt_tokens=means.chat,
        reply_share=args.reply_share,
        api_wait_s=args.api_wait_s,
        api_tokens_per_s=args.api_tokens_per_s,
        gpu_usd_per_hour=args.gpu_usd,
        gpu_bytes=node.gpu_bytes if device == "cuda" else None,
    )
    calls = step_calls(config, means)
    plan, timed = make_plan(config, spec, hardware, placement, assumed, calls)
    lines = [*placement_lines(placement, config.parallel), *plan_lines(plan, timed, assumed, hardware)]
    lines += dollar_lines({"steps": (config.train.steps, calls)})
    print("\n".join(lines))
    if args.json is not None:
        publish_json(args.json, {**asdict(plan), "assumed": asdict(assumed)})


if __name__ == "__main__":
    run_cli(main)
