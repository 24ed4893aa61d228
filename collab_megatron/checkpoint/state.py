"""What a checkpoint holds of an Actor, as megatron's sharded state dict, and how it is put back.

Model and optimizer are sharded tensors, which load under any tensor- and data-parallel size. Random states belong to a
rank of one layout: they are restored under the same layout and left alone under another.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor

from collab_megatron.actor.actor import Actor
from collab_megatron.actor.cpu_support import create_empty_adam_state
from collab_megatron.actor.optimizer import parts, set_learning_rates


def layout_of(actor: Actor) -> dict[str, Any]:
    """What must or may differ between saving and loading; plain JSON."""
    return {
        "tensor": actor.grid.tp_size,
        "data": actor.grid.dp_size,
        "device": actor.grid.backend.name,
        "architecture": actor.spec.architecture,
        "num_params": actor.num_params,
        "dtype": str(actor.dtype).removeprefix("torch."),
        "optimizer": actor.optimizer is not None,
        "distributed_optimizer": bool(actor.section and actor.section.distributed),
    }


def sharded_state(actor: Actor, *, loading: bool, random_states: bool) -> dict[str, Any]:
    """The state dict to save, or to load into. A frozen actor has only its weights."""
    metadata = {
        # gathers optimizer shards per parameter, so that another data-parallel size can take them
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": actor.grid.dp_group,
    }
    model = actor.chunks[0].sharded_state_dict(metadata=metadata)
    # transformer-engine's fp8 bookkeeping: empty in fp32 and bf16, and a pickle
    model = {name: tensor for name, tensor in model.items() if not name.endswith("_extra_state")}
    state: dict[str, Any] = {"model": model}
    if actor.optimizer is not None and actor.scheduler is not None:
        create_empty_adam_state(actor.optimizer)
        state["optimizer"] = actor.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        if not loading:
            state["scheduler"] = actor.scheduler.state_dict()
    if random_states:
        state["random"] = {
            name: ShardedTensor.from_rank_offsets(
                f"random.{name}", value, (0, actor.grid.rank, actor.grid.world_size), prepend_axis_num=1
            )
            for name, value in _random_states().items()
        }
    return state


def restore(actor: Actor, state: dict[str, Any]) -> None:
    """Put a loaded state dict into the actor."""
    missing, unexpected = actor.chunks[0].load_state_dict(state["model"], strict=False)
    lost = [name for name in missing if not name.endswith("_extra_state")]
    assert not lost, lost
    assert not unexpected, unexpected
    if actor.optimizer is not None and actor.scheduler is not None:
        _add_step_zero(actor.optimizer, state["optimizer"])
        actor.optimizer.load_state_dict(state["optimizer"])
        actor.scheduler.num_steps = int(state["scheduler"]["num_steps"])
        set_learning_rates(actor.optimizer, actor.scheduler)
    if "random" in state:
        _restore_random(state["random"])


def _add_step_zero(optimizer: Any, state: dict[str, Any]) -> None:
    """Upstream leaves AdamW's step out when it is 0 (saved before the first step) and then cannot load its own file."""
    if not all(isinstance(part.optimizer, torch.optim.AdamW) for part in parts(optimizer)):
        return
    inner = state.get("optimizer", state)
    if "state" in inner and "common_step" not in inner["state"]:
        inner["state"]["common_step"] = torch.tensor(0.0)


def _random_states() -> dict[str, torch.Tensor]:
    """This rank's generators by name, each a uint8 vector."""
    states = {"cpu": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {**states, **{f"tracker.{name}": state for name, state in tracker.items()}}


def _restore_random(states: dict[str, torch.Tensor]) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    names = tracker.get_states()
    tracker.set_states({name: states[f"tracker.{name}"] for name in names})
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["cpu"])
