"""Trainer ranks that publish eleven versions of a tiny model and ask every engine for greedy replies in between.

    sync_ranks.py JOB.json

The job: model, roster, out, parallel and sync settings; device, if not the CPU. Rank 0 writes OUT/replies.json, the
weights of every version that it asked for as OUT/v{version}, and OUT/freed.json: the bytes of its GPU that colocated
engines gave back before each change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from collab_megatron.config.sections import EngineSection, ParallelSection, SyncSection
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import close_grid, init_grid
from collab_megatron.trainer.sync.publisher import Publisher

ASKED = (0, 1, 10)  # before any change, after one, after ten
PROMPTS = ([3, 40, 41, 42, 2, 4], [9, 50, 51, 2, 4, 77, 120, 8], [60, 2, 4, 70, 71, 2, 3, 80, 2, 4])
NEW_TOKENS = 24


def change(actor: Actor) -> None:
    """Scale every weight by two percent: replicated weights stay equal on all ranks."""
    with torch.no_grad():
        for chunk in actor.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.02)


def free_bytes() -> int:
    """Of this rank's GPU, for all processes; 0 on CPU."""
    return torch.cuda.mem_get_info()[0] if torch.version.cuda and torch.cuda.is_available() else 0


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    out = Path(job["out"])
    grid = init_grid(ParallelSection(device=job.get("device", "cpu"), **job["parallel"]), seed=1)
    actor = Actor.build(job["model"], dtype=job["dtype"], grid=grid, optimizer=None)
    publisher = Publisher(
        actor,
        roster=Path(job["roster"]),
        engine=EngineSection(startup_timeout_s=4, **job.get("engine", {})),
        sync=SyncSection(**{"timeout_s": 120, "verify_every": 4, **job["sync"]}),
        probe_ids=list(range(5, 45)),
        weights_dir=out / "weights",
    )
    rows, freed = [], []
    for version in range(max(ASKED) + 1):
        if version:
            before = free_bytes()
            publisher.make_room()
            freed.append(free_bytes() - before)
            change(actor)
        report = publisher.publish(version)
        if version not in ASKED:
            continue
        actor.save_hf(out / f"v{version}")
        if grid.is_main:
            servers = publisher.servers
            for entry in servers.live:
                control = servers.control(entry)
                replies = [control.greedy(ids, max_new_tokens=NEW_TOKENS, stop_token_ids=[])[0] for ids in PROMPTS]
                row = {"version": version, "served": control.weight_version(), "replies": replies}
                rows.append(row | {"engine": entry.name, "checked": report.checked, "gap": report.probe_gap})
    if grid.is_main:
        (out / "replies.json").write_text(json.dumps(rows))
        (out / "freed.json").write_text(json.dumps(freed))
    publisher.close()
    close_grid()


if __name__ == "__main__":
    main(*sys.argv[1:])
