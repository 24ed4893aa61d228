"""The command line and environment of one SGLang server. Nothing is started here."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collab_megatron.config.sections import EngineSection
from collab_megatron.errors import UserError

# variables that point an interpreter at packages: a server with an environment of its own must not see ours
PYTHON_PLACES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Variables of processes whose peers are all on this node: gloo and NCCL listen on loopback only."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Of every process of a run on the CPU: SGLang's `is_cuda` and Megatron ask torch for GPUs, whatever a flag says."""

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
    "--config": "the keys of engine, which SGLang's file would override",
}
"""Flags that a key of the config sets: repeated in engine.extra_args they would silently override the key."""


NCCL_DEFAULTS: Mapping[str, str] = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What SGLang sets where the environment does not (0.5.23, srt/entrypoints/engine.py, _set_envs_and_config)."""


def nccl_settings(extra_args: Sequence[str], inherited: Mapping[str, str]) -> dict[str, str]:
    """The settings of every process that shares an NCCL communicator with a server: ranks that differ in them hang or
    fail when they connect. `inherited`: the environment of trainer and servers. A flag of SGLang outranks it."""
    flags = {word.partition("=")[0] for word in extra_args}
    symmetric = "--enable-symm-mem" in flags
    on = {"NCCL_CUMEM_ENABLE": symmetric, "NCCL_NVLS_ENABLE": symmetric or "--enable-nccl-nvls" in flags}
    return {name: "1" if on[name] else inherited.get(name, default) for name, default in NCCL_DEFAULTS.items()}


def check_own_flags(extra_args: Sequence[str]) -> None:
    """Raise UserError for a flag among engine.extra_args that a key sets."""
    for flag in extra_args:
        key = OWN_FLAGS.get(flag.partition("=")[0])
        if key is not None:
            raise UserError(f"engine.extra_args holds {flag}, which the config sets itself: use {key} instead")


# An OpenMP thread that waits for the next loop spins GOMP_SPINCOUNT times, some 50 microseconds, then sleeps. Without
# spinning every small loop pays for waking it; with libgomp's default it takes cores from threads that work.
# OMP_WAIT_POLICY is for other OpenMP libraries, which do not know the count.
OPENMP_WAITS: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


@dataclass(frozen=True)
class EngineCommand:
    """The command and environment of one server."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to the caller's environment
    url: str
    unset: tuple[str, ...] = ()  # variables of the caller's environment that it must not see


def engine_command(
    settings: EngineSection,
    *,
    model_path: str,
    dtype: str,
    device: str,
    port: int | str,
    seed: int,
    number: int = 0,
    cores: Sequence[int] | None = None,
    threads: int = 1,
    keys_file: Path | None = None,
    scratch: Path | None = None,
    text: bool = False,
) -> EngineCommand:
    """The server for `model_path`; prefix cache on. `text`: with a tokenizer, for chats over the OpenAI API; else for
    token ids only.

    `port`: also the word that a node's agent replaces (launch/agent.py). `number`: of the server within its run.
    `cores`: CPU cores for its ranks; None: all that this process may use. `threads`: of each rank on CPU, unless
    engine.threads is set. `keys_file`: the API keys it asks for (keys.py).
    `scratch`: folder of mode 0700 through which its ranks find each other; None: over a port that is open to all.
    On CPU: pure-torch attention and sampling, because SGLang's CPU kernels are not on PyPI (tools/cpu_support). On GPUs
    in fp32: Triton's attention.
    """
    argv = [settings.python or sys.executable, "-m", "sglang.launch_server"]
    argv += ["--model-path", model_path, "--dtype", dtype, "--host", settings.host, "--port", str(port)]
    argv += ["--tp-size", str(settings.tensor), "--random-seed", str(seed), "--log-level", "warning"]
    argv += [*([] if text else ["--skip-tokenizer-init"]), "--sleep-on-idle"]
    # log-probs of the distribution at the sampling temperature, as the trainer's are, whatever the caller's environment
    env = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"} | ON_LOOPBACK  # a server's ranks are all on this node
    # clients close idle connections, after KEEPALIVE_S; a server that did not run for a while (SGLang's default: 5 s)
    # would close one that holds a request it has not read yet, and count as gone
    env["SGLANG_TIMEOUT_KEEP_ALIVE"] = "3600"
    if device == "cpu":
        argv += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        # overlapping the scheduler with a device's work only costs where there is no device (docs/benchmarks.md)
        argv.append("--disable-overlap-schedule")
        # the pool gives up a server that reports no finished batch; SGLang's default, 15 decode steps, takes too long
        argv += ["--load-snapshot-publish-interval", "1"]
        env |= {"SGLANG_USE_CPU_ENGINE": "1", **OPENMP_WAITS, **NO_GPU}
        env["OMP_NUM_THREADS"] = str(settings.threads or threads)
        # glibc returns large blocks to the kernel at once, and fresh pages cost more than the copy into them: without
        # these the server would fault in its receive buffers again for every bucket of weights
        env |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
        if settings.tensor > 1:
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                str(core) for core in _cores(settings.tensor, number, cores or sorted(os.sched_getaffinity(0)))
            )
    else:
        argv += _attention(dtype, settings.extra_args)
        env |= nccl_settings(settings.extra_args, os.environ)
        env["PATH"] = _path(argv[0])
        if settings.placement == "colocated":
            argv.append("--enable-memory-saver")  # frees its memory while the trainer works on the same GPUs
            # a server that restarts finds GPUs of which the trainer has taken unequal shares (0.5.23,
            # srt/distributed/bootstrap.py, _check_tp_memory_balance)
            env["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
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
        argv += ["--config", str(keys_file)]  # not as flags: every user can read a command line
    if scratch is not None and not any(word.startswith("--dist-init-addr") for word in settings.extra_args):
        # a new file for each start; torch's TCPStore would listen on every interface and obey anybody
        env["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{scratch}/ranks-{uuid.uuid4().hex[:12]}"
        if device == "cpu":  # SGLang's kernels name their shared memory after that port; nothing listens there
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv += settings.extra_args
    unset = PYTHON_PLACES if settings.python is not None else ()
    return EngineCommand(tuple(argv), env, f"http://{settings.host}:{port}", unset)


def _path(python: str) -> str:
    """PATH with the programs of an interpreter's environment in front: SGLang compiles kernels with a bare `ninja`
    (0.5.23, kernels/jit/utils/compile/ninja.py), which nobody finds where the environment is not activated."""
    folder = os.path.dirname(os.path.abspath(shutil.which(python) or python))  # its link's own, not the base's
    return os.pathsep.join((folder, os.environ.get("PATH", os.defpath)))


def _attention(dtype: str, extra_args: Sequence[str]) -> list[str]:
    """The attention backend, where SGLang's choice cannot serve the dtype: fa3 (Hopper), trtllm_mha (Blackwell) and
    flashinfer have kernels for 16 bits and less (0.5.23, srt/arg_groups/model_override_base.py)."""
    chosen = any("attention-backend" in word for word in extra_args)  # also --decode-attention-backend and others
    return ["--attention-backend", "triton"] if dtype == "float32" and not chosen else []


def _cores(ranks: int, number: int, cores: Sequence[int]) -> list[int]:
    """One core for each rank: different ones for each server while there are enough, then the same ones again."""
    return [cores[(number * ranks + rank) % len(cores)] for rank in range(ranks)]
