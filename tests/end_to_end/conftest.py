"""The short demo, run once for all tests that check its output; runs that start warm, and cold ones on its data."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import ONE_USER, Ended, Run, Server, environment
from tests.end_to_end.running import Running


@pytest.fixture(scope="session")
def warm_run(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `run`, with processes that are forked from one that has their imports (tests/warm.py)."""
    if torch.version.cuda is not None:  # it may be touched while importing
        return run
    from tests.engine.real_servers import SGLANG
    from tests.warm import run_warm

    def ran(*argv: str, timeout_s: float = 240) -> Ended:
        log = tmp_path_factory.mktemp("warm") / "output"
        code = run_warm(log, argv, environment(), SGLANG, timeout_s)
        return Ended(code, log.read_text())

    return ran


@pytest.fixture(scope="session")
def short_demo(run: Run, warm_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """RUN_DIR of `tools/demo.py --short`, and what it said."""
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    start = run if os.environ.get("COLLAB_MEGATRON_FULL") else warm_run
    ended = start("tools/demo.py", "--short", "--run-dir", str(run_dir), timeout_s=560)
    assert ended.code == 0, ended.output[-6000:]
    return run_dir, ended


@pytest.fixture
def rl_command(short_demo: tuple[Path, Ended], desk: Server, engine: Server) -> Callable[..., list[str]]:
    """`python` arguments of a small RL run on the short demo's data, against the session's engine unless overridden."""
    demo, _ = short_demo

    def command(run_dir: Path, *overrides: str) -> list[str]:
        return [
            *("-m", "collab_megatron.train_rl", "conf/demo_rl.yaml", f"run.dir={run_dir}"),
            *(f"model.path={demo / 'sft_hf'}", f"data.train={demo / 'data' / 'rl_train.parquet'}"),
            *(f"data.validation={demo / 'data' / 'rl_validation.parquet'}", "evaluation.num_tasks=8"),
            *(f"simulators.user.api_base={desk.url}", f"simulators.judge.api_base={desk.url}", *ONE_USER),
            *("rollout.prompts_per_step=4", "rollout.num_replies=4", f"engine.urls=[{engine.url}]"),
            *("train.eval_at_start=false", "train.save_interval=1", "optimizer.warmup_steps=1", *overrides),
        ]

    return command


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(argv: list[str], *, warm: bool = False) -> Running:
        started.append(Running(argv, tmp_path / "launcher.log", warm and torch.version.cuda is None))
        return started[-1]

    yield begin
    for running in started:
        running.send(signal.SIGTERM)
        running._process.wait(30)
        shutil.rmtree(running.temporary)
