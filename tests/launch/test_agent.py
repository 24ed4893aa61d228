"""Node agents and the launcher's connection to them, with small processes in the place of engines and ranks."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from collab_megatron.errors import RunError, UserError
from collab_megatron.launch.agent import Agent
from collab_megatron.launch.job_link import JobLink
from collab_megatron.wire import job as messages
from collab_megatron.wire.curve import REFUSED, encrypt_client, encrypt_server
from collab_megatron.wire.sealed import NOBODY, Channel, new_half
from tests.launch.agents import KEY, WAIT_S, Job, running_job

SLEEP = "import time; time.sleep(60)"
READY = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); time.sleep(60)"
INPUTS = 10_000


def runs(pid: int) -> bool:
    """A zombie does not: its parent may never collect it."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    with running_job(tmp_path, monkeypatch, "gpu01", "gpu02") as found:
        found.join()
        yield found


def test_agents_join_and_start_processes_with_what_only_their_node_knows(job: Job) -> None:
    hello = job.link.hello("gpu02")
    assert hello is not None
    assert (hello.node, hello.address) == ("gpu02", "127.0.0.1")
    assert hello.cores >= 1
    show = "import os, sys; print(sys.argv[1:], os.environ['WHERE'], open(sys.argv[1]).read())"
    for node in ("gpu01", "gpu02"):
        job.start(node, show, "{scratch}/secret", "{address}:{port:a}", "{port:a} {port:b}", env={"WHERE": "{address}"})
    first, second = (job.until_ended(node) for node in ("gpu01", "gpu02"))
    for state in (first, second):
        assert (state.code, state.refused) == (0, "")
        assert state.tail.endswith("127.0.0.1 of the node")
    file, where, ports = first.tail.partition("[")[2].partition("]")[0].replace("'", "").split(", ")
    assert where == f"127.0.0.1:{ports.split()[0]}"
    assert len(set(ports.split())) == 2
    assert Path(file).parent != Path(second.tail[2:].partition("'")[0]).parent  # a scratch folder for each
    assert (job.folder / "gpu01" / "child.log").exists()
    assert (job.folder / "gpu02" / "child.log").exists()


def test_files_of_the_welcome_are_for_this_user_only(job: Job) -> None:
    show = "import os, sys; print([oct(os.stat(path).st_mode) for path in sys.argv[1:]])"
    job.start("gpu01", show, "{scratch}/secret", "{scratch}")
    wanted = [oct(stat.S_IFREG | 0o600), oct(stat.S_IFDIR | 0o700)]
    assert job.until_ended("gpu01").tail == str(wanted)


def test_a_process_is_ready_when_its_file_is_there_or_its_url_answers(job: Job) -> None:
    job.start("gpu01", READY, "{scratch}/ready", "tcp://{address}:7", ready_file="{scratch}/ready")
    assert job.until_ready("gpu01").address == "tcp://127.0.0.1:7"
    serve = (
        "import http.server, sys\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200 if self.path == '/health' else 404); self.end_headers()\n"
        "http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Health).serve_forever()\n"
    )
    job.start("gpu02", serve, "{address}", "{port:http}", probe_url="http://{address}:{port:http}")
    assert job.until_ready("gpu02").address.startswith("http://127.0.0.1:")


@pytest.mark.slow
def test_a_second_start_of_a_life_starts_nothing_and_the_next_life_does(job: Job) -> None:
    for _ in range(3):
        job.start("gpu01", READY, "{scratch}/ready", "first", ready_file="{scratch}/ready")
    first = job.until_ready("gpu01")
    job.start("gpu01", SLEEP, life=1)  # while the first one runs: it waits
    assert not job.link.wait_for(lambda: job.state("gpu01").life == 1, timeout_s=0.5)
    job.link.send("gpu01", messages.Kill("child", 0))
    assert job.link.wait_for(lambda: job.state("gpu01").life == 1, timeout_s=WAIT_S)
    assert not psutil.pid_exists(first.pid)
    second = job.state("gpu01")
    assert (second.code, second.address) == (None, "")  # not ready by the file of the first life
    job.link.send("gpu01", messages.Kill("child", 0))  # late: not of this life
    assert not job.link.wait_for(lambda: job.state("gpu01").code is not None, timeout_s=0.5)


def test_the_end_of_a_process_and_of_its_descendants_is_told(job: Job) -> None:
    job.start("gpu01", "import sys; print('the disk is full'); sys.exit(3)")
    state = job.until_ended("gpu01")
    assert (state.code, state.tail) == (3, "the disk is full")
    orphan = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    )
    job.start("gpu01", orphan, role="parent")
    assert job.link.wait_for(lambda: bool((s := job.link.role("gpu01", "parent")) and s.code == 0), timeout_s=WAIT_S)
    assert not job.state("gpu01", "parent").gone  # its GPU memory and ports are not free yet
    job.link.send("gpu01", messages.Kill("parent", 0))
    state = job.until_ended("gpu01", "parent")
    assert not runs(int(state.tail))


@pytest.mark.slow
def test_term_comes_first_and_kill_after_the_grace_time(job: Job) -> None:
    code = "import signal, sys, time; signal.signal(15, {}); open(sys.argv[1], 'w'); time.sleep(60)"
    polite, deaf = code.format("lambda *_: sys.exit(9)"), code.format("signal.SIG_IGN")
    for role, code in (("polite", polite), ("deaf", deaf)):
        job.start("gpu02", code, str(job.folder / role), role=role)
        assert job.link.wait_for((job.folder / role).exists, timeout_s=WAIT_S)
        job.link.send("gpu02", messages.End(role, 0, 0.5))
    assert job.until_ended("gpu02", "polite").code == 9
    assert job.until_ended("gpu02", "deaf").code == -signal.SIGKILL


def test_what_cannot_be_started_is_a_sentence(job: Job) -> None:
    job.link.send("gpu01", messages.Start("engine-0", 0, ("no/such/program",)))
    state = job.until_ended("gpu01", "engine-0")
    assert state.refused.startswith("gpu01: engine-0 could not be started: [Errno 2] No such file or directory")
    assert state.pid == 0


@pytest.mark.slow
def test_a_stopped_process_is_told_as_hung(job: Job) -> None:
    job.start("gpu01", SLEEP)
    assert job.link.wait_for(lambda: job.link.role("gpu01", "child") is not None, timeout_s=WAIT_S)
    os.kill(job.state("gpu01").pid, signal.SIGSTOP)
    assert job.link.wait_for(lambda: bool(job.state("gpu01").hung), timeout_s=WAIT_S)
    assert "has been stopped by a signal" in job.state("gpu01").hung
    job.link.send("gpu01", messages.Kill("child", 0))
    assert job.until_ended("gpu01").code == -signal.SIGKILL


@pytest.mark.slow
def test_a_shared_file_may_appear_late(job: Job) -> None:
    assert job.link.shared("gpu01") == ""
    (job.folder / "shared").write_text("random text\n")
    assert job.link.wait_for(lambda: job.link.shared("gpu01") == "random text", timeout_s=WAIT_S)


def test_at_the_end_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_job(tmp_path, monkeypatch, "gpu01") as job:
        job.join()
        job.start("gpu01", READY, "{scratch}/ready", "{scratch}", ready_file="{scratch}/ready")
        state = job.until_ready("gpu01")
        agent = job.agents["gpu01"]
    assert agent.code() == 0
    assert not psutil.pid_exists(state.pid)
    assert not Path(state.address).exists()


def test_a_node_that_does_not_report_is_named(tmp_path: Path) -> None:
    link = JobLink("127.0.0.1:*", KEY, [f"gpu{number}" for number in range(12)])
    with pytest.raises(RunError, match=r"12 of 12 nodes did not report within 0.2 s: gpu0, .*gpu7, \.\.\.; see"):
        link.wait_until_joined(lambda hello: messages.Welcome(str(tmp_path), "077", 0, 0), timeout_s=0.2)
    link.close()


@pytest.mark.slow
def test_without_its_launcher_an_agent_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_job(tmp_path, monkeypatch, "gpu01", lost_s=4.0, orphan_s=1.5) as job:
        job.join()
        job.start("gpu01", SLEEP)
        assert job.link.wait_for(lambda: job.link.role("gpu01", "child") is not None, timeout_s=WAIT_S)
        pid = job.state("gpu01").pid
        # the launcher says nothing any more
        assert job.agents["gpu01"].code() == 1
        assert not psutil.pid_exists(pid)


@pytest.mark.slow
def test_a_silent_node_is_lost_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_job(tmp_path, monkeypatch, "gpu01", "gpu02", lost_s=3.5) as job:
        job.join()
        silent = job.agents["gpu01"].agent
        blocked = threading.Event()
        send = silent._send

        def say_nothing(message: messages.Message) -> None:
            if not blocked.is_set():
                send(message)

        silent._send = say_nothing  # type: ignore[method-assign]
        blocked.set()
        assert job.link.wait_for(lambda: "gpu01" in job.link.lost, timeout_s=WAIT_S)
        assert job.link.lost == {"gpu01": "no sign of life for 3.5 s"}
        blocked.clear()  # the network is back
        assert job.link.wait_for(lambda: not job.agents["gpu01"].thread.is_alive(), timeout_s=WAIT_S)
        assert job.agents["gpu01"].code() == 0
        assert "gpu02" not in job.link.lost


def test_a_lost_message_is_said_again(job: Job) -> None:
    """Of the launcher: it was never sent. Its session goes on."""
    tell = job.link._tell
    job.link._tell = lambda node, message: None  # type: ignore[method-assign]
    job.start("gpu01", "print('started once')")
    job.link._tell = tell  # type: ignore[method-assign]
    assert job.until_ended("gpu01").tail == "started once"


def test_strangers_start_nothing_and_stop_nothing(job: Job) -> None:
    """10,000 messages on the launcher's port: noise, other keys, sealed messages of ours again."""
    rng = random.Random(3)
    begin = psutil.Process().memory_info().rss
    other = bytes(32)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        encrypt_client(stranger, KEY, "job")  # else ZeroMQ lets nothing through
        stranger.connect(f"tcp://{job.link.address}")
        hello = messages.Hello("gpu01", "10.6.6.6", 1, (), "0", "")
        again = Channel(KEY, new_half() + NOBODY, "agent").seal(messages.encode(hello))  # a second agent of a node
        for number in range(INPUTS):
            frames = [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 6))]
            if number % 3 == 1:
                frames = Channel(other, new_half() + NOBODY, "agent").seal(messages.encode(hello))
            elif number % 3 == 2:
                frames = again
            stranger.send_multipart(frames)
        assert job.link.wait_for(lambda: job.link.dropped.total() >= INPUTS, timeout_s=WAIT_S)
        assert not stranger.poll(200)  # no answer
    assert set(job.link.dropped) == {"malformed", "without the job's key", "of a second agent of a node"}
    assert job.link.dropped.total() == INPUTS
    said = job.link.dropped.news("launcher", job.link.address)
    assert said is not None
    assert f"dropped {INPUTS} messages" in said
    assert job.link.hello("gpu01") != hello
    assert psutil.Process().memory_info().rss - begin < 50 * 2**20
    job.start("gpu01", "print('well')")
    assert job.until_ended("gpu01").tail == "well"


def test_without_the_key_nothing_is_read(job: Job) -> None:
    """Not encrypted, or for another key: ZeroMQ ends the handshake, and no message arrives."""
    said = messages.encode(messages.Hello("gpu01", "", 1, (), "0", ""))
    hello = Channel(KEY, new_half() + NOBODY, "agent").seal(said)
    with zmq.Context() as context, context.socket(zmq.DEALER) as plain, context.socket(zmq.DEALER) as other:
        encrypt_client(other, bytes(32), "job")
        for stranger in (plain, other):
            stranger.linger = 0
            stranger.connect(f"tcp://{job.link.address}")
            with contextlib.suppress(zmq.Again):  # the handshake has failed already
                stranger.send_multipart(hello, zmq.NOBLOCK)
        job.start("gpu01", "print('well')")
        assert job.until_ended("gpu01").tail == "well"
        assert job.link.wait_for(lambda: job.link.dropped[REFUSED] >= 2, timeout_s=WAIT_S)
        assert set(job.link.dropped) == {REFUSED}


@pytest.mark.slow
def test_an_agent_obeys_nobody_without_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_job(tmp_path, monkeypatch, orphan_s=2.0) as job, zmq.Context() as context:
        with context.socket(zmq.ROUTER) as false_launcher:
            false_launcher.linger = 0
            encrypt_server(false_launcher, KEY, "job")  # else the agent would tell it nothing
            port = false_launcher.bind_to_random_port("tcp://127.0.0.1")
            agent = Agent("gpu01", f"127.0.0.1:{port}", KEY, join_s=2.0)
            codes: list[int] = []
            thread = threading.Thread(target=lambda: codes.append(agent.run()))
            thread.start()
            deadline = time.monotonic() + WAIT_S
            assert false_launcher.poll(int(WAIT_S * 1000))
            peer, session, *_ = false_launcher.recv_multipart()
            forged = Channel(bytes(32), session[:8] + new_half(), "launcher")
            welcome = messages.Welcome(str(tmp_path / "forged"), "077", 0, 0)
            false_launcher.send_multipart([peer, *forged.seal(messages.encode(welcome))])
            false_launcher.send_multipart([peer, b"noise"])
            thread.join(WAIT_S)
            assert time.monotonic() < deadline
        agent.close()
        assert codes == [1]  # nobody with the key has answered
        assert agent.dropped == {"without the job's key": 1, "malformed": 1}
        assert not (tmp_path / "forged").exists()
        assert job.link.lost == {}


@pytest.mark.parametrize("address", ["nonsense", "no-such-host.invalid:1", "127.0.0.1:x"])
def test_a_wrong_address_is_one_sentence(address: str) -> None:
    with pytest.raises(UserError, match="gpu01 cannot reach the launcher at"):
        Agent("gpu01", address, KEY)


def test_a_port_that_is_taken_is_one_sentence() -> None:
    link = JobLink("127.0.0.1:*", KEY, [])
    with pytest.raises(UserError, match=f"the launcher cannot listen at {link.address}: Address already in use"):
        JobLink(link.address, KEY, [])
    link.close()
