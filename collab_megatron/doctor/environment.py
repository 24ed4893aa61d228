"""Checks of the installed environment: Python, package versions, GPUs, torch with NCCL, the trainer's backend.

torch and Megatron are imported by processes of their own, with a deadline: an import that hangs or crashes is a
finding.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from collab_megatron.doctor.facts import PROGRAMS, packages, said_by
from collab_megatron.doctor.findings import Finding, Level
from collab_megatron.launch.engine_versions import ask
from collab_megatron.launch.node import has_driver, has_gpu_packages, visible_gpus

DISTRIBUTION = "collab-megatron"
PYTHONS = ((3, 11), (3, 12))
OLDEST_DRIVER = 580  # of CUDA 13
BACKEND_TIMEOUT_S = 180.0  # megatron's import takes some 10 s, from a cold network file system minutes
# what a trainer rank would choose; warnings of a package that is installed and not used go to stderr
BACKEND_QUESTION = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
import torch
from collab_megatron.trainer.actor.backend import choose_backend
backend = choose_backend("auto", 0)
print(json.dumps([backend.name, backend.process_group, backend.transformer_engine, backend.optimizer]))
"""
NOT_USED = "is installed but cannot be used"  # of choose_backend's warning
# releases that must not run, with the reason (setup.cfg excludes them; pip install --no-deps would not)
REFUSED: Mapping[str, Mapping[str, str]] = {
    "litellm": dict.fromkeys(("1.82.7", "1.82.8", "1.107.0"), "was published with code that steals credentials")
}
# pairs that pip calls a conflict and that run together (requirements/gpu-overrides.txt)
ACCEPTED = frozenset({"openai", "numpy", "triton"})


def check_python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in PYTHONS:
        yield Finding("ok", "python", f"{version} at {sys.executable}")
    else:
        yield Finding("fail", "python", f"{version} at {sys.executable}", "install with Python 3.11 or 3.12")


def check_packages() -> Iterator[Finding]:
    """Installed versions against what setup.cfg asks for, and releases that must not run."""
    found = packages()
    yield Finding("ok", "packages", ", ".join(f"{name} {version}" for name, version in found.items()) or "none")
    for name, reasons in REFUSED.items():
        if found.get(name) in reasons:
            way_out = f"uninstall {name}, change every key that this machine had, and run make install"
            yield Finding("fail", "packages", f"{name} {found[name]} {reasons[found[name]]}", way_out)
    try:
        asked = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        way_out = "run make install, or pip install . in the checkout"
        yield Finding("warn", "packages", f"{DISTRIBUTION} is not installed, so versions were not compared", way_out)
        return
    yield from conflicts(asked)


def conflicts(asked: list[str]) -> Iterator[Finding]:
    """Requirements that the environment does not meet."""
    for line in asked:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", "packages", f"{requirement.name} is not installed", "run make install")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            level: Level = "warn" if requirement.name in ACCEPTED else "fail"
            text = f"{requirement.name} is {version}, this project needs {requirement.specifier}"
            yield Finding(level, "packages", text, "run make install, or pip install that version")


def check_gpus() -> Iterator[Finding]:
    gpus = visible_gpus()
    if not has_driver() and not gpus:
        yield Finding("ok", "gpu", "no GPU on this machine: runs use the CPU")
        return
    said = said_by("nvidia-smi", PROGRAMS["nvidia-smi"])
    yield from driver_findings(said)
    if not gpus:
        yield Finding("warn", "gpu", "CUDA_VISIBLE_DEVICES hides every GPU", "unset it, or name GPUs in it")
    if has_gpu_packages():
        yield Finding("ok", "gpu", f"{len(gpus)} visible, and this environment was installed for GPUs")
    else:
        yield Finding(
            "warn", "gpu", "this environment has no GPU packages, so runs use the CPU", "run make install-gpu"
        )


def driver_findings(said: str) -> Iterator[Finding]:
    """Findings from nvidia-smi's lines `name, driver_version, ...`."""
    versions = {int(found[1]) for line in said.splitlines() if (found := re.search(r",\s*(\d+)\.\d", line))}
    if not versions:
        yield Finding(
            "fail", "gpu", f"nvidia-smi: {said[:200]}", "install NVIDIA's driver, or see dmesg for its errors"
        )
    elif min(versions) < OLDEST_DRIVER:
        text = f"NVIDIA driver {min(versions)} is too old for CUDA 13"
        yield Finding("fail", "gpu", text, f"install driver {OLDEST_DRIVER} or newer")
    else:
        yield Finding("ok", "gpu", "; ".join(said.splitlines()))


def check_torch() -> Iterator[Finding]:
    """torch with its CUDA and NCCL, in this interpreter. Raises UserError where it cannot be imported."""
    versions = ask(sys.executable, elsewhere=False)
    if versions is None:
        yield Finding("warn", "torch", "its import took over two minutes", "put .venv on a local disk")
    elif versions.cuda and not versions.nccl:
        yield Finding("fail", "torch", f"{versions}: NCCL is missing", "run make install-gpu")
    else:
        yield Finding("ok", "torch", str(versions))


def check_backend() -> Iterator[Finding]:
    """transformer-engine or apex: which one a trainer rank uses here, or why not."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", BACKEND_QUESTION],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BACKEND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"Megatron's import took over {BACKEND_TIMEOUT_S:g} s"
        yield Finding("warn", "trainer", text, "put .venv on a local disk")
        return
    yield from backend_findings(done.returncode, done.stdout, done.stderr)


def backend_findings(code: int, output: str, errors: str) -> Iterator[Finding]:
    """Findings from the answer to BACKEND_QUESTION."""
    last = ([line for line in errors.splitlines() if line.strip()] or ["no reason given"])[-1]
    lines = output.strip().splitlines()
    if code or not lines:
        way_out = "run make install (on a GPU node make install-gpu), see docs/install.md"
        yield Finding("fail", "trainer", f"Megatron cannot be imported: {last}", way_out)
        return
    name, group, has_te, optimizer = json.loads(lines[-1])
    layers = "transformer-engine's layers" if has_te else "megatron's local layers"
    yield Finding("ok", "trainer", f"{name}, {group}, {layers}, Adam of {optimizer}")
    not_used = next((line for line in errors.splitlines() if NOT_USED in line), "")
    if not_used:
        way_out = "build transformer-engine-torch for the installed torch, see docs/install.md"
        yield Finding("warn", "trainer", not_used, way_out)
    elif name == "cuda" and not has_te:
        text = "transformer-engine is not installed: context parallelism is off and layers are slower"
        yield Finding("warn", "trainer", text, "run make install-gpu")
