"""An attempt: the news that one rank leaves and the others' waits find."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from collab_megatron.errors import RunError
from collab_megatron.trainer.sync.attempt import Abandoned, Attempt


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def attempt(store: dist.Store, number: int = 1, rank: int = 0, timeout_s: float = 30) -> Attempt:
    return Attempt(store, number=number, rank=rank, members=(), timeout_s=timeout_s)


def test_a_wait_ends_at_its_deadline_and_names_rank_and_phase(store: dist.Store) -> None:
    with pytest.raises(RunError, match=r"trainer rank 3: packing bucket 7 did not end within 0.1 s"):
        attempt(store, rank=3, timeout_s=0.1).wait(lambda: False, "packing bucket 7")


def test_abandoning_ends_the_waits_of_the_same_attempt_only(store: dist.Store) -> None:
    attempt(store, number=1, rank=1).abandon()
    with pytest.raises(Abandoned):
        attempt(store, number=1).wait(lambda: False, "")
    with pytest.raises(RunError, match="did not end"):
        attempt(store, number=2, timeout_s=0.1).wait(lambda: False, "")


def test_values_reach_other_ranks_until_their_rank_closes_the_attempt(store: dist.Store) -> None:
    writer, reader = attempt(store, rank=0), attempt(store, rank=1)
    assert not reader.is_posted("handle")
    writer.post("handle", b"\0abc")
    assert reader.read("handle") == b"\0abc"
    reader.close()
    assert reader.is_posted("handle"), "a rank deletes only its own keys"
    writer.close()
    assert not reader.is_posted("handle")
