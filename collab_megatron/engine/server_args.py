"""The command line and environment of one SGLang server. Pure: nothing is started here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from collab_megatron.config.sections import EngineSection


@dataclass(frozen=True)
class EngineCommand:
    """What to execute for one server."""

    argv: tuple[str, ...]
    env: Mapping[str, str]  # on top of the caller's environment
    url: str


def engine_command(
    settings: EngineSection, *, model_path: str, dtype: str, device: str, port: int, seed: int
) -> EngineCommand:
    """The server for `model_path`; token ids only (no tokenizer in the server), prefix cache on.

    On CPU: pure-torch attention and sampling, because SGLang's CPU kernels are not on PyPI (tools/cpu_support).
    """
    argv = [settings.python or sys.executable, "-m", "sglang.launch_server"]
    argv += ["--model-path", model_path, "--dtype", dtype, "--host", settings.host, "--port", str(port)]
    argv += ["--tp-size", str(settings.tensor), "--random-seed", str(seed), "--log-level", "warning"]
    argv += ["--skip-tokenizer-init", "--sleep-on-idle"]
    # SGLang can report log-probs of the temperature-scaled distribution; the trainer's are of the raw logits
    env = {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}
    if device == "cpu":
        threads = settings.threads or 1
        argv += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        # spinning OpenMP threads starve the trainer that shares these cores
        env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if settings.tensor > 1:
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(settings.tensor))
    mem_fraction = settings.mem_fraction or (0.1 if device == "cpu" else None)
    for flag, value in (
        ("--mem-fraction-static", mem_fraction),
        ("--max-total-tokens", settings.max_total_tokens),
        ("--max-running-requests", settings.max_running_requests),
        ("--context-length", settings.context_length),
    ):
        if value is not None:
            argv += [flag, str(value)]
    argv += settings.extra_args
    return EngineCommand(argv=tuple(argv), env=env, url=f"http://{settings.host}:{port}")
