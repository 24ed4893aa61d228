"""Agents on nodes with addresses of their own: processes find each other, and what a network that fails does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from collab_megatron.launch.job_link import JobLink
from collab_megatron.wire.job import Hello, RoleState, Start, Welcome
from tests.conftest import REPOSITORY
from tests.launch import namespaces
from tests.launch.agents import KEY
from tests.launch.namespaces import Network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
WAIT_S = 90.0
LOST_S = 10.0
SLEEP = "import time; time.sleep(300)"
SERVE = """
import http.server, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"from " + sys.argv[1].encode())
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Health).serve_forever()
"""
ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=20).read().decode())"


class Nodes:
    """The launcher's link and the agents gpu0, gpu1, each in its namespace."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        names = [f"gpu{number}" for number in range(len(network.nodes))]
        self.link = JobLink(f"{network.address}:*", KEY, names, lost_s=LOST_S)
        self.agents: list[subprocess.Popen[str]] = []
        for name, node in zip(names, network.nodes, strict=True):
            module = [sys.executable, "-m", "collab_megatron.launch.agent"]
            agent = subprocess.Popen(
                node.inside(*module, "--launcher", self.link.address, "--name", name),
                stdin=subprocess.PIPE,
                cwd=REPOSITORY,
                text=True,
            )
            self.agents.append(agent)
            assert agent.stdin is not None
            agent.stdin.write(KEY.hex())
            agent.stdin.close()
        self.link.wait_until_joined(self._welcome, timeout_s=WAIT_S)

    def _welcome(self, hello: Hello) -> Welcome:
        return Welcome(str(self.folder / hello.node), "077", stopped_timeout_s=0, save_grace_s=0)

    def start(self, node: str, code: str, *arguments: str, probe_url: str = "") -> None:
        self.link.send(node, Start("child", 0, ("{python}", "-c", code, *arguments), probe_url=probe_url))

    def until(self, node: str, what: str) -> RoleState:
        """The state of the child once it has this field."""

        def there() -> bool:
            state = self.link.role(node, "child")
            return state is not None and bool(getattr(state, what))

        assert self.link.wait_for(there, timeout_s=WAIT_S), (self.link.role(node, "child"), self.link.lost)
        state = self.link.role(node, "child")
        assert state is not None
        return state

    def end(self) -> None:
        self.link.say_bye(timeout_s=WAIT_S)
        self.link.close()
        for agent in self.agents:
            agent.terminate()
            agent.wait(WAIT_S)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    if reason := namespaces.why_not():
        pytest.skip(reason)
    with namespaces.network(2) as network:
        found = Nodes(network, tmp_path)
        try:
            yield found
        finally:
            found.end()


def test_a_process_of_one_node_reaches_that_of_another(nodes: Nodes) -> None:
    here = [hello.address for name in ("gpu0", "gpu1") if (hello := nodes.link.hello(name))]
    assert here == [node.address for node in nodes.network.nodes]
    nodes.start("gpu0", SERVE, "{address}", "{port:http}", probe_url="http://{address}:{port:http}")
    url = nodes.until("gpu0", "address").address
    assert url.startswith(f"http://{here[0]}:")
    nodes.start("gpu1", ASK, url)
    state = nodes.until("gpu1", "gone")
    assert (state.code, state.tail) == (0, f"from {here[0]}")


def test_a_short_outage_delays_a_command_and_a_long_one_loses_the_node(nodes: Nodes) -> None:
    cable = nodes.network.nodes[1].cable
    cable("down")
    nodes.start("gpu1", SLEEP)
    nodes.link.wait_for(lambda: False, timeout_s=3)
    assert nodes.link.role("gpu1", "child") is None
    cable("up")
    pid = nodes.until("gpu1", "pid").pid
    assert nodes.link.lost == {}
    cable("down")
    assert nodes.link.wait_for(lambda: bool(nodes.link.lost), timeout_s=WAIT_S)
    assert nodes.link.lost == {"gpu1": f"no sign of life for {LOST_S:g} s"}
    assert psutil.pid_exists(pid)
    cable("up")  # its agent comes back, and is told to leave
    assert nodes.link.wait_for(lambda: nodes.agents[1].poll() is not None, timeout_s=WAIT_S)
    assert nodes.agents[1].returncode == 0
    assert not psutil.pid_exists(pid)
    assert nodes.agents[0].poll() is None
