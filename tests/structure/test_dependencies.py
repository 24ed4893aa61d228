"""setup.cfg names every distribution that the package imports, so an install brings all of them."""

from __future__ import annotations

import configparser
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.structure.import_rules import PACKAGE, imports_of

REPOSITORY = Path(__file__).resolve().parents[2]


def normalized(name: str) -> str:
    """Names that pip takes for one: `PyYAML` is `pyyaml`, `huggingface_hub` is `huggingface-hub`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named_in(setup_cfg: Path) -> set[str]:
    """The distributions that an install brings."""
    config = configparser.ConfigParser()
    config.read(setup_cfg)
    lines = config["options"]["install_requires"].splitlines()
    names = (re.match(r"[\w.-]+", line.strip()) for line in lines if not line.strip().startswith("#"))
    return {normalized(found[0]) for found in names if found}


def missing(root: Path, named: set[str]) -> list[str]:
    """Imports of the tree that no named distribution brings."""
    brought_by = packages_distributions()
    imported = {(str(found), found.name.partition(".")[0]) for found in imports_of(root)}
    return sorted(
        where
        for where, top in imported
        if top not in sys.stdlib_module_names
        and top != PACKAGE
        and not named & {normalized(distribution) for distribution in brought_by.get(top, [top])}
    )


def test_every_import_is_named() -> None:
    assert missing(REPOSITORY, named_in(REPOSITORY / "setup.cfg")) == []


@pytest.mark.slow
def test_an_import_that_is_not_named_is_found() -> None:
    named = named_in(REPOSITORY / "setup.cfg")
    assert any("imports httpx" in where for where in missing(REPOSITORY, named - {"httpx"}))
    assert any("imports megatron" in where for where in missing(REPOSITORY, named - {"megatron-core"}))
    assert any("imports yaml" in where for where in missing(REPOSITORY, named - {"pyyaml"}))
