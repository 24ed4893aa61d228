"""The file with address and key of a driver's live page (rollout/live_page.py), which the launcher reads."""

from __future__ import annotations

from pathlib import Path


def live_file(logs_dir: Path, shard: int) -> Path:
    """Of driver process `shard`; {"url": ..., "key": ...}, mode 600."""
    return logs_dir / ("live.json" if shard == 0 else f"live.shard{shard}.json")
