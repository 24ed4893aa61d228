"""No code of the package loads a pickle without restriction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
RESTRICTED = "collab_megatron/trainer/checkpoint/reader.py"  # an Unpickler with a list of classes


def unsafe(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            yield from (name for name in names if name in ("pickle", "dill", "cloudpickle"))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "torch.load"
            and "weights_only=True" not in [ast.unparse(word) for word in node.keywords]
        ):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.slow
def test_torch_load_is_always_weights_only_and_pickle_stays_in_one_place() -> None:
    found = {
        str(file.relative_to(REPOSITORY)): list(unsafe(ast.parse(file.read_text())))
        for room in ("collab_megatron", "tools")
        for file in (REPOSITORY / room).rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names} == {RESTRICTED: ["pickle"]}


def test_the_check_sees_what_it_looks_for() -> None:
    source = "import pickle\nfrom dill import loads\ntorch.load(f)\ntorch.load(f, weights_only=False)\n"
    assert len(list(unsafe(ast.parse(source)))) == 4
    assert list(unsafe(ast.parse("torch.load(f, weights_only=True)"))) == []
