"""A run's temporary folder is private, and gone after the run, a kill -9 of everything included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collab_megatron.launch.scratch import NEW, NEW_S, SHARED_MEMORY, ScratchFolder
from collab_megatron.launch.supervisor import Supervisor

DEADLINE_S = 30.0


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # tmp_path is made in the old one
    """TMPDIR of its own: a short one, as a Unix socket's address must be."""
    with tempfile.TemporaryDirectory(prefix="test_scratch_") as name:
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(name)


def launcher(folder: Path, child: str) -> subprocess.Popen[str]:
    """A process with a supervisor and one child, which has printed something; it prints the child's number and the
    scratch folder."""
    code = (
        "import sys, time; from pathlib import Path; from collab_megatron.launch.supervisor import Supervisor\n"
        f"with Supervisor(Path({str(folder)!r})) as s:\n"
        f"    child = s.start('child', [sys.executable, '-c', {child!r}], {{}})\n"
        "    while not child.log.read_text(): time.sleep(0.02)\n"
        "    print(child.process.pid, s.scratch, sep='\\n', flush=True); time.sleep(60)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str]) -> tuple[int, Path]:
    assert process.stdout is not None
    return int(process.stdout.readline()), Path(process.stdout.readline().strip())


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    stat = Path(f"/proc/{pid}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, f"process {pid} did not end"
        time.sleep(0.02)


def test_a_folder_is_private_and_goes_with_the_supervisor(temporary: Path, tmp_path: Path) -> None:
    code = "import os, tempfile; print(tempfile.NamedTemporaryFile(delete=False).name, os.environ['TMPDIR'])"
    with Supervisor(tmp_path) as supervisor:
        folder = supervisor.scratch
        supervisor.wait_for([supervisor.start("child", [sys.executable, "-c", code], {})])
        made, its = (tmp_path / "child.log").read_text().split()
        assert its == str(folder)
        assert Path(made).parent == folder
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(temporary.iterdir()) == []


def test_what_a_killed_launcher_left_goes_at_the_next_start(temporary: Path, tmp_path: Path) -> None:
    dead = launcher(
        tmp_path, "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    child, folder = lines(dead)
    (folder / "socket").touch()
    (folder / "weights").mkdir()
    (folder / "weights" / "shard").touch()
    dead.kill()
    dead.wait()
    ScratchFolder.create().remove()
    assert folder.exists(), "a child of that run is still there: it may use the folder"
    os.kill(child, signal.SIGKILL)
    wait_until_ended(child)
    ScratchFolder.create().remove()
    assert list(temporary.iterdir()) == []


def test_the_folder_of_a_run_that_goes_on_stays(temporary: Path) -> None:
    first, second = ScratchFolder.create(), ScratchFolder.create()
    assert first.folder.exists()
    first.remove()
    assert second.folder.exists()
    second.remove()


def test_folders_of_others_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ScratchFolder.create()
    os.close(elsewhere.held)
    (elsewhere.folder / "owner").write_text("another-host 12\n")
    (temporary / "target").mkdir()
    (temporary / "collab_run_link").symlink_to(temporary / "target")
    young = temporary / f"{NEW}1"
    young.mkdir()
    ScratchFolder.create().remove()
    assert elsewhere.folder.exists()
    assert (temporary / "target").exists()
    assert young.exists(), "somebody is about to take its lock"
    then = time.time() - 2 * NEW_S
    os.utime(young, (then, then))
    ScratchFolder.create().remove()
    assert not young.exists()


def test_shared_memory_of_killed_processes_goes_too(temporary: Path, tmp_path: Path) -> None:
    code = """if True:
        import mmap, multiprocessing, sys, time
        lock = multiprocessing.get_context("spawn").Lock()
        print(lock._semlock.name.strip("/"), flush=True)
        files = [open(name, "r+b") for name in sys.argv[1:]]
        maps = [mmap.mmap(file.fileno(), 0) for file in files]
        print(len(maps), flush=True)
        time.sleep(60)
    """
    mine, data, others = (SHARED_MEMORY / f"{name}_{os.getpid()}" for name in ("psm_mine", "dataset", "psm_others"))
    try:
        for file in (mine, data, others):
            file.write_bytes(bytes(64))
        with Supervisor(tmp_path) as supervisor:
            supervisor.start("child", [sys.executable, "-c", code, str(mine), str(data)], {})
            deadline = time.monotonic() + DEADLINE_S
            while not (said := (tmp_path / "child.log").read_text()).endswith("\n2\n"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            semaphore = SHARED_MEMORY / f"sem.{said.split()[0]}"
            assert semaphore.exists()
            supervisor.note_shared_memory()
            for child in supervisor._children:
                supervisor.kill(child)  # -9: nobody clears up
        assert not semaphore.exists()
        assert not mine.exists()
        assert data.exists(), "it is mapped, but no library made it"
        assert others.exists(), "no process of ours has it mapped"
    finally:
        for file in (mine, data, others):
            file.unlink(missing_ok=True)
