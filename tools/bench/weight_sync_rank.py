"""A trainer rank of tools/bench/weight_sync.py, which starts it: syncs and floors in turns, rows into FOLDER/rows.json.

python tools/bench/weight_sync_rank.py FOLDER  (reads FOLDER/job.json; RANK and the like from the environment)
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from collab_megatron.config.sections import EngineSection, ParallelSection, SyncSection
from collab_megatron.errors import run_cli
from collab_megatron.files import publish_json

if TYPE_CHECKING:
    from torch import Tensor

    from collab_megatron.trainer.actor.actor import Actor
    from collab_megatron.trainer.sync.publisher import Publisher, SyncReport

MESSAGE_BYTES = 256 * 2**20  # of a floor
RENDEZVOUS = timedelta(seconds=600)
PROBE_IDS = (1, 2)  # as short as possible: the cost of the probe prompt is not part of the sync


@dataclass(frozen=True)
class Job:
    """What the parent asks for."""

    transports: list[Literal["broadcast", "ipc", "disk"]]
    model: str
    dtype: Literal["float32", "bfloat16"]
    folder: str  # with the roster, and for everything that is written
    tensor: int
    pipeline: int
    engine_tensor: int
    placement: Literal["disaggregated", "colocated"]
    bucket_mb: int | None
    repeats: int
    timeout_s: float


@dataclass(frozen=True)
class SyncRow:
    transport: str
    bytes: int  # of weights
    seconds: float
    floor_seconds: float
    ratio: float
    peak_extra_bytes: int
    gbytes_per_s: float
    tensors: int  # Hugging Face tensors
    bucket_mb: float
    dtype: str
    device: str
    trainer_tensor: int
    trainer_pipeline: int
    engine_tensor: int
    repeats: int
    median_seconds: float
    median_floor_seconds: float
    paused_s: float  # of the fastest sync: no token was produced
    publish_seconds: float  # of the fastest sync: with the probe prompt
    verified_seconds: float  # a sync with the checksums of all tensors
    checked: int  # engine tensors whose checksums were compared there


@dataclass(frozen=True)
class Sample:
    """One sync."""

    seconds: float
    report: SyncReport
    peak_extra_bytes: int


def main() -> None:
    import torch

    from collab_megatron.trainer.actor.actor import Actor
    from collab_megatron.trainer.actor.grid import close_grid, init_grid

    folder = Path(sys.argv[1])
    job = Job(**json.loads((folder / "job.json").read_text()))
    grid = init_grid(ParallelSection(tensor=job.tensor, pipeline=job.pipeline), seed=1)
    actor = Actor.build(job.model, dtype=job.dtype, grid=grid, optimizer=None)
    with torch.no_grad():
        for chunk in actor.chunks:
            for weight in chunk.parameters():
                weight.mul_(1.0625)  # different from the server's, so that their arrival is proved, too
    rows = [asdict(measure(job, transport, actor)) for transport in job.transports]
    if grid.is_main:
        publish_json(folder / "rows.json", rows)
    close_grid()


def measure(job: Job, transport: Literal["broadcast", "ipc", "disk"], actor: Actor) -> SyncRow:
    """Collective over the trainer's ranks; what rank 0 returns counts."""
    grid, plan = actor.grid, actor.tensor_plan()
    num_bytes = sum(tensor.num_bytes for tensor in plan)
    before = memory()
    publisher = make_publisher(job, transport, actor, verify_every=1)
    first = take(publisher, 0, before)
    checked = take(publisher, 1, before)
    publisher.close()
    del publisher
    publisher = make_publisher(job, transport, actor, verify_every=0)
    floor = make_floor(job, transport, actor, num_bytes) if grid.is_main else lambda: 1.0
    floors, samples = [], []
    for turn in range(job.repeats + 1):  # the first of each makes groups and warms buffers
        floors.append(floor())
        samples.append(take(publisher, 2 + turn, before))
    publisher.close()
    floors, samples = floors[1:], samples[1:]
    best = min(samples, key=lambda sample: sample.seconds)
    return SyncRow(
        transport=transport,
        bytes=num_bytes,
        seconds=best.seconds,
        floor_seconds=min(floors),
        ratio=best.seconds / min(floors),
        peak_extra_bytes=max(first.peak_extra_bytes, checked.peak_extra_bytes),  # the floor's buffers come later
        gbytes_per_s=num_bytes / best.seconds / 1e9,
        tensors=len(plan),
        bucket_mb=SyncSection(bucket_mb=job.bucket_mb).bucket_mb_on(grid.device.type),
        dtype=job.dtype,
        device=grid.device.type,
        trainer_tensor=job.tensor,
        trainer_pipeline=job.pipeline,
        engine_tensor=job.engine_tensor,
        repeats=job.repeats,
        median_seconds=statistics.median(sample.seconds for sample in samples),
        median_floor_seconds=statistics.median(floors),
        paused_s=best.report.paused_s,
        publish_seconds=best.report.seconds,
        verified_seconds=checked.seconds,
        checked=checked.report.checked,
    )


class TimedTransport:
    """A transport that reports how long it took: a whole publish has the probe prompt, too, which is no transfer."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.close = transport.close
        self.seconds = 0.0

    def deliver(self, *args: Any) -> None:
        start = time.monotonic()
        self._transport.deliver(*args)
        self.seconds = time.monotonic() - start


def make_publisher(
    job: Job, transport: Literal["broadcast", "ipc", "disk"], actor: Actor, *, verify_every: int
) -> Publisher:
    from collab_megatron.trainer.sync.publisher import Publisher

    folder = Path(job.folder)
    publisher = Publisher(
        actor,
        roster=folder / "roster",
        engine=EngineSection(placement=job.placement, tensor=job.engine_tensor),
        sync=SyncSection(
            transport=transport,
            bucket_mb=job.bucket_mb,
            timeout_s=job.timeout_s,
            disk_dir=folder / f"weights-{verify_every}",
            verify_every=verify_every,
            max_probe_gap=1.0,  # random weights; the checksums are the proof here
        ),
        probe_ids=PROBE_IDS,
        weights_dir=folder / "weights",
    )
    publisher._transport = TimedTransport(publisher._transport)  # only a benchmark wants that
    return publisher


def take(publisher: Publisher, version: int, before: int) -> Sample:
    """One sync. Collective; the memory is that of the worst rank over `before` the publisher was made, the seconds are
    rank 0's."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak
    report = publisher.publish(version)
    extra = (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before
    every = [0] * dist.get_world_size()
    dist.all_gather_object(every, max(extra, 0))
    timed_transport: Any = publisher._transport
    return Sample(timed_transport.seconds + report.proof_s, report, max(every))


def memory() -> int:
    """Bytes that this process holds: on the GPU, or resident."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else resident("VmRSS")


def resident(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory: now, or at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:"))


def make_floor(
    job: Job, transport: Literal["broadcast", "ipc", "disk"], actor: Actor, num_bytes: int
) -> Callable[[], float]:
    """What measures the least that `num_bytes` can cost, in seconds; its first call warms it up."""
    import torch

    from collab_megatron.files import fsync_folder

    # as large as the weights: a smaller one, used again and again, would stay in the processor's cache
    source = torch.ones(num_bytes, dtype=torch.uint8, device=actor.grid.device)
    if transport == "broadcast":
        return timed(broadcast_floor(source, actor.grid.world_size, job.engine_tensor))
    if transport == "ipc":
        target = torch.zeros_like(source)

        def copy() -> None:
            target.copy_(source)

        return timed(copy)
    folder = Path(job.folder) / "floor"
    folder.mkdir()
    data = memoryview(source.cpu().numpy().data)

    def write() -> None:
        with (folder / "weights").open("wb") as stream:
            stream.write(data)
        fsync_folder(folder)

    def write_new_file() -> float:
        (folder / "weights").unlink(missing_ok=True)
        return timed(write)()

    return write_new_file


def timed(action: Callable[[], None]) -> Callable[[], float]:
    import torch

    def run() -> float:
        start = time.monotonic()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - start

    return run


def broadcast_floor(source: Tensor, first_gpu: int, receivers: int) -> Callable[[], None]:
    """Starts the receivers, which end with us."""
    from collab_megatron.trainer.actor.rendezvous import listening_store

    store = listening_store("127.0.0.1", 0, timeout=RENDEZVOUS)
    world_size = receivers + 1
    for rank in range(1, world_size):
        gpu = first_gpu + rank - 1 if source.is_cuda else None
        arguments = (store.port, rank, world_size, gpu, source.numel())
        multiprocessing.get_context("spawn").Process(target=receive, args=arguments, daemon=True).start()
    group = floor_group(store, 0, world_size, on_gpu=source.is_cuda)

    def send() -> None:
        send_all(group, source)

    return send


def receive(port: int, rank: int, world_size: int, gpu: int | None, num_bytes: int) -> None:
    """A receiver of the broadcast floor, until its parent ends."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    target = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=RENDEZVOUS)
    group = floor_group(store, rank, world_size, on_gpu=gpu is not None)
    try:
        while True:
            send_all(group, target)
    except RuntimeError:
        return  # the sender has left


def send_all(group: Any, flat: Tensor) -> None:
    for message in flat.split(MESSAGE_BYTES):
        group.broadcast(message, 0).wait()
    group.barrier().wait()  # a sender may be done before the last byte has arrived


def floor_group(store: Any, rank: int, world_size: int, *, on_gpu: bool) -> Any:
    """A group that no other group knows of."""
    import torch.distributed as dist

    if on_gpu:
        return dist.ProcessGroupNCCL(store, rank, world_size, dist.ProcessGroupNCCL.Options())
    return dist.ProcessGroupGloo(store, rank, world_size, RENDEZVOUS)


if __name__ == "__main__":
    run_cli(main)
