"""The section that maps the columns of a single-turn dataset."""

from __future__ import annotations

from string import Template
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from collab_megatron.config.sections.base import Named, Positive, Section


class ColumnTemplate(Template):
    """`$problem` or `${annotations.answer.0}`: a column, or a value inside one, by keys and places."""

    idpattern = r"(?a:[_a-z][_a-z0-9]*(?:\.[_a-z0-9]+)*)"  # also without braces: `$a.` ends before the full stop

    def columns(self) -> list[str]:
        return self.get_identifiers()


def _checked(text: str) -> str:
    template = ColumnTemplate(text)
    if not template.is_valid():
        raise ValueError(f"{text!r} contains a lone $: write $$ for a dollar sign, ${{column}} for a column")
    if not template.columns():
        raise ValueError(f"{text!r} names no column: write ${{column}}")
    return text


Columns = Annotated[str, Field(min_length=1), AfterValidator(_checked)]


class MappingSection(Section):
    """How a row of any single-turn dataset becomes a problem of tools/build_dataset.py.

    conf/mappings/ has those of known datasets.

    A text is a template: `$column`, or `${column.key.0}` for a value inside a column, is replaced by the row's value,
    `$$` is a dollar sign. Of a list of templates the first one counts whose values are all there.
    """

    single_turn_prompt: Columns | tuple[Columns, ...]  # the complete task
    single_turn_completion: Columns | tuple[Columns, ...]  # the reference answer
    # the opening; None, or values that are not there: the simulated user writes it
    prompt: Columns | tuple[Columns, ...] | None = None
    task_desc: str = ""  # the kind of task, for the simulated user
    metadata: dict[str, Named] = Field(default={})  # name in single_turn_metadata -> column, or value inside one
    # column -> value: whether single_turn_metadata.ambiguous is true, for rows whose opening leaves something out
    ambiguous_where: dict[str, Any] = Field(default={})
    where: dict[str, Any] = Field(default={})  # column -> value, or a list of values: other rows are left out
    # rows with the largest values of this column come first; rows without one are left out
    largest_first: Named | None = None
    # rows with a longer reference are left out; tokens of `tokenizer`, words without one
    max_completion_tokens: Positive | None = None

    @field_validator("single_turn_prompt", "single_turn_completion", "prompt")
    @classmethod
    def _some_template(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("it is an empty list: name at least one template")
        return value
