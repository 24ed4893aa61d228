"""What the tests of tools/build_dataset.py share: the tool in this process and in another, and the rows it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from collab_megatron.config import BuildDatasetConfig, load_config
from collab_megatron.data_engine.build import BuildProgress, build_dataset
from tests.conftest import REPOSITORY

READY_S = 30.0
TOOL_S = 120.0


def build(config: Path, *overrides: str) -> BuildProgress:
    """The tool's work in this process: it takes seconds to import LiteLLM in another."""
    return build_dataset(load_config(BuildDatasetConfig, config, overrides), lambda progress: None)


def tool(name: str, *arguments: str, timeout_s: float = TOOL_S) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def built_rows(config: Path) -> list[dict[str, Any]]:
    shards = sorted((config.parent / "built").glob("conversations-*.jsonl"))
    return [json.loads(line) for shard in shards for line in shard.read_text().splitlines()]
