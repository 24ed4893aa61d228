"""Convert between Hugging Face folders and training checkpoints of any layout, tensor by tensor.

    python tools/convert_checkpoint.py hf-to-megatron --hf-path MODEL --output DIR [--processes N]
    python tools/convert_checkpoint.py megatron-to-hf --checkpoint DIR --output DIR [--max-shard-size 5GB] [...]

hf-to-megatron writes DIR/step_00000000 (weights only, no optimizer). megatron-to-hf takes a step folder, or a folder of
step folders: then it converts the newest complete one, or with --best the one with the lowest held-out loss. The header
of each file names the run and the step.

The whole model is never in memory: a process needs less than 1 GB plus one or two of the largest tensors. float32 and
bfloat16 stay as they are; a folder of mixed dtypes is an error. The output appears complete at the end, or not at all.

Several processes share the work by tensors (hf-to-megatron) or by files (megatron-to-hf, so more processes than files
do not help). `--processes N` starts them on this machine. On several machines with a shared file system, start one per
rank yourself; without --processes the tool reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from the environment:

    torchrun --nproc-per-node 8 tools/convert_checkpoint.py hf-to-megatron --hf-path MODEL --output DIR
    srun --ntasks 8 bash -c 'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS MASTER_ADDR=$HOST MASTER_PORT=29400 python ...'
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from collab_megatron.config.sections import UMASKS, ParallelSection
from collab_megatron.engine.server_args import ON_LOOPBACK
from collab_megatron.errors import EXIT_RUN, EXIT_USER, RunError, UserError, run_cli
from collab_megatron.files import keep_from_others
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.model.folder import read_hf_config, resolve_model_folder
from collab_megatron.model.layout import check_layout
from collab_megatron.trainer.convert.hf_folder import check_output, parse_size
from collab_megatron.wire.checkpoints import BEST, CheckpointInfo, named_checkpoint, read_best, read_info

if TYPE_CHECKING:
    from collab_megatron.trainer.actor.grid import RankGrid

_OTHERS_END_S = 15.0  # after one process failed, for the others to notice and clean up
_DAY_S = 86400.0  # ranks wait for the slowest, which may write hundreds of gigabytes
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main() -> None:
    args = _arguments()
    keep_from_others(args.umask)
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no GPU is needed; set before torch looks for devices
    if args.command == "hf-to-megatron":
        folder = resolve_model_folder(args.hf_path)
        check_layout(read_hf_config(folder), ParallelSection())
    else:
        info = _checkpoint(args.checkpoint, best=args.best)
        parse_size(args.max_shard_size)
    check_output(args.output)  # on every rank before the rendezvous: afterwards rank 0 may have begun to write
    if args.processes is not None:
        for name in _PLACE:
            os.environ.pop(name, None)  # set by the Slurm step or torchrun around this process
        if args.processes > 1:
            _start(sys.argv[1:], args.processes)
            return
    with _grid() as grid:
        if args.command == "hf-to-megatron":
            written = hf_to_megatron(folder, args.output, grid, source=args.hf_path)
        else:
            written = megatron_to_hf(info, args.output, grid, max_shard_size=args.max_shard_size)
        if grid.is_main:
            print(written)


def hf_to_megatron(folder: Path, output: Path, grid: RankGrid, *, source: str) -> Path:
    """Write a checkpoint of step 0 with `source` in its marker."""
    from collab_megatron.trainer.checkpoint.from_hf import (
        checkpoint_from_hf,
    )  # only here: mistakes should not wait for megatron

    return checkpoint_from_hf(folder, output, grid, extra={"source": source})


def megatron_to_hf(info: CheckpointInfo, output: Path, grid: RankGrid, *, max_shard_size: str) -> Path:
    """Write a Hugging Face folder from the weights; optimizer and random states are not read."""
    from collab_megatron.trainer.checkpoint.to_hf import hf_from_checkpoint  # only here, as above

    hf_from_checkpoint(info, output, grid, max_shard_size=max_shard_size)
    return output


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/convert_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf-to-megatron", help="a Hugging Face folder to a training checkpoint")
    to_megatron.add_argument("--hf-path", required=True, help="model folder or hub name")
    to_megatron.add_argument("--output", required=True, type=Path, help="folder that gets step_00000000")
    to_hf = commands.add_parser("megatron-to-hf", help="a training checkpoint to a Hugging Face folder")
    to_hf.add_argument("--checkpoint", required=True, type=Path, help="step folder, or a folder of step folders")
    to_hf.add_argument("--best", action="store_true", help="of a run's step folders the one that best.json names")
    to_hf.add_argument("--output", required=True, type=Path, help="new folder")
    to_hf.add_argument("--max-shard-size", default="5GB", help="largest safetensors file, e.g. 5GB")
    for command in (to_megatron, to_hf):
        command.add_argument("--umask", choices=UMASKS, default=UMASKS[0], help=f"of the files (default {UMASKS[0]})")
        command.add_argument("--processes", type=int, help="number to start on this machine (default: see above, or 1)")
    args = parser.parse_args()
    if args.processes is not None and args.processes < 1:
        raise UserError(f"--processes is {args.processes}, but must be at least 1")
    return args


def _checkpoint(path: Path, *, best: bool) -> CheckpointInfo:
    if best:
        named = read_best(path)
        if named is None:
            raise UserError(f"{path} has no best checkpoint in {BEST}: leave --best out, or name a step folder")
        return read_info(named.folder)
    return named_checkpoint(path)


@contextlib.contextmanager
def _grid() -> Iterator[RankGrid]:
    """The rank grid of the conversion. Only rank 0 prints an error, because it receives those of all ranks."""
    from collab_megatron.trainer.actor.grid import close_grid, init_grid

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        for name in _PLACE:
            os.environ.pop(name, None)  # no port is needed
    try:
        grid = init_grid(ParallelSection(data=ranks, device="cpu", collective_timeout_s=_DAY_S), seed=0)
        yield grid
    except (UserError, RunError) as error:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
            raise KeyboardInterrupt from error  # it failed because the other processes were ended too
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(EXIT_USER if isinstance(error, UserError) else EXIT_RUN)
    finally:
        close_grid()  # also after a failure: torch's threads must end before the interpreter


def _start(argv: Sequence[str], count: int) -> None:
    """Run `count` processes of this program, each with its rank in the environment. Exits with their exit code."""
    argv = list(argv)
    at = next(i for i, word in enumerate(argv) if word.startswith("--processes"))
    del argv[at : at + (1 if "=" in argv[at] else 2)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **ON_LOOPBACK}
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, **meeting}
    with Supervisor() as supervisor:
        children = [
            supervisor.start(
                f"process {rank} of {count}",
                [sys.executable, __file__, *argv],
                {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
                show=True,
            )
            for rank in range(count)
        ]
        processes = [child.process for child in children]
        while any(process.poll() is None for process in processes) and not any(map(_failed, processes)):
            time.sleep(0.1)
        deadline = time.monotonic() + _OTHERS_END_S
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        supervisor.wait_for(children)


def _failed(process: object) -> bool:
    return getattr(process, "returncode", None) not in (None, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_cli(main)
