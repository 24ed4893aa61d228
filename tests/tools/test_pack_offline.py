"""tools/pack_offline.sh and the script that joins its pieces, on wheels made here; nothing is fetched."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools.gpu.device_code import keep_only
from tools.gpu.trim_wheel import trim

PIECE_BYTES = 10**6


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """Of (kind, architecture, code), as tools/gpu/device_code.py describes it."""
    body = b"".join(
        struct.pack("<HHIQ12xI8x", kind, 0x101, 40, len(code), architecture) + code
        for kind, architecture, code in entries
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


HOPPER, AMPERE, TEXT = (2, 90, b"h" * 100), (2, 80, b"a" * 64), (1, 90, b"ptx!")
UNRELATED = struct.pack("<I", 0xBA55ED50) + b"code that loads this constant"


def test_device_code_for_other_gpus_is_removed_in_place() -> None:
    before = UNRELATED + fatbin(AMPERE, HOPPER) + b"host" + fatbin(TEXT, HOPPER)
    library = bytearray(before)
    assert keep_only(library, 90) == 200
    second = len(UNRELATED + fatbin(AMPERE, HOPPER) + b"host")
    assert len(library) == len(before)
    assert library.startswith(UNRELATED + fatbin(HOPPER) + bytes(64))  # a fatbin keeps its place and becomes shorter
    assert library[second - 4 : second] == b"host"
    assert library[second:].startswith(fatbin(HOPPER))
    assert library[second:].strip(b"\0") == fatbin(HOPPER).strip(b"\0")
    once = bytes(library)
    assert keep_only(library, 90) == 200
    assert library == once


def test_a_library_that_could_not_run_or_is_not_understood_is_refused() -> None:
    assert keep_only(bytearray(UNRELATED + b"host"), 90) == 0
    assert keep_only(bytearray(UNRELATED[:4]), 90) == 0
    with pytest.raises(ValueError, match="no code for sm_100"):
        keep_only(bytearray(fatbin(AMPERE, HOPPER)), 100)
    with pytest.raises(ValueError, match="the entry at byte 16 of a fatbin has an unknown layout"):
        keep_only(bytearray(fatbin((7, 90, b"x"))), 90)


def test_a_trimmed_wheel_records_what_it_holds(tmp_path: Path) -> None:
    code = fatbin(AMPERE, HOPPER)
    wheel = make_wheel(tmp_path, "kernels", {"kernels/ops.so": code, "kernels/host.so": b"host", "kernels/a,b.py": b""})
    assert trim(wheel, architecture=90) == 0
    with zipfile.ZipFile(wheel) as after:
        rows = {row[0]: row[1:] for row in csv.reader(after.read("kernels-1.0.dist-info/RECORD").decode().splitlines())}
        library = after.read("kernels/ops.so")
        assert set(rows) == set(after.namelist())
    digest = base64.urlsafe_b64encode(hashlib.sha256(library).digest()).decode().rstrip("=")
    assert rows["kernels/ops.so"] == [f"sha256={digest}", str(len(code))]
    assert library != code
    assert rows["kernels/host.so"] == ["", ""]
    with pytest.raises(ValueError, match=r"kernels/ops\.so of kernels-1\.0.*no code for sm_100"):
        trim(wheel, architecture=100)
    assert list(tmp_path.iterdir()) == [wheel]


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    names = [f'"{path}"' if "," in path else path for path in files]
    record = "".join(f"{name},,\n" for name in names) + f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as target:
        for path, data in {**files, f"{info}/RECORD": record.encode()}.items():
            target.writestr(path, data)
    return wheel


def test_a_wheel_without_what_is_not_loaded(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, "engine", {"engine/srt/a.py": b"", "engine/test/b.py": b"", "engine/testing.py": b""})
    assert trim(wheel, "engine/(test|rust)/") == 1
    with zipfile.ZipFile(wheel) as after:
        assert "engine/test/b.py" not in after.namelist()
        record = after.read("engine-1.0.dist-info/RECORD").decode()
        assert sorted(line.split(",")[0] for line in record.splitlines()) == sorted(after.namelist())
        assert {"engine/srt/a.py", "engine/testing.py"} < set(after.namelist())
    with pytest.raises(ValueError, match="its layout has changed"):
        trim(wheel, "engine/(test|rust)/")
    assert list(tmp_path.iterdir()) == [wheel]


IMPORT_WITHOUT = """
import importlib, re, sys

class Trimmed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if re.search(sys.argv[1], name.replace(".", "/") + "/"):
            raise ModuleNotFoundError(f"{name} was left out")

sys.meta_path.insert(0, Trimmed)
for name in sys.argv[2:]:
    importlib.import_module(name)
print(sorted(name for name in sys.modules if name.startswith("sglang.srt.multimodal"))[0])
"""
LOADED = ("entrypoints.http_server", "entrypoints.engine", "managers.scheduler", "models.llama", "models.qwen2")


def setting(name: str) -> str:
    """A setting of pack_offline.sh, or its default."""
    text = (REPOSITORY / "tools" / "pack_offline.sh").read_text()
    found = re.search(rf"\b{name}=(?:\${{{name}:?-([^}}]*)}}|'([^']*)')", text)
    assert found is not None, name
    return found[1] or found[2]


@pytest.mark.slow
def test_the_engine_that_is_packed_can_be_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT, setting("SGLANG_WITHOUT"), *(f"sglang.srt.{name}" for name in LOADED)],
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("sglang.srt.multimodal")  # what looks superfluous is loaded


def bash(script: Path, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(script), *(str(argument) for argument in arguments)]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    return subprocess.run(
        command, env={**plain, **env}, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY
    )


@pytest.mark.slow
def test_pieces_are_small_and_join_to_what_was_packed(tmp_path: Path) -> None:
    index = tmp_path / "index"
    large = make_wheel(index, "large", {"large.bin": random.Random(1).randbytes(5 * PIECE_BYTES // 2)})
    lock = "# a comment\n"
    for wheel in (large, make_wheel(index, "small", {"small.py": b"x = 1\n"})):
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lock += f"{wheel.name.partition('-')[0]}==1.0 \\\n    --hash=sha256:{digest}\n    # via somebody\n"
    lock += f"torch==1.0 \\\n    --hash=sha256:{'0' * 64}\n"  # is there already
    (tmp_path / "lock.txt").write_text(lock)
    demo = tmp_path / "demo"
    (demo / "sft_hf").mkdir(parents=True)
    (demo / "data").mkdir()
    (demo / "sft_hf" / "config.json").write_text("{}")
    (demo / "data" / "rl_train.parquet").write_text("rows")
    env = {
        "PYTHON": sys.executable,
        "LOCKS": str(tmp_path / "lock.txt"),
        "TEST_LOCK": "",
        "PIECE_MB": "1",
        "DEMO": str(demo),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
    }
    out, there = tmp_path / "pieces", tmp_path / "there"
    packed = bash(REPOSITORY / "tools" / "pack_offline.sh", out, "base", "demo", **env)
    assert packed.returncode == 0, packed.stderr
    pieces = sorted(out.glob("base.tar.*"))
    assert len(pieces) == 3
    assert all(piece.stat().st_size <= PIECE_BYTES for piece in out.iterdir())
    joined = bash(out / "join.sh", "--unpack-only", "base", "demo", INTO=str(there))
    assert joined.returncode == 0, joined.stderr
    assert sorted(path.name for path in (there / "wheels").iterdir()) == sorted(path.name for path in index.iterdir())
    assert (there / "wheels" / large.name).read_bytes() == large.read_bytes()
    assert (there / "collab_megatron" / "runs" / "demo" / "sft_hf" / "config.json").read_text() == "{}"

    pieces[1].write_bytes(pieces[1].read_bytes()[:-1])
    damaged = bash(out / "join.sh", "--unpack-only", "base", INTO=str(there))
    assert damaged.returncode == 2
    assert "a piece of base is missing or damaged" in damaged.stderr
    again = bash(REPOSITORY / "tools" / "pack_offline.sh", out, "base", **env)
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)


SETUP = """
import os, pathlib, shutil, subprocess, sys

at = sys.argv.index("--dest") + 1
said = ""
if "--no-binary" in sys.argv:  # as transformer-engine's setup.py
    import torch
    nvcc = pathlib.Path(os.environ["CUDA_HOME"], "bin", "nvcc")
    said = subprocess.run([nvcc, "-V"], capture_output=True, text=True, check=True).stdout + torch.version.cuda
pathlib.Path(sys.argv[at]).mkdir(exist_ok=True)
if "cu13" in sys.argv[-1]:
    shutil.copy(os.environ["CORE_WHEEL"], sys.argv[at])
pathlib.Path(sys.argv[at], sys.argv[-1]).write_text(said)
sys.exit("transformer-engine==" in sys.argv[-1] and os.environ.get("BREAKS") == "1")
"""


@pytest.mark.slow
def test_the_source_of_transformer_engine_is_fetched_without_cuda(tmp_path: Path) -> None:
    """Its setup.py wants a toolkit of CUDA and a torch for CUDA, where neither is."""
    (tmp_path / "pip.py").write_text(SETUP)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -m ] || set -- {tmp_path}/pip.py "$@"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    core = make_wheel(tmp_path / "index", "transformer_engine_cu13", {"core.so": fatbin(AMPERE, HOPPER)})
    pack, env = REPOSITORY / "tools" / "pack_offline.sh", {"PYTHON": str(python), "CORE_WHEEL": str(core)}
    packed = bash(pack, tmp_path / "out", "te", **env)
    assert packed.returncode == 0, packed.stderr
    bash(tmp_path / "out" / "join.sh", "--unpack-only", "te", INTO=str(tmp_path / "there"))
    (source,) = (tmp_path / "there" / "source").iterdir()
    nvcc, cuda = source.read_text().splitlines()
    assert nvcc == "Cuda compilation tools, release 13.0, V13.0.48"
    assert cuda.startswith("13.")
    with zipfile.ZipFile(tmp_path / "there" / "wheels" / core.name) as trimmed:
        assert b"aa" not in trimmed.read("core.so")
    assert (
        "TE_BUILD=1 needs torch and nvidia-cuda-nvcc"
        in bash(pack, tmp_path / "built", "te", TE_BUILD="1", **env).stderr
    )
    broken = bash(pack, tmp_path / "broken", "te", BREAKS="1", **env)
    assert broken.returncode == 2
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["join.sh"]


def test_what_the_machine_has_is_not_carried_over() -> None:
    have = setting("HAVE").replace("\\", "").split()
    text = "".join((REPOSITORY / "requirements" / name).read_text() for name in ("cpu.txt", "torch.txt"))
    locked = set(re.findall(r"^([a-z0-9.-]+)==", text, re.MULTILINE))
    assert {"pyarrow", "scipy", "grpcio"} <= set(have) <= locked  # a misspelt name would be carried over
    assert len(set(have)) == len(have)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "name a folder for the pieces"),
        (("OUT", "bsae"), "bsae is none of the groups"),
        (("OUT", "demo"), "run make demo first"),
    ],
)
def test_mistakes_end_with_2(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    given = [str(tmp_path / word) if word == "OUT" else word for word in arguments]
    done = bash(REPOSITORY / "tools" / "pack_offline.sh", *given, DEMO=str(tmp_path / "none"))
    assert done.returncode == 2
    assert says in done.stderr


CORE_SOURCE = """
import os, pathlib, setuptools

forced, cpath = os.environ["NVTE_PYTORCH_FORCE_BUILD"], os.environ["CPATH"]
pathlib.Path("built.py").write_text(f"FORCED, CPATH = {forced!r}, {cpath!r}")
setuptools.setup(name="transformer_engine_torch", version="1.0", py_modules=["built"])
"""


@pytest.mark.slow
def test_what_has_arrived_is_installed_on_top_of_a_virtual_environment(tmp_path: Path) -> None:
    """The Python of these tests is one, with torch and pip, as the machine's may be."""
    make_wheel(tmp_path / "wheels", "arrived", {"arrived.py": b"x = 1\n"})
    header = tmp_path / "machine" / "nvidia" / "cudnn" / "include" / "cudnn.h"
    header.parent.mkdir(parents=True)
    header.touch()
    source = tmp_path / "source" / "transformer_engine_torch-1.0"
    source.mkdir(parents=True)
    (source / "setup.py").write_text(CORE_SOURCE)
    shutil.copy(REPOSITORY / "tools" / "gpu" / "join_offline.sh", tmp_path / "join.sh")
    (tmp_path / "empty").mkdir()
    subprocess.run(
        ["bash", "-c", "tar -cf none.tar.00 -C empty . && sha256sum none.tar.* > none.sha256"], cwd=tmp_path, check=True
    )
    env = {"PYTHON": sys.executable, "INTO": str(tmp_path), "CPATH": "/more", "PYTHONPATH": str(tmp_path / "machine")}
    joined = bash(tmp_path / "join.sh", "none", **env)
    assert joined.returncode == 0, joined.stderr
    assert "compiling transformer-engine" in joined.stdout
    shows = (
        "import arrived, built, pip, torch; print(arrived.__file__, built.FORCED, built.CPATH, pip.__file__, sep='\\n')"
    )
    python = tmp_path / ".venv-gpu" / "bin" / "python"
    said = subprocess.run([python, "-c", shows], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    arrived, forced, cpath, pip = said.stdout.splitlines()
    assert Path(arrived).is_relative_to(tmp_path / ".venv-gpu")
    assert forced == "TRUE"  # else its setup looks for a wheel on the net
    assert cpath.endswith("nvidia/nccl/include:/more")
    assert (Path(arrived).parent / "nvidia" / "cudnn" / "include" / "cudnn.h").samefile(header)
    assert Path(pip).is_relative_to(sysconfig.get_path("purelib"))
    again = bash(
        tmp_path / "join.sh", "none", **env
    )  # its module is not there; what is installed is not compiled again
    assert (again.returncode, "compiling" in again.stdout) == (0, False), again.stderr
