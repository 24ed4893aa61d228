"""Checks of the machine: disk, shared memory, open files, ports, the hub, keys in the environment."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from collab_megatron.doctor.findings import Finding, Level
from collab_megatron.launch.ports import free_port

SHARED_MEMORY = Path("/dev/shm")
LITTLE_SHARED_MB, TOO_LITTLE_SHARED_MB = 1024, 64
LITTLE_DISK_GB = 10
FEW_FILES = 4096  # a driver holds a connection for each call in flight
REACH_TIMEOUT_S = 5.0
HUB = "https://huggingface.co"
USUAL_KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN")


def check_disk(folder: Path) -> Iterator[Finding]:
    """Space where a run would write. `folder` may not exist yet."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free_gb = shutil.disk_usage(existing).free / 2**30
    if free_gb < LITTLE_DISK_GB:
        way_out = "free some space, or choose another run.dir; the config's checks know how much checkpoints need"
        yield Finding("warn", "disk", f"{existing} has {free_gb:.1f} GB free", way_out)
    else:
        yield Finding("ok", "disk", f"{existing} has {free_gb:.0f} GB free")


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """torch, NCCL, SGLang and sync.transport=ipc on CPU use it."""
    way_out = "enlarge it: mount -o remount,size=8G /dev/shm, or start the container with --shm-size 8g"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding("fail", "shared memory", f"{folder} is not a writable folder", way_out)
        return
    free_mb = shutil.disk_usage(folder).free / 2**20
    level = shared_level(free_mb)
    text = f"{folder} has {free_mb:,.0f} MB free"
    yield Finding(level, "shared memory", text, "" if level == "ok" else way_out)


def shared_level(free_mb: float) -> Level:
    return "fail" if free_mb < TOO_LITTLE_SHARED_MB else "warn" if free_mb < LITTLE_SHARED_MB else "ok"


def check_open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        way_out = f"ulimit -n {FEW_FILES} before the start (hard limit: {hard})"
        yield Finding("warn", "open files", f"this shell allows {soft}", way_out)
    else:
        yield Finding("ok", "open files", "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} allowed")


def check_ports(host: str = "127.0.0.1") -> Iterator[Finding]:
    """Raises RunError where no port is free."""
    yield Finding("ok", "ports", f"a server can listen at {host}:{free_port(host)}")


def check_hub(environment: Mapping[str, str], *, needed: bool) -> Iterator[Finding]:
    """The model hub, with a deadline. `needed`: the config names a model on it."""
    if environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("ok", "hub", "HF_HUB_OFFLINE is set: models come from the cache")
        return
    url = environment.get("HF_ENDPOINT") or HUB
    try:
        answer = httpx.head(url, timeout=REACH_TIMEOUT_S, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        text = f"{url} cannot be reached ({type(error).__name__}, deadline {REACH_TIMEOUT_S:g} s)"
        way_out = "name local folders, set HF_ENDPOINT to a mirror, or HTTPS_PROXY to a proxy"
        yield Finding("fail" if needed else "warn", "hub", text, way_out)
        return
    if answer.status_code >= 500:
        yield Finding("warn", "hub", f"{url} answers {answer.status_code}", "try again later, or use the cache")
    else:
        yield Finding("ok", "hub", f"{url} answers")


def check_keys(environment: Mapping[str, str], needed: Mapping[str, str]) -> Iterator[Finding]:
    """Which keys are there; no part of a value is shown. needed: environment variable -> place in the config."""
    for name, place in needed.items():
        if environment.get(name):
            yield Finding("ok", "keys", f"{name} is set ({place})")
        else:
            way_out = f"export {name}=..., or set {place}.api_key_env to null for a server that wants none"
            yield Finding("fail", "keys", f"{name} is not set ({place})", way_out)
    if not needed:
        there = [name for name in USUAL_KEYS if environment.get(name)]
        yield Finding("ok", "keys", f"set: {', '.join(there)}" if there else f"none of {', '.join(USUAL_KEYS)} is set")
