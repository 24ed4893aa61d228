"""Compiles the Triton kernels for a GPU that need not be there, and prints what each takes.

    python tools/compile_kernels.py [--capability 90] [--json FILE]

Registers and spills are ptxas' own figures, of the ptxas that Triton brings. A kernel that spills keeps values in
memory that should be in registers. Ends with 1 if any does.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_json

DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
THREADS_PER_WARP = 32


@dataclass(frozen=True)
class Compiled:
    """One kernel for one dtype of the logits."""

    kernel: str
    dtype: str
    warps: int
    registers: int  # of a thread; 65,536 of a multiprocessor
    spilled_bytes: int  # stores and loads of a thread
    shared_bytes: int  # of a program


def compile_kernel(kernel: Any, dtype: str, block: int, warps: int, capability: int) -> Compiled:
    """One kernel, for rows that begin at a multiple of 16 bytes, as tiles do."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"logits": f"*{DTYPES[dtype]}", "local": "*i64"}
    values = {"first": "i32", "columns": "i32", "scale": "fp32", "BLOCK": "constexpr"}
    signature = {name: pointers.get(name) or values.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (place,): aligned for place, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name == "columns"
    }
    source = ASTSource(kernel, signature, constexprs={"BLOCK": block}, attrs=attributes)
    target = GPUTarget("cuda", capability, THREADS_PER_WARP)
    found = triton.compile(source, target=target, options={"num_warps": warps})
    registers, spilled = ptxas_figures(found.asm["ptx"])
    return Compiled(kernel.__name__, dtype, warps, registers, spilled, int(found.metadata.shared))


def ptxas_figures(ptx: str) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads) of a thread. Raises RunError if ptxas refuses the code."""
    from triton import knobs

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "kernel.ptx"
        file.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(file), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise RunError(f"{' '.join(command)} failed:\n{done.stderr}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None, done.stderr
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(registers[1]), sum(int(size) for size in spilled)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/compile_kernels.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--capability", type=int, default=90, help="90: H100 and H200")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError(f"Triton cannot be imported ({error}): install the environment with `make install`") from None
    from collab_megatron.trainer.actor import triton_head as head

    kernels = (
        (head.statistics_kernel, head.ROW_BLOCK, head.ROW_WARPS),
        (head.gradient_kernel, head.GRADIENT_BLOCK, head.GRADIENT_WARPS),
    )
    found = [
        compile_kernel(kernel, dtype, block, warps, args.capability)
        for kernel, block, warps in kernels
        for dtype in DTYPES
    ]
    print(f"sm_{args.capability}: kernel, dtype, warps, registers, spilled bytes, shared bytes")
    for row in found:
        print(
            f"{row.kernel:<18} {row.dtype:<9} {row.warps:>2} {row.registers:>4} {row.spilled_bytes:>6} "
            f"{row.shared_bytes:>6}"
        )
    if args.json is not None:
        publish_json(args.json, [asdict(row) for row in found])
    if spilling := [f"{row.kernel} ({row.dtype})" for row in found if row.spilled_bytes]:
        raise RunError(f"{', '.join(spilling)} spill registers to memory")


if __name__ == "__main__":
    run_cli(main)
