"""Prompt templates: text files with `$name` placeholders.

Values are inserted verbatim, except for closing tags of the prompt's blocks, and are not expanded again: braces,
dollars and percent signs in a user's text are harmless. A literal dollar in a template is written `$$`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.files import contents
from collab_megatron.types import Message

TEXT_FILES = ("prompt_file", "rubric_file")  # ends of keys that name a text file
BLOCK_END = re.compile(r"</(?=\s*(?:chat|request|reference|rubric|task_desc|first|second)\s*>)", re.IGNORECASE)


class PromptTemplate:
    """One template, whose names are checked when it is made."""

    def __init__(self, text: str, *, required: Iterable[str], optional: Iterable[str] = (), source: str) -> None:
        """Raises UserError if `text` has a lone dollar, an unknown name, or not every required name."""
        self._template = Template(text)
        required, known = set(required), set(required) | set(optional)
        if not self._template.is_valid():
            raise UserError(f"prompt {source}: it contains a lone $; write $$ for a dollar sign")
        found = set(self._template.get_identifiers())
        if found - known:
            raise UserError(f"prompt {source}: unknown name ${min(found - known)}; known: {_listed(known)}")
        if required - found:
            raise UserError(f"prompt {source}: ${min(required - found)} is missing; it needs {_listed(required)}")

    def fill(self, **values: str) -> str:
        r"""The prompt. Raises KeyError if a name of the template has no value.

        A closing tag of a block inside a value becomes `<\/chat>`, so that no text can end its block.
        """
        return self._template.substitute({name: BLOCK_END.sub(r"<\\/", value) for name, value in values.items()})


def load_template(
    name: str, prompt_file: Path | None, *, required: Iterable[str], optional: Iterable[str] = ()
) -> PromptTemplate:
    """`prompt_file`, or the shipped `prompts/{name}.txt` if it is None. Raises UserError if it cannot be used."""
    if prompt_file is None:
        text = resources.files("collab_megatron.rollout.llm").joinpath("prompts", f"{name}.txt").read_text("utf-8")
        return PromptTemplate(text, required=required, optional=optional, source=f"{name}.txt")
    try:
        text = prompt_file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file {prompt_file} cannot be read: {error}") from None
    return PromptTemplate(text, required=required, optional=optional, source=str(prompt_file))


def proactive_message(prompt_file: Path | None) -> str:
    """The system message that asks a policy for collaboration: `prompt_file`, or the shipped one. Raises UserError."""
    return load_template("policy_proactive", prompt_file, required=()).fill().strip()


def shipped_prompts() -> list[Path]:
    """All of them. Which ones a config uses depends on its other settings."""
    folder = Path(str(resources.files("collab_megatron.rollout.llm"))) / "prompts"
    return sorted(folder.glob("*.txt"))


def prompts_by_content(node: Any) -> Any:
    """`node` with the hash of the text instead of the path of every `...prompt_file` and `rubric_file`."""
    if isinstance(node, Mapping):
        return {
            key: contents(Path(value)) if key.endswith(TEXT_FILES) and value else prompts_by_content(value)
            for key, value in node.items()
        }
    return [prompts_by_content(value) for value in node] if isinstance(node, list) else node


def chat_lines(chat: Sequence[Message]) -> str:
    """The user and assistant turns, one JSON object per line. fill() escapes closing tags the way JSON does."""
    lines = [
        json.dumps(message.as_dict(), ensure_ascii=False) for message in chat if message.role in ("user", "assistant")
    ]
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names))
