"""Division of samples between ranks, and into micro-batches. Pure: no megatron, no torch.distributed."""

from collab_megatron.trainer.batching.micro_batch import (
    MicroBatch,
    TokenSample,
    collate,
    idle_like,
    split_by_tokens,
    units_of,
)

__all__ = ["MicroBatch", "TokenSample", "collate", "idle_like", "split_by_tokens", "units_of"]
