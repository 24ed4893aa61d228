"""docs/config.md is what tools/config_doc.py makes of the sections."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import Positive, Seconds, Section
from tools import config_doc


def test_the_page_is_that_of_the_sections() -> None:
    assert config_doc.PAGE.read_text() == config_doc.page(), "run python tools/config_doc.py --write"


class Example(Section):
    """Two lines
    of meaning."""

    # above, and None: read as YAML
    above: Positive | None = None
    at_the_end: Seconds = 20.0  # at the end
    bounded: float = Field(default=0.5, gt=0)  # a number


def test_a_row_has_type_default_and_comment() -> None:
    assert config_doc._table(Example, ["above", "at_the_end", "bounded"]).splitlines()[2:] == [
        "| `above` | integer > 0, null | `null` | above, and null: read as YAML |",
        "| `at_the_end` | seconds > 0 | `20` | at the end |",
        "| `bounded` | number > 0 | `0.5` | a number |",
    ]


def test_every_key_has_a_meaning() -> None:
    kinds = {kind for config in config_doc.PROGRAMS.values() for _, kind in config_doc._sections(config)}
    for kind in {*kinds, *config_doc.PROGRAMS.values()}:
        keys = {name for name, field in kind.model_fields.items() if not config_doc._section_in(field.annotation)}
        assert keys <= config_doc._meanings(kind).keys(), kind.__name__


@pytest.mark.parametrize("section", RLConfig.model_fields)
def test_every_section_has_its_heading(section: str) -> None:
    headings = [line for line in Path(config_doc.PAGE).read_text().splitlines() if line.startswith("## ")]
    assert any(f"`{section}`" in heading for heading in headings)
