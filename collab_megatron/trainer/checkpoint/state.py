"""An Actor's state as megatron's sharded state dict, for saving and loading.

Model and optimizer are sharded tensors, which load under any layout. The rest of megatron's optimizer state is not
saved: parameter groups belong to one layout, and their rates, betas and decay are in the run's config. Two numbers are
saved besides, AdamW's step and the schedule's. Random states belong to one layout too: they are restored under the same
layout and left alone under another.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.optimizer import set_learning_rates, shards_state
from collab_megatron.trainer.checkpoint.optimizer_state import OptimizerState

PROGRESS = "progress"


def layout_of(actor: Actor) -> dict[str, Any]:
    """Model, dtype and rank grid of a checkpoint, as plain JSON: some must be equal when it is loaded."""
    return {
        **grid_of(actor),
        "architecture": actor.spec.architecture,
        "num_params": actor.num_params,
        "dtype": str(actor.dtype).removeprefix("torch."),
        "optimizer": actor.optimizer is not None,
        "distributed_optimizer": actor.section is not None and shards_state(actor.section, actor.grid),
    }


def grid_of(actor: Actor) -> dict[str, Any]:
    """The part of the layout that determines which rank holds what."""
    grid = actor.grid
    return {
        "tensor": grid.tp_size,
        "pipeline": grid.pp_size,
        "interleave": len(actor.chunks),
        "context": grid.cp_size,
        "expert": grid.ep_size,
        "data": grid.dp_size,
        "device": grid.backend.name,
    }


class ShardedState:
    """A sharded state dict of `actor`, to save or to load into. Collective.

    `tree` holds the model's chunks, the optimizer and the random states under names of its own, without upstream's
    nesting, which differs between layouts. Only the sharded tensors in it reach the file.
    """

    def __init__(
        self,
        actor: Actor,
        *,
        loading: bool,
        random_states: bool,
        optimizer: bool = True,
    ) -> None:
        """optimizer: include the actor's, where it has one."""
        self._actor = actor
        actor.gather_weights()  # the last step may have left the weights sharded over the data ranks
        metadata = {"singleton_local_shards": False, "dp_cp_group": actor.grid.dp_cp_group}
        # without transformer-engine's fp8 bookkeeping: empty in fp32 and bf16, and a pickle. By type, because grouped
        # experts have _extra_state, _extra_state1, ... (megatron/core/extensions/transformer_engine.py, 0.16.1)
        chunks = {
            str(number): {
                name: entry
                for name, entry in chunk.sharded_state_dict(metadata=metadata).items()
                if not isinstance(entry, ShardedObject)
            }
            for number, chunk in enumerate(actor.chunks)
        }
        self.tree: dict[str, Any] = {"model": chunks}
        self._optimizer: OptimizerState | None = None
        if optimizer and actor.optimizer is not None:
            self._optimizer = OptimizerState(actor.optimizer, chunks, loading=loading)
            self.tree["optimizer"] = self._optimizer.leaves
        if random_states:
            self.tree["random"] = {
                name: ShardedTensor.from_rank_offsets(
                    f"random.{name}", value, (0, actor.grid.rank, actor.grid.world_size), prepend_axis_num=1
                )
                for name, value in _random_states().items()
            }

    @property
    def progress(self) -> dict[str, int]:
        """The numbers that are saved next to the tensors."""
        if self._optimizer is None or self._actor.scheduler is None:
            return {}
        return {"optimizer_steps": self._optimizer.steps, "schedule_steps": int(self._actor.scheduler.num_steps)}

    def restore(self, loaded: dict[str, Any], progress: dict[str, int]) -> None:
        """Put a loaded tree and its progress into the actor."""
        for number, chunk in enumerate(self._actor.chunks):
            missing, unexpected = chunk.load_state_dict(loaded["model"][str(number)], strict=False)
            lost = _tensors_of(chunk).intersection(missing)
            assert not lost, lost
            assert not unexpected, unexpected
        if self._optimizer is not None:
            optimizer, scheduler = self._actor.optimizer, self._actor.scheduler
            assert optimizer is not None
            assert scheduler is not None
            self._optimizer.restore(loaded.get("optimizer", {}), progress["optimizer_steps"])
            scheduler.num_steps = progress["schedule_steps"]
            set_learning_rates(optimizer, scheduler)
        if "random" in loaded:
            _restore_random(loaded["random"])


def _tensors_of(chunk: torch.nn.Module) -> set[str]:
    """Names of its parameters and buffers; a state dict may have entries of other types besides."""
    named = (*chunk.named_parameters(remove_duplicate=False), *chunk.named_buffers(remove_duplicate=False))
    return {name for name, _ in named}


def _random_states() -> dict[str, torch.Tensor]:
    """States of this rank's random generators by name, each a uint8 vector."""
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {**states, **{f"tracker.{name}": state for name, state in tracker.items()}}


def _restore_random(states: dict[str, torch.Tensor]) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    names = tracker.get_states()
    tracker.set_states({name: states[f"tracker.{name}"] for name in names})
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["cpu"])
