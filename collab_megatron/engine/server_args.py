"""The command line and environment of one SGLang server. Nothing is started here."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collab_megatron.config.sections import EngineSection
from collab_megatron.errors import UserError

# where an interpreter looks for packages: ours must not reach one of another environment
PYTHON_PLACES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment of processes whose peers are all on this node: gloo and NCCL listen where nobody else can knock."""

OWN_FLAGS: Mapping[str, str] = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--dtype": "model.dtype",
    "--host": "engine.host",
    "--port": "engine.port",
    "--tp-size": "engine.tensor",
    "--tp": "engine.tensor",
    "--tensor-parallel-size": "engine.tensor",
    "--random-seed": "run.seed",
    "--device": "parallel.device",
    "--mem-fraction-static": "engine.mem_fraction",
    "--max-total-tokens": "engine.max_total_tokens",
    "--max-running-requests": "engine.max_running_requests",
    "--context-length": "engine.context_length",
    "--config": "the keys of engine: SGLang's file would go over them",
}
"""Flags that the config sets with keys of its own: given again in engine.extra_args they would win unseen."""


def check_own_flags(extra_args: Sequence[str]) -> None:
    """Raise UserError for a flag among engine.extra_args that a key sets."""
    for flag in extra_args:
        key = OWN_FLAGS.get(flag.partition("=")[0])
        if key is not None:
            raise UserError(f"engine.extra_args holds {flag}, which is set elsewhere: use {key}")


# OpenMP threads that wait for the next loop spin so often, which takes some 50 microseconds, and then sleep. Without
# spinning every small loop pays for waking them; with libgomp's own choice they take the cores from those that
# work meanwhile. OMP_WAIT_POLICY is for other OpenMP libraries, which do not know the count
OPENMP_WAITS: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


@dataclass(frozen=True)
class EngineCommand:
    """What to execute for one server."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  # on top of the caller's environment
    url: str
    unset: tuple[str, ...] = ()  # variables of the caller's environment that it must not see


def engine_command(
    settings: EngineSection,
    *,
    model_path: str,
    dtype: str,
    device: str,
    port: int,
    seed: int,
    number: int = 0,
    cores: Sequence[int] | None = None,
    threads: int = 1,
    keys_file: Path | None = None,
    scratch: Path | None = None,
) -> EngineCommand:
    """The server for `model_path`; token ids only (no tokenizer in the server), prefix cache on.

    number: of the server among its run's. cores: CPU cores that its ranks may be bound to; None: all that we may use.
    threads: of each rank on CPU, where engine.threads does not say. keys_file: what it asks for (engine/keys.py).
    scratch: folder of mode 0700 through which its ranks find each other; None: over a port that is open to all.
    On CPU: pure-torch attention and sampling, because SGLang's CPU kernels are not on PyPI (tools/cpu_support).
    """
    argv = [settings.python or sys.executable, "-m", "sglang.launch_server"]
    argv += ["--model-path", model_path, "--dtype", dtype, "--host", settings.host, "--port", str(port)]
    argv += ["--tp-size", str(settings.tensor), "--random-seed", str(seed), "--log-level", "warning"]
    argv += ["--skip-tokenizer-init", "--sleep-on-idle"]
    # the log-probs that come back are of the distribution at the sampling temperature, as the trainer's are; a
    # caller's environment may say otherwise
    env = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"} | ON_LOOPBACK  # a server's ranks are all on this node
    if device == "cpu":
        argv += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        # there is no device whose work the scheduler's own could hide behind: it only costs (docs/benchmarks.md)
        argv.append("--disable-overlap-schedule")
        # a server that finishes no batch is taken for hung (pool.py); its own choice, 15 decode steps, can take long
        argv += ["--load-snapshot-publish-interval", "1"]
        env |= {"SGLANG_USE_CPU_ENGINE": "1", **OPENMP_WAITS}
        env["OMP_NUM_THREADS"] = str(settings.threads or threads)
        # glibc gives large blocks back to the kernel at once, and fresh pages cost more than the copy into them: the
        # server would fault its receive buffers in anew for every bucket of weights
        env |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
        if settings.tensor > 1:
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                str(core) for core in _cores(settings.tensor, number, cores or sorted(os.sched_getaffinity(0)))
            )
    elif settings.placement == "colocated":
        argv.append("--enable-memory-saver")  # gives its memory back while the trainer works on the same GPUs
    mem_fraction = settings.mem_fraction or (0.1 if device == "cpu" else None)
    for flag, value in (
        ("--mem-fraction-static", mem_fraction),
        ("--max-total-tokens", settings.max_total_tokens),
        ("--max-running-requests", settings.max_running_requests),
        ("--context-length", settings.context_length),
    ):
        if value is not None:
            argv += [flag, str(value)]
    if keys_file is not None:
        argv += ["--config", str(keys_file)]  # not as flags: anybody may read a command line
    if scratch is not None and not any(word.startswith("--dist-init-addr") for word in settings.extra_args):
        # a file of this life alone; torch's TCPStore would listen on every interface and take orders from anybody
        env["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{scratch}/ranks-{uuid.uuid4().hex[:12]}"
        if device == "cpu":  # SGLang's kernels name their shared memory after that port; nobody listens there
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv += settings.extra_args
    unset = PYTHON_PLACES if settings.python is not None else ()
    return EngineCommand(tuple(argv), env, f"http://{settings.host}:{port}", unset)


def _cores(ranks: int, number: int, cores: Sequence[int]) -> list[int]:
    """One core for each rank: others for every server while there are enough, then the same ones again."""
    return [cores[(number * ranks + rank) % len(cores)] for rank in range(ranks)]
