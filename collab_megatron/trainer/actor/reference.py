"""Frozen reference policy (KL term, DPO): a second model, or the initial weights on the host, swapped in for use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.batching.micro_batch import MicroBatch


class SwappedReference:
    """A copy of the actor's current weights on the host, swapped into the actor for each use.

    It takes no device memory; on the host it takes two copies of this rank's shard (the frozen weights, and the actor's
    own during a swap). A swap moves the shard over the bus three times: on the way in, the frozen weight follows the
    actor's own on a second stream, because the bus has both directions. Create it before a checkpoint is loaded.
    """

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        actor.gather_weights()
        self._frozen = [_on_host(parameter) for parameter in self._parameters()]
        self._own = [torch.empty_like(kept, pin_memory=kept.is_pinned()) for kept in self._frozen]
        self._out, self._in = torch.cuda.Stream(), torch.cuda.Stream()  # on a CPU stand-ins: local/cpu_support.py

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]:
        """As Actor.logprobs, with the frozen weights. Collective over the same ranks."""
        with self._swapped_in():
            return self._actor.logprobs(micro_batches)

    @contextlib.contextmanager
    @torch.no_grad()
    def _swapped_in(self) -> Iterator[None]:
        self._actor.gather_weights()
        compute = torch.cuda.current_stream()
        self._out.wait_stream(compute)
        for parameter, own, frozen in zip(self._parameters(), self._own, self._frozen, strict=True):
            with torch.cuda.stream(self._out):
                own.copy_(parameter, non_blocking=True)
            self._in.wait_event(self._out.record_event())
            with torch.cuda.stream(self._in):
                parameter.copy_(frozen, non_blocking=True)
        compute.wait_stream(self._in)
        try:
            yield
        finally:  # behind the copies above: the compute stream has waited for them
            for parameter, own in zip(self._parameters(), self._own, strict=True):
                parameter.copy_(own, non_blocking=True)

    def _parameters(self) -> list[Tensor]:
        return [parameter for chunk in self._actor.chunks for parameter in chunk.parameters()]


def _on_host(parameter: Tensor) -> Tensor:
    kept = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
    return kept.copy_(parameter.detach())


def build_reference(actor: Actor, kind: Literal["model", "swap"], *, logits_chunk_mb: int) -> Actor | SwappedReference:
    """The weights of the actor's source folder; with "swap" the actor's current ones, so before a checkpoint is loaded
    (algorithm.reference, dpo.reference)."""
    if kind == "swap":
        return SwappedReference(actor)
    dtype: Literal["float32", "bfloat16"] = "float32" if actor.dtype == torch.float32 else "bfloat16"
    folder, grid = actor.source_folder, actor.grid
    return Actor.build(
        folder,
        dtype=dtype,
        grid=grid,
        optimizer=None,
        logits_chunk_mb=logits_chunk_mb,
        temperature=actor.temperature,
    )
