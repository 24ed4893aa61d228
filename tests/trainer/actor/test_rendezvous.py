"""Stores listen on loopback only if all ranks are on this node."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from collab_megatron.trainer.actor.rendezvous import listening_store, ranks_store
from tests.listening import listening, open_to_others

TIMEOUT = timedelta(seconds=20)
LOOPBACK = ipaddress.ip_address("127.0.0.1")


def test_a_store_of_ours_listens_on_loopback_and_one_of_torchs_everywhere() -> None:
    before = listening(os.getpid())
    store = listening_store("127.0.0.1", 0, timeout=TIMEOUT)
    assert listening(os.getpid()) - before == {(LOOPBACK, store.port)}
    client = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=TIMEOUT)
    client.set("key", "value")
    assert store.get("key") == b"value"
    torchs = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    assert torchs.port in {port for _, port in open_to_others([os.getpid()])[os.getpid()]}  # what this test can see
    del client, store, torchs
    assert listening(os.getpid()) == before  # with the store its socket is closed


def test_ranks_meet_on_the_interface_of_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    before = listening(os.getpid())
    assert isinstance(ranks_store(0, 1, TIMEOUT), dist.HashStore)  # a rank alone opens nothing
    assert listening(os.getpid()) == before
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert ranks_store(0, 2, TIMEOUT) is None
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert ranks_store(0, 2, TIMEOUT) is None
