"""Seconds of a weight sync's control calls to all servers: asked at the same time by the trainer, or through smg.

    python tools/bench/control_calls.py [--servers 2] [--repeats 20] [--smg PATH_TO_SMG] [--json FILE]

Starts real SGLang servers with a tiny model on CPU and measures one fan-out of each control call, in the order of a
sync without its weights, two ways:

- direct: `SyncServers.call_all`, as collab_megatron/trainer/sync does it; a thread and a connection for every server;
- smg: one call to the router's RL control plane, which calls the servers. The requirements do not have it: install
  smg==1.13.0 and setproctitle, without smg's dependencies, into their own environment. Without it the row is "skipped".

The ways take turns, sync by sync, so that other load slows both; two warm-up turns do not count.
`seconds` is the median of the turns; `all` is the sum over one sync's calls. The servers are idle.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import PYTHON_PLACES, engine_command
from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.files import publish_json
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.trainer.sync.servers import SyncServers
from collab_megatron.wire.roster import EngineEntry, RosterFolder

WARM_UPS = 2
START_S, CALL_S = 600.0, 60.0
HOST = "127.0.0.1"

Row = dict[str, Any]
"""{"call", "way", "servers", and "repeats", "seconds" (median), "fastest_seconds", "slowest_seconds" or "skipped"}"""

# name -> as EngineControl makes it; body and query for the router; in the order of a sync
CALLS: dict[str, tuple[Callable[[EngineControl], object], dict[str, str], dict[str, str]]] = {
    "pause_generation": (EngineControl.pause, {"mode": "in_place"}, {}),
    "begin_weight_update": (EngineControl.begin_update, {}, {}),
    "end_weight_update": (EngineControl.end_update, {}, {}),
    "flush_cache": (partial(EngineControl.flush_cache, timeout_s=0), {}, {"timeout": "0"}),
    "continue_generation": (EngineControl.resume, {}, {}),
}


def alive(supervisor: Supervisor, child: ChildProcess) -> bool:
    """Raises with its own words if it has failed."""
    supervisor.check()
    return child.process.poll() is None


def start_servers(supervisor: Supervisor, count: int, model: Path) -> list[EngineEntry]:
    """As many servers, side by side; returns when all are ready."""
    section = EngineSection(mem_fraction=0.4, max_total_tokens=2048, max_running_requests=4)
    started = []
    for number in range(count):
        port = free_port()
        command = engine_command(section, model_path=str(model), dtype="float32", device="cpu", port=port, seed=1)
        started.append((command.url, supervisor.start(f"engine-{number}", command.argv, command.env)))
    for url, child in started:
        with closing(EngineControl(url, timeout_s=CALL_S)) as control:
            control.wait_until_ready(timeout_s=START_S, alive=partial(alive, supervisor, child))
    # not managed: nobody would restart it, so a lost server ends the benchmark
    return [EngineEntry(f"engine-{number}", url, ranks=1, managed=False) for number, (url, _) in enumerate(started)]


def start_router(supervisor: Supervisor, executable: str, servers: Sequence[EngineEntry], client: httpx.Client) -> None:
    """smg in front of the servers, and `client` set to its control plane; returns when it has found all of them."""
    port = free_port()
    argv = [executable, "launch", "--enable-rl", "--policy", "round_robin", "--host", HOST, "--port", str(port)]
    argv += ["--prometheus-host", HOST, "--prometheus-port", str(free_port()), "--log-level", "warn"]
    argv += ["--disable-tokenizer-autoload", "--worker-urls", *(server.url for server in servers)]
    child = supervisor.start("smg", argv, {}, unset=PYTHON_PLACES)
    client.base_url = f"http://{HOST}:{port}/v1/rl"
    with closing(EngineControl(f"http://{HOST}:{port}", timeout_s=CALL_S)) as control:
        control.wait_until_ready(timeout_s=START_S, alive=partial(alive, supervisor, child))
    deadline = time.monotonic() + START_S
    # it answers before it has found all servers, and fans out to those that it has
    while sum(worker["health"] == "ready" for worker in client.get("/workers").json()["workers"]) < len(servers):
        if not alive(supervisor, child) or time.monotonic() > deadline:
            raise RunError(f"smg did not find {len(servers)} ready servers within {START_S:g} s")
        time.sleep(0.2)


def direct(servers: SyncServers, name: str) -> None:
    """One fan-out. Raises RunError unless every server did it."""
    answers = servers.call_all(name, lambda control, _: CALLS[name][0](control))
    if False in answers.values():  # the answer of flush_cache when it refuses
        raise RunError(f"a server refused {name}")


def through_router(client: httpx.Client, name: str) -> None:
    """One fan-out. Raises RunError unless every server did it."""
    _, body, query = CALLS[name]
    try:
        response = client.post(f"/engine/{name}", json=body, params={"selector": "engine=sglang", **query})
    except httpx.HTTPError as error:
        raise RunError(f"smg did not answer {name} ({type(error).__name__})") from None
    if response.status_code != 200:  # 207: a server failed or refused
        raise RunError(f"{name} through smg failed ({response.status_code}): {response.text[:300]}")


def take_turns(ways: Mapping[str, Callable[[str], None]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """way -> call -> seconds of every measured turn."""
    seconds: dict[str, dict[str, list[float]]] = {way: {name: [] for name in CALLS} for way in ways}
    for turn in range(WARM_UPS + repeats):
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            for name in CALLS:
                start = time.perf_counter()
                ways[way](name)
                if turn >= WARM_UPS:
                    seconds[way][name].append(time.perf_counter() - start)
    return seconds


def rows_of(way: str, seconds: Mapping[str, list[float]], servers: int) -> list[Row]:
    rows = []
    for name, times in [*seconds.items(), ("all", [sum(turn) for turn in zip(*seconds.values(), strict=True)])]:
        row = {"call": name, "way": way, "servers": servers, "repeats": len(times), "seconds": statistics.median(times)}
        rows.append({**row, "fastest_seconds": min(times), "slowest_seconds": max(times)})
    return rows


def measure(servers: int, repeats: int, smg: str | None) -> list[Row]:
    """Start everything, take turns, end everything."""
    from transformers.utils.logging import disable_progress_bar

    from collab_megatron.demo.tiny_model import (
        write_model,  # torch with it: seconds that a mistyped option need not wait
    )

    disable_progress_bar()
    with (
        tempfile.TemporaryDirectory(prefix="bench_control_calls_") as work,
        Supervisor(Path(work) / "logs") as supervisor,
        httpx.Client(timeout=CALL_S, trust_env=False) as client,
    ):
        write_model(Path(work) / "model", seed=1)
        entries = start_servers(supervisor, servers, Path(work) / "model")
        roster = RosterFolder(Path(work) / "roster")
        roster.publish(entries, coming=0)
        with closing(SyncServers(roster, timeout_s=CALL_S, wait_s=CALL_S)) as sync_servers:
            if len(sync_servers.find()) != servers:
                raise RunError("a server was ready and does not answer any more")
            ways = {"direct": partial(direct, sync_servers)}
            if smg is not None:
                start_router(supervisor, smg, entries, client)
                ways["smg"] = partial(through_router, client)
            seconds = take_turns(ways, repeats)
    rows = [row for way in ways for row in rows_of(way, seconds[way], servers)]
    if smg is None:
        reason = "needs --smg with the path of its executable"
        rows += [{"call": name, "way": "smg", "servers": servers, "skipped": reason} for name in (*CALLS, "all")]
    return rows


def line(row: Row) -> str:
    """For people."""
    head = f"{row['call']:19s} {row['way']:6s} {row['servers']} servers:"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    return f"{head} {row['seconds']:.4f} s ({row['fastest_seconds']:.4f} to {row['slowest_seconds']:.4f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tools/bench/control_calls.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20, help="measured turns of each way")
    parser.add_argument("--smg", help="the router's executable; default: its rows are skipped")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if min(args.servers, args.repeats) < 1:
        raise UserError("--servers and --repeats must be at least 1")
    if args.smg is not None and shutil.which(args.smg) is None:
        raise UserError(f"--smg {args.smg} is not an executable: install smg and give its path")
    return args


def main() -> None:
    args = parse()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for row in (rows := measure(args.servers, args.repeats, args.smg)):
        print(line(row), flush=True)
    if args.json:
        publish_json(args.json, rows)


if __name__ == "__main__":
    run_cli(main)
