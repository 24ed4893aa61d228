"""The demo's endpoint as a process, and a build of its tasks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from collab_megatron.demo.task_files import write_tasks
from tests.conftest import REPOSITORY
from tests.tools.build_helpers import READY_S


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the demo's endpoint."""
    ready = tmp_path_factory.mktemp("desk") / "address"
    command = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", "0", "--ready-file", str(ready)]
    command += ["--items", str(REPOSITORY / "conf" / "mini")]
    process = subprocess.Popen([*command, "--die-with-parent"], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://{ready.read_text().strip()}/v1"
    finally:
        process.terminate()
        process.wait(READY_S)


@pytest.fixture
def config(desk: str, tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks", train=40, heldout=10, seed=1)
    role = {"api_base": desk, "api_key_env": None, "deadline_s": 20.0, "timeout_s": 20.0}
    raw: dict[str, Any] = {
        "problems": str(tmp_path / "tasks" / "train.jsonl"),
        "output": str(tmp_path / "built"),
        "simulators": {name: {**role, "model": f"hosted_vllm/desk-{name}"} for name in ("user", "judge", "assistant")},
        "reward": {
            "accuracy_verifier": "exact",
            "metric_weights": {"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.1},
        },
        "num_repeat_rollouts": 2,
    }
    path = tmp_path / "build.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
