"""`sbatch --nodes=N slurm/train_rl.sbatch`: the demo's RL on a real Slurm whose nodes have addresses of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import DESK_KEY, REPOSITORY
from tests.launch import namespaces
from tests.slurm import cluster
from tests.slurm.cluster import SlurmCluster, poll, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(500)]


@dataclass(frozen=True)
class Job:
    """A layout of `ranks` trainer ranks, and its lines in the plan."""

    layout: tuple[str, ...]
    ranks: int
    plan: tuple[str, ...]
    end_s: float

    @property
    def engines(self) -> int:
        return len(self.plan) - 1


TWO_RANKS = Job(
    ("parallel.tensor=2",),
    ranks=2,
    plan=("node1 to node2  trainer 0 to 1, 1 on each", "node3           engine 0"),
    end_s=300,
)
EIGHT_RANKS = Job(
    ("parallel.tensor=2", "parallel.data=2", "parallel.pipeline=2", "engine.count=4"),
    ranks=8,
    plan=("node1 to node8   trainer 0 to 7, 1 on each", *(f"node{9 + k:<13}engine {k}" for k in range(4))),
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
    desk, run = desk_on_first_node, submit_folder / "run"
    _, _, *arguments = rl_command(
        run,
        *("train.steps=2", "engine.urls=[]", *job.layout, "parallel.tensor_across_nodes=true"),
        *(f"simulators.user.api_base={desk}", f"simulators.judge.api_base={desk}"),
        *("parallel.threads=1", "engine.threads=1"),  # they share the cores of one machine
    )
    env = {"COLLAB_PYTHON": sys.executable, "PYTHONPATH": str(submit_folder), "DESK_API_KEY": DESK_KEY}
    number = nodes.sbatch(
        f"--nodes={job.ranks + job.engines}", "slurm/train_rl.sbatch", *arguments, cwd=submit_folder, env=env
    )
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
