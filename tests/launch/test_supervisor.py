"""Children never outlive the supervisor, and their last sentence becomes ours."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from collab_megatron.errors import BudgetSpent, RunError
from collab_megatron.launch import supervisor as module
from collab_megatron.launch.ports import free_port, port_in_use
from collab_megatron.launch.supervisor import Supervisor


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_failed_child_ends_the_others_and_is_quoted(tmp_path: Path) -> None:
    said = r"engine ended with exit code 1: the disk is full; see .*engine.log"
    with pytest.raises(RunError, match=said), Supervisor(tmp_path) as supervisor:
        sleeper = supervisor.start("trainer", python("import time; time.sleep(60)"), {})
        supervisor.start("engine", python("import sys; print('error: the disk is full'); sys.exit(1)"), {})
        supervisor.wait_for([sleeper])
    assert sleeper.process.poll() is not None


@pytest.mark.parametrize("printed", [True, False])
@pytest.mark.slow
def test_a_spent_budget_keeps_its_exit_code_whichever_rank_ends_first(tmp_path: Path, printed: bool) -> None:
    """Rank 0 prints to our output and may end later; without it, the message comes from the other rank's log."""
    code = "import sys, time; time.sleep({}); print('error: the budget is spent', file=sys.stderr); sys.exit(3)"
    with Supervisor(tmp_path) as supervisor:
        if printed:
            supervisor.start("trainer-0", python(code.format(1)), {}, show=True, saves=True)
        last = supervisor.start("trainer-1", python(code.format(0)), {}, saves=True)
        last.process.wait()
        with pytest.raises(SystemExit if printed else BudgetSpent) as ended:
            supervisor.check()
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 3
    else:
        assert "trainer-1 ended with exit code 3: the budget is spent" in str(ended.value)


def test_a_users_mistake_keeps_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, Supervisor(tmp_path) as supervisor:
        child = supervisor.start("driver", python("import sys; print('error: no key'); sys.exit(2)"), {})
        supervisor.wait_for([child])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no key\n"


def test_a_killed_child_is_named_with_its_signal(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="engine ended with signal SIGKILL"), Supervisor(tmp_path) as supervisor:
        child = supervisor.start("engine", python("import time; time.sleep(60)"), {})
        os.kill(child.process.pid, signal.SIGKILL)
        supervisor.wait_for([child])


def test_grandchildren_end_too(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    with Supervisor(tmp_path) as supervisor:
        supervisor.start("engine", python(code), {})
        log = tmp_path / "engine.log"
        while not log.read_text().strip():
            time.sleep(0.05)
        grandchild = int(log.read_text())
        assert psutil.pid_exists(grandchild)
    assert gone(grandchild)


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from collab_megatron.launch.supervisor import Supervisor\n"
        f"with Supervisor(Path({str(tmp_path)!r})) as s:\n"
        "    child = s.start('engine', [sys.executable, '-c', 'import time; time.sleep(60)'], {})\n"
        "    print(child.process.pid, flush=True); time.sleep(60)\n"
    )
    launcher = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    assert gone(child)


def test_a_ready_file_that_never_comes_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"driver was not ready within 0\.3 s"), Supervisor(tmp_path) as supervisor:
        child = supervisor.start("driver", python("import time; time.sleep(60)"), {})
        supervisor.wait_for_file(tmp_path / "never", child, timeout_s=0.3)


def test_a_child_that_does_not_end_is_named_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"driver did not end within 0\.3 s"), Supervisor(tmp_path) as supervisor:
        child = supervisor.start("driver", python("import time; time.sleep(60)"), {})
        supervisor.wait_for([child], timeout_s=0.3)


def test_ports() -> None:
    port = free_port()
    assert not port_in_use("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert port_in_use("127.0.0.1", port)


@pytest.mark.slow
def test_others_than_essential_children_end_without_us(tmp_path: Path) -> None:
    ticks = []
    with Supervisor(tmp_path) as supervisor:
        helper = supervisor.start(
            "helper", python("import time; time.sleep(0.3); raise SystemExit(3)"), {}, essential=False
        )
        trainer = supervisor.start("trainer", python("import time; time.sleep(1.5)"), {})
        supervisor.wait_for([trainer], poll_s=0.02, tick=lambda: ticks.append(helper.ended()))
        assert (helper.ended(), trainer.ended()) == ("exit code 3", "exit code 0")
        assert ticks[0] is None
        assert ticks[-1] == "exit code 3"
        with pytest.raises(RunError, match="helper ended with exit code 3"):
            supervisor.fail(helper)


def test_a_killed_group_is_gone_when_its_last_process_is(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.start("engine", python(code), {}, essential=False)
        log = tmp_path / "engine.log"
        while not log.read_text().strip():
            time.sleep(0.05)
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait()
        assert not supervisor.is_gone(child)  # what it started goes on
        supervisor.kill(child)
        deadline = time.monotonic() + 5
        while not supervisor.is_gone(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert gone(int(log.read_text()), within_s=0.1)


def test_a_stopped_child_ends_with_the_others(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.start("engine", python("import time; time.sleep(60)"), {})
        os.kill(child.process.pid, signal.SIGSTOP)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5  # TERM was enough
    assert child.ended() == "signal SIGTERM"


SAVER = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(1.5)
    Path(sys.argv[1]).write_text("saved")
    sys.exit(130)

signal.signal(signal.SIGTERM, save)
Path(sys.argv[1] + ".ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("all_there", [True, False])
@pytest.mark.slow
def test_those_that_save_come_first_and_get_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], all_there: bool
) -> None:
    """While the others still run; but none waits for a save that cannot be, because one of its ranks has ended."""
    monkeypatch.setattr(module, "GRACE_S", 0.3)
    with Supervisor(tmp_path / "logs", save_grace_s=60) as supervisor:
        engine = supervisor.start("engine", python("import time; time.sleep(60)"), {})
        files = [tmp_path / f"rank{rank}" for rank in range(2)]
        ranks = [
            supervisor.start(f"trainer-{rank}", [*python(SAVER), str(file)], {}, saves=True)
            for rank, file in enumerate(files)
        ]
        deadline = time.monotonic() + 20
        while not all(file.with_name(file.name + ".ready").exists() for file in files):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if not all_there:
            supervisor.kill(ranks[1])
            ranks[1].process.wait(10)
        supervisor.end_all()
    assert [file.exists() for file in files] == [all_there, all_there]
    assert engine.ended() == "signal SIGTERM"
    assert ("trainer-0, trainer-1 may take 60 s to save" in capsys.readouterr().err) == all_there


def test_the_grace_time_of_those_that_save_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAY_S", 0.1)
    with Supervisor(tmp_path, save_grace_s=0.2) as supervisor:
        stuck = supervisor.start(
            "trainer-0",
            python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); time.sleep(60)"),
            {"PYTHONUNBUFFERED": "1"},
            saves=True,
        )
        deadline = time.monotonic() + 20
        while not (tmp_path / "trainer-0.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert stuck.ended() == "signal SIGKILL"


def test_a_rank_that_was_signalled_alone_ends_the_run_as_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, Supervisor(tmp_path) as supervisor:
        ranks = [
            supervisor.start(f"trainer-{rank}", python("raise SystemExit(130)"), {}, saves=True) for rank in range(2)
        ]
        supervisor.wait_for(ranks)
    assert ended.value.code == 130
    assert "was interrupted" in capsys.readouterr().err


LAUNCHER = """
import sys, time
from pathlib import Path
from collab_megatron import signals
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.errors import run_cli

signals.SAME_S = float(sys.argv[2])

def main():
    with Supervisor(Path(sys.argv[1]), save_grace_s=30) as supervisor:
        code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('told', flush=True))"
        code += "; print('ready', flush=True); [time.sleep(0.1) for _ in iter(int, 1)]"
        child = supervisor.start("trainer", [sys.executable, "-c", code], {}, saves=True)
        print(child.process.pid, flush=True)
        supervisor.wait_for([child])

run_cli(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.slow
def test_a_second_signal_ends_a_save_at_once_and_one_that_comes_with_the_first_does_not(
    tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "trainer.log"

    def wait_for(said: str) -> None:
        deadline = time.monotonic() + 30
        while not log.exists() or said not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ends(same_s: float) -> tuple[subprocess.Popen[str], int]:
        log.unlink(missing_ok=True)
        argv = python(LAUNCHER)
        launcher = subprocess.Popen([*argv, str(tmp_path), str(same_s)], stdout=subprocess.PIPE, text=True)
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        launcher.stdout.close()
        wait_for("ready")
        launcher.send_signal(number)
        wait_for("told")
        launcher.send_signal(number)
        return launcher, child

    launcher, child = ends(0.0)
    assert launcher.wait(20) == 130
    assert gone(child)
    if number == signal.SIGTERM:  # one request: the child is still waited for
        launcher, child = ends(1000.0)
        with pytest.raises(subprocess.TimeoutExpired):
            launcher.wait(1)
        assert not gone(child, within_s=0.1)
        launcher.kill()
        launcher.wait(20)
        os.killpg(child, signal.SIGKILL)


def test_the_environment_is_ours_with_additions_and_without_what_is_unset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OURS", "1")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    code = "import os; print([os.environ.get(name) for name in ('OURS', 'ADDED', 'PYTHONPATH')])"
    with Supervisor(tmp_path) as supervisor:
        supervisor.wait_for([supervisor.start("engine", python(code), {"ADDED": "2"}, unset=("PYTHONPATH",))])
    assert (tmp_path / "engine.log").read_text() == "['1', '2', None]\n"
