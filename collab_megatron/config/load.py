"""YAML to a typed config: `extends`, `a.b=c` overrides, and errors that name the key and its nearest neighbour.

config = load_config(RLConfig, Path("conf/demo_rl.yaml"), ["train.steps=3", "run.resume=true"])
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from collab_megatron.errors import UserError, masked

WIDE = 2**16  # columns: no address is broken over two lines
NEAR = 0.7
"""How alike two keys must be (difflib's ratio) for one to be taken for a slip of the other."""

C = TypeVar("C", bound=BaseModel)


def load_config(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read `path` (and what it extends), apply `overrides`, validate.

    Raises UserError with one sentence for a missing file, bad YAML, an unknown key or a bad value.
    """
    raw = _read_with_extends(path, ())
    for override in overrides:
        _apply_override(raw, override)
    _find_modules(raw, path.absolute().parent)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(kind, error)}") from None


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, as other processes of the run read it. It holds no key: those are named by
    environment variable only. An address may hold a password: what is shown or kept comes from the two below."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=WIDE)


def show_config(config: BaseModel) -> str:
    """The resolved config as YAML for people, passwords in addresses masked."""
    return masked(dump_config(config))


def kept_config(config: BaseModel) -> dict[str, Any]:
    """The resolved config as JSON values for a checkpoint, passwords in addresses masked."""
    kept: dict[str, Any] = _masked_values(config.model_dump(mode="json"))
    return kept


def _masked_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked_values(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_masked_values(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def _read_with_extends(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: `extends` goes in a circle")
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no config file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(raw).__name__}")
    _find_modules(raw, path.parent)
    parents = raw.pop("extends", None)
    if parents is None:
        return raw
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        merged = _merge(merged, _read_with_extends(path.parent / parent, (*seen, path)))
    return _merge(merged, raw)


def _find_modules(raw: dict[str, Any], folder: Path) -> None:
    """Metric modules in the config's `folder` become paths: other processes read a copy of it that lies elsewhere."""
    reward = raw.get("reward")
    modules = reward.get("metric_modules") if isinstance(reward, dict) else None
    if isinstance(reward, dict) and isinstance(modules, list):
        reward["metric_modules"] = [_find_module(name, folder) for name in modules]


def _find_module(name: Any, folder: Path) -> Any:
    if not isinstance(name, str):
        return name  # validation names it
    if name.endswith(".py"):
        return str(folder / name)
    if not name.isidentifier():
        return name  # a dotted name is for Python to find
    near = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((str(file) for file in near if file.is_file()), name)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping. metric_weights is replaced whole: a weight left out is switched off."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "metric_weights"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    *parents, last = dotted.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first error as one sentence, and how many more there are."""
    first, *more = error.errors(include_url=False, include_input=True)
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=NEAR)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
        sentence = f"unknown key {dotted!r}; {hint}"
    elif first["type"] == "missing":
        sentence = f"{dotted!r} is not set and has no default"
    elif first["type"] == "value_error":
        sentence = f"{dotted}: {first['ctx']['error']}" if dotted else str(first["ctx"]["error"])
    else:
        sentence = f"{dotted!r}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"
    return sentence + (f" (and {len(more)} more)" if more else "")


def _keys_at(kind: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    node: Any = kind
    for part in loc:
        if typing.get_origin(node) in (dict, tuple):  # {name: section} or (section, ...)
            node = next(a for a in reversed(typing.get_args(node)) if a is not Ellipsis)
            continue
        annotation = node.model_fields[part].annotation
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        node = annotation
    return list(node.model_fields)
