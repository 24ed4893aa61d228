"""The driver process: answers the trainer's requests for rollouts and evaluations.

    python -m collab_megatron.driver.service RESOLVED.yaml --max-context-tokens N --ready-file FILE [--first-step N]

It binds a free port on loopback and writes the address to FILE. Which engines it may ask stands in every request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop
import zmq
import zmq.asyncio

from collab_megatron.cluster.processes import die_with_parent
from collab_megatron.config import RLConfig, load_config
from collab_megatron.data.parquet import read_tasks
from collab_megatron.driver.cast import Cast, assemble, usable_tasks
from collab_megatron.driver.collector import collect_step, evaluate
from collab_megatron.driver.protocol import POLL_S, Answer, Request, encode_answer, request_decoder
from collab_megatron.driver.record import TreeRecorder
from collab_megatron.errors import NoEngineLeft, RunError, run_cli
from collab_megatron.files import publish_json, publish_text
from collab_megatron.simulators.usage import API_USAGE_FILE
from collab_megatron.types import RolloutBatch, Task


class Service:
    """One job at a time: a step's rollouts or an evaluation."""

    def __init__(self, config: RLConfig, cast: Cast, recorder: TreeRecorder) -> None:
        self._config = config
        self._cast = cast
        self._recorder = recorder
        limit = config.rollout.max_prompt_tokens
        self._train = usable_tasks(read_tasks(config.data.train), cast, limit)
        self._validation: list[Task] = []
        if config.data.validation is not None:
            self._validation = usable_tasks(read_tasks(config.data.validation), cast, limit)
        self._job: asyncio.Task[Answer] | None = None
        self._job_request: Request | None = None

    async def answer(self, request: Request) -> Answer:
        """The job's result, or "pending" after POLL_S. The same request again goes on waiting for the same job."""
        if request.op == "stop":
            return Answer(metrics={})
        if self._job is None or self._job_request != request:
            await self._abandon()
            self._cast.engine.use(request.engines, request.version)
            self._job = asyncio.create_task(self._run(request))
            self._job_request = request
        done, _ = await asyncio.wait({self._job}, timeout=POLL_S)
        if not done:
            return Answer(pending=True)
        job, self._job = self._job, None
        lost = self._cast.engine.lost
        try:
            answer = job.result()
            answer.lost = lost
            return answer
        except RunError as error:
            return Answer(error=str(error), no_engine=isinstance(error, NoEngineLeft), lost=lost)

    async def _abandon(self) -> None:
        """End the job that the trainer asks for no longer: it would go on against the engines of the next."""
        if self._job is not None:
            self._job.cancel()
            await asyncio.wait({self._job}, timeout=POLL_S)
            self._job = None

    def _run(self, request: Request) -> Coroutine[Any, Any, Answer]:
        return self._step(request) if request.op == "step" else self._evaluate()

    async def _step(self, request: Request) -> Answer:
        config, players = self._config, self._cast.players
        before, calls_before = _clocks(self._cast), self._cast.gateway.snapshot()
        engine, usage_before = self._cast.engine, self._cast.engine.usage.copy()
        collected = await collect_step(
            request.step,
            self._train,
            seed=config.run.seed,
            rollout=config.rollout,
            algorithm=config.algorithm,
            weights=config.reward.metric_weights,
            limits=self._cast.limits,
            players=players,
        )
        _require_version(collected.batch, request.version)
        self._recorder.write(request.step, collected.groups)
        calls = self._cast.gateway.snapshot()
        metrics = dict(collected.batch.metrics)
        metrics |= {name: value - before[name] for name, value in _clocks(self._cast).items()}
        metrics |= (calls - calls_before).metrics()
        metrics |= {f"total/{name}": value for name, value in calls.metrics().items() if "/" in name}
        metrics |= engine.usage.since(usage_before).metrics(
            live=engine.live, lost=len(engine.lost), seconds=metrics["time_s/rollout"]
        )
        return Answer(batch=RolloutBatch(request.step, collected.batch.samples, metrics))

    async def _evaluate(self) -> Answer:
        figures, _ = await evaluate(
            self._validation,
            evaluation=self._config.evaluation,
            weights=self._config.reward.metric_weights,
            limits=self._cast.limits,
            players=self._cast.players,
        )
        return Answer(metrics=figures)


def _clocks(cast: Cast) -> dict[str, float]:
    players = cast.players
    return {
        "time_s/engine": players.engine_clock.seconds(),
        "time_s/simulators": players.user_clock.seconds(),
        "time_s/judges": players.judge_clock.seconds(),
    }


def _require_version(batch: RolloutBatch, version: int) -> None:
    """Strictly on-policy: every trained token was sampled by the weights that the trainer published last."""
    seen = {v for sample in batch.samples for v in sample.versions_T}
    if seen - {version}:
        raise RunError(f"driver: step {batch.step} holds tokens of weight versions {sorted(seen)}, expected {version}")


async def serve(config: RLConfig, *, max_context_tokens: int, first_step: int, ready_file: Path) -> None:
    """Answer requests until told to stop."""
    recorder = TreeRecorder(config.run.dir / "conversations.jsonl", first_step=first_step)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.REP)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    decode = request_decoder()
    async with assemble(config, engine_urls=(), max_context_tokens=max_context_tokens) as cast:
        service = Service(config, cast, recorder)
        publish_text(ready_file, f"tcp://127.0.0.1:{port}")
        running = True
        while running:
            request = decode(await socket.recv())
            start = time.monotonic()
            answer = await service.answer(request)
            await socket.send(encode_answer(answer))
            if answer.batch is not None:
                print(f"step {request.step}: delivered {len(answer.batch.samples)} samples", flush=True)
            elif answer.error:
                print(f"{request.op} {request.step} failed after {time.monotonic() - start:.1f} s: {answer.error}")
            running = request.op != "stop"
        publish_json(config.run.logs_dir / API_USAGE_FILE, cast.gateway.snapshot().metrics())  # of this attempt
    socket.close(linger=1000)
    context.term()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--max-context-tokens", type=int, required=True)
    parser.add_argument("--first-step", type=int, default=0)
    parser.add_argument("--ready-file", type=Path, required=True)
    args = parser.parse_args()
    die_with_parent()
    config = load_config(RLConfig, args.config)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(
            serve(
                config,
                max_context_tokens=args.max_context_tokens,
                first_step=args.first_step,
                ready_file=args.ready_file,
            )
        )


if __name__ == "__main__":
    run_cli(main)
