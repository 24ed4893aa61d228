"""Servers die, hang, are given up and come again: real processes that answer /health, in place of SGLang."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import EngineCommand
from collab_megatron.errors import RunError, UserError
from collab_megatron.launch import fleet as fleet_module
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.fleet import Fleet
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.wire.roster import EngineEntry, RosterFolder

pytestmark = pytest.mark.slow

# a server with a child, as SGLang has: argv is port and seconds until it is ready
SERVER = """
import http.server, subprocess, sys, time
port, slow_s = int(sys.argv[1]), float(sys.argv[2])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
began = time.monotonic()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(0.1)  # SGLang takes its time over /health too
        ready = time.monotonic() - began >= slow_s
        self.send_response(200 if ready or self.path != "/health" else 503)
        self.end_headers()
        self.wfile.write(b'{"tp_size": 4}')

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def command(port: int, slow_s: float = 0.0) -> EngineCommand:
    return EngineCommand((sys.executable, "-c", SERVER, str(port), str(slow_s)), {}, f"http://127.0.0.1:{port}")


def build(number: int, port: int) -> EngineCommand:
    return command(port)


def saying(code: str) -> Callable[[int, int], EngineCommand]:
    return lambda number, port: EngineCommand((sys.executable, "-c", code), {}, f"http://127.0.0.1:{port}")


class Stage:
    """A supervisor, a roster folder and the fleets between them."""

    def __init__(self, tmp_path: Path, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.folder = RosterFolder(tmp_path / "engines")

    def fleet(self, builder: Callable[[int, int], EngineCommand] = build, **settings: object) -> Fleet:
        section = EngineSection.model_validate({"startup_timeout_s": 10.0, **settings})
        fleet = Fleet(self.supervisor, section, self.folder, builder)
        fleet.start()
        return fleet

    def ready(self) -> list[EngineEntry]:
        return list(self.folder.read().ready)

    def names(self) -> list[str]:
        return [f"{entry.name}.{entry.life}" for entry in self.ready()]

    def pid(self, entry: EngineEntry) -> int:
        """Of the process that listens at the entry's address."""
        words = ("-c", entry.url.rsplit(":", 1)[1])
        family = psutil.Process().children(recursive=True)
        (found,) = [child.pid for child in family if all(word in child.cmdline() for word in words)]
        return found

    def poll_until(self, fleet: Fleet, state: Callable[[], bool], within_s: float = 8.0) -> None:
        """No poll may wait for a server; what is left is starting one, on a busy machine."""
        deadline = time.monotonic() + within_s
        while not state():
            begin = time.monotonic()
            fleet.poll()
            assert time.monotonic() - begin < 2.0
            assert time.monotonic() < deadline, self.folder.read()
            time.sleep(0.02)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    monkeypatch.setattr(fleet_module, "ASK_S", 0.1)
    monkeypatch.setattr(fleet_module, "POLL_S", 0.02)
    with Supervisor(tmp_path / "logs") as supervisor:
        yield Stage(tmp_path, supervisor)


def test_all_first_lives_come_up(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = stage.fleet(lambda number, port: command(port, slow_s=0.5 * number), count=2, tensor=2)
    assert (stage.ready(), stage.folder.read().coming) == ([], 2)
    fleet.wait_until_ready()
    roster = stage.folder.read()
    assert [(entry.name, entry.ranks, entry.life, entry.managed) for entry in roster.ready] == [
        ("engine-0", 2, 0, True),
        ("engine-1", 2, 0, True),
    ]
    assert roster.coming == 0
    assert fleet.urls == [entry.url for entry in roster.ready]
    assert f"engine-1 is ready at {fleet.urls[1]}" in capsys.readouterr().out


def test_a_server_that_dies_comes_again_elsewhere(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = stage.fleet(count=2)
    fleet.wait_until_ready()
    entry = stage.ready()[1]
    group = [stage.pid(entry), *(child.pid for child in psutil.Process(stage.pid(entry)).children())]
    assert len(group) == 2
    os.kill(group[0], signal.SIGKILL)  # only the server itself, as the kernel does when memory runs out
    stage.poll_until(fleet, lambda: stage.names() == ["engine-0.0"], within_s=1.0)
    assert stage.folder.read().coming == 1
    stage.poll_until(fleet, lambda: stage.names() == ["engine-0.0", "engine-1.1"])
    assert stage.folder.read().coming == 0
    assert stage.ready()[1].url != entry.url
    said = capsys.readouterr().out
    assert "engine-1 died (signal SIGKILL): restarting it (1 of 3)\n" in said
    assert f"engine-1 is back at {stage.ready()[1].url}" in said
    # its own child did not outlive it
    assert not [pid for pid in group if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_a_server_that_hangs_is_killed_once_it_is_given_up(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = stage.fleet()
    fleet.wait_until_ready()
    (entry,) = stage.ready()
    pid = stage.pid(entry)
    os.kill(pid, signal.SIGSTOP)
    fleet.poll()
    assert stage.names() == ["engine-0.0"]  # a silent one is not the launcher's to judge
    stage.folder.condemn(entry, "no answer\nfor 60 s")
    fleet.poll()
    assert (stage.ready(), stage.folder.read().coming) == ([], 1)
    stage.poll_until(fleet, lambda: not psutil.pid_exists(pid), within_s=2.0)
    stage.poll_until(fleet, lambda: stage.names() == ["engine-0.1"])
    assert "engine-0 was given up (no answer for 60 s): restarting it (1 of 3)\n" in capsys.readouterr().out
    for _ in range(20):  # the marker was of the earlier life
        fleet.poll()
    assert stage.names() == ["engine-0.1"]


def test_a_server_with_a_stopped_process_is_killed_and_comes_again(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when SGLang's scheduler or detokenizer is stopped: its HTTP side goes on."""
    with Supervisor(tmp_path / "logs", stopped_timeout_s=1) as stage.supervisor:
        fleet = stage.fleet()
        fleet.wait_until_ready()
        (entry,) = stage.ready()
        (helper,) = psutil.Process(stage.pid(entry)).children()
        helper.suspend()
        assert httpx.get(entry.url, timeout=30, trust_env=False).status_code == 200

        def again() -> bool:
            stage.supervisor.check()
            return stage.names() == ["engine-0.1"]

        stage.poll_until(fleet, again, within_s=30.0)
    said = f"engine-0 was given up (process {helper.pid} (python"
    assert said in (told := capsys.readouterr().out)
    assert "(run.stopped_timeout_s=1)): restarting it (1 of 3)\n" in told


def test_restarts_have_a_limit(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    first = iter([True])
    fleet = stage.fleet(
        lambda number, port: command(port) if next(first, False) else saying("raise SystemExit(7)")(number, port),
        max_restarts=2,
    )
    fleet.wait_until_ready()
    os.kill(stage.pid(stage.ready()[0]), signal.SIGTERM)
    stage.poll_until(fleet, lambda: stage.folder.read().coming == 0 and not stage.ready())
    said = capsys.readouterr().out
    assert "engine-0 died (exit code 7): restarting it (2 of 2)" in said
    assert "engine-0 died (exit code 7): not restarted (engine.max_restarts=2); see " in said
    for _ in range(20):
        fleet.poll()
    stage.supervisor.check()  # nor does it end the run
    assert fleet.urls == []


def test_a_server_of_a_lost_node_does_not_come_again(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = stage.fleet()
    fleet.wait_until_ready()
    monkeypatch.setattr(ChildProcess, "lost", "node2 is lost (no sign of life for 20 s)")
    stage.poll_until(fleet, lambda: stage.folder.read().coming == 0 and not stage.ready())
    for _ in range(20):
        fleet.poll()
    assert capsys.readouterr().out.splitlines()[1:] == ["engine-0 is gone: node2 is lost (no sign of life for 20 s)"]


def test_a_later_life_that_does_not_come_up_is_given_up(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    slow = iter([0.0])
    fleet = stage.fleet(
        lambda number, port: command(port, slow_s=next(slow, 60.0)), max_restarts=1, startup_timeout_s=1.0
    )
    fleet.wait_until_ready()
    os.kill(stage.pid(stage.ready()[0]), signal.SIGKILL)
    stage.poll_until(fleet, lambda: stage.folder.read().coming == 0 and not stage.ready())
    assert "engine-0 was not ready within 1 s: not restarted" in capsys.readouterr().out


def test_a_first_life_that_dies_ends_the_run(stage: Stage) -> None:
    fleet = stage.fleet(saying("print('error: no such flag --x'); raise SystemExit(1)"), count=2)
    with pytest.raises(RunError, match=r"engine-\d ended with exit code 1: no such flag --x; see "):
        fleet.wait_until_ready()


def test_a_first_life_that_ends_well_ends_the_run_too(stage: Stage) -> None:
    with pytest.raises(RunError, match="engine-0 ended with exit code 0"):
        stage.fleet(saying("pass")).wait_until_ready()


def test_a_first_life_that_is_late_ends_the_run(stage: Stage) -> None:
    with pytest.raises(RunError, match=r"engine-0 \(http://.*\) was not ready within 0\.5 s; see .*engine-0\.log"):
        stage.fleet(saying("import time; time.sleep(60)"), startup_timeout_s=0.5).wait_until_ready()


def test_the_others_of_the_run_are_watched_while_servers_start(stage: Stage) -> None:
    fleet = stage.fleet(saying("import time; time.sleep(60)"))
    stage.supervisor.start("driver", (sys.executable, "-c", "raise SystemExit('error: no key')"), {})
    with pytest.raises(RunError, match="driver ended with exit code 1: no key"):
        fleet.wait_until_ready()


def test_markers_of_an_earlier_attempt_do_not_count(stage: Stage) -> None:
    stage.folder.condemn(EngineEntry("engine-0", "", 1), "long ago")
    fleet = stage.fleet()
    fleet.wait_until_ready()
    fleet.poll()
    assert stage.names() == ["engine-0.0"]


def test_ports_follow_the_first(stage: Stage) -> None:
    port = next(port for port in iter(free_port, 0) if port < 65000)
    stage.fleet(count=3, port=port).wait_until_ready()
    assert [entry.url for entry in stage.ready()] == [f"http://127.0.0.1:{port + number}" for number in range(3)]


def test_given_servers_are_listed_and_never_started(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    port, nobody = free_port(), f"http://127.0.0.1:{free_port()}"
    given = stage.supervisor.start("theirs", command(port, slow_s=0.4).argv, {})
    fleet = stage.fleet(saying("never started"), urls=[f"http://127.0.0.1:{port}/", nobody], startup_timeout_s=1.5)
    assert stage.folder.read().coming == 0
    fleet.wait_until_ready()
    (entry,) = stage.ready()
    # as many ranks as it says itself
    assert (entry.url, entry.ranks, entry.managed) == (f"http://127.0.0.1:{port}", 4, False)
    assert f"no answer within 1.5 s from {nobody}: continuing without" in capsys.readouterr().out
    stage.folder.condemn(entry, "silent")
    fleet.poll()
    assert stage.ready() == [entry]
    assert given.process.poll() is None
    assert httpx.get(entry.url, trust_env=False).status_code == 200


def test_given_servers_of_which_none_answers_are_a_users_mistake(stage: Stage) -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    fleet = stage.fleet(urls=urls, startup_timeout_s=0.3)
    with pytest.raises(UserError, match=r"none of engine\.urls answered within 0\.3 s"):
        fleet.wait_until_ready()
