"""Starts the processes of a run on this node and stays until they end: engine, driver, trainer ranks.

If any of them fails, all others are ended and its sentence becomes ours.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from collab_megatron.cluster.preflight import RLStart, device_of
from collab_megatron.cluster.processes import Child, Supervisor, free_port
from collab_megatron.config import EvaluateConfig, RLConfig, SFTConfig, dump_config
from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import engine_command

DRIVER_END_S = 60.0


def launch_rl(config: RLConfig, start: RLStart) -> None:
    """Run engine, driver and trainers; returns when training is done. Raises RunError when a part fails."""
    with (
        Supervisor(config.run.logs_dir) as supervisor,
        tempfile.TemporaryDirectory(prefix="collab_megatron_") as scratch,
    ):
        files = Path(scratch)
        resolved = write_resolved(config, config.run.logs_dir)
        url, engine = start_engine(
            supervisor, config.engine, config.model.path, config.model.dtype, config.parallel, config.run.seed
        )
        driver = supervisor.start(
            "driver",
            [
                *(sys.executable, "-m", "collab_megatron.driver.service", str(resolved), "--engine", url),
                *("--first-step", str(start.first_step), "--max-context-tokens", str(start.max_context_tokens)),
                *("--ready-file", str(files / "driver")),
            ],
            {},
        )
        trainers = start_trainers(
            supervisor,
            "collab_megatron.train_rl",
            resolved,
            config.parallel,
            [
                *("--engine-url", url, "--engine-ready-file", str(files / "engine")),
                *("--driver-ready-file", str(files / "driver")),
            ],
        )
        wait_for_engine(supervisor, url, engine, config.engine)
        (files / "engine").write_text(url)
        supervisor.wait_for(trainers)
        supervisor.wait_for([driver], timeout_s=DRIVER_END_S)  # it was told to stop by the trainer


def launch_sft(config: SFTConfig) -> None:
    """Run the trainer ranks; returns when training is done. Raises RunError when one fails."""
    with Supervisor(config.run.logs_dir) as supervisor:
        resolved = write_resolved(config, config.run.logs_dir)
        supervisor.wait_for(start_trainers(supervisor, "collab_megatron.train_sft", resolved, config.parallel, []))


def start_engine(
    supervisor: Supervisor, engine: EngineSection, model_path: str, dtype: str, parallel: ParallelSection, seed: int
) -> tuple[str, Child | None]:
    """URL of the engine, and the server if it was started by us."""
    if engine.url is not None:
        return engine.url.rstrip("/"), None
    device = device_of(parallel)
    command = engine_command(
        engine, model_path=model_path, dtype=dtype, device=device, port=engine.port or free_port(engine.host), seed=seed
    )
    env = dict(command.env)
    if device == "cuda":  # the GPUs after the trainer's
        first = parallel.world_size
        env["CUDA_VISIBLE_DEVICES"] = ",".join(str(first + rank) for rank in range(engine.tensor))
    return command.url, supervisor.start("engine", command.argv, env)


def wait_for_engine(supervisor: Supervisor, url: str, child: Child | None, engine: EngineSection) -> None:
    """Until the engine answers. Raises RunError if it dies, anything else of the run fails, or at the deadline."""
    control = EngineControl(url, timeout_s=engine.startup_timeout_s)

    def alive() -> bool:
        supervisor.check()
        return child is None or child.process.poll() is None

    try:
        start = time.monotonic()
        control.wait_until_ready(timeout_s=engine.startup_timeout_s, alive=alive)
        print(f"engine ready at {url} after {time.monotonic() - start:.0f} s", flush=True)
    finally:
        control.close()


def start_trainers(
    supervisor: Supervisor, module: str, resolved: Path, parallel: ParallelSection, extra: list[str]
) -> list[Child]:
    """One process per rank; rank 0 speaks on our terminal, the others into their logs."""
    port = free_port()
    world = parallel.world_size
    argv = [sys.executable, "-m", module, str(resolved), "--trainer-rank", *extra]
    return [
        supervisor.start(f"trainer-{rank}", argv, _rank_env(rank, world, port, device_of(parallel)), show=rank == 0)
        for rank in range(world)
    ]


def _rank_env(rank: int, world: int, port: int, device: str) -> Mapping[str, str]:
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":  # ranks share the cores with the engine: one thread each, and none that spins
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return env


def write_resolved(config: BaseModel, folder: Path) -> Path:
    """The config as every process of this attempt reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "resolved.yaml"
    path.write_text(dump_config(config))
    return path


def launch_engine_only(supervisor: Supervisor, config: EvaluateConfig) -> str:
    """Start and await the engine of an evaluation; its URL."""
    url, child = start_engine(
        supervisor, config.engine, config.model.path, config.model.dtype, config.parallel, config.run.seed
    )
    wait_for_engine(supervisor, url, child, config.engine)
    return url
