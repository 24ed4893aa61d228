"""Check of the nodes of a Slurm job: each node's agent reports, sees the shared folder, and starts a process.

    sbatch --nodes=8 slurm/check_nodes.sbatch [--folder runs/mine]

Runs on the first node. The agents connect to --address, which shows that the network lets them; the job's key comes on
standard input (slurm/nodes.sh). Prints a line per node. Ends with 1 if a node is missing, does not see the folder, or
differs from the others in packages or number of GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_text
from collab_megatron.launch.hosts import parse_hosts
from collab_megatron.launch.job_link import JOIN_S, JobLink
from collab_megatron.signals import end_at_signals
from collab_megatron.wire.job import End, Hello, RoleState, Start, Welcome
from collab_megatron.wire.sealed import new_half, read_key

SHARED_S = 30.0
PROCESS_S = 120.0  # torch from a cold file system
BYE_S = 5.0
ROLE = "probe"
PROBE = """
import torch
print(f"torch {torch.__version__}, {torch.cuda.device_count()} GPUs")
"""


@dataclass(frozen=True)
class Finding:
    """What was found of one node."""

    node: str
    said: Hello
    shared: bool
    output: str  # of the process; empty if it failed
    error: str

    @property
    def line(self) -> str:
        same = f"{self.output or self.error}, version {self.said.package}"
        seen = "sees the folder" if self.shared else "DOES NOT SEE THE FOLDER"
        return f"{self.node:16s} {self.said.address:15s} {self.said.cores:4d} cores  {same}  {seen}"


def check(link: JobLink, nodes: list[str], folder: Path) -> list[Finding]:
    """What every node has. Raises RunError if an agent does not report."""
    shared_file, text = folder / ".check_nodes", new_half().hex()
    publish_text(shared_file, text)
    try:
        link.wait_until_joined(lambda hello: _welcome(hello, folder, shared_file), timeout_s=JOIN_S)
        link.wait_for(lambda: all(link.shared(node) == text for node in nodes), timeout_s=SHARED_S)
        for node in nodes:
            link.send(node, Start(ROLE, 0, ("{python}", "{scratch}/probe.py")))
        link.wait_for(lambda: all(_has_ended(link, node) for node in nodes), timeout_s=PROCESS_S)
        found = [_finding(link, node, shared=link.shared(node) == text) for node in nodes]
        for node in nodes:
            if not _has_ended(link, node):
                link.send(node, End(ROLE, 0, 1.0))
        return found
    finally:
        shared_file.unlink(missing_ok=True)
        link.say_bye(timeout_s=BYE_S)


def _welcome(hello: Hello, folder: Path, shared_file: Path) -> Welcome:
    return Welcome(
        logs_dir=str(folder / "check_nodes" / hello.node),
        umask="077",
        stopped_timeout_s=0,
        save_grace_s=0,
        files={"probe.py": PROBE.encode()},
        shared_file=str(shared_file.absolute()),
    )


def _state(link: JobLink, node: str) -> RoleState | None:
    return link.role(node, ROLE)


def _has_ended(link: JobLink, node: str) -> bool:
    state = _state(link, node)
    return node in link.lost or (state is not None and state.gone)


def _finding(link: JobLink, node: str, *, shared: bool) -> Finding:
    state, said = _state(link, node), link.hello(node)
    assert said is not None, "it has joined"
    if node in link.lost:
        error = f"lost: {link.lost[node]}"
    elif state is None or not state.gone:
        error = f"its process did not end within {PROCESS_S:g} s"
    else:
        error = state.refused or (f"its process ended with {state.code}: {state.tail}" if state.code else "")
    return Finding(node, said, shared, "" if error or state is None else state.tail.strip(), " ".join(error.split()))


def problems(findings: list[Finding], folder: Path) -> list[str]:
    """What is wrong, a sentence each."""
    blind = [each.node for each in findings if not each.shared]
    found = [f"{each.node}: {each.error}" for each in findings if each.error]
    if blind:
        found.append(f"{', '.join(blind)}: {folder} is not visible: choose a folder that all nodes share (--folder)")
    kinds = {(each.output, each.said.package) for each in findings if not each.error}
    if len(kinds) > 1:
        found.append("the nodes differ in packages or GPUs: give all of them the same environment and --gpus-per-node")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, metavar="HOST:PORT", help="where the agents connect to")
    parser.add_argument("--nodes", help="names in Slurm's form, such as gpu[01-08]; by default those of the job")
    parser.add_argument("--folder", type=Path, default=Path("runs/slurm"), help="that all nodes should share")
    args = parser.parse_args()
    end_at_signals()
    names = args.nodes or os.environ.get("SLURM_JOB_NODELIST")
    if not names:
        raise UserError("there is no Slurm job here: use sbatch slurm/check_nodes.sbatch, or name the nodes (--nodes)")
    nodes = [host.name for host in parse_hosts(names, 0)]
    link = JobLink(args.address, read_key(sys.stdin.read(200), "standard input"), nodes)
    begin = time.monotonic()
    try:
        findings = check(link, nodes, args.folder)
    finally:
        link.close()
    for each in findings:
        print(each.line)
    found = problems(findings, args.folder)
    if found:
        raise RunError("; ".join(found))
    print(f"{len(nodes)} nodes are alike and share {args.folder} ({time.monotonic() - begin:.1f} s)")


if __name__ == "__main__":
    run_cli(main)
