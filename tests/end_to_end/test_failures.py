"""Failures while running: one sentence, exit code 1, no process left, earlier checkpoints intact."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collab_megatron.launch.ports import free_port
from collab_megatron.rollout.record_files import read_trees
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete, read_info
from tests.conftest import DESK_KEY, Ended, Run, environment
from tests.end_to_end.another_user import require_nothing_for_another_user
from tests.end_to_end.running import Running
from tests.end_to_end.searched import require_files_clean, require_secrets_kept, secrets_of
from tests.end_to_end.strangers import knock_at_the_driver, require_closed_to_strangers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def require_figures_of_saved_steps(run_dir: Path) -> Path:
    """The newest checkpoint, once every step that it holds has its one line: none of them is run again."""
    newest = newest_complete(run_dir / "checkpoints" / "rl")
    assert newest is not None
    steps = [row["step"] for row in read_metrics(run_dir / "tensorboard" / "rl") if "train/tokens" in row]
    assert steps == list(range(1, read_info(newest).step + 1))
    return newest


@pytest.mark.full
@pytest.mark.timeout(600)  # a server starts twice
def test_a_stopped_scheduler_comes_again_and_the_last_engine_killed_ends_the_run(
    rl_command: Callable[..., list[str]], start: Callable[..., Running], tmp_path: Path
) -> None:
    settings = ["train.steps=500", "engine.urls=[]", "engine.max_restarts=1", "run.stopped_timeout_s=2"]
    running = start(rl_command(tmp_path / "run", *settings))
    running.wait_until("rl 2/500")
    shared = running.shared_memory()
    scheduler = running.child("sglang::scheduler")
    scheduler.suspend()
    # not by its HTTP side, which is well, nor by the deadline of a request or of the step
    running.wait_until(f"engine-0 was given up (process {scheduler.pid} (")
    running.wait_until("engine-0 is back")
    done = running.newest_step()
    running.wait_until(f"rl {done + 1}/500")  # the step under way was asked for again
    os.kill(running.child("sglang.launch_server").pid, signal.SIGKILL)
    ended = running.end()
    assert list(running.temporary.iterdir()) == []
    assert not [path for path in shared if path.exists()]
    assert ended.code == 1
    assert any("engine" in error for error in ended.errors), ended.output[-3000:]
    assert "Traceback" not in ended.output
    require_figures_of_saved_steps(tmp_path / "run")
    assert DESK_KEY not in ended.output


def test_a_stopped_driver_comes_again_and_the_run_ends_well(
    rl_command: Callable[..., list[str]], start: Callable[..., Running], tmp_path: Path
) -> None:
    settings = ["train.steps=5", "driver.max_staleness=1", "run.stopped_timeout_s=2"]
    running = start(rl_command(tmp_path / "run", *settings), warm=True)
    running.wait_until("rl 1/5")
    driver, command = running.started("collab_megatron.rollout.service")
    with knock_at_the_driver(command, running.family):
        running.wait_until("messages at ipc://")
    running.wait_until("rl 2/5")
    driver.suspend()
    running.wait_until("killing driver: process ")
    running.wait_until("driver ended with signal SIGKILL: restarting it")
    running.wait_until("rl 3/5")  # the processes again
    ended = running.end()
    assert ended.code == 0, ended.output[-3000:]
    assert "rl 5/5" in ended.output
    trees = list(read_trees(tmp_path / "run" / "conversations" / "rl"))
    assert Counter(tree["step"] for tree in trees) == dict.fromkeys(range(1, 6), 4)
    assert len({tree["task_id"] for tree in trees}) == len(trees)


def test_trainer_ranks_that_are_stopped_or_killed_start_again(
    rl_command: Callable[..., list[str]], start: Callable[..., Running], tmp_path: Path
) -> None:
    """Stopped: they save first. Killed: they go on from the newest checkpoint, with the journal's batches."""
    settings = ["train.steps=500", "train.save_interval=0", "run.stopped_timeout_s=2", "train.max_restarts=2"]
    running = start(rl_command(tmp_path / "run", *settings), warm=True)
    running.wait_until("rl 1/500")
    rank = running.rank(1)
    rank.suspend()
    running.wait_until(f"trainer-1 was given up (process {rank.pid} (")
    running.wait_until("all trainer ranks start again at step ")
    newest = newest_complete(tmp_path / "run" / "checkpoints" / "rl")
    assert newest is not None  # no save was due
    saved = read_info(newest).step
    assert saved >= running.newest_step() >= 1
    running.wait_until(f"rl {saved + 2}/500")
    os.kill(running.rank(0).pid, signal.SIGKILL)
    running.wait_until("trainer-0 ended with signal SIGKILL: restarting the trainer (2 of 2)")
    running.wait_until(f"all trainer ranks start again at step {saved + 1}")
    running.wait_until(f"rl {saved + 3}/500")
    metrics = [row["step"] for row in read_metrics(tmp_path / "run" / "tensorboard" / "rl") if "train/tokens" in row]
    assert metrics[: saved + 3] == list(range(1, saved + 4))  # no step twice, none missing
    os.kill(running.rank(1).pid, signal.SIGKILL)
    ended = running.end()
    assert ended.code == 1
    said = "error: trainer-1 ended with signal SIGKILL, after 2 restarts of the trainer (train.max_restarts=2)"
    assert ended.errors[-1] == said, ended.output[-3000:]


def test_a_term_signal_ends_everything(
    rl_command: Callable[..., list[str]], start: Callable[..., Running], run: Run, tmp_path: Path
) -> None:
    command = rl_command(tmp_path / "run", "train.steps=500", "train.save_interval=0", "engine.urls=[]")
    running = start(command)
    running.wait_until("rl 1/500")
    require_closed_to_strangers(running.family, tmp_path / "run")
    secrets = secrets_of(running.family, tmp_path / "run" / "logs" / "rl" / "latest")
    require_secrets_kept(running.family, [tmp_path, running.temporary], secrets)
    if os.getuid() == 0:  # only root can become another user
        require_nothing_for_another_user(running.family, tmp_path / "run", sorted(running.shared_memory()))
    shared = running.shared_memory()
    assert any(path.name.startswith("sglang_loads_") for path in shared)
    assert any(running.temporary.glob("*/tmp*")), "what SGLang makes lies in the run's own folder"
    second = run(*command)
    assert second.code == 2
    (sentence,) = second.output.splitlines()
    assert f"run.name=rl in run.dir={tmp_path / 'run'} is in use: process {running.pid} on " in sentence
    running.send(signal.SIGTERM)
    ended = running.end()
    assert list(running.temporary.iterdir()) == []
    assert not [path for path in shared if path.exists()]
    written = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert not [path for path in written if path.stat().st_mode & 0o077], "run.umask"
    assert not (tmp_path / "run" / "locks" / "rl.lock").exists()
    assert ended.code == 130
    newest = require_figures_of_saved_steps(tmp_path / "run")
    assert f"is saved: {newest}; run.resume=true continues" in ended.output
    assert " of 500 steps: the same command with run.resume=true goes on from it" in ended.output
    assert "never awaited" not in ended.output
    assert require_files_clean([tmp_path], secrets) == {"live.json"}


def test_simulators_that_go_away_end_the_run(
    rl_command: Callable[..., list[str]], start: Callable[..., Running], tmp_path: Path
) -> None:
    port = free_port()
    argv = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", str(port), "--die-with-parent"]
    with subprocess.Popen(argv, env=environment()) as endpoint:
        time.sleep(2)
        base = f"http://127.0.0.1:{port}/v1"
        overrides = [
            f"simulators.{role}.{key}"
            for role in ("user", "judge")
            for key in (f"api_base={base}", "timeout_s=10", "deadline_s=30", "max_attempts=2")
        ]
        running = start(rl_command(tmp_path / "run", "train.steps=500", "train.save_interval=0", *overrides), warm=True)
        running.wait_until("rl 1/500")
        endpoint.kill()
        ended = running.end()
    assert ended.code == 1
    # no save was due: it is the end of the run that saved, on both ranks
    newest = newest_complete(tmp_path / "run" / "checkpoints" / "rl")
    assert newest is not None
    assert f"is saved: {newest}; run.resume=true continues" in ended.output
    assert "were dropped" in ended.errors[-1]
    assert f"connection refused by 127.0.0.1:{port}" in ended.errors[-1]
    assert "status" not in ended.errors[-1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fills_up_while_saving(
    short_demo: tuple[Path, Ended], small_disk: Path, start: Callable[..., Running]
) -> None:
    demo, _ = short_demo
    running = start(
        [
            *("-m", "collab_megatron.train_sft", "conf/demo_sft.yaml", f"run.dir={small_disk}", "export_hf=null"),
            *(f"model.path={demo / 'model'}", f"data.train={demo / 'data' / 'sft_train.parquet'}"),
            *("train.steps=2000", "train.save_interval=20", "batch_size=16", "optimizer.warmup_steps=1"),
        ],
        warm=True,
    )
    running.wait_until("sft 40/2000")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:  # all but 4 MB: less than one checkpoint
        while (left := shutil.disk_usage(small_disk).free - 4 * 2**20) > 0:
            try:
                file.write(b"\0" * min(left, 2**20))
            except OSError as error:  # a save that was under way has taken the rest
                if error.errno != errno.ENOSPC:
                    raise
                break
    ended = running.end()
    assert ended.code == 1
    assert "disk" in ended.errors[-1], ended.output[-3000:]
    newest = newest_complete(small_disk / "checkpoints" / "sft")
    assert newest is not None
    assert not list((small_disk / "checkpoints" / "sft").glob("*.tmp"))


@pytest.mark.parametrize("module", ["train_rl", "train_sft", "evaluate"])
def test_mistakes_on_the_command_line_end_with_two(run: Run, module: str) -> None:
    conf = {"train_rl": "demo_rl", "train_sft": "demo_sft", "evaluate": "demo_evaluate"}[module]
    begin = time.monotonic()
    ended = run("-m", f"collab_megatron.{module}", f"conf/{conf}.yaml", "model.pth=x", timeout_s=30)
    assert ended.code == 2
    assert ended.output.count("\n") == 1
    assert "did you mean 'path'?" in ended.output
    assert time.monotonic() - begin < 20
