"""Shows in a terminal what a running run does: what its live page shows in a browser.

    python -m collab_megatron.watch RUN_DIR [--name NAME] [--once]

Where the output is no terminal (a file, a pipe) it is one line for each new step. It reads address and key from
RUN_DIR/logs/NAME/latest/live.json, changes nothing in the run, and ends when the run does, or with Ctrl-C. A run on
another machine: there, or through ssh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path

import httpx
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from collab_megatron.errors import UserError, run_cli
from collab_megatron.text import duration, visible
from collab_megatron.wire.live_file import live_file
from collab_megatron.wire.live_status import Status, rows_of, title_of

ASK_S = 2.0  # between two requests
ANSWER_S = 5.0
GONE_S = 30.0  # without an answer: a driver that is started again needs some of it
LONGEST_TEXT = 300  # characters of a message
MOST_SHARDS = 512


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run.dir of a run that is running")
    parser.add_argument("--name", help="run.name, where the folder has several")
    parser.add_argument("--once", action="store_true", help="show it once, and end")
    args = parser.parse_args(argv)
    logs = logs_of(args.run, args.name)
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end it
        watch(logs, Console(), once=args.once)


def logs_of(run: Path, name: str | None) -> Path:
    """The folder of logs of the newest attempt. Raises UserError where no run has a live page."""
    pages = {path.parent.parent.name: path for path in sorted(run.glob("logs/*/latest/live.json"))}
    if name is not None:
        pages = {found: path for found, path in pages.items() if found == name}
    if not pages:
        what = f"{run}/logs/{name or 'NAME'}/latest/live.json"
        raise UserError(
            f"no run has a live page here ({what} is missing): name the run.dir of a run that trains or collects, with "
            "driver.live_port not null"
        )
    if len(pages) > 1:
        newest = max(pages, key=lambda found: pages[found].stat().st_mtime)
        print(f"{run} has the runs {', '.join(pages)}: this is {newest}, --name shows another", flush=True)
        return pages[newest].parent
    return next(iter(pages.values())).parent


def watch(logs: Path, console: Console, *, once: bool = False) -> None:
    """Until the run ends. Raises UserError if it never answers."""
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as client, Live(console=console, auto_refresh=False) as live:
        answered: float | None = None
        last = -1
        while True:
            statuses = ask(client, logs)
            if statuses:
                answered = time.monotonic()
                if console.is_terminal and not once:
                    live.update(picture(statuses), refresh=True)
                elif once:
                    live.console.print(picture(statuses))
                elif statuses[0].step != last:
                    last = statuses[0].step
                    live.console.print(line(statuses[0]), soft_wrap=True)
            elif answered is None:
                raise UserError(
                    f"the live page of {logs / 'live.json'} does not answer: the run has ended, or runs on another "
                    "machine, where this command works"
                )
            elif time.monotonic() - answered > GONE_S:
                live.console.print(f"no answer for {GONE_S:g} s: the run has ended", highlight=False)
                return
            if once:
                return
            time.sleep(ASK_S)


def ask(client: httpx.Client, logs: Path) -> list[Status]:
    """The status of each driver process that answers, in the order of the shards."""
    found = []
    for shard in range(MOST_SHARDS):
        file = live_file(logs, shard)
        if not file.exists():
            break
        try:
            page = json.loads(file.read_text())
            answer = client.get(f"{page['url']}/status", headers={"Authorization": f"Bearer {page['key']}"})
            if answer.status_code == httpx.codes.OK:
                found.append(msgspec.json.decode(answer.content, type=Status))
        except (httpx.HTTPError, msgspec.DecodeError, ValueError):
            continue  # it is being started again, or another program has its port
    return found


def picture(statuses: list[Status]) -> Group:
    """The first process in full; of the others the work in flight."""
    first = statuses[0]
    table = Table.grid(padding=(0, 2))
    for name, value in rows_of(first).items():
        table.add_row(Text(name, style="dim"), Text(visible(value)))
    for shard, status in enumerate(statuses[1:], 1):
        table.add_row(Text(f"process {shard}", style="dim"), Text(f"{status.trees_running} trees running"))
    lost: list[RenderableType] = [
        Text(visible(f"{url}: {why}"), style="red") for url, why in first.engines_lost.items()
    ]
    chat: list[RenderableType] = [
        Padding(Text(visible(f"{role}: {text[:LONGEST_TEXT]}"), style="yellow" if role == "user" else ""), (0, 0, 0, 2))
        for role, text in first.chat
    ]
    best: list[RenderableType] = (
        [Text("the best reply of the last batch, and a future", style="bold"), *chat] if chat else []
    )
    bar = Padding(ProgressBar(total=max(1, first.steps), completed=first.step, width=60), 0)  # with a line end
    return Group(Text(visible(title_of(first)), style="bold"), bar, table, *lost, *best)


def line(status: Status) -> Text:
    """`rl: step 12 of 40 | reward 1.75 | ... | 4m12s left`."""
    rows = rows_of(status)
    shown = [f"{name} {rows[name]}" for name in ("reward", "asks", "so far") if name in rows]
    left = "" if status.eta_s is None else f" | {duration(status.eta_s)} left"
    return Text(visible(f"{title_of(status)} | {' | '.join(shown)}{left}"))


if __name__ == "__main__":
    run_cli(main)
