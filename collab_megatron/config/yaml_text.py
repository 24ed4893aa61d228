"""YAML for configs: plain values only, no duplicate keys, one sentence for every error.

PyYAML silently keeps the last of two equal keys, but only the user knows which one is right.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """The text is not a valid config; the message is one line."""


def parse_yaml(text: str) -> Any:
    """The value of `text`: mappings, lists, text, numbers, true, false, null, dates. Raises NotYaml."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _Twice as error:
        raise NotYaml(str(error)) from None
    except RecursionError:
        raise NotYaml("it is nested too deeply: a config has about five levels") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an invalid date, a number with too many digits
        raise NotYaml(f"it is not valid YAML: {' '.join(str(error).split())}") from None


class _Twice(yaml.YAMLError):
    """A mapping has a duplicate key."""


class _Loader(yaml.SafeLoader):
    """Plain values only; refuses a duplicate key in a mapping."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the mappings that `<<` names. Keys are checked once, before: a mapping that another one merges is
        flattened early, and then contains merged keys and its own."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue  # PyYAML refuses other keys itself; merged keys give way to those of this mapping
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first:
                raise _Twice(f"duplicate key {key!r} in line {first[key]} and line {line}: keep one of them")
            first[key] = line
