"""Driver service: the process that grows one shard of the conversation trees and answers the trainer's requests.

    python -m collab_megatron.rollout.service RESOLVED.yaml --max-context-tokens N --ready-file FILE
        --address ADDRESS --token-file FILE [--engine-keys FILE] [--first-step N] [--shard N]

It listens at ADDRESS (ipc://FILE, tcp://HOST:PORT) and writes the address to the ready file. A request must carry the
token of the token file, and names the engines to use. After a kill or an unexpected exception the launcher starts the
process again, and it continues from the journal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import sys
import time
import traceback
from collections import deque
from pathlib import Path

import msgspec
import uvloop
import zmq.asyncio

from collab_megatron.config import RLConfig, load_config
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import EXIT_UNEXPECTED, BudgetSpent, NoEngineLeft, RunError, UserError, run_cli
from collab_megatron.files import keep_from_others, publish_json, publish_text
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.batch_collector import BatchCollector
from collab_megatron.rollout.clients import RolloutClients, open_clients, open_journal
from collab_megatron.rollout.listener import Listener
from collab_megatron.rollout.live_page import LivePage
from collab_megatron.rollout.llm.accounting import API_USAGE_FILE
from collab_megatron.rollout.record_files import RecordWriter
from collab_megatron.rollout.shard_evaluator import ShardEvaluator
from collab_megatron.rollout.tree_grower import TreeGrower
from collab_megatron.signals import die_with_parent
from collab_megatron.wire.live_file import live_file
from collab_megatron.wire.live_status import Status
from collab_megatron.wire.protocol import POLL_S, Answer, Request

WAITING = "waiting for the trainer"
PACE_STEPS = 10
"""The time left is estimated from so many steps."""


class Service:
    """Answers one request at a time. Trees also run between two requests."""

    def __init__(self, config: RLConfig, clients: RolloutClients, recorder: RecordWriter, *, shard: int = 0) -> None:
        self._config, self._clients = config, clients
        self._collector = BatchCollector(config, clients, TreeGrower(config, clients, shard), recorder)
        self._evaluator = ShardEvaluator(config, clients, shard)
        self._engines: tuple[tuple[str, ...], int | None] | None = None
        self._evaluation: asyncio.Task[Answer] | None = None
        self._asked: Request | None = None
        self._since = 0.0
        self._phase, self._phase_since = WAITING, time.monotonic()
        self._delivered: deque[float] = deque(maxlen=PACE_STEPS + 1)  # when the last batches were

    async def answer(self, request: Request) -> Answer:
        """The answer to a request, or "pending" after POLL_S. An equal request continues the same work.

        Waits for a batch, an evaluation, or a discarded batch's trees to end.
        """
        if request.op == "stop":
            await self.close()
            return Answer()
        if request.op == "discard":
            self._asked = None
            await self._collector.discard(request.step)
            return Answer()
        if request != self._asked:
            await self._abandon_evaluation()
            self._asked, self._since = request, time.monotonic()
            self._enter("evaluation" if request.op == "evaluate" else f"rollouts of step {request.step + 1}")
        if self._engines != (request.engines, request.version):
            self._engines = request.engines, request.version
            self._clients.pool.use(request.engines, request.version)
        try:
            answer = await (self._step(request) if request.op == "step" else self._evaluate(request))
        except RunError as error:
            answer = Answer(
                error=str(error),
                no_engine=isinstance(error, NoEngineLeft),
                stop="budget" if isinstance(error, BudgetSpent) else "",
            )
        answer.lost = self._clients.pool.lost
        if not answer.pending and self._phase != WAITING:
            if request.op == "step" and not answer.error:
                self._delivered.append(time.monotonic())
            self._enter(WAITING)
        if answer.no_engine:
            self._engines, self._since = None, time.monotonic()
        return answer

    def _enter(self, phase: str) -> None:
        self._phase, self._phase_since = phase, time.monotonic()

    def status(self) -> Status:
        """This moment, for the live page."""
        config, clients, last = self._config, self._clients, self._collector.last
        between = [later - earlier for earlier, later in itertools.pairwise(self._delivered)]
        pace = statistics.median(between) if between else None
        asked = 0 if self._asked is None else self._asked.step + (self._asked.op == "step")
        budget = clients.gateway.budget.metrics()
        return Status(
            run=config.run.name,
            step=asked,
            steps=config.train.steps,
            phase=self._phase,
            phase_s=time.monotonic() - self._phase_since,
            trees_running=self._collector.num_running,
            calls_in_flight={role: usage.in_flight for role, usage in clients.gateway.snapshot().roles.items()},
            turns_waiting=clients.engine_limiter.waiting,
            engines_live=len(clients.pool.live),
            engines_lost=clients.pool.lost,
            seconds_per_step=pace,
            eta_s=None if pace is None else pace * max(0, config.train.steps - asked),
            usd=budget["budget/usd_to_date"],
            calls=int(budget["budget/calls_to_date"]),
            figures={} if last is None else last.figures,
            chat=() if last is None else last.chat,
        )

    async def close(self) -> None:
        """Cancel evaluation and trees. Waits until they have ended."""
        await self._abandon_evaluation()
        await self._collector.close()

    async def _step(self, request: Request) -> Answer:
        delivered = await self._collector.begin(request.step, request.version, request.saved)
        if delivered is not None:
            return delivered
        until = time.monotonic() + POLL_S
        while True:
            answer = self._collector.take(request.step)
            if answer is not None:
                return answer
            self._require_engines()
            timeout_s = self._config.driver.step_timeout_s
            if time.monotonic() - self._since > timeout_s:
                raise RunError(
                    f"driver: the rollouts of step {request.step + 1} took over {timeout_s:g} s; "
                    f"{self._collector.state()}"
                )
            left_s = until - time.monotonic()
            if left_s <= 0:
                return Answer(pending=True)
            await self._collector.changed(min(left_s, 0.5))

    async def _evaluate(self, request: Request) -> Answer:
        if self._evaluation is None:
            await self._collector.live(request.version)
            self._evaluation = asyncio.create_task(self._evaluate_apart(request.step))
        until = time.monotonic() + POLL_S
        while not self._evaluation.done():
            self._require_engines()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return Answer(pending=True)
            await asyncio.wait({self._evaluation}, timeout=min(left_s, 0.5))
        # kept until the next request: this answer may be lost on its way to the trainer
        return self._evaluation.result()

    async def _evaluate_apart(self, step: int) -> Answer:
        """The evaluator's answer. Its LLM calls, dollars and seconds are not the next step's too, unless trees of
        training run meanwhile (driver.max_staleness): then nothing tells them apart."""
        answer = await self._evaluator.evaluate(step)
        if not self._config.driver.max_staleness:
            self._collector.leave_out()
        return answer

    def _require_engines(self) -> None:
        if not self._clients.pool.live:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self._clients.pool.lost.items())
            raise NoEngineLeft(f"no engine is left ({reasons or 'none is live yet'})")

    async def _abandon_evaluation(self) -> None:
        """Cancel an evaluation that the trainer no longer asks for. Waits at most POLL_S."""
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is not None:
            evaluation.cancel()
            await asyncio.wait({evaluation}, timeout=POLL_S)


async def serve(
    config: RLConfig,
    *,
    max_context_tokens: int,
    first_step: int | None,
    ready_file: Path,
    shard: int,
    address: str,
    token: bytes,
    engine_keys: EngineKeys | None,
    logs_dir: Path,
) -> None:
    """Answer requests with `token` until one asks to stop, then write the calls and their costs to `logs_dir`. Waits
    for requests, without a deadline: the process dies with its parent. Raises UserError, RunError of the disk, and
    bugs."""
    recorder = RecordWriter(
        config.run.conversations_dir,
        config.record,
        first_step=None if first_step is None else first_step + 1,
        shard=shard,
        shards=config.driver.shards,
    )
    context = zmq.asyncio.Context()
    listener = Listener(context, address, token)
    journal = open_journal(config)
    async with (
        open_clients(
            config, engine_urls=(), max_context_tokens=max_context_tokens, journal=journal, engine_keys=engine_keys
        ) as clients,
        contextlib.AsyncExitStack() as ending,
    ):
        service = Service(config, clients, recorder, shard=shard)
        page = LivePage(service.status)
        if (port := config.driver.live_port) is not None:
            await page.start(port and port + shard, live_file(logs_dir, shard))
            ending.push_async_callback(page.close)
        publish_text(ready_file, listener.address)
        running = True
        while running:
            received = await listener.next()
            request, start = received.request, time.monotonic()
            answer = await service.answer(request)
            if not answer.pending and (news := listener.news()):  # the trainer reads notes in the final answer only
                answer = msgspec.structs.replace(answer, notes=(*answer.notes, news))
            await listener.answer(received, answer)
            what = f"evaluation after step {request.step}" if request.op == "evaluate" else f"step {request.step + 1}"
            if answer.error:
                print(f"{what} failed after {time.monotonic() - start:.1f} s: {answer.error}")
            elif request.op == "step" and not answer.pending:
                print(f"{what}: delivered {len(answer.samples)} samples", flush=True)
            for note in answer.notes:
                print(note, flush=True)
            running = request.op != "stop"
        usage = API_USAGE_FILE if shard == 0 else API_USAGE_FILE.replace(".json", f".shard{shard}.json")
        publish_json(logs_dir / usage, clients.gateway.snapshot().metrics())  # of this attempt
    journal.close()
    listener.close()
    context.term()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--max-context-tokens", type=int, required=True)
    parser.add_argument("--first-step", type=int, help="first step of this attempt; omitted when a driver is restarted")
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--shard", type=int, default=0, help="index of this process among driver.shards")
    parser.add_argument("--address", required=True, help="address to listen at: ipc://FILE or tcp://HOST:PORT")
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--engine-keys", type=Path, help="file with API keys of the engines, if they require them")
    parser.add_argument("--logs-dir", type=Path, required=True, help="folder of this attempt's logs")
    args = parser.parse_args()
    die_with_parent()
    set_up_logging(f"driver-{args.shard}")
    config = load_config(RLConfig, args.config)
    keep_from_others(config.run.umask)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(
            serve(
                config,
                max_context_tokens=args.max_context_tokens,
                first_step=args.first_step,
                ready_file=args.ready_file,
                shard=args.shard,
                address=args.address,
                token=args.token_file.read_bytes(),
                engine_keys=EngineKeys.read(args.engine_keys) if args.engine_keys else None,
                logs_dir=args.logs_dir,
            )
        )


def main_or_bug() -> None:
    """`main` with an exit code of its own for unexpected exceptions, at which the launcher restarts the driver."""
    try:
        main()
    except (RunError, UserError):
        raise
    except Exception:  # noqa: BLE001 - any bug: reported to the launcher as an exit code
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(EXIT_UNEXPECTED)


if __name__ == "__main__":
    run_cli(main_or_bug)
