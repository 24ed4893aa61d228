"""`sbatch --nodes=N slurm/train_rl.sbatch`: the demo's RL on a real Slurm whose nodes have addresses of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import DESK_KEY, REPOSITORY
from tests.launch import namespaces
from tests.slurm import cluster
from tests.slurm.cluster import SlurmCluster, poll, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
END_S = 300.0


@dataclass(frozen=True)
class Job:
    """A layout, and its lines in the plan."""

    layout: tuple[str, ...]
    ranks: int
    engines: int
    plan: tuple[str, ...]
    end_s: float


TWO_RANKS = Job(
    ("parallel.tensor=2",),
    ranks=2,
    engines=1,
    plan=("node1 to node2  trainer 0 to 1, 1 on each", "node3           engine 0"),
    end_s=END_S,
)
EIGHT_RANKS = Job(
    ("parallel.tensor=2", "parallel.data=2", "parallel.pipeline=2", "engine.count=4"),
    ranks=8,
    engines=4,
    plan=("node1 to node8   trainer 0 to 7, 1 on each", "node9 to node12  engine 0 to 3"),
    end_s=1500,
)


@pytest.fixture(scope="module")
def job(request: pytest.FixtureRequest) -> Job:
    job: Job = request.param
    return job


@pytest.fixture(scope="module")
def nodes(job: Job) -> Iterator[SlurmCluster]:
    if reason := cluster.why_not() or namespaces.why_not():
        pytest.skip(reason)
    number = job.ranks + job.engines
    with namespaces.network(number) as network, running_cluster(nodes=number, network=network) as found:
        yield found


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    """A repository root with the real scripts and links to the code."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    for name in ("collab_megatron", "conf"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


@pytest.fixture
def desk_on_first_node(nodes: SlurmCluster, tmp_path: Path) -> Iterator[str]:
    """The demo's user and judge behind loopback of node1, where the driver runs; their URL."""
    assert nodes.network is not None
    ready = tmp_path / "desk"
    module = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", "0", "--ready-file", str(ready)]
    command = nodes.network.nodes[0].inside(*module)
    desk = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "DESK_API_KEY": DESK_KEY})
    try:
        address = poll(lambda: ready.read_text() if ready.exists() else None, 60, lambda: "no endpoint")
        yield f"http://{address}/v1"
    finally:
        desk.terminate()
        desk.wait(30)


def settings(job: Job, desk: str) -> tuple[str, ...]:
    return (
        *("engine.urls=[]", *job.layout, "parallel.tensor_across_nodes=true"),
        *(f"simulators.user.api_base={desk}", f"simulators.judge.api_base={desk}"),
        *("parallel.threads=1", "engine.threads=1"),  # they share the cores of one machine
    )


def submit(nodes: SlurmCluster, job: Job, command: Sequence[str], folder: Path) -> int:
    """The number of the job in Slurm. command: rl_command's."""
    env = {"COLLAB_PYTHON": sys.executable, "PYTHONPATH": str(folder), "DESK_API_KEY": DESK_KEY}
    arguments = command[2:]  # not -m and the module
    return nodes.sbatch(f"--nodes={job.ranks + job.engines}", "slurm/train_rl.sbatch", *arguments, cwd=folder, env=env)


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(TWO_RANKS, id="two-ranks-one-engine"),
        pytest.param(EIGHT_RANKS, id="eight-ranks-four-engines", marks=[pytest.mark.full, pytest.mark.timeout(1800)]),
    ],
    indirect=True,
)
def test_a_job_of_many_nodes_trains(
    rl_command: Callable[..., list[str]],
    job: Job,
    nodes: SlurmCluster,
    desk_on_first_node: str,
    submit_folder: Path,
) -> None:
    """Each trainer rank and each engine is on a node of its own; nothing meets on 127.0.0.1."""
    run = submit_folder / "run"
    number = submit(nodes, job, rl_command(run, *settings(job, desk_on_first_node), "train.steps=2"), submit_folder)
    end = nodes.wait(number, timeout_s=job.end_s)
    text = (submit_folder / "runs" / "slurm" / f"train_rl-{number}.log").read_text()
    assert (end.state, end.exit_code) == ("COMPLETED", 0), text[-6000:]
    for line in job.plan:
        assert line in text, text[:4000]
    assert nodes.network is not None
    for engine, node in enumerate(nodes.network.nodes[job.ranks :]):
        assert re.search(rf"engine-{engine} is ready at http://{node.address}:\d+ after", text)
    rows = [row for row in read_metrics(run / "tensorboard" / "rl") if "time_s/step" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["train/logprob_gap"] for row in rows) < 1e-4  # the engines serve exactly what the nodes train
    assert newest_complete(run / "checkpoints" / "rl") is not None
    assert (run / "logs" / "rl" / "latest" / f"trainer-{job.ranks - 1}.log").exists()
    assert DESK_KEY not in text


@pytest.mark.full  # its parts: tests/launch/test_agent_network.py, test_job_supervisor.py
@pytest.mark.parametrize("job", [pytest.param(TWO_RANKS, id="two-ranks-one-engine")], indirect=True)
def test_a_lost_node_ends_the_job_saved_and_the_next_job_goes_on(
    rl_command: Callable[..., list[str]],
    job: Job,
    nodes: SlurmCluster,
    desk_on_first_node: str,
    submit_folder: Path,
) -> None:
    """The node of the engine loses its network."""
    assert nodes.network is not None
    run, third = submit_folder / "run", nodes.network.nodes[2]
    command = rl_command(run, *settings(job, desk_on_first_node), "run.resume=auto")
    number = submit(nodes, job, [*command, "train.steps=100"], submit_folder)
    log = submit_folder / "runs" / "slurm" / f"train_rl-{number}.log"
    trained = re.compile(r"^rl (\d+)/100 ", re.MULTILINE)
    poll(lambda: trained.search(log.read_text()) if log.exists() else None, END_S, lambda: log.read_text()[-4000:])
    third.cable("down")
    try:
        ended = re.compile(r"^saved  ", re.MULTILINE)  # the launcher's last line
        poll(lambda: ended.search(log.read_text()), END_S, lambda: log.read_text()[-4000:])
    finally:
        third.cable("up")  # or Slurm waits for SlurmdTimeout before the job is over
    end = nodes.wait(number, timeout_s=END_S)
    text = log.read_text()
    done = max(map(int, trained.findall(text)))
    assert end.state != "COMPLETED", text[-6000:]
    assert "engine-0 is gone: node3 is lost (no sign of life for 20 s)\n" in text
    assert "restarting it" not in text
    newest = newest_complete(run / "checkpoints" / "rl")
    assert newest is not None
    assert newest.name == f"step_{done:08}"
    poll(
        lambda: True if nodes.slurm("sinfo", "-h", "-o", "%T").split() == ["idle"] else None,
        120,
        lambda: nodes.slurm("sinfo"),
    )
    number = submit(nodes, job, [*command, f"train.steps={done + 1}"], submit_folder)
    assert nodes.wait(number, timeout_s=END_S).state == "COMPLETED"
    rows = [row for row in read_metrics(run / "tensorboard" / "rl") if "time_s/step" in row]
    assert [row["step"] for row in rows] == list(range(1, done + 2))
