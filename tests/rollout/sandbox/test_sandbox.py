"""Hostile programs in the sandbox. Where an attack needs no rights, the test shows that it works without isolation."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import pytest
import uvloop

from collab_megatron.errors import UserError
from collab_megatron.rollout.sandbox import sandbox as module
from collab_megatron.rollout.sandbox.launcher import ARCHITECTURES, DENIED, SETUP
from collab_megatron.rollout.sandbox.sandbox import LAUNCHER, Sandbox, SandboxRun
from tests.rollout.sandbox.programs import HURRIED, LIMITS, run, wait_for

COLUMN = ARCHITECTURES.get(platform.machine(), (0,))[0]
SYSTEM_PYTHON = Path("/usr/bin/python3")
ORDINARY_USER = 12345


@pytest.fixture(scope="module")
def isolated() -> Sandbox:
    try:
        return Sandbox(LIMITS)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def hurried(isolated: Sandbox) -> Sandbox:
    return Sandbox(HURRIED)


@pytest.fixture
def bystander(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user that is none of the sandbox's business, with a key in its environment."""
    with subprocess.Popen(["sleep", "60"], env={"OTHER_API_KEY": f"secret-{mark}"}) as process:
        yield process
        assert process.poll() is None
        process.kill()


def test_a_program_runs_and_its_output_comes_back(isolated: Sandbox) -> None:
    code = "import sys; print(sys.stdin.read().upper()); print('said', file=sys.stderr); sys.exit(3)"
    assert run(isolated, code, b"hello") == SandboxRun("ended", 1, b"HELLO\n", "said\n")
    assert run(isolated, "import numpy; print(numpy.arange(3).sum())") == SandboxRun("ended", 0, b"3\n", "")


def test_the_umask_of_a_run_does_not_lock_programs_out(isolated: Sandbox) -> None:
    """run.umask is 077 by default; the program has another user id than the folders of its root."""
    before = os.umask(0o077)
    try:
        ran = run(isolated, "import numpy, os; print(os.listdir('/etc') != [], os.umask(0))")
    finally:
        os.umask(before)
    assert ran == SandboxRun("ended", 0, b"True 18\n", "")


@pytest.mark.parametrize("below", ["/tmp", "/home"])
def test_an_interpreter_below_a_hidden_folder(isolated: Sandbox, below: str) -> None:
    """As a user's venv in his home; what lies next to it stays hidden."""
    if not os.access(below, os.W_OK):
        pytest.skip(f"{below} cannot be written")
    with tempfile.TemporaryDirectory(dir=below) as folder:
        own = Path(folder) / "venv"
        venv.create(own, symlinks=True)
        (Path(folder) / "key").write_text("secret")
        sandbox = Sandbox(LIMITS, python=own / "bin" / "python")
        ran = run(sandbox, f"import os, sys; print(sys.prefix, os.listdir({folder!r}), os.listdir('/home'))")
    seen = "[]" if below == "/tmp" else repr([Path(folder).name])
    assert ran == SandboxRun("ended", 0, f"{own} ['venv'] {seen}\n".encode(), "")


def test_a_fork_bomb_ends_with_its_sandbox(isolated: Sandbox, mark: str) -> None:
    code = """
import os, sys
first = os.getpid()
while True:
    try:
        if os.fork():
            print("forked", flush=True)
    except OSError:
        if os.getpid() == first:  # the others go on until the end of the sandbox
            print("refused", flush=True)
            sys.exit()
"""
    ran = run(Sandbox(replace(LIMITS, memory_mb=2048)), code, mark=mark)
    assert ran.ended == "ended"
    assert b"refused" in ran.result
    assert 0 < ran.result.count(b"forked") <= LIMITS.processes  # the end of the first one lets another begin


@pytest.mark.slow
def test_a_memory_bomb_is_ended(isolated: Sandbox, mark: str) -> None:
    ran = run(isolated, "kept = []\nwhile True: kept.append(bytearray(10 << 20))", mark=mark)
    assert (ran.ended, ran.exit_code) == ("ended", 1)
    assert "MemoryError" in ran.output
    many = """
import os, time
for number in range(8):
    if not os.fork():
        kept = bytearray(os.urandom(1 << 20) * 100)  # each below the limit of a process
        time.sleep(60)
time.sleep(60)
"""
    assert run(isolated, many, mark=mark).ended == "memory"
    from_a_thread = f"import threading\ndef bomb():\n{indent(many, '    ')}\nthreading.Thread(target=bomb).start()"
    assert run(isolated, from_a_thread, mark=mark).ended == "memory"
    files = """
size = 0
try:
    with open("/tmp/big", "wb") as first, open("/dev/shm/big", "wb") as second:
        for file in (first, second):
            for _ in range(100):
                size += file.write(bytes(10 << 20))
                file.flush()
except OSError as error:
    print(error)
"""
    ran = run(isolated, files, mark=mark)
    assert b"No space left" in ran.result or b"File too large" in ran.result
    hidden = f"import ctypes; print(ctypes.CDLL(None).syscall({DENIED['memfd_create'][COLUMN]}, b'x', 0))"
    assert run(isolated, hidden, mark=mark).result == b"-1\n"  # memfd_create: memory that no process shows


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time; signal.pthread_sigmask(0, range(1, 65)); time.sleep(60)",
    ],
)
@pytest.mark.slow
def test_an_endless_loop_meets_its_deadline(hurried: Sandbox, mark: str, code: str) -> None:
    start = time.monotonic()
    assert run(hurried, code, mark=mark).ended == "timeout"
    assert time.monotonic() - start < HURRIED.time_s + module.GRACE_S + 5


def _way_below(folder: Path, path: Path) -> tuple[str, ...]:
    """The name in `folder` that leads to `path`; none if it is elsewhere."""
    return path.relative_to(folder).parts[:1] if path.is_relative_to(folder) else ()


def test_nothing_can_be_written_outside(isolated: Sandbox, tmp_path: Path) -> None:
    home = Path.home()
    targets = [tmp_path / "x", home / "x", Path("/usr/x"), Path("/etc/x"), Path("/x"), Path(sys.prefix) / "x"]
    code = f"""
import os
for target in {[str(target) for target in targets]!r}:
    try:
        open(target, "w").write("x")
        print("wrote", target)
    except OSError as error:
        pass
for target in ("/tmp/x", os.path.expanduser("~/x")):
    open(target, "w").write("x")
import json
print(json.dumps([os.getcwd(), sorted(os.listdir("/tmp")), sorted(os.listdir(os.path.expanduser("~")))]))
"""
    before = set(os.listdir("/tmp"))
    ran = run(isolated, code)
    assert ran.output == ""
    # where Python is below one of the folders, the way to it shows
    shown = [sorted({"x", *_way_below(folder, Path(sys.prefix))}) for folder in (Path("/tmp"), home)]
    assert json.loads(ran.result) == ["/tmp", *shown]
    assert not any(target.exists() for target in targets)
    assert "x" not in set(os.listdir("/tmp")) - before


def test_files_of_this_machine_are_not_there(isolated: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    hidden = [tmp_path / "key", Path("/etc/shadow"), Path("/etc/hostname"), Path(__file__), Path("/var")]
    code = f"import os; print([name for name in {[str(path) for path in hidden]!r} if os.path.exists(name)])"
    assert run(isolated, code).result == b"[]\n"
    assert run(isolated, "import os; print(len(os.listdir(os.path.expanduser('~'))))").result == b"0\n"


READ_KEYS = """
import glob, os
found = [repr(dict(os.environ))]
for pattern in ("/proc/*/environ", "/proc/*/cmdline", "/proc/*/task/*/environ"):
    for name in glob.glob(pattern):
        try:
            found.append(open(name, "rb").read().decode(errors="replace"))
        except OSError:
            pass
print("\\n".join(found))
"""


def test_keys_cannot_be_read_from_the_environment_or_proc(
    isolated: Sandbox, bystander: subprocess.Popen[bytes], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"mine-{mark}")
    ran = run(isolated, READ_KEYS)
    assert ran.ended == "ended"
    assert b"HOME" in ran.result
    assert mark.encode() not in ran.result
    unsafe = run(Sandbox(LIMITS, unsafe=True), READ_KEYS)
    assert f"secret-{mark}".encode() in unsafe.result  # the attack is real: without isolation it finds the key in /proc
    assert f"mine-{mark}".encode() not in unsafe.result  # the environment is not handed on either way


def test_no_socket_reaches_anything(isolated: Sandbox) -> None:
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import socket
for address in (("127.0.0.1", {port}), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, timeout=1)
        print("connected", address)
    except OSError as error:
        print("refused")
"""
        assert run(isolated, code).result == b"refused\nrefused\n"
        unsafe = run(Sandbox(LIMITS, unsafe=True), code.replace(', ("1.1.1.1", 53)', ","))
        assert unsafe.result.startswith(b"connected")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_gigabyte_of_output_is_cut_off(isolated: Sandbox, mark: str, stream: str) -> None:
    code = f"import sys\nfor _ in range(1 << 14): sys.{stream}.write('x' * (1 << 16))\nprint('all written')"
    start = time.monotonic()
    ran = run(isolated, code, mark=mark)
    assert ran.ended == "output"
    assert len(ran.result) <= module.RESULT_BYTES + module.CHUNK
    assert len(ran.output) <= module.KEPT_BYTES
    assert time.monotonic() - start < 10


def test_its_parents_and_neighbors_cannot_be_killed(
    isolated: Sandbox, bystander: subprocess.Popen[bytes], mark: str
) -> None:
    code = f"""
import os, signal, time
for pid in (os.getppid(), 1, -1, {os.getpid()}, {bystander.pid}):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
time.sleep(0.2)
print("alive")
"""
    assert run(isolated, code, mark=mark) == SandboxRun("ended", 0, b"alive\n", "")
    assert bystander.poll() is None


def test_no_way_to_more_rights(isolated: Sandbox) -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x20000, 0x40000000):
    print(libc.unshare(flags), end=" ")
print(libc.ptrace(16, 1, 0, 0), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), end=" ")
words = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(words["CapEff"].strip(), words["NoNewPrivs"].strip(), words["Seccomp"].strip())
"""
    assert run(isolated, code).result == b"-1 -1 -1 -1 -1 0000000000000000 1 2\n"


def test_a_run_that_is_cancelled_leaves_nothing(isolated: Sandbox, mark: str) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(isolated.run(("-c", "import os, time; os.fork(); time.sleep(60)", mark), b""))
        await asyncio.to_thread(wait_for, mark)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(asyncio.wait_for(main(), 20))  # the fixture looks for what is left


def test_it_runs_on_the_drivers_event_loop(isolated: Sandbox, mark: str) -> None:
    async def main() -> list[SandboxRun]:
        programs = ("print(1)", "while True: print('x' * 65536)", "import os; os._exit(0)")
        return await asyncio.gather(*(isolated.run(("-c", code, mark), bytes(1 << 20)) for code in programs))

    said, flood, silent = uvloop.run(main())
    assert said == SandboxRun("ended", 0, b"1\n", "")
    assert flood.ended == "output"
    assert silent == SandboxRun("ended", 0, b"", "")


def test_where_the_kernel_refuses_the_reason_is_named(isolated: Sandbox) -> None:
    """For real: the launcher inside a sandbox, where unshare is refused."""
    spec = module._launch("isolated", LIMITS, sys.executable, (), ("-c", "print('ran')"), "/tmp")[-1]
    ran = asyncio.run(isolated.run(("-I", "-S", "-c", LAUNCHER.read_text(), spec), b""))
    assert (ran.result, ran.exit_code) == (b"", 1)
    assert "(unshare): Operation not permitted" in ran.output


def command_of_system_python(mode: module.Mode, code: str) -> list[str]:
    command = module._launch(mode, LIMITS, str(SYSTEM_PYTHON), (), ("-I", "-c", code), "/tmp")
    return [str(SYSTEM_PYTHON), *command[1:]]


@pytest.mark.parametrize("mode", ["isolated", "bubblewrap"])
def test_an_ordinary_user_has_the_same_sandbox(mode: module.Mode, mark: str) -> None:
    """With a user namespace, or bubblewrap, where the other tests run as root."""
    if os.geteuid() or not SYSTEM_PYTHON.exists():
        pytest.skip("it changes from root to a user without rights, and needs the system's Python")
    if mode == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    code = f"""
import os, time
count = 0
try:
    while True:
        if not os.fork():
            time.sleep(60)
        count += 1
except OSError:
    pass
seen = [name for name in os.listdir("/proc") if name.isdigit()]
try:
    open("/usr/x", "w")
except OSError as error:
    print(count, len(seen) < 40, error.errno, os.path.exists("/home") and os.listdir("/home"), {mark!r})
"""
    command = command_of_system_python(mode, code)
    ids = {"user": ORDINARY_USER, "group": ORDINARY_USER, "extra_groups": []}
    ran = subprocess.run(command, capture_output=True, timeout=60, env={}, cwd="/", check=False, text=True, **ids)  # type: ignore[call-overload]
    if ran.returncode == SETUP:
        pytest.skip(f"the kernel gives ordinary users no namespaces: {ran.stderr.strip()}")
    count, rest = ran.stdout.split(maxsplit=1)
    assert int(count) < LIMITS.processes, ran.stderr
    assert rest == f"True 30 [] {mark}\n"
    assert json.loads(command[-1])["mode"] == mode
