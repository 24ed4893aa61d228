"""Two real servers and one trainer: every transport, an update in mid generation, servers that die, hang and refuse."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from collab_megatron.engine.client import EngineClient, open_session
from collab_megatron.engine.control import PauseMode
from collab_megatron.errors import NoEngineLeft, WeightsDiffer
from collab_megatron.trainer.batching import TokenSample, split_by_tokens
from collab_megatron.trainer.convert import buckets
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.bucket_transport import BucketTransport
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.types import Generation
from tests.trainer.sync.two_engines import NUM_TENSORS, PROMPT, START_S, TIMEOUT_S, Run, running

pytestmark = pytest.mark.slow
FULL = pytest.mark.full


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with running(tmp_path_factory.mktemp("two_engines")) as both:
        yield both


@pytest.fixture
def both(run: Run) -> Run:
    """The run with two servers that hold the same, newest version."""
    run.wait_until_both_are_ready()
    report = run.publish()
    assert (report.engines, report.checked) == (2, NUM_TENSORS)
    return run


@pytest.fixture
def at_bucket(both: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Tensor], None]], None]:
    """`at_bucket(n, do)`: when bucket n is handed over, `do(its bytes)` first."""
    transport = both.publisher._transport
    assert isinstance(transport, BucketTransport)
    send = transport._send
    due: dict[int, Callable[[Tensor], None]] = {}

    def send_after(attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        if do := due.pop(bucket.number, None):
            do(tensors[0])
        return send(attempt, bucket, tensors)

    monkeypatch.setattr(transport, "_send", send_after)
    return due.__setitem__


@pytest.mark.parametrize(
    "transport", ["broadcast", "one by one", pytest.param("ipc", marks=FULL), pytest.param("disk", marks=FULL)]
)
def test_two_engines_say_what_transformers_says(both: Run, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if transport == "one by one":  # as large models' tensors travel
        monkeypatch.setattr(buckets, "APART_BYTES", 0)
        assert all(bucket.apart for bucket in both.actor.bucket_stream(30_000).plan)
    publisher = both.publisher_of(transport="broadcast" if transport == "one by one" else transport)
    both.change()
    report = publisher.publish(both.version)
    assert (report.engines, report.checked) == (2, NUM_TENSORS)
    assert report.paused_s > 0
    reply = both.serving_alike(publisher)
    model = transformers_model(both, "now")
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in reply:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert reply == ids[len(PROMPT) :]
    publisher.close()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_trainer_and_engine_have_the_same_logprobs_at_any_temperature(both: Run, temperature: float) -> None:
    """Of the distribution that was sampled from; a gap at one temperature only would be a missing division."""
    generation = asyncio.run(generate(both.publisher.servers.live[0].url, 64, temperature))
    ids = (*PROMPT, *generation.token_ids_T)
    sample = TokenSample(ids=ids, mask=(1.0,) * len(ids))
    batches = split_by_tokens([sample], micro_batch_tokens=2 * len(ids), pad_id=0, pad_multiple=1, packed=False)
    with both.actor.at_temperature(temperature):
        ((ours,), _) = both.actor.logprobs(batches)
    ((raw,), _) = both.actor.logprobs(batches)
    sampled = torch.tensor(generation.logprobs_T)
    assert (sampled - ours[0, len(PROMPT) : len(ids)]).abs().max() < 1e-4
    if temperature != 1.0:
        assert (sampled - raw[0, len(PROMPT) : len(ids)]).abs().mean() > 1e-2


@pytest.mark.parametrize("pause", ["in_place", "retract"])
def test_an_update_in_the_middle_of_a_generation(both: Run, pause: PauseMode) -> None:
    """The spans carry both versions, and each span's log-probs are those of its weights."""
    old, before = transformers_model(both, "old"), both.version
    entry = both.publisher.servers.live[0]
    publisher = both.publisher_of(pause=pause)
    generating = in_background("generating", lambda: asyncio.run(generate(entry.url, 900)))
    time.sleep(0.5)
    both.change()
    report = publisher.publish(both.version)
    generation = generating.result(60)
    new = transformers_model(both, "new")
    publisher.close()

    versions = generation.versions_T
    assert set(versions) == {before, both.version}, "the sync did not fall into the generation"
    assert 0 < report.paused_s < TIMEOUT_S
    change = versions.index(both.version)
    assert list(versions) == sorted(versions)
    assert 10 < change < len(versions) - 10
    ids = torch.tensor([[*PROMPT, *generation.token_ids_T]])
    sampled = torch.tensor(generation.logprobs_T)
    by_old = logprobs(old, ids, len(PROMPT))
    assert (sampled - by_old)[:change].abs().max() < 1e-4
    # a forward pass that was in flight at the pause counts into the later span: one token at most
    gaps = [(sampled - mixed(old, new, ids, by_old, cut, pause)).abs().max() for cut in (change, change + 1)]
    assert min(gaps) < 1e-4
    assert (sampled - by_old)[change + 1 :].abs().max() > 1e-2, "old and new weights must give different log-probs"


def mixed(
    old: torch.nn.Module, new: torch.nn.Module, ids: Tensor, by_old: Tensor, cut: int, pause: PauseMode
) -> Tensor:
    """Log-probs of all tokens if the first `cut` are the old weights' and the others the new ones'.

    After `retract` the new weights have computed the cache again. In place it is still that of the old weights, without
    the newest token, which was not run yet.
    """
    if pause == "retract":
        return torch.cat([by_old[:cut], logprobs(new, ids, len(PROMPT))[cut:]])
    first = len(PROMPT) + cut - 1
    with torch.no_grad():
        cache = old(ids[:, :first], use_cache=True).past_key_values
        logits = new(ids[:, first:], past_key_values=cache).logits
    late = logits[0, :-1].log_softmax(-1).gather(1, ids[0, first + 1 :, None])[:, 0]
    return torch.cat([by_old[:cut], late])


async def generate(url: str, tokens: int, temperature: float = 1.0) -> Generation:
    async with open_session() as session:
        client = EngineClient(session, url, stop_token_ids=[], timeout_s=60, max_concurrency=1)
        (generation,) = await client.generate(PROMPT, n=1, temperature=temperature, max_new_tokens=tokens)
    assert len(generation.token_ids_T) == tokens
    return generation


def transformers_model(run: Run, name: str) -> torch.nn.Module:
    """The trainer's weights as they are now."""
    folder: Path = run.root / f"{name}-v{run.version}"
    run.actor.save_hf(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logprobs(model: torch.nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """Of every id after the first `prompt`, float32 [ids - prompt]."""
    with torch.no_grad():
        every = model(ids).logits[0, prompt - 1 : -1].log_softmax(-1)
    return every.gather(1, ids[0, prompt:, None])[:, 0]


def test_a_paused_server_sleeps(both: Run) -> None:
    """As all are during a sync; by default SGLang's paused scheduler takes a whole core (tools/cpu_support)."""
    both.publisher.servers.pause()
    time.sleep(0.5)
    before, start = both.cpu_s("engine-0"), time.monotonic()
    time.sleep(2)
    used = (both.cpu_s("engine-0") - before) / (time.monotonic() - start)
    both.publisher.servers.resume()
    both.serving_alike()
    assert used < 0.25


def test_killed_before_a_sync(both: Run) -> None:
    both.signal("engine-1", signal.SIGKILL)
    report = both.publish()
    assert report.engines == 1
    assert [entry.name for entry in both.publisher.servers.live] == ["engine-0"]
    both.wait_until_both_are_ready()
    assert len(both.publisher.live_urls) == 1, "a restarted server is not used before it has the weights"
    report = both.publish()
    assert (report.engines, report.checked) == (2, NUM_TENSORS)
    both.serving_alike()


@pytest.mark.parametrize("first_news", ["from a server", pytest.param("from the broadcast", marks=FULL)])
def test_killed_in_the_middle_of_a_sync(
    both: Run, at_bucket: Callable[..., None], first_news: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other server is released at once, whichever thread of the trainer learns of the death first."""
    if first_news == "from the broadcast":
        monkeypatch.setattr(Attempt, "is_posted", lambda self, key: False)
    at_bucket(3, lambda flat: both.signal("engine-0", signal.SIGKILL))
    start = time.monotonic()
    report = both.publish()
    assert (report.engines, report.attempts) == (1, 2)
    assert any(server.startswith("engine-0") for server in report.lost)
    assert time.monotonic() - start < TIMEOUT_S
    (survivor,) = both.publisher.servers.live
    assert survivor.name == "engine-1"
    assert both.probe(survivor)[0] == str(both.version)
    both.wait_until_both_are_ready()
    both.publish()
    both.serving_alike()


def test_hangs_in_the_middle_of_a_sync(both: Run, at_bucket: Callable[..., None]) -> None:
    at_bucket(2, lambda flat: both.signal("engine-1", signal.SIGSTOP))
    report = both.publish()
    assert (report.engines, report.attempts) == (1, 2)
    why = next(why for server, why in report.lost.items() if "engine-1" in server)
    assert re.match(r"silent during bucket [12] of", why), "it was busy with bucket 1 or waited for bucket 2"
    both.wait_until_both_are_ready()  # the fleet has killed it and begun another life
    both.publish()
    both.serving_alike()


def test_killed_after_a_sync_the_driver_reports_it(both: Run) -> None:
    lost = both.publisher.servers.live[0]
    both.signal(lost.name, signal.SIGKILL)
    both.publisher.forget({lost.url: "gone during generate"})
    assert lost.url not in both.publisher.live_urls
    assert both.roster.condemned(lost) == "gone during generate"
    assert both.publish().engines >= 1


def test_a_flipped_bit_stops_the_run_and_the_next_sync_repairs_it(both: Run, at_bucket: Callable[..., None]) -> None:
    def flip(flat: Tensor) -> None:
        flat[100] ^= 1

    at_bucket(1, flip)
    with pytest.raises(WeightsDiffer, match=r"engine-\d .* tensor-parallel rank 0.*model\.layers\.0\."):
        both.publish()
    assert both.publisher.servers.take_lost() == {}, "wrong bytes are no reason to kill a server"
    assert both.publish().engines == 2
    both.serving_alike()


def test_no_engine_left(both: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both.publisher.servers, "_wait_s", 1.0)
    for name in ("engine-0", "engine-1"):
        both.signal(name, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(NoEngineLeft, match="none came within 1 s"):
        both.publish()
    assert time.monotonic() - start < 30
    monkeypatch.setattr(both.publisher.servers, "_wait_s", START_S)
    assert both.publish().engines >= 1  # it waits for the first one that comes back
