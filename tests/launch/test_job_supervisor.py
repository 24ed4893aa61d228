"""Children on the nodes of a job, with real agents in threads of this process."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from collab_megatron.errors import RunError
from collab_megatron.launch import agent as agent_module
from collab_megatron.launch import job_supervisor
from collab_megatron.launch.child_process import ChildProcess, Ready
from collab_megatron.launch.job_supervisor import JobSupervisor
from collab_megatron.launch.trainer_ranks import end_children
from tests.launch.agents import WAIT_S, Job, running_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
SLEEP = "import time; time.sleep(300)"
SERVE = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Health).serve_forever()
"""


def node_of(name: str) -> str:
    return "gpu02" if name.startswith("engine") else "gpu01"


@contextmanager
def supervised(job: Job, **settings: float) -> Iterator[JobSupervisor]:
    job.link.wait_for_hellos(timeout_s=WAIT_S)
    with JobSupervisor(job.link, job.folder / "logs", node_of, umask="077", env={"OF_ALL": "yes"}, **settings) as found:
        yield found


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    with running_job(tmp_path, monkeypatch, "gpu01", "gpu02", lost_s=3.0) as found:
        yield found


def python(supervisor: JobSupervisor, name: str, code: str, *arguments: str, **more: object) -> ChildProcess:
    return supervisor.start(name, ["{python}", "-c", code, *arguments], {"OWN": "also"}, **more)  # type: ignore[arg-type]


def until(supervisor: JobSupervisor, state: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not state():
        supervisor.check()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_has_its_files_its_variables_and_its_log(job: Job) -> None:
    with supervised(job) as supervisor:
        file = supervisor.publish("resolved.yaml", "a: 1\n")
        assert str(file) == "{scratch}/resolved.yaml"
        code = "import os, sys; print(open(sys.argv[1]).read(), os.environ['OF_ALL'], os.environ['OWN'])"
        child = python(supervisor, "engine-0", code, str(file))
        supervisor.wait_for([child], timeout_s=WAIT_S)
        assert child.ended() == "exit code 0"
        assert (job.folder / "logs" / "engine-0.log").read_text().split() == ["a:", "1", "yes", "also"]
        supervisor.publish("resolved.yaml", "a: 2\n")  # a newer version, for the next life
        again = python(supervisor, "engine-0", code, str(file))
        supervisor.wait_for([again], timeout_s=WAIT_S)
        assert (job.folder / "logs" / "engine-0.log").read_text().split()[4:6] == ["a:", "2"]
    assert not list((job.folder / "logs").glob(".seen*"))


def test_a_server_is_ready_at_the_address_of_its_node_and_gone_after_a_kill(job: Job) -> None:
    with supervised(job) as supervisor:
        url = "http://{address}:{port:http}"
        child = python(supervisor, "engine-0", SERVE, "{address}", "{port:http}", ready=Ready(url=url), essential=False)
        readiness = supervisor.readiness(child, every_s=0.1)
        assert readiness.url == ""
        until(supervisor, readiness.answers)
        assert readiness.url.startswith("http://127.0.0.1:")
        supervisor.kill(child)
        until(supervisor, lambda: supervisor.is_gone(child))
        assert child.process.poll() == -signal.SIGKILL


def test_a_driver_shows_its_address_to_all_nodes(job: Job) -> None:
    with supervised(job) as supervisor:
        ready = Ready(file="{scratch}/driver.0")
        write = "import sys, time; open(sys.argv[1], 'w').write('tcp://here'); time.sleep(300)"
        driver = python(supervisor, "driver", write, ready.file, ready=ready, restarted=True)
        until(supervisor, lambda: supervisor.was_ready(driver))
        supervisor.pass_on_addresses([driver])
        reader = python(supervisor, "engine-0", "import sys; print(open(sys.argv[1]).read())", ready.file)
        supervisor.wait_for([reader], timeout_s=WAIT_S)
        assert (job.folder / "logs" / "engine-0.log").read_text() == "tcp://here\n"


def test_an_error_message_on_another_node_ends_the_run(job: Job) -> None:
    said = r"engine-0 ended with exit code 1: the disk is full; see .*engine-0.log"
    with pytest.raises(RunError, match=said), supervised(job) as supervisor:
        sleeper = python(supervisor, "trainer-0", SLEEP)
        python(supervisor, "engine-0", "import sys; print('error: the disk is full'); sys.exit(1)")
        supervisor.wait_for([sleeper], timeout_s=WAIT_S)
    assert job.agents["gpu01"].code() == 0  # they have left
    assert sleeper.process.poll() == -signal.SIGTERM


def test_a_program_that_cannot_be_started_ends_the_run(job: Job) -> None:
    with pytest.raises(RunError, match="gpu02: engine-0 could not be started"), supervised(job) as supervisor:
        child = supervisor.start("engine-0", ["/no/such/program"], {})
        supervisor.wait_for([child], timeout_s=WAIT_S)


def test_the_children_of_a_lost_node_count_as_killed(job: Job) -> None:
    with supervised(job) as supervisor:
        child = python(supervisor, "engine-0", SLEEP, essential=False, restarted=True)
        until(supervisor, lambda: child.process.pid)
        assert child.lost == ""
        job.agents["gpu02"].agent._orphan_s = 0.0  # it leaves without a word
        until(supervisor, lambda: child.process.poll() is not None)
        assert child.ended() == "signal SIGKILL"
        assert child.lost == "gpu02 is lost (no sign of life for 3 s)"
        assert not child.will_restart()
        assert supervisor.is_gone(child)
        assert job.link.lost == {"gpu02": "no sign of life for 3 s"}
    assert job.agents["gpu02"].code() == 1


def test_ranks_get_their_time_to_save(job: Job) -> None:
    save = (
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(1); print('saved', flush=True); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save); print('up', flush=True); time.sleep(300)"
    )
    logs = [job.folder / "logs" / f"{name}.log" for name in ("trainer-0", "trainer-1")]
    with supervised(job, save_grace_s=30.0) as supervisor:
        for log in logs:
            python(supervisor, log.stem, save, saves=True)
        until(supervisor, lambda: all(log.exists() and "up" in log.read_text() for log in logs))
    assert [log.read_text() for log in logs] == ["up\nsaved\n"] * 2


def test_a_folder_that_a_node_does_not_see_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_supervisor, "SHARED_S", 1.0)
    monkeypatch.setattr(agent_module, "_first_line", lambda file: "")
    with pytest.raises(RunError, match=r"run.dir is not shared: gpu01, gpu02 did not see .* choose a run.dir"):
        supervised(job).__enter__()
    assert [running.code() for running in job.agents.values()] == [0, 0]


def test_children_that_do_not_end_are_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collab_megatron.launch.trainer_ranks.GONE_S", 0.0)
    with supervised(job) as supervisor:
        child = python(supervisor, "trainer-0", SLEEP, essential=False)
        with pytest.raises(RunError, match="trainer-0 did not end within 0 s after a kill"):
            end_children(supervisor, [child], supervisor.check)
