"""`sbatch --nodes=3 slurm/train_rl.sbatch`: the demo's RL on a real Slurm whose nodes have addresses of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import DESK_KEY, REPOSITORY
from tests.launch import namespaces
from tests.slurm import cluster
from tests.slurm.cluster import SlurmCluster, poll, running_cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(500)]
NODES = 3
END_S = 300.0


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[SlurmCluster]:
    if reason := cluster.why_not() or namespaces.why_not():
        pytest.skip(reason)
    with namespaces.network(NODES) as network, running_cluster(nodes=NODES, network=network) as found:
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
def desk_on_first_node(three_nodes: SlurmCluster, tmp_path: Path) -> Iterator[str]:
    """The demo's user and judge behind loopback of node1, where the driver runs; their URL."""
    assert three_nodes.network is not None
    ready = tmp_path / "desk"
    module = [sys.executable, "-m", "collab_megatron.demo.endpoint", "--port", "0", "--ready-file", str(ready)]
    command = three_nodes.network.nodes[0].inside(*module)
    desk = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "DESK_API_KEY": DESK_KEY})
    try:
        address = poll(lambda: ready.read_text() if ready.exists() else None, 60, lambda: "no endpoint")
        yield f"http://{address}/v1"
    finally:
        desk.terminate()
        desk.wait(30)


def test_a_job_of_three_nodes_trains(
    rl_command: Callable[..., list[str]],
    three_nodes: SlurmCluster,
    desk_on_first_node: str,
    submit_folder: Path,
) -> None:
    """Two tensor-parallel ranks on two nodes, the engine on the third; nothing meets on 127.0.0.1."""
    desk, run = desk_on_first_node, submit_folder / "run"
    _, _, *arguments = rl_command(
        run,
        *("train.steps=2", "engine.urls=[]", "parallel.tensor=2", "parallel.tensor_across_nodes=true"),
        *(f"simulators.user.api_base={desk}", f"simulators.judge.api_base={desk}"),
        *("parallel.threads=1", "engine.threads=1"),  # they share the cores of one machine
    )
    env = {"COLLAB_PYTHON": sys.executable, "PYTHONPATH": str(submit_folder), "DESK_API_KEY": DESK_KEY}
    job = three_nodes.sbatch("--nodes=3", "slurm/train_rl.sbatch", *arguments, cwd=submit_folder, env=env)
    end = three_nodes.wait(job, timeout_s=END_S)
    text = (submit_folder / "runs" / "slurm" / f"train_rl-{job}.log").read_text()
    assert (end.state, end.exit_code) == ("COMPLETED", 0), text[-6000:]
    assert "node1 to node2  trainer 0 to 1, 1 on each" in text
    assert "node3           engine 0" in text
    assert three_nodes.network is not None
    _, _, third = (node.address for node in three_nodes.network.nodes)
    assert re.search(rf"engine-0 is ready at http://{third}:\d+ after", text)
    rows = [row for row in read_metrics(run / "tensorboard" / "rl") if "time_s/step" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert max(row["train/logprob_gap"] for row in rows) < 1e-4  # the engine serves exactly what two nodes train
    assert newest_complete(run / "checkpoints" / "rl") is not None
    assert (run / "logs" / "rl" / "latest" / "trainer-1.log").exists()
    assert DESK_KEY not in text
