"""The shape of the project: import edges, pure rooms, shipped configs, file sizes, swallowed errors, machine paths.

Every check is a function of a tree, so that the same function is shown to fail on a tree with the fault in it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from collab_megatron.config import BuildDatasetConfig, DPOConfig, EvaluateConfig, RLConfig, SFTConfig, load_config
from tests.structure import import_rules

REPOSITORY = Path(__file__).parents[2]
STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)
LONGEST_FILE = 400
NOT_OURS = {
    ".git",
    ".venv",
    "runs",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "node_modules",
}
TEXT = {".py", ".yaml", ".cfg", ".toml", ".md", ".sh", ".sbatch", ".txt", ".in", ".pth", ""}
# put together here, so that this file does not contain what it looks for
MACHINE_PATH = re.compile(rf"(?<![\w.~}}*])/({'|'.join(('work', 'root', 'home', 'Users'))})/[\w.]")
KINDS: dict[str, type[BaseModel]] = {
    "rl": RLConfig,
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "evaluate": EvaluateConfig,
    "data": BuildDatasetConfig,
    "gpu": RLConfig,
}


def own_files(root: Path, *suffixes: str) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_OURS and ".egg-info" not in name)
        for file in (Path(folder, name) for name in sorted(names) if name not in NOT_OURS and ".egg-info" not in name):
            if file.suffix in suffixes and file.is_file():
                yield file


def forbidden_imports(root: Path) -> list[str]:
    return import_rules.violations(root, STANDARD_LIBRARY)


def long_files(root: Path) -> list[str]:
    files = own_files(root, ".py", ".sh", ".yaml", ".sbatch", ".js")
    counts = {file: len(file.read_text().splitlines()) for file in files}
    return [f"{file}: {count} lines" for file, count in counts.items() if count > LONGEST_FILE]


def swallowed_errors(root: Path) -> list[str]:
    """Handlers that do nothing at all. `contextlib.suppress` with a named type says the same on purpose."""
    return [
        f"{file}:{node.lineno}"
        for file in own_files(root, ".py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and all(
            isinstance(line, ast.Pass)
            or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and line.value.value is ...)
            for line in node.body
        )
    ]


def machine_paths(root: Path) -> list[str]:
    return [
        f"{file}:{number}: {line.strip()}"
        for file in own_files(root, *TEXT)
        if file.name != "LICENSE"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """Python 3.11's parser counts its depth globally: a collection in the middle of it that runs the parser again (a
    finalizer's traceback does) makes it raise SystemError (cpython#106905)."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("check", [forbidden_imports, long_files, swallowed_errors, machine_paths])
def test_the_tree_is_in_order(check: Callable[[Path], list[str]]) -> None:
    assert check(REPOSITORY) == []


def test_every_room_has_a_row_and_every_entry_is_needed() -> None:
    package = REPOSITORY / import_rules.PACKAGE
    rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} <= {*import_rules.ROOMS, *import_rules.FREE}, "a new room: give it a row in the table"
    assert import_rules.unused_entries(REPOSITORY) == []


def test_an_entry_that_no_import_needs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(import_rules.ROOMS, "engine", (*import_rules.ROOMS["engine"], "demo"))
    monkeypatch.setitem(import_rules.ADDED, "demo.summary", {"wire": "no reason"})
    assert import_rules.unused_entries(REPOSITORY) == ["engine -> demo", "demo.summary -> wire"]


FAULTS = [
    (forbidden_imports, "rollout/x.py", "import litellm"),
    (forbidden_imports, "train_rl.py", "from megatron.core import parallel_state"),
    (forbidden_imports, "trainer/loss/x.py", "from torch import distributed"),
    (forbidden_imports, "trainer/batching/x.py", "import numpy"),
    (forbidden_imports, "rollout/rewards/x.py", "def f():\n    import torch.distributed"),
    (forbidden_imports, "engine/x.py", "from sglang import Engine"),
    (forbidden_imports, "engine/x.py", "from collab_megatron.trainer.actor.grid import RankGrid"),
    (forbidden_imports, "engine/x.py", "from collab_megatron import rollout"),
    (forbidden_imports, "engine/x.py", "from ..rollout import group"),
    (forbidden_imports, "rollout/x.py", "from collab_megatron.trainer.loss.losses import LossSum"),
    (forbidden_imports, "data/x.py", "from collab_megatron.rollout.rewards import Scorer"),
    (forbidden_imports, "types.py", "import pydantic"),
    (forbidden_imports, "demo/endpoint.py", "import torch"),
    (long_files, "rollout/x.py", "x = 1\n" * (LONGEST_FILE + 1)),
    (swallowed_errors, "rollout/x.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (machine_paths, "rollout/x.py", f"path = '/{'home'}/someone/model'"),
]


class Copy:
    """A copy of the package, and what each check says of it as it is."""

    def __init__(self, root: Path) -> None:
        self.root, self.package = root, root / import_rules.PACKAGE
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / import_rules.PACKAGE, self.package, ignore=ignore)
        self.said_by: Callable[[Callable[[Path], list[str]]], list[str]] = functools.cache(lambda check: check(root))

    @contextlib.contextmanager
    def ending_in(self, file: str, text: str) -> Iterator[Path]:
        """`file` with `text` at its end."""
        target = self.package / file
        before = target.read_bytes() if target.exists() else None
        with target.open("a") as changed:
            changed.write("\n" + text + "\n")
        try:
            yield target
        finally:  # the copy serves the next test, however this one ends
            if before is None:
                target.unlink()
            else:
                target.write_bytes(before)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


@pytest.mark.parametrize(("check", "file", "text"), FAULTS, ids=[text.split("\n")[0][:50] for _, _, text in FAULTS])
def test_each_check_finds_its_fault(copy: Copy, check: Callable[[Path], list[str]], file: str, text: str) -> None:
    before = copy.said_by(check)
    with copy.ending_in(file, text) as target:
        new = [found for found in check(copy.root) if found not in before]
    assert new
    assert all(str(target) in found for found in new), new


PURE_ROOMS = ("types", "config", "trainer.loss", "trainer.batching", "rollout.rewards")


@pytest.fixture(scope="module")
def loaded_by() -> dict[str, list[str]]:
    """What each pure room brings with it, of what it must not; the rooms are imported one after the other."""
    code = "import importlib, json, sys\nfound = {}\n"
    for room in PURE_ROOMS:
        files = REPOSITORY / import_rules.PACKAGE / room.replace(".", "/")
        names = sorted(f"{room}.{file.stem}" for file in files.glob("*.py") if file.stem != "__init__") or [room]
        code += "".join(f"importlib.import_module('{import_rules.PACKAGE}.{name}')\n" for name in names)
        code += f"found['{room}'] = [name for name in ('megatron', 'litellm', 'sglang') if name in sys.modules]\n"
    code += "print(json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, list[str]] = json.loads(done.stdout)
    return loaded


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_pure_rooms_leave_megatron_and_litellm_unloaded(loaded_by: dict[str, list[str]], room: str) -> None:
    assert loaded_by[room] == []  # of several that fail, the first is to blame


TASKS = dict.fromkeys(("math_hard.yaml", "medium.yaml", "bigcodebench.yaml"), RLConfig)
"""The paper's tasks; their other configs are in folders of their names."""
NOT_EXTENDED = ("ambig_qa.yaml", "abg_coqa.yaml")
"""Mappings that no shipped config extends."""
CONFIGS = sorted((REPOSITORY / "conf").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(REPOSITORY / "conf")))
def test_every_shipped_config_loads(file: Path) -> None:
    """A file whose name does not say its kind is a base: one that does must extend it."""
    kind = next(
        (kind for word, kind in KINDS.items() if word in file.stem.split("_")),
        TASKS.get(str(file.relative_to(REPOSITORY / "conf"))),
    )
    if kind is not None:
        load_config(kind, file)
    else:
        extended = {base for other in CONFIGS for base in _bases(other)}
        assert file in extended or file.name in NOT_EXTENDED, (
            f"{file.name}: neither a kind of {sorted(KINDS)} nor extended by one"
        )


def _bases(file: Path) -> list[Path]:
    found = yaml.safe_load(file.read_text()).get("extends") or []
    return [(file.parent / base).resolve() for base in ([found] if isinstance(found, str) else found)]
