"""The place of each process in a job of several nodes, as its variables show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.errors import RunError, UserError
from collab_megatron.launch.job_link import JobLink
from collab_megatron.launch.many_nodes import ManyNodes, _require_equal_packages, job_node
from collab_megatron.wire.job import Hello


def link_of(gpus: Sequence[int]) -> JobLink:
    """A stand-in that knows the Hello of nodes a, b, ... with so many GPUs, 16 cores each."""
    names = "abcdefgh"[: len(gpus)]
    hellos = {
        name: Hello(name, f"10.0.0.{number + 1}", 16, tuple(map(str, range(count))), "1", "", tuple(range(7000, 7010)))
        for number, (name, count) in enumerate(zip(names, gpus, strict=True))
    }
    link: Any = SimpleNamespace(nodes=tuple(names), hello=hellos.get)
    return link


def site(gpus: Sequence[int], *overrides: str) -> ManyNodes:
    config = load_config(RLConfig, Path("conf/demo_rl.yaml"), overrides)
    return ManyNodes(link_of(gpus), config, config.engine, shards=config.driver.shards)


def test_ranks_and_servers_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    found = site((4, 4), "parallel.device=cuda", "parallel.tensor=2", "parallel.data=3", "engine.count=2")
    assert [found.node_of(f"trainer-{rank}") for rank in range(6)] == ["a"] * 4 + ["b"] * 2
    env = [found.rank_env(rank) for rank in range(6)]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in env] == [(str(rank), str(rank % 4)) for rank in range(6)]
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"], one["WORLD_SIZE"]) for one in env} == {("10.0.0.1", "7000", "6")}
    assert {one["NCCL_SOCKET_IFNAME"] for one in env} == {"{interface}"}
    assert [found.node_of(f"engine-{number}") for number in range(2)] == ["b", "b"]
    assert [found.engine_env(number)["CUDA_VISIBLE_DEVICES"] for number in range(2)] == ["2", "3"]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")  # what the site has set stays
    assert found.rank_env(0)["NCCL_SOCKET_IFNAME"] == "ib0"


def test_drivers_keep_their_addresses_and_prefer_a_node_without_gpus() -> None:
    found = site((4, 4, 0), "parallel.device=cuda", "driver.shards=2")
    assert found.driver_addresses(2) == ["tcp://10.0.0.3:7001", "tcp://10.0.0.3:7002"]
    assert (found.node_of("driver-0"), found.node_of("driver-1"), found.node_of("driver")) == ("c", "c", "c")
    with pytest.raises(UserError, match=r"driver.shards=10 are more than .* set at most 9"):
        found.driver_addresses(10)


def test_cores_are_those_of_the_node() -> None:
    found = site((0, 0), "parallel.tensor=2", "engine.count=4", "parallel.tensor_across_nodes=false")
    assert [found.node_of(f"trainer-{rank}") for rank in range(2)] == ["a", "a"]
    assert found.rank_env(0)["OMP_NUM_THREADS"] == "8"
    assert found.rank_env(1)["LOCAL_RANK"] == "1"
    assert {found.engine_threads(number) for number in range(4)} == {4}


def test_shared_memory_on_cpus_does_not_cross_nodes() -> None:
    with pytest.raises(UserError, match=r"sync.transport=ipc shares memory"):
        site((0, 0), "sync.transport=ipc")


def test_a_server_across_nodes_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine.tensor=8 is more than the GPUs of a node"):
        site((4, 4, 4), "parallel.device=cuda", "engine.tensor=8", "engine.count=1")


def test_a_layout_that_does_not_fit_names_what_would() -> None:
    with pytest.raises(UserError, match="ask for 3 nodes"):
        site((2, 2), "parallel.device=cuda", "parallel.tensor=2", "parallel.data=2", "engine.count=1")


def test_the_checks_plan_for_the_nodes_of_the_job() -> None:
    node = job_node(link_of((4, 2)), None)
    assert node is not None
    assert ([host.name for host in node.hosts], node.gpus, node.here) == (["a", "b"], 4, True)
    assert job_node(None, None) is None


def test_nodes_with_other_packages_are_named() -> None:
    hellos = [Hello(name, "", 1, (), version, "") for name, version in (("a", "1"), ("b", "2"))]
    with pytest.raises(RunError, match=r"different versions of this package \(1 on a, 2 on b\)"):
        _require_equal_packages(hellos)
