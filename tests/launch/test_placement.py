"""Placement of a run on 1 to 512 nodes: every layout that fits is placed, and one that does not says what would."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import pytest

from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.errors import UserError
from collab_megatron.launch.hosts import Host, equal_hosts, parse_hosts
from collab_megatron.launch.placement import EnginePlace, Placement, place
from collab_megatron.launch.placement_map import placement_lines


def hosts_of(*gpus: int) -> tuple[Host, ...]:
    return tuple(Host(f"node{n}", tuple(map(str, range(count)))) for n, count in enumerate(gpus, 1))


def placed(
    hosts: tuple[Host, ...],
    engine: dict[str, Any] | None = None,
    *,
    device: str = "cuda",
    shards: int = 1,
    **layout: Any,
) -> Placement:
    servers = None if engine is None else EngineSection(**engine)
    return place(hosts, ParallelSection(**layout), servers, device=device, shards=shards)


def counts(placement: Placement) -> tuple[list[int], list[int]]:
    """(trainer ranks, engine ranks) on each node."""
    mine = Counter(rank.host for rank in placement.trainers)
    theirs = Counter(rank.host for engine in placement.engines for rank in engine.ranks)
    numbers = range(len(placement.hosts))
    return [mine[n] for n in numbers], [theirs[n] for n in numbers]


def check(placement: Placement, parallel: ParallelSection, engine: EngineSection | None) -> None:
    """What holds for every placement on GPUs."""
    assert len(placement.trainers) == len(set(placement.trainers)) == parallel.world_size
    for rank in placement.trainers:
        assert rank.gpu in placement.hosts[rank.host].gpus
    assert [rank.host for rank in placement.trainers] == sorted(rank.host for rank in placement.trainers)
    if not parallel.tensor_across_nodes:
        assert "tensor" not in placement.across_nodes(parallel)
    if engine is None:
        return
    places = [rank for server in placement.engines for rank in server.ranks]
    assert len(places) == len(set(places)) == engine.count * engine.tensor
    widest = max(len(host.gpus) for host in placement.hosts)
    for server in placement.engines:
        assert len(server.hosts) == max(1, -(-engine.tensor // widest))
        assert len(set(Counter(rank.host for rank in server.ranks).values())) == 1
    if engine.placement == "disaggregated":
        assert not set(places) & set(placement.trainers)
    else:
        assert places == list(placement.trainers)


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 64, 512])
@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
def test_one_to_512_nodes(nodes: int, placement: str) -> None:
    ranks = 8 * nodes if placement == "colocated" else 4 * nodes
    parallel = ParallelSection(tensor=4, data=ranks // 4)
    engine = EngineSection(placement=placement, tensor=2, count=ranks // 2)
    began = time.perf_counter()
    found = place(equal_hosts(nodes, 8), parallel, engine, device="cuda", shards=4)
    assert time.perf_counter() - began < 5
    check(found, parallel, engine)
    assert found.idle_gpus == 0
    assert found.drivers == (0,) * 4
    assert ("data" in found.across_nodes(parallel)) == (nodes > (1 if placement == "colocated" else 2))


def test_neighboring_ranks_are_neighbors_and_only_outer_axes_cross_nodes() -> None:
    parallel = ParallelSection(tensor=4, context=2, data=2, pipeline=2)
    found = place(equal_hosts(4, 8), parallel, device="cuda")
    assert [rank.host for rank in found.trainers] == [rank // 8 for rank in range(32)]
    assert [rank.gpu for rank in found.trainers] == [str(rank % 8) for rank in range(32)]
    assert found.across_nodes(parallel) == ("data", "pipeline")
    wider = ParallelSection(tensor=8, context=2, pipeline=2)
    assert place(equal_hosts(4, 8), wider, device="cuda").across_nodes(wider) == ("context", "pipeline")


def test_engines_share_a_node_with_the_trainer_where_gpus_are_left() -> None:
    found = placed(hosts_of(8, 8), {"count": 3, "tensor": 4}, tensor=2, data=2)
    assert counts(found) == ([4, 0], [4, 8])
    assert [found.near_trainer(engine) for engine in found.engines] == [True, False, False]


def test_uneven_nodes_leave_idle_gpus_rather_than_cut_a_tensor_group() -> None:
    found = placed(hosts_of(6, 6, 8), {"count": 2, "tensor": 2}, tensor=4, data=3)
    assert counts(found) == ([4, 4, 4], [2, 2, 0])
    assert found.idle_gpus == 4
    found = placed(hosts_of(6, 6, 4), tensor=4, data=4, tensor_across_nodes=True)
    assert counts(found)[0] == [6, 6, 4]
    assert found.across_nodes(ParallelSection(tensor=4, data=4)) == ("tensor", "data")


def test_the_only_node_that_is_large_enough_is_left_to_the_engine() -> None:
    found = placed(hosts_of(8, 4), {"count": 1, "tensor": 8}, tensor=4)
    assert counts(found) == ([0, 4], [8, 0])


def test_an_engine_that_no_node_holds_takes_whole_nodes() -> None:
    found = placed(equal_hosts(6, 8), {"count": 2, "tensor": 16}, tensor=8, data=2)
    assert counts(found) == ([8, 8, 0, 0, 0, 0], [0, 0, 8, 8, 8, 8])
    assert [engine.hosts for engine in found.engines] == [(2, 3), (4, 5)]
    together = {"count": 2, "tensor": 16, "placement": "colocated"}
    found = placed(equal_hosts(4, 8), together, tensor=8, data=4)
    assert [engine.hosts for engine in found.engines] == [(0, 1), (2, 3)]
    with pytest.raises(UserError, match="do not fit"):
        placed(equal_hosts(6, 8), {"count": 1, "tensor": 12}, tensor=8)


def test_colocated_engines_stay_inside_nodes_of_six() -> None:
    found = placed(equal_hosts(3, 6), {"count": 3, "tensor": 4, "placement": "colocated"}, tensor=2, data=6)
    assert counts(found) == ([4, 4, 4], [4, 4, 4])
    assert all(found.near_trainer(engine) for engine in found.engines)


def test_drivers_are_on_a_node_without_gpus_if_the_job_has_one() -> None:
    found = placed(hosts_of(8, 8, 0), {"count": 1, "tensor": 8}, shards=3, tensor=8)
    assert found.drivers == (2, 2, 2)
    assert placed(hosts_of(8, 8), shards=2, tensor=8).drivers == (0, 0)


def test_given_servers_take_no_gpu() -> None:
    found = placed(hosts_of(8), {"urls": ("http://elsewhere:30000",)}, tensor=8)
    assert found.engines == ()


def test_cpu_nodes_are_divided_evenly() -> None:
    nodes = equal_hosts(3, 0)
    asked = placed(nodes, {"count": 1}, device="cpu", tensor=2, tensor_across_nodes=True)
    assert counts(asked) == ([1, 1, 0], [0, 0, 1])
    assert counts(placed(nodes, {"count": 1}, device="cpu", tensor=2)) == ([2, 0, 0], [0, 0, 1])
    eight = placed(equal_hosts(8, 0), {"count": 4, "placement": "colocated"}, device="cpu", data=8)
    assert counts(eight) == ([1] * 8, [1, 1, 1, 1, 0, 0, 0, 0])
    assert counts(placed(equal_hosts(1, 0), {"count": 2}, device="cpu", data=3)) == ([3], [2])


@pytest.mark.parametrize(
    "gpus, engine, layout, ways_out",
    [
        # too few GPUs: nodes to ask for, and the largest of each key that fits here
        (
            (8, 8),
            {"count": 2, "tensor": 4},
            {"tensor": 4, "data": 4},
            ["3 nodes", "parallel.data=2", "parallel.tensor=2"],
        ),
        ((8,), {"count": 5, "tensor": 1}, {"tensor": 4}, ["2 nodes", "engine.count=4", "parallel.tensor=2"]),
        # enough GPUs, but no node for a group
        ((4, 4), None, {"tensor": 8}, ["parallel.tensor=4", "parallel.tensor_across_nodes=true"]),
        ((6, 6), None, {"tensor": 4, "data": 3}, ["3 nodes", "parallel.data=2", "parallel.tensor_across_nodes=true"]),
        (
            (8,),
            {"placement": "colocated", "count": 4, "tensor": 4},
            {"tensor": 4, "data": 4},
            ["parallel.data=2 and engine.count=2"],
        ),
    ],
)
def test_an_impossible_layout_says_what_would_fit(
    gpus: tuple[int, ...], engine: dict[str, Any] | None, layout: dict[str, Any], ways_out: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        placed(hosts_of(*gpus), engine, **layout)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for way_out in ways_out:
        assert way_out in sentence, sentence
        key, _, value = way_out.partition(" and ")[0].rpartition(".")[2].partition("=")
        if key.endswith(" nodes"):
            more = int(key.split()[0])
            placed(hosts_of(*gpus, *[max(gpus)] * (more - len(gpus))), engine, **layout)
            with pytest.raises(UserError):
                placed(hosts_of(*gpus, *[max(gpus)] * (more - len(gpus) - 1)), engine, **layout)
        elif key == "count":
            placed(hosts_of(*gpus), {**(engine or {}), "count": int(value)}, **layout)
        elif "engine" not in way_out:
            placed(hosts_of(*gpus), engine, **{**layout, key: True if value == "true" else int(value)})


def test_every_layout_that_fits_is_found() -> None:
    """Compared with a search over all ways to divide each node, where one size divides the other."""
    for gpus in itertools.product((0, 2, 6), repeat=3):
        for tensor, size in ((1, 2), (2, 1), (2, 4), (4, 2), (2, 2), (4, 4)):
            for groups, servers in itertools.product(range(1, 5), range(1, 5)):
                ways = [[(a, (n - a * tensor) // size) for a in range(n // tensor + 1)] for n in gpus]
                fits = size <= max(gpus) and any(
                    sum(a for a, _ in way) >= groups and sum(b for _, b in way) >= servers
                    for way in itertools.product(*ways)
                )
                if size > max(gpus):
                    continue  # whole nodes, in a test of its own
                parallel, engine = (
                    ParallelSection(tensor=tensor, data=groups),
                    EngineSection(count=servers, tensor=size),
                )
                if not fits:
                    with pytest.raises(UserError):
                        place(hosts_of(*gpus), parallel, engine, device="cuda")
                else:
                    check(place(hosts_of(*gpus), parallel, engine, device="cuda"), parallel, engine)


def test_the_map_has_one_line_for_nodes_that_are_alike() -> None:
    parallel, engine = ParallelSection(tensor=8, data=20), EngineSection(count=12, tensor=8)
    hosts = parse_hosts("gpu[001-032]:8,cpu1:0", 8)
    lines = placement_lines(place(hosts, parallel, engine, device="cuda", shards=2), parallel)
    assert [line.strip() for line in lines] == [
        "nodes       33 nodes, 256 GPUs: 160 trainer ranks, 12 servers of 8 ranks, 0 idle",
        "gpu001 to gpu020  8 GPUs  trainer 0 to 159, 8 on each",
        "gpu021 to gpu032  8 GPUs  engine 0 to 11",
        "cpu1              0 GPUs  no ranks",
        "crosses nodes: data; launcher on gpu001, 2 drivers on cpu1",
        "0 of 12 servers with trainer ranks on the same nodes",
    ]


def test_the_map_shows_mixed_nodes_and_idle_gpus() -> None:
    parallel = ParallelSection(tensor=2, data=2)
    found = place(hosts_of(8, 8), parallel, EngineSection(count=3, tensor=3), device="cuda")
    lines = placement_lines(found, parallel)
    assert "node1  8 GPUs  trainer 0 to 3; engine 0; 1 idle" in lines[1]
    assert "node2  8 GPUs  engine 1 to 2; 2 idle" in lines[2]
    assert "1 of 3 servers with trainer ranks on the same nodes" in lines[-1]


def test_the_map_of_cpu_nodes_has_no_gpus() -> None:
    parallel, engine = ParallelSection(tensor=2, tensor_across_nodes=True), EngineSection()
    lines = placement_lines(place(equal_hosts(3, 8), parallel, engine, device="cpu", shards=1), parallel)
    assert [line.strip() for line in lines] == [
        "nodes       3 nodes, on CPUs: 2 trainer ranks, 1 server of 1 rank",
        "node1 to node2  trainer 0 to 1, 1 on each",
        "node3           engine 0",
        "crosses nodes: tensor; launcher on node1, 1 driver on node1",
        "0 of 1 server with trainer ranks on the same nodes",
    ]


def test_a_server_knows_its_nodes_in_order() -> None:
    found = placed(equal_hosts(2, 4), {"count": 1, "tensor": 4}, tensor=4)
    assert found.engines == (EnginePlace(0, found.engines[0].ranks),)
    assert found.engines[0].hosts == (1,)


def test_names_of_nodes() -> None:
    names = [(host.name, len(host.gpus)) for host in parse_hosts("a:8, b ,gpu[08-10,3]x:4,c:0", 2)]
    assert names == [("a", 8), ("b", 2), ("gpu08x", 4), ("gpu09x", 4), ("gpu10x", 4), ("gpu3x", 4), ("c", 0)]


@pytest.mark.parametrize(
    "text", ["", "a:8,", "a b", "a[1", "a[2-1]", "a[x]", "a[1-99999]", "a,a", "a:100", ":8", "a:-1"]
)
def test_a_bad_list_of_nodes_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match="--hosts") as caught:
        parse_hosts(text, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [0, -1, 5000])
def test_a_bad_number_of_nodes_is_one_sentence(number: int) -> None:
    with pytest.raises(UserError, match="--nodes"):
        equal_hosts(number, 8)
