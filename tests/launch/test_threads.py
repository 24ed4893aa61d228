"""Who gets which cores: all of them where trainer and engines take turns, a share where both work at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from collab_megatron.config import EvaluateConfig, RLConfig, SFTConfig, load_config
from collab_megatron.config.sections import EngineSection
from collab_megatron.launch import site
from collab_megatron.launch.site import OneNode
from collab_megatron.launch.threads import ThreadCounts, share_threads


@pytest.mark.parametrize(
    "cores, trainers, engines, at_once, expected",
    [
        (2, 1, 1, False, ThreadCounts(2, 2)),  # they take turns: each has the machine
        (2, 2, 1, False, ThreadCounts(1, 2)),
        (16, 4, 2, False, ThreadCounts(4, 8)),
        (2, 1, 1, True, ThreadCounts(1, 1)),  # both at once
        (16, 4, 4, True, ThreadCounts(2, 2)),
        (2, 4, 4, True, ThreadCounts(1, 1)),  # never none
        (8, 2, 0, False, ThreadCounts(4, 8)),  # engines elsewhere, or none at all
    ],
)
def test_cores_are_shared(cores: int, trainers: int, engines: int, at_once: bool, expected: ThreadCounts) -> None:
    assert share_threads(cores, trainer_ranks=trainers, engine_ranks=engines, at_once=at_once) == expected


def test_a_run_that_alternates_uses_every_core_and_one_that_overlaps_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "usable_cores", lambda: 8)

    def of(*overrides: str) -> ThreadCounts:
        return site.threads_of(load_config(RLConfig, Path("conf/demo_rl.yaml"), overrides))

    assert of("parallel.tensor=2") == ThreadCounts(4, 8)
    assert of("parallel.tensor=2", "driver.max_staleness=1") == ThreadCounts(2, 2)
    assert of("parallel.threads=3", "engine.threads=5") == ThreadCounts(3, 5)
    assert site.threads_of(load_config(SFTConfig, Path("conf/demo_sft.yaml"))).trainer >= 4
    assert site.threads_of(load_config(EvaluateConfig, Path("conf/demo_evaluate.yaml"))).engine == 8


def rank_env(rank: int, *overrides: str) -> Mapping[str, str]:
    return OneNode(load_config(RLConfig, Path("conf/demo_rl.yaml"), overrides)).rank_env(rank)


def test_ranks_are_told_and_soon_sleep() -> None:
    env = rank_env(1, "parallel.device=cpu", "parallel.tensor=2", "parallel.threads=3")
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"], env["LOCAL_RANK"]) == ("3", "PASSIVE", "1")
    assert 0 < int(env["GOMP_SPINCOUNT"]) < 300_000  # libgomp's own choice, which starves those that work meanwhile
    assert "OMP_NUM_THREADS" not in rank_env(0, "parallel.device=cuda")


@pytest.mark.parametrize(
    ("urls", "here"),
    [
        ((), True),
        (("http://127.0.0.1:1", "http://localhost:2/"), True),
        (("http://127.0.0.1:1", "http://node7:30000"), False),
    ],
)
def test_ranks_listen_on_loopback_unless_an_engine_is_elsewhere(urls: tuple[str, ...], here: bool) -> None:
    assert site.engines_are_here(EngineSection(urls=urls)) is here
    env = rank_env(0, f"engine.urls=[{','.join(urls)}]")
    assert [env.get(f"{kind}_SOCKET_IFNAME") for kind in ("GLOO", "NCCL")] == (["lo"] * 2 if here else [None] * 2)
