"""Real SGLang servers of tiny models, each started when a test first asks for it and shared by those that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import engine_command
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from tests.engine.real_servers import end_at_once, server_supervisor
from tests.trainer.parallel.tiny import make_model

START_S = 600.0  # 20 s on an idle machine; longer while other tests run
MOST = 3  # servers at a time; each is two processes and one per rank, about 0.7 GB each


@dataclass(frozen=True)
class TinyServer:
    """A server that was started with the weights in `folder`; a test that changed them has to put them back."""

    url: str
    pid: int
    ranks: int  # tensor-parallel
    dtype: torch.dtype
    folder: Path

    def control(self, timeout_s: float = 120.0) -> EngineControl:
        return EngineControl(self.url, timeout_s=timeout_s)


class Servers:
    """`servers(kind, tensor)`: the server of a kind (tests/trainer/parallel/tiny.py) on so many ranks.

    At most MOST run; the one used longest ago is ended first: keep the tests of one server together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[tuple[str, int, torch.dtype], tuple[TinyServer, Supervisor]] = {}

    def __call__(self, kind: str, tensor: int = 1, dtype: torch.dtype = torch.float32) -> TinyServer:
        key = (kind, tensor, dtype)
        if key not in self._running:
            while len(self._running) >= MOST:
                end_at_once(self._running.pop(next(iter(self._running)))[1])
            self._running[key] = self._start(*key)
        self._running[key] = self._running.pop(key)  # the latest stands last
        return self._running[key][0]

    def end_all(self) -> None:
        for _, supervisor in self._running.values():
            end_at_once(supervisor)
        self._running.clear()

    def _start(self, kind: str, tensor: int, dtype: torch.dtype) -> tuple[TinyServer, Supervisor]:
        name = f"{kind}-tp{tensor}-{str(dtype).removeprefix('torch.')}"
        folder = self._folder / name
        if not folder.exists():
            make_model(folder, kind, dtype)
        # the fraction leaves room for other processes: SGLang takes what they use while it loads for its own weights
        section = EngineSection(tensor=tensor, max_total_tokens=8192, max_running_requests=16, mem_fraction=0.5)
        command = engine_command(
            section,
            model_path=str(folder),
            dtype=str(dtype).removeprefix("torch."),
            device="cpu",
            port=free_port(),
            seed=1,
        )
        supervisor = server_supervisor(self._folder / "logs").__enter__()  # left in end_at_once
        child = supervisor.start(name, command.argv, command.env)
        control = EngineControl(command.url, timeout_s=120)
        try:
            control.wait_until_ready(timeout_s=START_S, alive=lambda: child.process.poll() is None)
        except BaseException:
            end_at_once(supervisor)
            raise
        finally:
            control.close()
        return TinyServer(command.url, child.process.pid, tensor, dtype, folder), supervisor


@pytest.fixture(scope="session")
def server_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """`server_for(kind, tensor, dtype=...)`; all are ended with the session."""
    servers = Servers(tmp_path_factory.mktemp("servers"))
    try:
        yield servers
    finally:
        servers.end_all()


@pytest.fixture(scope="session")  # so that pytest puts the tests of one server together, whatever file they are in
def tiny_server(server_for: Servers, request: pytest.FixtureRequest) -> TinyServer:
    """Indirectly parametrised with the arguments of `server_for`: its start does not count into the test's time."""
    return server_for(*request.param)
