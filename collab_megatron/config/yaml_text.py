"""YAML as a config wants it: plain values only, no key twice, and one sentence for whatever a text may be instead.

PyYAML keeps the last of two equal keys and says nothing; which of the two was meant only the user knows.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class NotYaml(ValueError):
    """A text that is no config; the message is one line."""


def parse_yaml(text: str) -> Any:
    """The value of `text`: mappings, lists, text, numbers, true, false, null, dates. Raises NotYaml."""
    try:
        return yaml.load(text, Loader=_Loader)
    except _Twice as error:
        raise NotYaml(str(error)) from None
    except RecursionError:
        raise NotYaml("it is nested too deeply: a config has a handful of levels") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, a number of too many digits
        raise NotYaml(f"it is not valid YAML: {' '.join(str(error).split())}") from None


class _Twice(yaml.YAMLError):
    """A mapping holds a key twice."""


class _Loader(yaml.SafeLoader):
    """Nothing but plain values; refuses a key that stands twice in one mapping."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Brings in what `<<` names. Looked at once: a mapping that another one merges is flattened before its own
        turn, and then holds both what was merged in and what stands here."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue  # PyYAML refuses other keys itself; what is merged in gives way to what stands here
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first:
                raise _Twice(f"the key {key!r} stands twice, in line {first[key]} and line {line}: keep one of them")
            first[key] = line
