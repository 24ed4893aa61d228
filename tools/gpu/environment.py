"""Versions, devices and two speed probes of this machine, as JSON: the first part of tools/gpu_check.py.

python tools/gpu/environment.py --device cuda --json FILE
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from collab_megatron.doctor.facts import PROGRAMS, packages, said_by
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_json

SIDE = {"cuda": 8192, "cpu": 256}  # of the matrices that are multiplied
COPIED = {"cuda": 2**30, "cpu": 2**22}  # bytes
REPEATS = 10
HEAD_SIZES = (64, 128)  # of the attention that is compared


def speeds(device: str) -> dict[str, float]:
    """TB/s of a copy within the device, read and write counted, and TFLOP/s of a bf16 product."""
    import torch

    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(SIDE[device], SIDE[device], device=device).to(torch.bfloat16)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    copied = 2 * source.numel() / seconds(lambda: target.copy_(source)) / 1e12
    return {"copy_tb_per_s": copied, "matmul_tflops": 2 * SIDE[device] ** 3 / seconds(lambda: matrix @ matrix) / 1e12}


def torch_facts(device: str) -> dict[str, Any]:
    """What torch was built with, and the devices that it finds."""
    import torch

    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "devices": []}
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU: see nvidia-smi for the driver, "
                "and requirements/README.md for the environment of a GPU machine"
            )
        facts["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        facts["cudnn"] = torch.backends.cudnn.version()
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            capability = f"{properties.major}.{properties.minor}"
            memory = round(properties.total_memory / 2**30, 1)
            facts["devices"].append({"name": properties.name, "memory_gib": memory, "capability": capability})
    return facts


def backend_facts(device: str) -> dict[str, Any]:
    """What a trainer rank would choose here."""
    from collab_megatron.trainer.actor.backend import choose_backend

    return {**asdict(choose_backend(device, 0)), "device": device}


def attention_facts() -> dict[str, Any]:
    """How far torch's attention over a packed row is from fp32, and what the trainer accepts (trainer/local/varlen.py).

    With transformer-engine the trainer uses its attention instead.
    """
    import torch

    from collab_megatron.trainer.local import varlen

    try:
        found = [
            varlen.difference(torch.device("cuda", 0), torch.bfloat16, size, windowed=windowed)
            for size in HEAD_SIZES
            for windowed in (False, True)
        ]
    except Exception as error:  # noqa: BLE001  # an old torch, or whatever its kernels raise: a fact like the others
        return {"failed": str(error).partition("\n")[0], "bound": varlen.BOUND}
    return {"differs": max(found), "bound": varlen.BOUND}


TE_ATTENTION = """
import torch
from transformer_engine.pytorch import DotProductAttention
attention = DotProductAttention(12, 128, num_gqa_groups=2, attn_mask_type="padding_causal", qkv_format="thd")
q, k, v = (torch.randn(2048, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (12, 2, 2))
ends = torch.tensor([0, 1500, 2048], device="cuda", dtype=torch.int32)
attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=1500, max_seqlen_kv=1500).sum().backward()
"""


def te_attention_facts() -> list[str]:
    """Which attention transformer-engine takes for a packed row of Qwen2.5-1.5B, and why not the faster ones: its own
    words (2.20.2, pytorch/attention/dot_product_attention/utils.py), else its error."""
    env = {**os.environ, "NVTE_DEBUG": "1", "NVTE_DEBUG_LEVEL": "2"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", TE_ATTENTION], env=env, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return ["no answer within 60 s"]
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        return lines[-1:]
    return [line for line in lines if re.search("Disabling|Available|Selected", line)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "packages": packages(),
        "programs": {program: said_by(program, arguments) for program, arguments in PROGRAMS.items()},
    }
    publish_json(args.json, found)  # what is known so far, in case torch cannot be imported
    found["torch"] = torch_facts(args.device)
    publish_json(args.json, found)
    found["speed"] = speeds(args.device)
    publish_json(args.json, found)
    found["backend"] = backend_facts(args.device)
    publish_json(args.json, found)
    if args.device == "cuda":
        found["packed_attention"] = attention_facts()
        if found["backend"]["transformer_engine"]:
            found["te_attention"] = te_attention_facts()
        publish_json(args.json, found)


if __name__ == "__main__":
    run_cli(main)
