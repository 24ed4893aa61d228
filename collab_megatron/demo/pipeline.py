"""The demo's pipeline: each stage is a command that a user could type.

model -> tasks -> endpoint -> base evaluation -> data -> SFT -> RL (evaluates before and after) -> export -> proof

Each stage is a process of its own. If one fails, the demo ends with its exit code. The figures go to
RUN_DIR/summary.json.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from collab_megatron.errors import UserError
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.supervisor import Supervisor

ENDPOINT_START_S = 30.0
STAGE_END_S = 120.0  # for an interrupted stage: train.save_grace_s, and the end of its servers
KEY_VARIABLE = "DESK_API_KEY"
Device = Literal["cpu", "cuda"]
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a CPU demo's stages: the same commands then choose the CPU, on a machine with GPUs too."""
ON_ONE_GPU: Mapping[str, tuple[str, ...]] = {
    # bf16: SGLang's fastest attention kernels have no fp32
    "evaluate": ("parallel.device=cuda", "model.dtype=bfloat16"),
    "sft": ("parallel.device=cuda", "parallel.tensor=1", "model.dtype=bfloat16"),
    "rl": (
        "parallel.device=cuda",
        "parallel.tensor=1",
        "engine.placement=colocated",
        "model.dtype=bfloat16",
        "sync.max_logprob_gap=0.1",
    ),
}
"""Overrides of a GPU demo's stages: trainer and engine share one GPU."""


SECOND_USER = "simulators.user.mixture.0"
EVALUATION_USERS = ("evaluation.users.bare", "evaluation.users.unseen")
"""Keys of conf/demo_mixture.yaml and conf/demo_users.yaml."""


@dataclass(frozen=True)
class DemoSettings:
    """How much each stage does. The defaults are the demo's; `tools/demo.py --short` takes a few steps of each."""

    run_dir: Path
    seed: int = 1
    device: Device = "cpu"
    conversations: int = 6000  # grown by the data builder
    held_out: int = 1000
    sft_steps: int | None = None  # None: the shipped config's value
    rl_steps: int | None = None
    rl_config: str = "conf/demo_rl.yaml"
    overrides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # stage -> more a.b=c


class DemoPipeline:
    """Runs the stages and measures their times."""

    def __init__(self, settings: DemoSettings, repository: Path) -> None:
        self._settings = settings
        self._repository = repository
        # treated like a real key: it must not appear anywhere
        self._key = os.environ.get(KEY_VARIABLE) or secrets.token_hex(16)
        self._api_base = ""
        self.wall_s: dict[str, float] = {}

    @property
    def run_dir(self) -> Path:
        return self._settings.run_dir

    def start_endpoint(self, supervisor: Supervisor, *flags: str) -> None:
        """Start the simulated user, judge and assistant behind HTTP on a free port. `flags` are more of its own."""
        ready = self.run_dir / "logs" / "endpoint.address"
        ready.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", "0", "--ready-file", str(ready)]
        child: ChildProcess = supervisor.start(
            "endpoint", [*argv, "--die-with-parent", *flags], {KEY_VARIABLE: self._key}
        )
        address = supervisor.wait_for_file(ready, child, timeout_s=ENDPOINT_START_S)
        self._api_base = f"http://{address.strip()}/v1"

    def stage(self, name: str, argv: Sequence[str]) -> None:
        """Run one command with its output on this terminal; exits with its code if it fails."""
        print(f"\n== {name}: python {' '.join(argv)}", flush=True)
        start = time.monotonic()
        env = {**os.environ, **(ON_CPU if self._settings.device == "cpu" else {}), KEY_VARIABLE: self._key}
        code = _call([sys.executable, *argv], self._repository, env)
        self.wall_s[name] = self.wall_s.get(name, 0.0) + time.monotonic() - start
        if code:
            sys.exit(code)
        print(f"== {name} took {self.wall_s[name]:.0f} s", flush=True)

    def roles(self, *names: str) -> list[str]:
        """Overrides that connect these roles to the endpoint."""
        return [f"simulators.{name}.api_base={self._api_base}" for name in names]

    def desk(self, *names: str, **has: bool) -> list[str]:
        """Overrides that connect a config of the desk to the endpoint, as `desk_addresses`."""
        return desk_addresses(self._api_base, *names, **has)

    def extra_overrides(self, stage: str) -> list[str]:
        on_gpu = ON_ONE_GPU.get(stage, ()) if self._settings.device == "cuda" else ()
        return [*on_gpu, *self._settings.overrides.get(stage, ())]

    # the stages, in order

    def make_model(self) -> None:
        argv = ["-m", "collab_megatron.demo.tiny_model", "--output", str(self.run_dir / "model")]
        self.stage("model", [*argv, "--seed", str(self._settings.seed)])

    def make_tasks(self) -> None:
        s = self._settings
        argv = ["-m", "collab_megatron.demo.task_files", "--output", str(self.run_dir / "data" / "tasks")]
        self.stage(
            "tasks", [*argv, "--train", str(s.conversations), "--heldout", str(s.held_out), "--seed", str(s.seed)]
        )

    def build_data(self) -> None:
        data = self.run_dir / "data"
        argv = [
            "tools/build_dataset.py",
            "conf/demo_data.yaml",
            *self.desk("user", "judge", "assistant", evaluates=False),
        ]
        argv += [f"problems={data / 'tasks' / 'train.jsonl'}", f"output={data / 'multiturn'}"]
        argv += [f"tokenizer={self.run_dir / 'model'}", f"seed={self._settings.seed}", *self.extra_overrides("data")]
        self.stage("data", argv)
        prepare = ["tools/prepare_dataset.py", "--dataset", str(data / "multiturn"), "--output", str(data)]
        self.stage("data", [*prepare, "--dataset-type", "sft"])  # holds out its own share, for the loss
        held_out = str(data / "tasks" / "heldout.jsonl")
        # only openings: a history whose question is answered teaches nothing about asking
        self.stage("data", [*prepare, "--dataset-type", "rl", "--validation", held_out, "--turns", "first"])

    def evaluate_base(self) -> None:
        argv = ["-m", "collab_megatron.evaluate", "conf/demo_evaluate.yaml", *self.desk("user", "judge", mixture=False)]
        argv += [*self._common(), f"model.path={self.run_dir / 'model'}", *self._rl_data()]
        argv += [f"output={self.run_dir / 'evaluation_base.json'}", *self.extra_overrides("evaluate")]
        self.stage("evaluate_base", argv)

    def train_sft(self) -> None:
        argv = ["-m", "collab_megatron.train_sft", "conf/demo_sft.yaml", *self._common()]
        data = self.run_dir / "data"
        argv += [f"model.path={self.run_dir / 'model'}", f"data.train={data / 'sft_train.parquet'}"]
        argv += [f"data.validation={data / 'sft_validation.parquet'}", "train.eval_interval=300"]
        argv += [
            f"export_hf={self.run_dir / 'sft_hf'}",
            *self._steps(self._settings.sft_steps),
            *self.extra_overrides("sft"),
        ]
        self.stage("sft", argv)

    def train_rl(self, name: str = "rl", run_dir: Path | None = None, overrides: Sequence[str] = ()) -> None:
        argv = ["-m", "collab_megatron.train_rl", self._settings.rl_config, *self.desk("user", "judge")]
        argv += [*self._common(run_dir), f"run.name={name}", f"model.path={self.run_dir / 'sft_hf'}", *self._rl_data()]
        self.stage(name, [*argv, *self._steps(self._settings.rl_steps), *self.extra_overrides("rl"), *overrides])

    def export(self) -> None:
        checkpoints = self.run_dir / "checkpoints" / "rl"
        newest = max(path for path in checkpoints.iterdir() if path.name.startswith("step_"))
        argv = ["tools/convert_checkpoint.py", "megatron-to-hf", "--checkpoint", str(newest)]
        self.stage("export", [*argv, "--output", str(self.run_dir / "hf")])
        probe = str(self.run_dir / "engine_probe" / "rl.json")
        self.stage("proof", ["tools/check_export.py", "--hf", str(self.run_dir / "hf"), "--probe", probe])

    def _common(self, run_dir: Path | None = None) -> list[str]:
        return [f"run.dir={run_dir or self.run_dir}", f"run.seed={self._settings.seed}"]

    def _rl_data(self) -> list[str]:
        data = self.run_dir / "data"
        return [f"data.train={data / 'rl_train.parquet'}", f"data.validation={data / 'rl_validation.parquet'}"]

    def _steps(self, steps: int | None) -> list[str]:
        return [] if steps is None else [f"train.steps={steps}"]


def desk_addresses(api_base: str, *names: str, mixture: bool = True, evaluates: bool = True) -> list[str]:
    """Overrides of a config of the desk: the address of these roles, of the second user, of the evaluation's users."""
    places = [f"simulators.{name}" for name in names]
    places += [SECOND_USER] if mixture else []
    places += EVALUATION_USERS if evaluates else []
    return [f"{place}.api_base={api_base}" for place in places]


def _call(argv: Sequence[str], folder: Path, env: Mapping[str, str]) -> int:
    """The exit code of a command. An interrupt reaches it too, and it gets time to save its state."""
    with subprocess.Popen(argv, cwd=folder, env=env) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()  # Ctrl-C has reached it already, a signal to this process alone has not
            try:
                process.wait(STAGE_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def refuse_used_folder(run_dir: Path) -> None:
    """Raises UserError if the folder holds an earlier run, which the demo would overwrite."""
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UserError(f"{run_dir} is not empty: remove it (rm -r {run_dir}) or choose another with --run-dir")


def run_demo(settings: DemoSettings, repository: Path) -> dict[str, Any]:
    """Run all stages; returns the contents of RUN_DIR/summary.json."""
    from collab_megatron.demo.summary import write_summary  # reads files of the stages

    refuse_used_folder(settings.run_dir)
    pipeline = DemoPipeline(settings, repository)
    with Supervisor(settings.run_dir / "logs") as supervisor:
        pipeline.make_model()
        pipeline.make_tasks()
        pipeline.start_endpoint(supervisor)
        pipeline.build_data()
        pipeline.evaluate_base()
        pipeline.train_sft()
        pipeline.train_rl()
        pipeline.export()
    return write_summary(settings.run_dir, wall_s=pipeline.wall_s, settings=settings_json(settings))


ABLATION: Mapping[str, tuple[str, ...]] = {
    # the same budget on accuracy and tokens only, so that only the futures reward asking
    "rl_reply_only": ("rollout.num_repeat_rollouts=0", "reward.metric_weights={accuracy: 1.0, token_amount: -0.1}"),
    "rl_no_interactivity": ("reward.metric_weights={accuracy: 1.0, token_amount: -0.1}",),
}


def run_ablation(settings: DemoSettings, repository: Path) -> dict[str, Any]:
    """Two more RL runs from the SFT model of an earlier `run_demo`; adds their figures to its summary."""
    from collab_megatron.demo.summary import read_summary, write_summary

    earlier = read_summary(settings.run_dir)
    pipeline = DemoPipeline(settings, repository)
    pipeline.wall_s = dict(earlier["wall_s"])
    with Supervisor(settings.run_dir / "logs") as supervisor:
        pipeline.start_endpoint(supervisor)
        for name, overrides in ABLATION.items():
            folder = settings.run_dir / "ablation" / name
            refuse_used_folder(folder)
            pipeline.wall_s.pop(name, None)
            pipeline.train_rl(name, folder, [*overrides, "train.eval_at_start=false"])
    return write_summary(settings.run_dir, wall_s=pipeline.wall_s, settings=earlier["config"]["settings"])


def settings_json(settings: DemoSettings) -> dict[str, Any]:
    """The settings as a mapping for the summary."""
    plain = {"seed": settings.seed, "conversations": settings.conversations, "held_out": settings.held_out}
    return {**plain, "sft_steps": settings.sft_steps, "rl_steps": settings.rl_steps}
