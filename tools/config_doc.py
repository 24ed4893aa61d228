"""Writes docs/config.md: every key of every config with type, default and meaning, from the sections' own source.

    python tools/config_doc.py           prints the page
    python tools/config_doc.py --write   replaces docs/config.md; a test fails when that file is stale

The meaning of a key is its comment: the lines above its field, or the one at the end of its line. The meaning of a
section is its docstring.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from collab_megatron.config import BuildDatasetConfig, DPOConfig, EvaluateConfig, RLConfig, SFTConfig, sections
from collab_megatron.config.explain import REMOVED
from collab_megatron.config.sections import Section

SECTIONS = Path(sections.__file__).parent
PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
PROGRAMS: dict[str, type[Section]] = {
    "python -m collab_megatron.train_rl": RLConfig,
    "python -m collab_megatron.train_sft": SFTConfig,
    "python -m collab_megatron.train_dpo": DPOConfig,
    "python -m collab_megatron.evaluate": EvaluateConfig,
    "python tools/build_dataset.py": BuildDatasetConfig,
}
INTRODUCTION = """\
# Configuration

*Written by `tools/config_doc.py` from `collab_megatron/config/`; edit the comments there.*

A config is a YAML file of sections. It holds only the keys that differ from the defaults below; every other key keeps
its default. An unknown key is an error that names the nearest known key. Values are checked when the file is loaded,
before a process starts.

- **Extend a file.** `extends: base.yaml`, or a list of files, reads other files first; their paths are relative to the
  file that names them. Sections merge key by key, and the extending file wins. `reward.metric_weights` is replaced as a
  whole, so a metric that is left out is switched off. On the command line `reward.metric_weights.bleu_score=1` adds a
  metric and `reward.metric_weights.interactivity=null` removes one.
- **Override a key.** `section.key=value` on the command line wins over every file, such as
  `train.steps=3 run.resume=true`. The value is YAML: lists as `[a, b]`, mappings as `{a: 1}`, nothing as `null`. A list
  is given as a whole, or a key of an entry that a file has is changed: `simulators.user.mixture.0.weight=2`.
- **Automatic values.** `auto` and `null` are decided at the start, from the machine or from other keys; the meaning of
  the key says how. `--dry-run` prints the config and the plan and starts nothing.
- **Units** are part of the name: `_s` seconds, `_mb` megabytes, `_usd` US dollars, `_usd_per_mtoken` US dollars per
  million tokens.
- **Paths** are relative to the working directory. A key of an LLM service never stands in a config:
  `api_key_env` names the environment variable that holds it.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace docs/config.md")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(page(), end="")


def page() -> str:
    places: dict[type[Section], list[str]] = {}
    for place, kind in dict(item for config in PROGRAMS.values() for item in _sections(config)).items():
        places.setdefault(kind, []).append(place)
    blocks = [INTRODUCTION, _programs()]
    for command, config in PROGRAMS.items():
        own = [name for name, field in config.model_fields.items() if not _section_in(field.annotation)]
        if own:
            blocks.append(f"## Keys of `{command}` outside sections\n\n{_table(config, own)}")
    for kind, named in places.items():
        base = next((base for base in kind.__mro__[1:] if base in places), None)
        text = [f"## {_listed(named)}", _meaning_of(kind)]
        if base:
            text.append(f"It has the keys of {_listed([min(places[base], key=len)])}, and these:")
        own = [name for name in kind.__annotations__ if not _section_in(kind.model_fields[name].annotation)]
        blocks.append("\n\n".join([*text, *([_table(kind, own)] if own else [])]).rstrip() + "\n")
    removed = "\n".join(f"- `{key}`: {successor}" for key, successor in REMOVED.items())
    blocks.append(f"## Removed keys\n\n{removed}\n")
    return "\n".join(blocks)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _programs() -> str:
    lines = [
        "## Which program reads which section",
        "",
        "| program | sections | defaults of its own |",
        "|---|---|---|",
    ]
    for command, config in PROGRAMS.items():
        read = [name for name, field in config.model_fields.items() if _section_in(field.annotation)]
        defaults = {name: config.model_fields[name].default for name in read}
        own = [
            f"{name}.{key}={getattr(section, key)}"
            for name, section in defaults.items()
            if isinstance(section, Section)
            for key in sorted(section.model_fields_set)
        ]
        lines.append(f"| `{command}` | {_listed(read)} | {_listed(own)} |")
    return "\n".join([*lines, ""])


def _sections(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Place in the config -> section, in the order of the fields."""
    for name, field in kind.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is None:
            continue
        origins = [typing.get_origin(part) for part in _parts(field.annotation)]
        place = f"{prefix}{name}{'.NAME' if dict in origins else '.0' if tuple in origins else ''}"
        yield place, inner
        yield from _sections(inner, f"{place}.")


def _parts(annotation: Any) -> Iterator[Any]:
    """The members of a union; anything else as it is."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds: as it is, or as the values of a mapping or tuple."""
    for part in _parts(annotation):
        for kind in (part, *typing.get_args(part)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                return typing.cast("type[Section]", kind)
    return None


def _meaning_of(kind: type[Section]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").strip()


def _table(kind: type[Section], names: list[str]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    meanings, types_of = _meanings(kind), _types(kind, names)
    for name in names:
        cells = (f"`{name}`", types_of[name], _default(kind, name), meanings.get(name, ""))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _default(kind: type[Section], name: str) -> str:
    value = kind.model_fields[name].get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {each}' for key, each in value.items())}}}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if str(value) else '`""`'


def _classes(kind: type[Section]) -> Iterator[tuple[str, ast.ClassDef]]:
    """Source and syntax of a section and of the sections it inherits from, the nearest first."""
    for base in kind.__mro__:
        if issubclass(base, Section) and base is not Section:
            source = textwrap.dedent(inspect.getsource(base))
            node = ast.parse(source).body[0]
            assert isinstance(node, ast.ClassDef)
            yield source, node


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, line


def _types(kind: type[Section], names: list[str]) -> dict[str, str]:
    """The type of each key, in the words of a config file."""
    found: dict[str, str] = {}
    for _, node in _classes(kind):
        for name, line in _fields(node):
            if name in names and name not in found:
                number, *others = _type_name(line.annotation).split(", ", 1)
                found[name] = ", ".join([number + _bounds([line.value] if line.value else []), *others])
    return found


NAMES = {
    "int": "integer",
    "float": "number",
    "bool": "true, false",
    "str": "text",
    "Path": "path",
    "Named": "text",
    "Address": "URL",
    "Positive": "integer > 0",
    "Count": "integer >= 0",
    "Seed": "integer >= 0",
    "Seconds": "seconds > 0",
    "Share": "0 to 1",
    "Finite": "number",
    "Umask": "octal digits",
    "FolderOrHubName": "folder or hub name",
    "Any": "any",
}


@functools.cache
def _aliases() -> dict[str, ast.expr]:
    """The sections' own names for types, such as CutReply."""
    lines = (line for file in SECTIONS.glob("*.py") for line in ast.parse(file.read_text()).body)
    return {
        line.targets[0].id: line.value
        for line in lines
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
    }


def _type_name(node: ast.expr) -> str:
    """`Positive | None` as `integer > 0, null`; a Literal as its choices."""
    if isinstance(node, ast.BinOp):
        return f"{_type_name(node.left)}, {_type_name(node.right)}"
    if isinstance(node, ast.Constant):
        return "null" if node.value is None else str(node.value).lower()
    if isinstance(node, ast.Name):
        return NAMES.get(node.id) or _type_name(_aliases()[node.id])
    if not (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)):
        raise TypeError(f"no words for the type {ast.unparse(node)}")
    inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if node.value.id == "Annotated":
        return _type_name(inside[0]) + _bounds(inside[1:])
    if node.value.id == "Literal":
        return ", ".join(map(_type_name, inside))
    if node.value.id == "dict":
        return f"mapping of {_type_name(inside[-1])}"
    return f"list of {_type_name(inside[0])}"


def _bounds(arguments: list[ast.expr]) -> str:
    """` >= 2` from Field(ge=2)."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    keywords = [word for call in arguments if isinstance(call, ast.Call) for word in call.keywords]
    return "".join(f" {signs[word.arg]} {ast.unparse(word.value)}" for word in keywords if word.arg in signs)


def _meanings(kind: type[Section]) -> dict[str, str]:
    """The comment of each key."""
    found: dict[str, str] = {}
    for source, node in _classes(kind):
        comments: dict[int, tuple[bool, str]] = {}  # line -> (alone on it, text)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                alone = token.line.strip().startswith("#")
                comments[token.start[0]] = (alone, token.string.lstrip("# "))
        for name, line in _fields(node):
            above: list[str] = []
            number = line.lineno - 1
            while number in comments and comments[number][0]:
                above.insert(0, comments[number][1])
                number -= 1
            ends = range(line.lineno, (line.end_lineno or line.lineno) + 1)
            trailing = [text for number in ends if number in comments for _, text in [comments[number]]]
            if above or trailing:
                text = " ".join([*above, *trailing])
                found.setdefault(name, text.replace("None:", "null:"))  # as YAML spells it
    return found


if __name__ == "__main__":
    main()
