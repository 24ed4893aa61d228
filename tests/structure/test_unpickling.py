"""Nothing of the package unpickles what came through a socket or out of a file of somebody else. To unpickle is to run
what the sender wrote. Found in the source; each exception stands below with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "collab_megatron"

# whatever object they belong to
CALLS = frozenset(
    {
        *("recv_pyobj", "recv_serialized", "loads", "Unpickler", "rebuild_tensor", "read_pickle"),
        *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"),
    }
)
SAFE_LOADS = frozenset({"json", "orjson", "tomllib"})
MODULES = frozenset({"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "multiprocessing.connection"})
"""Their import is named, too."""

BETWEEN_RANKS = (
    "between the trainer ranks of one process group; only who takes a rank's place while the group is made could "
    "write there, docs/operations.md#keys-and-ports"
)
EXPLAINED: Mapping[str, Mapping[str, str]] = {
    "trainer/actor/agreement.py": {"broadcast_object_list": BETWEEN_RANKS, "all_gather_object": BETWEEN_RANKS},
    "trainer/actor/grid.py": {"all_gather_object": BETWEEN_RANKS},
    "trainer/actor/actor.py": {"broadcast_object_list": BETWEEN_RANKS},
    "trainer/sync/publisher.py": {"all_gather_object": BETWEEN_RANKS},
    "trainer/sync/broadcast_transport.py": {"all_gather_object": BETWEEN_RANKS},
    "trainer/sync/attempt.py": {"broadcast_object_list": BETWEEN_RANKS},
    "config/yaml_text.py": {"yaml.load": "its loader builds plain values only, tests/config/test_bad_inputs.py"},
    "trainer/checkpoint/reader.py": {
        "import pickle": "its Unpickler refuses every name that is not on a list, tests/trainer/checkpoint",
        "Unpickler": "the same",
    },
}


def unpickling(source: str) -> Iterator[str]:
    """What in this source unpickles, or may."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield f"import {node.module}"
        elif isinstance(node, ast.ClassDef):
            yield from (_name(base) for base in node.bases if _name(base) in CALLS)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(call: ast.Call) -> Iterator[str]:
    name = _name(call.func)
    owner = _name(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    options = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
    if name in CALLS and owner not in SAFE_LOADS:
        yield name
    elif (owner, name) == ("torch", "load") and options.get("weights_only") is not True:
        yield "torch.load"
    elif (owner, name) == ("yaml", "load") or (name == "load" and options.get("allow_pickle")):
        yield f"{owner}.load"


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("socket.recv_pyobj()", ["recv_pyobj"]),
        ("import pickle\npickle.loads(x)", ["import pickle", "loads"]),
        ("from pickle import loads\nloads(x)", ["import pickle", "loads"]),
        ("torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("dist.all_gather_object(a, b)", ["all_gather_object"]),
        ("numpy.load(f, allow_pickle=True)", ["numpy.load"]),
        ("import json\njson.loads(x)", []),
        ("from multiprocessing.connection import Listener", ["import multiprocessing.connection"]),
    ],
)
def test_what_is_found(source: str, found: list[str]) -> None:
    assert sorted(unpickling(source)) == sorted(found)


def test_every_place_that_unpickles_is_explained() -> None:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if names := set(unpickling(path.read_text("utf-8"))):
            found[str(path.relative_to(PACKAGE))] = names
    assert found == {file: set(reasons) for file, reasons in EXPLAINED.items()}
