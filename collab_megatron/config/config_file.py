"""Reads config files: `extends`, `a.b=c` overrides, and errors that name the key and the nearest known key.

config = load_config(RLConfig, Path("conf/demo_rl.yaml"), ["train.steps=3", "run.resume=true"])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from collab_megatron.config.explain import cut, explain, shown
from collab_megatron.config.sections import RewardSection
from collab_megatron.config.yaml_text import NotYaml, parse_yaml
from collab_megatron.errors import UserError, masked

WEIGHTS = "reward.metric_weights"
WIDE = 2**16  # columns: no address is broken over two lines
NAMED = {"algorithm": "preset"}
"""Sections that a name stands for, and the key that holds it."""

C = TypeVar("C", bound=BaseModel)


def load_config(kind: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read `path` (and what it extends), apply `overrides`, validate.

    Raises UserError, one sentence, for a missing file, bad YAML, an unknown key or a bad value.
    """
    raw = _read_with_extends(path, ())
    for override in overrides:
        if override.startswith(f"{WEIGHTS}."):
            _apply_weight(raw, override)
        else:
            _apply_override(raw, override)
    _find_modules(raw, path.absolute().parent)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(kind, error)}") from None


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, for other processes of the run. It contains no API keys, which are named by
    environment variable, but an address may contain a password: use the two functions below for output."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=WIDE)


def show_config(config: BaseModel) -> str:
    """The resolved config as YAML for the terminal and logs, with passwords in addresses masked."""
    return masked(dump_config(config))


def kept_config(config: BaseModel) -> dict[str, Any]:
    """The resolved config as JSON values for a checkpoint, with passwords in addresses masked."""
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
        raise UserError(f"{path}: `extends` forms a cycle: remove one of the `extends`")
    try:
        raw = parse_yaml(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"config file {path} cannot be read: {reason}") from None
    except NotYaml as error:
        raise UserError(f"config file {path}: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UserError(f"{path} must contain a mapping of sections, not a {type(raw).__name__}")
    _find_modules(raw, path.parent)
    raw |= {section: {NAMED[section]: raw[section]} for section in NAMED if isinstance(raw.get(section), str)}
    parents = raw.pop("extends", None)
    if parents is None:
        return raw
    merged: dict[str, Any] = {}
    for parent in parents if isinstance(parents, list) else [parents]:
        if not isinstance(parent, str) or not parent or "\0" in parent:
            raise UserError(f"{path}: `extends` names a config file or a list of config files, not {shown(parent)}")
        merged = _merge(merged, _read_with_extends(path.parent / parent, (*seen, path)))
    return _merge(merged, raw)


def _find_modules(raw: dict[str, Any], folder: Path) -> None:
    """Metric modules in the config's `folder` become paths, because other processes read a copy of the config."""
    reward = raw.get("reward")
    modules = reward.get("metric_modules") if isinstance(reward, dict) else None
    if isinstance(reward, dict) and isinstance(modules, list):
        reward["metric_modules"] = [_find_module(name, folder) for name in modules]


def _find_module(name: Any, folder: Path) -> Any:
    if not isinstance(name, str):
        return name  # validation reports it
    if name.endswith(".py"):
        return str(folder / name)
    if not name.isidentifier():
        return name  # Python finds a dotted name
    near = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((str(file) for file in near if file.is_file()), name)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` over `base`, key by key. metric_weights is replaced as a whole: a missing weight switches a metric off."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "metric_weights"
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_weight(raw: dict[str, Any], override: str) -> None:
    """reward.metric_weights.NAME=1 adds a metric to those of the files, or to the default ones; =null removes it."""
    reward = raw["reward"] = {} if raw.get("reward") is None else raw["reward"]
    if isinstance(reward, dict) and reward.get("metric_weights") is None:
        reward["metric_weights"] = dict(RewardSection().metric_weights)
    before = list(reward["metric_weights"]) if isinstance(reward, dict) else []
    _apply_override(raw, override)
    name = override.partition("=")[0].removeprefix(f"{WEIGHTS}.")
    weights = reward["metric_weights"]
    if name in weights and weights[name] is None:
        if name not in before:
            raise UserError(f"override {cut(override)!r}: {name} has no weight; metrics with one: {', '.join(before)}")
        del weights[name]


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    *parents, last = dotted.split(".")
    if not separator or any(part.split() != [part] for part in (*parents, last)):
        raise UserError(f"override {cut(override)!r} is not of the form section.key=value")
    node: Any = raw
    for number, parent in enumerate(parents):
        if isinstance(node, list):
            node = node[int(parent)]
        else:
            if node.get(parent) is None:  # `section:` without keys
                node[parent] = {}
            node = node[parent]
        entry = parents[number + 1] if number + 1 < len(parents) else ""
        if isinstance(node, list) and entry.isdecimal() and int(entry) < len(node):
            continue  # `list.0.key=value`: an entry that the files have
        if isinstance(node, list):
            raise UserError(
                f"override {cut(override)!r}: {parent} is a list: give the whole list, {parent}=[...], or change a key "
                f"of one of its {len(node)} entries, {parent}.0.KEY=..."
            )
        if not isinstance(node, dict):
            raise UserError(f"override {cut(override)!r}: {parent} is a value, not a section: set {parent} itself")
    try:
        value = parse_yaml(text)
    except NotYaml as error:
        raise UserError(f"override {dotted}={cut(text)}: {error}") from None
    if dotted in NAMED and isinstance(value, str) and isinstance(raw.get(dotted) or {}, dict):
        value = {**(raw.get(dotted) or {}), NAMED[dotted]: value}  # a name changes its own key only
    node[last] = value
