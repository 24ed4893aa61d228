"""Driver processes that are killed or break come again at their address; real processes, with a small script for the
driver."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collab_megatron.config.sections import DriverSection
from collab_megatron.errors import EXIT_UNEXPECTED, RunError
from collab_megatron.launch import drivers as drivers_module
from collab_megatron.launch.cli import shard_file
from collab_megatron.launch.drivers import Drivers, driver_command
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.wire.live_file import live_file

# appends its arguments to argv[1], writes its ready file unless told not to, and sleeps
SCRIPT = """
import json, sys, time
story, ready, *rest = sys.argv[1:]
with open(story, "a") as file:
    file.write(json.dumps(rest) + "\\n")
if ready == "ready":
    open(rest[rest.index("--ready-file") + 1], "w").write(rest[rest.index("--address") + 1])
time.sleep(60)
"""
MISTAKE = "import sys; print('error: no key'); sys.exit(2)"
BUG = f"import sys; print('KeyError: 7'); sys.exit({EXIT_UNEXPECTED})"
FAILURE = "import sys; print('error: the disk is full'); sys.exit(1)"


class Stage:
    """Drivers that run a script, and what their lives were told."""

    def __init__(self, supervisor: Supervisor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.supervisor, self._folder, self._patch = supervisor, folder, monkeypatch
        self._story = folder / "story"

    def drivers(self, script: str = SCRIPT, *, ready: bool = True, **section: int) -> Drivers:
        argv = [sys.executable, "-c", script, str(self._story), "ready" if ready else "not"]
        self._patch.setattr(drivers_module, "driver_command", lambda resolved, tokens: argv)
        drivers = Drivers(self.supervisor, DriverSection(**section), Path("none"), 64)
        drivers.start(7)
        return drivers

    def lives(self) -> list[dict[str, str]]:
        """The options of every life so far, in the order in which they began."""
        told = [json.loads(line) for line in self._story.open()] if self._story.exists() else []
        return [dict(zip(words[::2], words[1::2], strict=True)) for words in told]

    def wait_for_lives(self, count: int, *, ready: int = 0) -> list[dict[str, str]]:
        files = [shard_file(self.supervisor.scratch / "driver", shard) for shard in range(ready)]
        wait_until(lambda: len(self.lives()) >= count and all(file.exists() for file in files))
        return self.lives()

    def kill(self, drivers: Drivers, shard: int = 0) -> None:
        """And look after them until another one was started."""
        old = drivers.children[shard]
        os.kill(old.process.pid, signal.SIGKILL)
        wait_until(lambda: drivers.poll() or drivers.children[shard] is not old)  # type: ignore[func-returns-value]


def wait_until(state: Callable[[], object], within_s: float = 15.0) -> None:
    deadline = time.monotonic() + within_s
    while not state():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with Supervisor(tmp_path / "logs") as supervisor:
        yield Stage(supervisor, tmp_path, monkeypatch)


def test_a_killed_driver_comes_again_at_its_address(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    drivers = stage.drivers(shards=2)
    stage.wait_for_lives(2, ready=2)
    first, other = drivers.children
    stage.kill(drivers, shard=0)
    lives = stage.wait_for_lives(3)
    assert capsys.readouterr().out == "driver-0 ended with signal SIGKILL: restarting it\n"
    assert drivers.children[0].process.pid != first.process.pid
    assert drivers.children[1] is other
    assert other.process.poll() is None
    stage.supervisor.check()  # nothing of it ends the run
    (before,) = (life for life in lives[:2] if life["--shard"] == "0")
    assert before["--first-step"] == "7"
    assert lives[2] == {name: value for name, value in before.items() if name != "--first-step"}
    assert {life["--shard"] for life in lives[:2]} == {"0", "1"}
    assert len({life["--address"] for life in lives}) == 2
    (token,) = {life["--token-file"] for life in lives}
    assert stat.S_IMODE(os.stat(token).st_mode) == 0o600
    assert len(Path(token).read_text()) == 64


def test_one_that_an_unexpected_exception_ended_comes_again_a_few_times(stage: Stage) -> None:
    drivers = stage.drivers(BUG, max_restarts=2)
    lives = []
    with pytest.raises(RunError, match=r"driver ended with exit code 70 after 2 restarts"):
        while True:
            (child,) = drivers.children
            lives.append(child)
            assert child.process.wait(15) == EXIT_UNEXPECTED
            stage.supervisor.check()  # nothing of it ends the run
            wait_until(lambda: drivers.poll() or drivers.children != lives[-1:])  # type: ignore[func-returns-value]
    assert len(lives) == 3


def test_a_stopped_driver_is_killed_and_comes_again(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    drivers = stage.drivers()
    stage.wait_for_lives(1, ready=1)
    (old,) = drivers.children
    old.hung = "it is stopped"  # by the supervisor: tests/launch/test_stopped.py
    os.kill(old.process.pid, signal.SIGSTOP)
    wait_until(lambda: drivers.poll() or drivers.children[0] is not old)  # type: ignore[func-returns-value]
    assert len(stage.wait_for_lives(2)) == 2
    told = capsys.readouterr().out
    assert told == "killing driver: it is stopped\ndriver ended with signal SIGKILL: restarting it\n"


def test_one_killed_before_it_was_ready_is_told_the_first_step_again(stage: Stage) -> None:
    """It may not have taken the lines of an earlier attempt out yet."""
    drivers = stage.drivers(ready=False)
    stage.wait_for_lives(1)
    stage.kill(drivers)
    before, after = stage.wait_for_lives(2)
    assert after == before
    assert after["--first-step"] == "7"


def test_one_that_is_killed_too_often_ends_the_run(stage: Stage) -> None:
    drivers = stage.drivers(max_restarts=2)
    for life in (1, 2):
        stage.wait_for_lives(life)
        stage.kill(drivers)
    stage.wait_for_lives(3)
    with pytest.raises(RunError, match=r"driver ended with signal SIGKILL after 2 restarts \(dri"):
        stage.kill(drivers)
    assert len(stage.lives()) == 3


def test_each_shard_has_restarts_of_its_own(stage: Stage) -> None:
    drivers = stage.drivers(shards=2, max_restarts=1)
    stage.wait_for_lives(2)
    stage.kill(drivers, shard=0)
    stage.kill(drivers, shard=1)
    assert len(stage.wait_for_lives(4)) == 4
    with pytest.raises(RunError, match="driver-1 ended with signal SIGKILL"):
        stage.kill(drivers, shard=1)


@pytest.mark.parametrize("script, code", [(MISTAKE, 2), (FAILURE, 1)])
def test_one_that_ends_with_an_error_ends_the_run(
    stage: Stage, script: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    drivers = stage.drivers(script)
    (child,) = drivers.children
    assert child.process.wait(15) == code
    drivers.poll()
    assert drivers.children == [child]  # it is not started again
    if code == 2:
        with pytest.raises(SystemExit) as ended:
            stage.supervisor.check()
        assert ended.value.code == 2
        assert capsys.readouterr().err == "error: no key\n"
    else:
        with pytest.raises(RunError, match="driver ended with exit code 1: the disk is full"):
            stage.supervisor.check()


def test_the_address_of_a_live_page_is_printed_once_and_again_when_it_changes(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    drivers = stage.drivers()
    stage.wait_for_lives(1, ready=1)
    file = live_file(stage.supervisor.logs_dir, 0)
    drivers.poll()
    assert capsys.readouterr().out == ""
    for url in ("http://127.0.0.1:8001", "http://127.0.0.1:8002"):
        file.write_text(json.dumps({"url": url, "key": "a-secret"}))
        drivers.poll()
        drivers.poll()
        said = capsys.readouterr().out
        assert said == f"live page of driver: {url} (any user name; the password is the key in {file})\n"


def test_one_that_has_ended_well_stays_away(stage: Stage) -> None:
    drivers = stage.drivers("pass")
    (child,) = drivers.children
    assert child.process.wait(15) == 0
    drivers.poll()
    stage.supervisor.check()
    assert drivers.children == [child]


def test_the_command_is_that_of_the_service() -> None:
    command = driver_command(Path("run/resolved.yaml"), 512)
    assert command[1:] == [
        *("-m", "collab_megatron.rollout.service", "run/resolved.yaml"),
        *("--max-context-tokens", "512"),
    ]
