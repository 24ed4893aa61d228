"""Output folder of a build: one append-only JSONL shard per worker process, and the settings of the build.

A conversation is appended as a whole (json_lines.py), as a row for each candidate or as one nested row. Every row has
`conv_rows`, the row count of its conversation: a conversation that a kill cut short is recognized, and removed when the
build continues.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collab_megatron.config.entry import BuildDatasetConfig
from collab_megatron.config.roles import llm_roles, role_place
from collab_megatron.config.sections import UserSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.files import contents
from collab_megatron.json_lines import append_lines, object_of, replace_lines
from collab_megatron.rollout.llm.templates import prompts_by_content, shipped_prompts
from collab_megatron.rollout.rewards.modules import module_sources
from collab_megatron.text import on_one_line

SETTINGS_FILE = "build.json"
# settings that may differ between runs into one folder: they do not change the conversations
FREE_SETTINGS = frozenset(
    {
        *("output", "form", "umask", "budget", "journal", "max_concurrency", "processes", "engine", "parallel"),
        # compared by contents
        *("problems", "problems_split", "problems_subset", "on_bad_problem", "num_conversations"),
    }
)
BY_CONTENT = frozenset({"judges", "metric_modules"})  # of the reward section: compared separately
SHAPING_LLM_SETTINGS = (
    "model",
    "temperature",
    "max_tokens",
    "response_format",
    "prompt_file",
    "extra",
    "weight",
)

logger = logging.getLogger(__name__)


def shard_path(output: Path, worker: int) -> Path:
    return output / f"conversations-{worker:03d}.jsonl"


def claim_output(config: BuildDatasetConfig, problems: str) -> set[int]:
    """Create or open the folder; returns the conv_ids of its finished conversations. `problems`: a hash of all of them.

    Raises UserError if it has conversations of other settings: mixed rows would not be comparable.
    """
    output = config.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        done: set[int] = set()
        for shard in sorted(output.glob("conversations-*.jsonl")):
            done |= _whole_conversations(shard)
        path, settings = output / SETTINGS_FILE, _settings(config, problems)
        if done and path.exists():
            _compare_settings(json.loads(path.read_text()), settings, output)
        else:
            replace_lines(path, [json.dumps(settings, indent=1).encode() + b"\n"])
    except json.JSONDecodeError:
        raise UserError(f"{output / SETTINGS_FILE} is not valid JSON: choose another output folder") from None
    except OSError as error:
        raise UserError(f"output folder {output} cannot be used: {error}; choose another one") from None
    return done


def append_conversation(shard: Path, rows: Sequence[Mapping[str, Any]], *, nested: bool = False) -> None:
    """Append all rows of one conversation, or none. Raises RunError on a full disk."""
    if nested:
        rows = [nested_row(rows)]
    data = b"".join(on_one_line(json.dumps(row, ensure_ascii=False).encode(errors="replace")) + b"\n" for row in rows)
    try:
        append_lines(shard, data)
    except OSError as error:
        raise RunError(
            f"{shard} cannot be written: {error}; finished conversations are kept: free some space and run the same "
            "command again"
        ) from None


def nested_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The flat rows of one conversation as one row."""
    shared = ("conv_id", "single_turn_prompt", "single_turn_completion", "single_turn_metadata", "task_desc")
    own = ("completion", "score", "proactive", "sessions", "rewards")
    turns: dict[int, dict[str, Any]] = {}
    for row in rows:
        turn = turns.setdefault(row["turn_id"], {"prompt": row["prompt"], "responses": []})
        turn["responses"].append({name: row[name] for name in own})
    return {**{name: rows[0][name] for name in shared}, "turns": list(turns.values()), "conv_rows": 1}


def _settings(config: BuildDatasetConfig, problems: str) -> dict[str, Any]:
    """All settings that change the conversations: dotted name -> plain value."""
    raw = prompts_by_content(config.model_dump(mode="json"))
    settings = {name: value for name, value in raw.items() if name not in FREE_SETTINGS and name != "simulators"}
    settings["reward"] = {name: value for name, value in raw["reward"].items() if name not in BY_CONTENT}
    settings["reward"]["metric modules (contents)"] = [
        contents(source) for module in config.reward.metric_modules for source in module_sources(module)
    ]
    for role, section in llm_roles(config.simulators, config.reward).items():
        parts = {role_place(role): section}
        if isinstance(section, UserSection):
            parts |= {f"{role_place(role)}.mixture.{number}": part for number, part in enumerate(section.mixture)}
        for place, part in parts.items():
            shaping = prompts_by_content(part.model_dump(mode="json", include=set(SHAPING_LLM_SETTINGS)))
            settings |= {f"{place}.{name}": value for name, value in shaping.items()}
    settings["shipped prompts"] = {prompt.name: contents(prompt) for prompt in shipped_prompts()}
    settings["problems (contents)"] = problems
    return settings


def _compare_settings(old: Mapping[str, Any], new: Mapping[str, Any], output: Path) -> None:
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"{output} holds conversations made with another {', '.join(changed)}: choose another output folder, or "
            "use the settings in its build.json again (an older version's keys: with that version)"
        )


def _whole_conversations(shard: Path) -> set[int]:
    """Remove unfinished conversations from the shard; returns the conv_ids of the finished ones."""
    rows: list[tuple[int, bytes]] = []
    expected: dict[int, int] = {}
    lines = [line for line in shard.read_bytes().split(b"\n") if line]
    for line in lines:
        row = object_of(line) or {}
        conv_id, expected_rows = row.get("conv_id"), row.get("conv_rows")
        if isinstance(conv_id, int) and isinstance(expected_rows, int):
            expected[conv_id] = expected_rows
            rows.append((conv_id, line))
    counts = Counter(conv_id for conv_id, _ in rows)
    done = {conv_id for conv_id, count in counts.items() if count == expected[conv_id]}
    kept = [line for conv_id, line in rows if conv_id in done]
    if len(kept) != len(lines):
        logger.warning(
            "%s: removed %d of %d lines, of unfinished conversations; these conversations will be grown again",
            shard,
            len(lines) - len(kept),
            len(lines),
        )
        replace_lines(shard, (line + b"\n" for line in kept))
    return done
