"""tools/cpu_support: it sleeps where it is not needed, and SGLang's server modules import with it."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

CPU_ENGINE = {"SGLANG_USE_CPU_ENGINE": "1"}


def run_python(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    base = {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**base, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_sgl_kernel_is_found_only_by_a_cpu_engine() -> None:
    code = "import importlib.util as u; print(u.find_spec('sgl_kernel') is not None)"
    assert run_python(code).stdout.strip() == "False"
    assert run_python(code, CPU_ENGINE).stdout.strip() == "True"


def test_a_real_sgl_kernel_wins(tmp_path: Path) -> None:
    (tmp_path / "sgl_kernel.py").write_text("real = True\n")
    result = run_python("import sgl_kernel; print(sgl_kernel.real)", {**CPU_ENGINE, "PYTHONPATH": str(tmp_path)})
    assert result.stdout.strip() == "True", result.stderr


def test_a_kernel_that_is_called_says_what_to_do() -> None:
    result = run_python("import sgl_kernel; sgl_kernel.rotate_input_ids_cpu(1)", CPU_ENGINE)
    assert result.returncode == 1
    assert "start the server without speculative decoding" in result.stderr


def test_an_interpreter_starts_without_torch() -> None:
    result = run_python("import sys; print('torch' in sys.modules, 'sglang_cpu_support.hook' in sys.modules)")
    assert result.stdout.split() == ["False", "True"], result.stderr


@pytest.mark.slow
def test_torchvision_imports_with_operators_and_the_hook_sleeps_where_it_brings_its_own() -> None:
    result = run_python(
        "import torch, torchvision, sglang_cpu_support.hook as hook\n"
        "print(hasattr(torch.ops.torchvision, 'nms'), torchvision.extension._has_ops(), bool(hook._libraries))"
    )
    assert result.returncode == 0, result.stderr
    defined, own, declared_by_us = result.stdout.split()
    assert defined == "True"
    assert own != declared_by_us


@pytest.mark.slow
@pytest.mark.full
def test_sglang_imports_with_the_support_and_not_without() -> None:
    """The second half tells when the support can go."""
    scheduler = "import sglang.srt.managers.scheduler"
    uninstall = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != {!r}]; "
    finders = ["SglKernelStandIn"]
    if torch.version.cuda is None:  # with CUDA torch, torchvision's compiled part loads
        finders.append("TorchvisionOperators")
    with ThreadPoolExecutor() as pool:  # each takes 10 s of one core
        with_it = pool.submit(run_python, scheduler, CPU_ENGINE)
        without = {name: pool.submit(run_python, uninstall.format(name) + scheduler, CPU_ENGINE) for name in finders}
    assert with_it.result().returncode == 0, with_it.result().stderr[-2000:]
    for finder, ran in without.items():
        assert ran.result().returncode != 0, f"{finder} is not needed any more: remove it"
