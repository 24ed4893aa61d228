"""What many tests share: the demo's model folder, its endpoint, a real SGLang server, a real Slurm; each made once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import engine_command
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from tests.scheduling import LongAndShort, long_ones_first
from tests.slurm.cluster import SlurmCluster, running_cluster, why_not

REPOSITORY = Path(__file__).resolve().parents[1]
ONE_USER = ("simulators.user.mixture=[]", "evaluation.users={}")
"""Overrides of conf/demo_rl.yaml for tests that are not about several users."""
DESK_KEY = "a-key-for-tests-0123456789abcdef"

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("DEVICE") != "cuda":  # the tests are for the CPU, on a machine with GPUs too; tests/gpu skips then
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# in the background of a shell or under nohup these are ignored, and every process that a test starts would ignore them
for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


@dataclass(frozen=True)
class Server:
    """Something that answers HTTP."""

    url: str
    pid: int


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    output: str  # stdout and stderr

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


Run = Callable[..., Ended]
SLOW_FIXTURES = frozenset({"engine", "server_for", "slurm_cluster"})


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a real server or a real Slurm is slow; the long tests come first."""
    for item in items:
        if isinstance(item, pytest.Function) and not SLOW_FIXTURES.isdisjoint(item.fixturenames):
            item.add_marker(pytest.mark.slow)
    long_ones_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongAndShort:
    return LongAndShort(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No garbage collection while a failure is described: Python 3.11's parser, which pytest then uses, may end the run
    with an internal error if it happens inside (cpython#106905)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if collects:
            gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any] | None, dict[str, Any] | None]:
    """pytest-xdist can send no halves of surrogate pairs, which tests of hostile text print."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return type(value)(map(_encodable, value)) if isinstance(value, list | tuple) else value


def environment() -> dict[str, str]:
    return {**os.environ, "DESK_API_KEY": DESK_KEY, "PYTHONUNBUFFERED": "1"}


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """A command's main() that a test calls changes that of this process."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(scope="session")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    """Ends every process that a session's fixture started."""
    with Supervisor(tmp_path_factory.mktemp("logs")) as processes:
        yield processes


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model, randomly initialised, as a Hugging Face folder."""
    from collab_megatron.demo.tiny_model import write_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder, seed=3)
    return folder


@pytest.fixture(scope="session")
def desk(supervisor: Supervisor, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The demo's endpoint; its key is DESK_KEY."""
    ready = tmp_path_factory.mktemp("desk") / "address"
    argv = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", "0", "--ready-file", str(ready)]
    child = supervisor.start("endpoint", argv, {"DESK_API_KEY": DESK_KEY})
    address = supervisor.wait_for_file(ready, child, timeout_s=30)
    return Server(url=f"http://{address}/v1", pid=child.process.pid)


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real SGLang server holding `tiny_model` in fp32."""
    from tests.engine.real_servers import end_at_once, server_supervisor  # imports torch

    section = EngineSection(max_total_tokens=16384, max_running_requests=64)
    command = engine_command(
        section, model_path=str(tiny_model), dtype="float32", device="cpu", port=free_port(), seed=1
    )
    supervisor = server_supervisor(tmp_path_factory.mktemp("engine")).__enter__()  # left in end_at_once
    try:
        child = supervisor.start("engine", command.argv, command.env)
        control = EngineControl(command.url, timeout_s=120)
        control.wait_until_ready(timeout_s=180, alive=lambda: child.process.poll() is None)
        control.close()
        yield Server(url=command.url, pid=child.process.pid)
    finally:
        end_at_once(supervisor)


@pytest.fixture
def tiny_engine(engine: Server, tiny_model: Path) -> Server:
    """The session's server with the weights of `tiny_model`, whatever a training run has sent it since."""
    body = {"model_path": str(tiny_model), "weight_version": "default", "flush_cache": True}
    reply = httpx.post(f"{engine.url}/update_weights_from_disk", json=body, timeout=60, trust_env=False)
    assert reply.json()["success"], reply.text
    return engine


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A Slurm of two virtual nodes; skips with the reason where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def run() -> Run:
    """`run("-m", "collab_megatron.train_rl", ...)`: a Python command of this repository to its end."""

    def ran(*argv: str, timeout_s: float = 240) -> Ended:
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=REPOSITORY,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Ended(done.returncode, done.stdout)

    return ran
