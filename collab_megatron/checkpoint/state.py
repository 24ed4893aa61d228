"""What a checkpoint holds of an Actor, as megatron's sharded state dict, and how it is put back.

Model and optimizer are sharded tensors, which load under any layout. Of everything else in megatron's optimizer state
nothing is kept: parameter groups belong to a rank of one layout, and what they say (rates, betas, decay) the config of
the run says too. What remains are two numbers, AdamW's step and the schedule's. Random states belong to a rank of one
layout as well: they are restored under the same layout and left alone under another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.dist_checkpointing.mapping import ShardedBase

from collab_megatron.actor.actor import Actor
from collab_megatron.actor.cpu_support import create_empty_adam_state
from collab_megatron.actor.optimizer import parts, set_learning_rates

PROGRESS = "progress"
_STATE = "optimizer.state."


def layout_of(actor: Actor) -> dict[str, Any]:
    """What must or may differ between saving and loading; plain JSON."""
    return {
        **grid_of(actor),
        "architecture": actor.spec.architecture,
        "num_params": actor.num_params,
        "dtype": str(actor.dtype).removeprefix("torch."),
        "optimizer": actor.optimizer is not None,
        "distributed_optimizer": bool(actor.section and actor.section.distributed),
    }


def grid_of(actor: Actor) -> dict[str, Any]:
    """The part of the layout that says which rank holds what."""
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
    """A sharded state dict of `actor`: to save, or to load into and restore from. Building it is collective.

    `tree` holds the model's chunks, the optimizer and the random states without upstream's nesting, which differs from
    layout to layout: names of ours lead to sharded tensors, and only these reach the file.
    """

    def __init__(self, actor: Actor, *, loading: bool, random_states: bool, stored: Collection[str] = ()) -> None:
        """stored: when loading, the names of the tensors that the checkpoint has."""
        self._actor = actor
        actor.gather_weights()  # the last step's weights may still lie scattered over the data ranks
        metadata = {
            # gathers optimizer shards per parameter, so that another data-parallel size can take them
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": actor.grid.dp_cp_group,
        }
        # transformer-engine's fp8 bookkeeping is left out: empty in fp32 and bf16, and a pickle
        chunks = {
            str(number): {
                name: tensor
                for name, tensor in chunk.sharded_state_dict(metadata=metadata).items()
                if not name.endswith("_extra_state")
            }
            for number, chunk in enumerate(actor.chunks)
        }
        self.tree: dict[str, Any] = {"model": chunks}
        self._optimizer: Any = None  # upstream's own state dict, whose sharded leaves the tree shares
        if actor.optimizer is not None:
            create_empty_adam_state(actor.optimizer)
            self._optimizer = actor.optimizer.sharded_state_dict(chunks, is_loading=loading, metadata=metadata)
            leaves = {name: leaf for name, _, _, leaf in _sharded_leaves(self._optimizer)}
            self.tree["optimizer"] = _as_stored(leaves, stored) if loading else leaves
        if random_states:
            self.tree["random"] = {
                name: ShardedTensor.from_rank_offsets(
                    f"random.{name}", value, (0, actor.grid.rank, actor.grid.world_size), prepend_axis_num=1
                )
                for name, value in _random_states().items()
            }

    @property
    def progress(self) -> dict[str, int]:
        """The numbers beside the tensors."""
        if self._actor.optimizer is None or self._actor.scheduler is None:
            return {}
        return {
            "optimizer_steps": _adam_steps(self._actor.optimizer),
            "schedule_steps": int(self._actor.scheduler.num_steps),
        }

    def restore(self, loaded: dict[str, Any], progress: dict[str, int]) -> None:
        """Put a loaded tree into the actor, with the progress that was saved beside it."""
        model = [loaded["model"][str(number)] for number, _ in enumerate(self._actor.chunks)]
        optimizer, scheduler = self._actor.optimizer, self._actor.scheduler
        if optimizer is not None and scheduler is not None:
            leaves = list(_sharded_leaves(self._optimizer))
            if len(loaded["optimizer"]) < len(leaves):
                # no master weights there: upstream writes zeros through those of ours, which share the model's memory
                model = [{name: tensor.clone() for name, tensor in chunk.items()} for chunk in model]
            counts = all(map(_counts_per_parameter, _torch_optimizers(optimizer)))
            for name, container, key, leaf in leaves:
                container[key] = loaded["optimizer"].get(name, leaf.data)
                if key == "exp_avg" and counts:  # torch does not load a state without its step
                    container["step"] = torch.tensor(float(progress["optimizer_steps"]))
            for container, key, leaf in list(nested_items_iter(self._optimizer)):
                if isinstance(leaf, LocalNonpersistentObject):
                    container[key] = leaf.unwrap()
            optimizer.load_state_dict(self._optimizer)
            _set_adam_steps(optimizer, progress["optimizer_steps"])
            scheduler.num_steps = progress["schedule_steps"]
            set_learning_rates(optimizer, scheduler)
        for chunk, tensors in zip(self._actor.chunks, model, strict=True):
            missing, unexpected = chunk.load_state_dict(tensors, strict=False)
            lost = [name for name in missing if not name.endswith("_extra_state")]
            assert not lost, lost
            assert not unexpected, unexpected
        if "random" in loaded:
            _restore_random(loaded["random"])


def sharded_state(actor: Actor, *, loading: bool, random_states: bool) -> dict[str, Any]:
    """The tree alone, for who only looks at what a checkpoint of this actor holds."""
    return ShardedState(actor, loading=loading, random_states=random_states).tree


def progress_in(common: dict[str, Any]) -> dict[str, int]:
    """The numbers in a checkpoint's common part; format 1 kept them inside upstream's own state."""
    if PROGRESS in common or "scheduler" not in common:
        return dict(common.get(PROGRESS, {}))
    steps = [
        int(leaf) for _, key, leaf in nested_items_iter(common.get("optimizer", {})) if key in ("step", "common_step")
    ]
    return {"optimizer_steps": max(steps, default=0), "schedule_steps": int(common["scheduler"]["num_steps"])}


def _as_stored(leaves: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """The optimizer's leaves under the names that the checkpoint has, whichever kind of optimizer wrote it.

    Master weights are `param` to the distributed optimizer and `fp32_param` to the other, which in fp32 has none: then
    they are the model's weights, and left out here.
    """
    masters = [kind for kind in ("param", "fp32_param") if any(name.startswith(_STATE + kind) for name in stored)]
    found = {}
    for name, leaf in leaves.items():
        kind, _, rest = leaf.key.removeprefix(_STATE).partition(".")
        if kind not in ("param", "fp32_param"):
            found[name] = leaf
        elif masters:
            found[name] = replace(leaf, key=f"{_STATE}{masters[0]}.{rest}")
    return found


def _sharded_leaves(tree: Any) -> Iterator[tuple[str, Any, Any, ShardedBase]]:
    """(a name of ours, the dict or list that holds it, its key there, the leaf), in upstream's order."""
    sharded = ((c, key, leaf) for c, key, leaf in nested_items_iter(tree) if isinstance(leaf, ShardedBase))
    for number, (container, key, leaf) in enumerate(sharded):
        yield str(number), container, key, leaf


def _torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Those that step, one a part; a part without parameters on this rank has none."""
    return [part.optimizer for part in parts(optimizer) if part.optimizer is not None]


def _counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """As torch's own AdamW does; transformer-engine's counts per parameter group."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)


def _adam_steps(optimizer: Any) -> int:
    """Steps that AdamW has done."""
    counts = [0]
    for each in _torch_optimizers(optimizer):
        # never both: upstream leaves a stale step in the groups of torch's, too
        holders = each.state.values() if _counts_per_parameter(each) else each.param_groups
        counts += [int(holder["step"]) for holder in holders if "step" in holder]
    return max(counts)


def _set_adam_steps(optimizer: Any, steps: int) -> None:
    for each in _torch_optimizers(optimizer):
        of_torch = _counts_per_parameter(each)
        for group in each.param_groups:
            if not of_torch and steps:
                group["step"] = steps
            for parameter in group["params"] if of_torch else ():
                if state := each.state.get(parameter):
                    # a tensor for each: where upstream lets them share one, AdamW counts it up once a parameter
                    on = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                    state["step"] = torch.tensor(float(steps), device=on)


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
