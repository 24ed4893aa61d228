"""The machine that a run is planned for: this one, or the node that `--gpus 8x80` describes; or several of them.

A machine with a driver is no GPU machine for an environment without GPU packages (`make install` on a login node with
one card): parallel.device=auto is cuda only where both are there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import UserError
from collab_megatron.launch.hosts import Host, equal_hosts, parse_hosts

DEVICES = Path("/dev")


@dataclass(frozen=True)
class Node:
    """The hardware of a machine, as far as the checks need it."""

    gpus: int  # number of GPUs that a run may use
    gpu_bytes: int | None  # memory of each GPU; None: unknown
    host_bytes: int | None  # memory of the machine; None: unknown
    here: bool = True  # this machine, so ports, disk and services can be checked
    hosts: tuple[Host, ...] = ()  # of a job of several nodes (--nodes, --hosts); empty: this node alone

    def device(self, parallel: ParallelSection) -> str:
        """cpu or cuda: `parallel.device`, with auto decided for this node."""
        if parallel.device != "auto":
            return parallel.device
        return "cuda" if self.gpus and (not self.here or (has_driver() and has_gpu_packages())) else "cpu"

    def chosen(self, parallel: ParallelSection) -> str:
        """The device and the reason, for the plan."""
        device = self.device(parallel)
        if parallel.device != "auto":
            return f"{device} (parallel.device)"
        if not self.here:
            return f"{device} ({'--nodes' if self.hosts else '--gpus'})"
        if device == "cuda":
            found = "GPUs found"
        elif self.gpus and has_driver():
            found = "this environment has no GPU packages"
        else:
            found = "no GPU found"
        return f"{device} (parallel.device=auto: {found})"


def parse_node(text: str) -> Node:
    """`8x80`: 8 GPUs of 80 GB each. Raises UserError."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise UserError(f"--gpus {text[:40]} is not of the form COUNTxGB: write 8x80 for 8 GPUs of 80 GB each")
    return Node(int(match[1]), int(match[2]) * 2**30, None, here=False)


def several(node: Node, nodes: int | None, hosts: str | None) -> Node:
    """A job of nodes like `node`: `nodes` of them (--nodes), or those that --hosts names. Raises UserError."""
    if nodes is not None and hosts is not None:
        raise UserError("--nodes and --hosts both say which nodes there are: leave one of them out")
    found = (
        parse_hosts(hosts, node.gpus) if hosts is not None else equal_hosts(1 if nodes is None else nodes, node.gpus)
    )
    most = max(len(host.gpus) for host in found)
    if most and node.gpu_bytes is None:
        raise UserError("--hosts names GPUs, and this machine has none whose memory could be used: add --gpus 8x80")
    return replace(
        node, gpus=most, gpu_bytes=node.gpu_bytes if most else None, host_bytes=None, here=False, hosts=found
    )


def this_node() -> Node:
    """This machine."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Node(len(visible_gpus()), gpu_bytes(), pages * page if pages > 0 else None)


def device_of(parallel: ParallelSection) -> str:
    """cpu or cuda: `parallel.device`, with auto decided for this machine."""
    return this_node().device(parallel) if parallel.device == "auto" else parallel.device


def has_driver() -> bool:
    return (DEVICES / "nvidiactl").exists()


def has_gpu_packages() -> bool:
    """Whether this environment was installed for GPUs: a torch built for CUDA, and SGLang's kernels unless the engines
    have an environment of their own. tools/install.sh puts the stand-in for these kernels into every CPU environment,
    also where it finds only a CUDA build of torch. Imports neither."""
    if not _torch_has_cuda():
        return False
    return _is_installed("sglang-kernel") or not _is_installed("sglang-cpu-support")


def _torch_has_cuda() -> bool:
    """torch/version.py of every build assigns `cuda`: None, or CUDA's version."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and re.search(r"^cuda\b[^=]*= *['\"]", version.read_text(), re.MULTILINE) is not None


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(len(list(DEVICES.glob("nvidia[0-9]*"))))]
    numbers = [number.strip() for number in visible.split(",")]
    # CUDA ends the list at the first id that is none, such as -1
    end = next((place for place, number in enumerate(numbers) if number.startswith("-")), len(numbers))
    return [number for number in numbers[:end] if number]


def gpu_bytes() -> int | None:
    """Memory of this machine's first GPU from nvidia-smi; None without a GPU. The launcher does not import torch."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(output.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
