"""Strangers at the launcher's port and at an agent: another user of the node, and ten thousand inputs."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from pathlib import Path

import pytest
import zmq

from collab_megatron.launch.agent import Agent
from collab_megatron.wire import job as messages
from collab_megatron.wire.curve import REFUSED, encrypt_server
from collab_megatron.wire.sealed import NOBODY, Channel, new_half
from tests.fuzz import INPUTS, half_open, mutated, send_each, steady, zmq_input
from tests.launch.agents import KEY, WAIT_S, Job, running_job
from tests.stranger import as_stranger, only_root

pytestmark = pytest.mark.timeout(120)

SLEEP = "import time; time.sleep(60)"


def require_well(job: Job) -> None:
    job.start("gpu01", "print('well')", role="proof")
    assert job.until_ended("gpu01", "proof").tail == "well"


@only_root
@pytest.mark.slow
def test_another_user_starts_nothing_stops_nothing_and_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the test is one that the other user can enter, as /tmp is."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        monkeypatch.setattr("collab_megatron.launch.scratch.tempfile.gettempdir", lambda: name)
        with running_job(Path(name), monkeypatch, "gpu01") as job:
            job.join()
            job.start("gpu01", SLEEP)
            assert job.link.wait_for(lambda: job.link.role("gpu01", "child") is not None, timeout_s=WAIT_S)
            pid = job.state("gpu01").pid
            (scratch,) = Path(name).glob("collab_run_*")
            hello = messages.encode(messages.Hello("gpu01", "10.6.6.6", 1, (), "0", ""))
            frames = [
                [frame.hex() for frame in Channel(key, new_half() + NOBODY, "agent").seal(hello)]
                for key in (KEY, bytes(32))  # also with the seal of the job's key, without its handshake
            ]
            assert as_stranger([{"list": name}]) == ["done"]
            refused = as_stranger(
                [
                    *({"zmq": [f"tcp://{job.link.address}", each, 20]} for each in frames),
                    *({"list": str(scratch)}, {"read": str(scratch / "secret")}, {"write": str(scratch / "owner")}),
                    *({"kill": pid}, {"read": f"/proc/{pid}/environ"}, {"read": f"/proc/{pid}/mem"}),
                ]
            )
            assert refused == ["silence"] * 2 + ["EACCES"] * 3 + ["EPERM"] + ["EACCES"] * 2
            assert job.link.wait_for(lambda: job.link.dropped[REFUSED] >= 2, timeout_s=WAIT_S)
            assert set(job.link.dropped) == {REFUSED}
            said = job.link.dropped.news("launcher", job.link.address)
            assert said is not None
            assert "without the run's handshake" in said
            require_well(job)


@pytest.mark.slow
def test_the_launchers_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(21)
    with running_job(tmp_path, monkeypatch, "gpu01") as job:
        job.join()
        host, _, port = job.link.address.rpartition(":")
        where = (host, int(port))

        def knock(number: int) -> None:
            inputs = [zmq_input(rng) for _ in range(number)]
            sending = threading.Thread(target=send_each, args=(where, inputs), kwargs={"waits": False})
            sending.start()
            assert job.link.wait_for(lambda: not sending.is_alive(), timeout_s=60)

        knock(1000)
        with steady(os.getpid(), memory_mb=50):
            knock(INPUTS)
            with half_open(where, 200, zmq_input(rng)):
                require_well(job)
        assert job.link.dropped[REFUSED] > INPUTS // 2  # ZeroMQ does not report those that hang up within the greeting
        assert not job.link.lost


@pytest.mark.slow
def test_an_agents_end(tmp_path: Path) -> None:
    """A false launcher that even knows the handshake, not the seal."""
    rng = random.Random(22)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as false_launcher:
        false_launcher.linger = 0
        encrypt_server(false_launcher, KEY, "job")
        port = false_launcher.bind_to_random_port("tcp://127.0.0.1")
        agent = Agent("gpu01", f"127.0.0.1:{port}", KEY)
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(agent.run()))
        thread.start()
        try:
            assert false_launcher.poll(int(WAIT_S * 1000))
            peer, session, *_ = false_launcher.recv_multipart()
            start = messages.encode(messages.Start("engine-0", 0, ("touch", str(tmp_path / "forged"))))
            welcome = messages.encode(messages.Welcome(str(tmp_path / "forged"), "077", 0, 0))
            with steady(os.getpid(), memory_mb=50):
                for _ in range(INPUTS):
                    forged = Channel(rng.choice((bytes(32), KEY[::-1])), session[:8] + new_half(), "launcher")
                    sealed = forged.seal(rng.choice((start, welcome, mutated(rng, welcome), b"\x91" * 5000)))
                    noise = [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 6))]
                    false_launcher.send_multipart([peer, *rng.choice((sealed, noise, sealed[:3], [b""] * 50))])
                deadline = time.monotonic() + WAIT_S
                while agent.dropped.total() < INPUTS and time.monotonic() < deadline:
                    time.sleep(0.05)
        finally:
            vars(agent).update(_orphan_s=0.0, _join_s=0.0)
            thread.join(WAIT_S)
            agent.close()
        assert codes == [1]  # nobody with the key has answered
        assert agent.dropped.total() == INPUTS
        assert set(agent.dropped) == {"malformed", "without the job's key"}
        assert not list(tmp_path.iterdir())
