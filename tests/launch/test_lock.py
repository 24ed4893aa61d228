"""A run has one writer: a lock of a living owner is refused, one of a dead owner taken over."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from collab_megatron.config.sections import RunSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.launch import lock as lock_module
from collab_megatron.launch.lock import LockOwner, locked, run_lock

DEADLINE_S = 30.0
HOLD = """
import sys, time; from pathlib import Path
from collab_megatron.launch.lock import run_lock; from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.config.sections import RunSection
run = RunSection(dir=Path(sys.argv[1]), name="rl")
with run_lock(run) as lock, Supervisor(run.logs_dir, held=lock.held) as s:
    child = s.start("trainer-0", [sys.executable, "-c", sys.argv[2]], {}) if sys.argv[2] else None
    while child and not child.log.read_text(): time.sleep(0.02)
    print(child.process.pid if child else 0, flush=True)
    time.sleep(60)
"""
SAVING = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


@contextmanager
def holding(folder: Path, child: str = "") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that has the lock of run `rl`, and the number of its child."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), child], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def run_section(folder: Path, name: str = "rl") -> RunSection:
    return RunSection(dir=folder, name=name)


def test_a_second_run_of_the_same_name_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    with holding(tmp_path) as (first, _):
        said = (
            rf"run\.name=rl in run\.dir=\S+ is in use: process {first.pid} on \S+ has it since 20\d\d-.*choose another"
        )
        with pytest.raises(UserError, match=said), run_lock(run_section(tmp_path)):
            pass
        assert run_section(tmp_path).lock_file.exists()
        with run_lock(run_section(tmp_path, "other")):
            assert first.poll() is None


def test_a_finished_run_leaves_no_lock_and_no_empty_folder(tmp_path: Path) -> None:
    run = run_section(tmp_path / "runs" / "demo")
    with run_lock(run):
        assert run.lock_file.exists()
    assert list(tmp_path.iterdir()) == []
    with run_lock(run):
        (run.dir / "logs").mkdir()
    assert [path.name for path in run.dir.iterdir()] == ["logs"]


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    with holding(tmp_path) as (first, _):
        first.kill()
        first.wait()
        with run_lock(run_section(tmp_path)):
            assert json.loads(run_section(tmp_path).lock_file.read_text())["pid"] == os.getpid()


def test_a_number_that_another_process_got_since_is_no_owner(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(json.dumps(asdict(replace(LockOwner.this_process(), started=1))))
    with locked(path, "it", "choose another"):
        pass


def test_what_a_killed_launcher_left_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with holding(tmp_path, SAVING) as (first, child):
        first.kill()
        first.wait()

        def tell(watch: object, what: str) -> None:
            told.append(what)
            if len(told) == 2:
                os.kill(child, signal.SIGKILL)

        monkeypatch.setattr(lock_module._Watch, "_tell", tell)
        with run_lock(run_section(tmp_path)):
            pass
    assert len(told) >= 2
    assert set(told) == {f"process {first.pid} was killed: waiting until its children have ended"}


@pytest.mark.slow
def test_what_never_ends_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "LEFT_S", 0.5)
    with holding(tmp_path, SAVING) as (first, child):
        first.kill()
        first.wait()
        try:
            with (  # 0.0: it does not save
                pytest.raises(UserError, match=rf"its children still run \(processes {child}\): end them"),
                run_lock(run_section(tmp_path), 0.0),
            ):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A lock that another machine made."""
    path = run_section(tmp_path).lock_file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(asdict(replace(LockOwner.this_process(), host="node7", boot="another", pid=4711))))
    return path


def test_a_lock_of_another_machine_that_is_touched_is_refused(tmp_path: Path, elsewhere: Path) -> None:
    code = "import os, sys, time\nfor _ in range(300): time.sleep(0.1); os.utime(sys.argv[1])"
    beats = subprocess.Popen([sys.executable, "-c", code, str(elsewhere)])
    try:
        with pytest.raises(UserError, match="is in use: process 4711 on node7"), run_lock(run_section(tmp_path)):
            pass
    finally:
        beats.kill()
        beats.wait()


def test_a_lock_of_another_machine_that_stays_silent_is_taken_over(
    tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock_module, "SILENT_S", 0.5)
    with run_lock(run_section(tmp_path)):
        assert re.search(
            "process 4711 on node7 has it since .* waiting up to .* for a sign of life", capsys.readouterr().out
        )


def test_a_lock_of_another_machine_that_was_silent_for_an_hour_is_taken_over_at_once(
    tmp_path: Path, elsewhere: Path
) -> None:
    then = time.time() - 2 * lock_module.LONG_AGO_S
    os.utime(elsewhere, (then, then))
    with run_lock(run_section(tmp_path)):
        pass


def test_a_lock_that_a_kill_left_half_written_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "SILENT_S", 0.5)
    path = tmp_path / "run.lock"
    path.write_text('{"host": "no')
    with locked(path, "it", "choose another"):
        pass


def test_the_owner_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)
    with run_lock(run_section(tmp_path)):
        before = run_section(tmp_path).lock_file.stat().st_mtime_ns
        deadline = time.monotonic() + DEADLINE_S
        while run_section(tmp_path).lock_file.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_an_owner_whose_lock_was_taken_over_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.05)
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(RunError, match="is lost"), run_lock(run_section(tmp_path)) as lock:
            code = "import time; time.sleep(60)"
            child = subprocess.Popen([sys.executable, "-c", code], pass_fds=lock.held)
            path = run_section(tmp_path).lock_file
            path.unlink()
            path.touch()
            child.wait(DEADLINE_S)
            time.sleep(DEADLINE_S)
        assert child.wait(DEADLINE_S) == -signal.SIGKILL, "it must not save into a run that is another's"
        assert path.exists()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "demo"):
        with (
            pytest.raises(UserError, match=r"/file is a file, but a folder .*choose another"),
            run_lock(run_section(folder)),
        ):
            pass
