"""Seconds of one weight sync from the trainer to a real SGLang server, next to the shortest time for its bytes.

    python tools/bench/weight_sync.py [--shapes 10m 135m 1b] [--transports broadcast ipc disk] [--json FILE]

Starts a server with random weights and a trainer with others (tools/bench/weight_sync_rank.py), which publishes them
repeatedly through `collab_megatron.trainer.sync`. Before each sync its floor is measured: the same bytes between warm
buffers as large as the weights,

- broadcast: from one process to as many others as the server has ranks, same backend, in messages of 256 MiB;
- ipc: copied once in memory, on the same device;
- disk: written to the same file system and forced to the disk.

`seconds` is the fastest sync: pause, all tensors sent and loaded, session closed, caches flushed; for `disk` also the
writing. `floor_seconds` is the fastest floor. Not included: the probe prompt (see `publish_seconds`) and the checksums
(`verified_seconds` is a sync with those of all tensors). The first sync creates the groups and is not counted.
`peak_extra_bytes` is the largest growth of a trainer rank's memory (resident, or allocated on the GPU) in the syncs
with checksums, from before the publisher exists, kept buffers included.

`135m-deep` has the bytes of `135m` in four times as many tensors. A row reports if there are too few GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import ON_LOOPBACK, engine_command, nccl_settings
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.launch.node import visible_gpus
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.wire.roster import EngineEntry, RosterFolder

TRANSPORTS = ("broadcast", "ipc", "disk")
START_S, SYNC_S = 600.0, 300.0
RANK_SCRIPT = Path(__file__).resolve().with_name("weight_sync_rank.py")

Row = dict[str, Any]
"""As weight_sync_rank.SyncRow, with the name of the shape; or {"transport", "shape", "skipped": why}."""


@dataclass(frozen=True)
class LlamaShape:
    """A llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    dtype: Literal["float32", "bfloat16"] = "float32"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            parts: dict[str, tuple[int, ...]] = {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (self.ffn, hidden),
                "mlp.up_proj": (self.ffn, hidden),
                "mlp.down_proj": (hidden, self.ffn),
            }
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
        return {**found, "model.norm.weight": (hidden,)}

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "torch_dtype": self.dtype,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


SHAPES: dict[str, LlamaShape] = {
    "tiny": LlamaShape(64, 2, 4, 2, 128, 512),
    "10m": LlamaShape(256, 8, 8, 4, 768, 12288),
    "135m": LlamaShape(576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
    "135m-deep": LlamaShape(288, 120, 9, 3, 768, 98304),
    "1b": LlamaShape(2048, 16, 32, 8, 8192, 128256, "bfloat16"),  # Llama-3.2-1B
}


def write_model(shape: LlamaShape, folder: Path) -> None:
    """Random weights as a Hugging Face folder: a block of random numbers, repeated, since 1 G of them take long."""
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, shape.dtype)
    block = (0.02 * torch.randn(4_194_301, generator=torch.Generator().manual_seed(1))).to(dtype)
    weights = {}
    for name, size in shape.tensors().items():
        count = torch.Size(size).numel()
        values = block.repeat(-(-count // len(block)))[:count] if len(size) > 1 else torch.ones(count, dtype=dtype)
        weights[name] = values.view(size).clone()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1))


def why_not(transport: str, gpus: int, world_size: int, engine_tensor: int) -> str | None:
    """The reason why a transport cannot be measured here; None if it can."""
    if gpus == 0:
        return None
    if transport == "ipc" and world_size != engine_tensor:
        return f"every engine rank needs a trainer rank on its GPU: {engine_tensor} and {world_size} of them"
    needed = world_size if transport == "ipc" else world_size + engine_tensor
    return f"needs {needed} GPUs, there are {gpus}" if gpus < needed else None


def measure(name: str, args: argparse.Namespace) -> Iterator[Row]:
    """All transports of one shape, server by server."""
    import torch

    gpus = torch.cuda.device_count()
    possible: list[str] = []
    for transport in args.transports:
        if reason := why_not(transport, gpus, args.tensor * args.pipeline, args.engine_tensor):
            yield {"transport": transport, "shape": name, "skipped": reason}
        else:
            possible.append(transport)
    # on GPUs ipc needs the server on the trainer's GPUs, the others on different ones; on CPU one server is enough
    colocated = [transport for transport in possible if transport == "ipc" and gpus]
    apart = [transport for transport in possible if transport not in colocated]
    with tempfile.TemporaryDirectory(prefix="bench_weight_sync_", dir=args.dir) as work:
        if possible:
            write_model(SHAPES[name], Path(work) / "model")
        if apart:
            yield from run_job(name, "disaggregated", apart, Path(work), gpus, args)
        if colocated:
            yield from run_job(name, "colocated", colocated, Path(work), gpus, args)


def run_job(
    name: str,
    placement: Literal["disaggregated", "colocated"],
    transports: list[str],
    work: Path,
    gpus: int,
    args: argparse.Namespace,
) -> list[Row]:
    """One server and one trainer, from start to end. Raises RunError where a part fails."""
    world_size, dtype = args.tensor * args.pipeline, SHAPES[name].dtype
    folder = work / placement
    section = EngineSection(
        placement=placement,
        tensor=args.engine_tensor,
        mem_fraction=0.4,
        max_total_tokens=2048,
        max_running_requests=4,
        extra_args=tuple(shlex.split(args.engine_args)),
    )
    device = "cuda" if gpus else "cpu"
    command = engine_command(
        section, model_path=str(work / "model"), dtype=dtype, device=device, port=free_port(), seed=1
    )
    first_gpu = 0 if placement == "colocated" else world_size
    own = ",".join(visible_gpus()[first_gpu : first_gpu + args.engine_tensor])
    env = {**command.env, "CUDA_VISIBLE_DEVICES": own} if gpus else command.env
    with Supervisor(folder / "logs") as supervisor:
        server = supervisor.start("engine-0", command.argv, env)

        def alive() -> bool:
            supervisor.check()  # raises with the server's own words
            return server.process.poll() is None

        control = EngineControl(command.url, timeout_s=SYNC_S)
        control.wait_until_ready(timeout_s=START_S, alive=alive)
        control.close()
        # not managed: nobody would restart it, so a lost server ends the benchmark
        entry = EngineEntry("engine-0", command.url, args.engine_tensor, managed=False)
        RosterFolder(folder / "roster").publish([entry], coming=0)
        job = {
            "transports": transports,
            "model": str(work / "model"),
            "dtype": dtype,
            "folder": str(folder),
            "tensor": args.tensor,
            "pipeline": args.pipeline,
            "engine_tensor": args.engine_tensor,
            "placement": placement,
            "bucket_mb": args.bucket_mb,
            "repeats": args.repeats,
            "timeout_s": SYNC_S,
        }
        publish_json(folder / "job.json", job)
        port = free_port()
        argv = [sys.executable, str(RANK_SCRIPT), str(folder)]
        nccl = nccl_settings(section.extra_args, os.environ) if gpus else {}  # as the server has it
        ranks = [
            supervisor.start(f"trainer-{rank}", argv, rank_env(rank, world_size, port) | nccl, show=rank == 0)
            for rank in range(world_size)
        ]
        supervisor.wait_for(ranks, timeout_s=START_S + len(transports) * (args.repeats + 3) * SYNC_S)
    rows = json.loads((folder / "rows.json").read_text())
    return [{"transport": row["transport"], "shape": name, **row} for row in rows]


def rank_env(rank: int, world_size: int, port: int) -> dict[str, str]:
    """As the launcher sets it on CPU: one thread per rank, without spinning."""
    torchs = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **ON_LOOPBACK}
    return {**torchs, **meeting, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def line(row: Row) -> str:
    """For people."""
    head = f"{row['shape']:10s} {row['transport']:9s}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    return (
        f"{head} {row['bytes'] / 1e6:7.1f} MB in {row['tensors']:4d} tensors: {row['seconds']:.3f} s, "
        f"floor {row['floor_seconds']:.3f} s, ratio {row['ratio']:.2f}; paused {row['paused_s']:.3f} s, "
        f"with checksums {row['verified_seconds']:.3f} s; {row['peak_extra_bytes'] / 2**20:.0f} MiB more on the trainer"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/bench/weight_sync.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["10m", "135m", "135m-deep", "1b"])
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--repeats", type=int, default=5, help="measured syncs of each row")
    parser.add_argument("--bucket-mb", type=int, help="default: what sync.bucket_mb comes to")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks of the trainer")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages of the trainer")
    parser.add_argument("--engine-tensor", type=int, default=1, help="tensor-parallel ranks of the server")
    parser.add_argument("--engine-args", default="", metavar="FLAGS", help="more flags of sglang.launch_server, quoted")
    parser.add_argument("--dir", type=Path, help="for models and the disk transport; default: the temporary folder")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two syncs: whether it works, not how fast")
    parser.add_argument("--json", type=Path, help="write the rows here, after each row")
    args = parser.parse_args()
    for option in ("repeats", "bucket_mb", "tensor", "pipeline", "engine_tensor"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    if args.dir is not None and not args.dir.is_dir():
        raise UserError(f"--dir {args.dir} is not a folder")
    if args.quick:
        args.shapes, args.repeats = ["tiny"], min(args.repeats, 2)
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = []
    for name in args.shapes:
        for row in measure(name, args):
            rows.append(row)
            print(line(row), flush=True)
            if args.json is not None:
                publish_json(args.json, rows)


if __name__ == "__main__":
    run_cli(main)
