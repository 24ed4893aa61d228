"""A driver process: grows its shard of the conversation trees and answers the trainer's requests.

    python -m collab_megatron.rollout.service RESOLVED.yaml --max-context-tokens N --ready-file FILE
        --address ADDRESS --token-file FILE [--engine-keys FILE] [--first-step N] [--shard N]

It listens at ADDRESS (ipc://FILE, tcp://HOST:PORT) and writes it to the ready file; requests must carry the token of
the token file. Which engines it may ask stands in every request. Killed, or ended by an exception that nobody
expected, and started again it goes on from the journal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
import traceback
from pathlib import Path

import msgspec
import uvloop
import zmq.asyncio

from collab_megatron.config import RLConfig, load_config
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import EXIT_DEFECT, BudgetSpent, NoEngineLeft, RunError, UserError, run_cli
from collab_megatron.files import keep_from_others, publish_json, publish_text
from collab_megatron.log import set_up_logging
from collab_megatron.rollout.cast import Cast, assemble, open_journal
from collab_megatron.rollout.listener import Listener
from collab_megatron.rollout.llm.accounting import API_USAGE_FILE
from collab_megatron.rollout.recorder import TreeRecorder
from collab_megatron.rollout.steps import Steps
from collab_megatron.rollout.work import Work
from collab_megatron.signals import die_with_parent
from collab_megatron.wire.protocol import POLL_S, Answer, Request


class Service:
    """Answers one request at a time; trees may grow between two of them."""

    def __init__(self, config: RLConfig, cast: Cast, recorder: TreeRecorder, *, shard: int = 0) -> None:
        self._config, self._cast = config, cast
        self._work = Work(config, cast, shard)
        self._steps = Steps(config, cast, self._work, recorder)
        self._engines: tuple[tuple[str, ...], int] | None = None
        self._evaluation: asyncio.Task[Answer] | None = None
        self._asked: Request | None = None
        self._since = 0.0

    async def answer(self, request: Request) -> Answer:
        """What was asked for, or "pending" after POLL_S. The same request again goes on waiting for the same work."""
        if request.op == "stop":
            await self.close()
            return Answer()
        if request.op == "discard":
            self._asked = None
            await self._steps.discard(request.step)
            return Answer()
        if request != self._asked:
            await self._abandon_evaluation()
            self._asked, self._since = request, time.monotonic()
        if self._engines != (request.engines, request.version):
            self._engines = request.engines, request.version
            self._cast.engine.use(request.engines, request.version)
        try:
            answer = await (self._step(request) if request.op == "step" else self._evaluate(request))
        except RunError as error:
            answer = Answer(
                error=str(error),
                no_engine=isinstance(error, NoEngineLeft),
                stop="budget" if isinstance(error, BudgetSpent) else "",
            )
        answer.lost = self._cast.engine.lost
        if answer.no_engine:
            self._engines, self._since = None, time.monotonic()
        return answer

    async def close(self) -> None:
        """End whatever is under way."""
        await self._abandon_evaluation()
        await self._steps.close()

    async def _step(self, request: Request) -> Answer:
        delivered = await self._steps.begin(request.step, request.version, request.saved)
        if delivered is not None:
            return delivered
        until = time.monotonic() + POLL_S
        while True:
            answer = self._steps.take(request.step)
            if answer is not None:
                return answer
            self._require_engines()
            timeout_s = self._config.driver.step_timeout_s
            if time.monotonic() - self._since > timeout_s:
                raise RunError(
                    f"driver: the rollouts of step {request.step + 1} took over {timeout_s:g} s; {self._steps.state()}"
                )
            left_s = until - time.monotonic()
            if left_s <= 0:
                return Answer(pending=True)
            await self._steps.changed(min(left_s, 0.5))

    async def _evaluate(self, request: Request) -> Answer:
        if self._evaluation is None:
            await self._steps.live(request.version)
            self._evaluation = asyncio.create_task(self._work.evaluate(request.step))
        until = time.monotonic() + POLL_S
        while not self._evaluation.done():
            self._require_engines()
            left_s = until - time.monotonic()
            if left_s <= 0:
                return Answer(pending=True)
            await asyncio.wait({self._evaluation}, timeout=min(left_s, 0.5))
        # kept until another request comes: this answer may be lost on its way
        return self._evaluation.result()

    def _require_engines(self) -> None:
        if not self._cast.engine.live:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self._cast.engine.lost.items())
            raise NoEngineLeft(f"no engine is left ({reasons or 'none is live yet'})")

    async def _abandon_evaluation(self) -> None:
        """End the evaluation that the trainer asks for no longer."""
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
) -> None:
    """Answer the requests that carry `token` until told to stop. Raises what nobody expected."""
    recorder = TreeRecorder(
        config.run.conversations_dir,
        config.record,
        first_step=None if first_step is None else first_step + 1,
        shard=shard,
        shards=config.driver.shards,
    )
    context = zmq.asyncio.Context()
    listener = Listener(context, address, token)
    journal = open_journal(config)
    async with assemble(
        config, engine_urls=(), max_context_tokens=max_context_tokens, journal=journal, engine_keys=engine_keys
    ) as cast:
        service = Service(config, cast, recorder, shard=shard)
        publish_text(ready_file, listener.address)
        running = True
        while running:
            asked = await listener.next()
            request, start = asked.request, time.monotonic()
            answer = await service.answer(request)
            if not answer.pending and (news := listener.news()):  # the trainer looks at no notes before the last answer
                answer = msgspec.structs.replace(answer, notes=(*answer.notes, news))
            await listener.answer(asked, answer)
            what = f"evaluation after step {request.step}" if request.op == "evaluate" else f"step {request.step + 1}"
            if answer.error:
                print(f"{what} failed after {time.monotonic() - start:.1f} s: {answer.error}")
            elif request.op == "step" and not answer.pending:
                print(f"{what}: delivered {len(answer.samples)} samples", flush=True)
            for note in answer.notes:
                print(note, flush=True)
            running = request.op != "stop"
        usage = API_USAGE_FILE if shard == 0 else API_USAGE_FILE.replace(".json", f".shard{shard}.json")
        publish_json(config.run.logs_dir / usage, cast.gateway.snapshot().metrics())  # of this attempt
    journal.close()
    listener.close()
    context.term()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--max-context-tokens", type=int, required=True)
    parser.add_argument("--first-step", type=int, help="of this attempt; not given where a driver is started again")
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--shard", type=int, default=0, help="which of driver.shards this process is")
    parser.add_argument("--address", required=True, help="where to listen: ipc://FILE or tcp://HOST:PORT")
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--engine-keys", type=Path, help="file; not given where the engines ask for none")
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
            )
        )


def main_or_defect() -> None:
    """`main`, but an exception that nobody expected has an exit code of its own: the launcher starts us again."""
    try:
        main()
    except (RunError, UserError):
        raise
    except Exception:  # noqa: BLE001  (whatever it is, the launcher must be able to tell it)
        traceback.print_exc()
        sys.stderr.flush()
        sys.exit(EXIT_DEFECT)


if __name__ == "__main__":
    run_cli(main_or_defect)
