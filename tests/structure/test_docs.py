"""The documents name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_every_test_that_a_document_names_is_there() -> None:
    named = {
        (path.name, file, name)
        for path in (REPOSITORY / "docs").glob("*.md")
        for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text())
    }
    assert len(named) > 40
    sources = {file: REPOSITORY / file for _, file, _ in named}
    missing = [
        f"{document}: {file}::{name}"
        for document, file, name in sorted(named)
        if not sources[file].is_file() or (name and f"def {name}(" not in sources[file].read_text())
    ]
    assert missing == []
