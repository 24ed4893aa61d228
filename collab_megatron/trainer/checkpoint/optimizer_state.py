"""Optimizer state as megatron's sharded tensors, for saving and loading.

One file format for both kinds of optimizer: each parameter has exp_avg, exp_avg_sq and, in bf16, a master weight
`fp32_param`, all in the parameter's shape. A plain optimizer holds them whole, and upstream describes them. A
distributed one holds flat ranges of them. Upstream gathers these on every data rank before it saves; here every data
rank writes and reads its own ranges as boxes, without a collective or a copy.
Upstream: megatron/core/optimizer/distrib_optimizer.py (0.16.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from collab_megatron.trainer.actor.optimizer import parts
from collab_megatron.trainer.checkpoint.flat_range import boxes_of_range
from collab_megatron.trainer.local.cpu_support import create_empty_adam_state

_STATE = "optimizer.state."
_MASTER = "fp32_param"  # upstream's name for a plain optimizer


class OptimizerState:
    """The sharded tensors (leaves) to save, or to load into."""

    def __init__(self, optimizer: Any, chunks: dict[str, Any], *, loading: bool) -> None:
        """chunks: the model's sharded state."""
        create_empty_adam_state(optimizer)
        self._optimizer = optimizer
        self._whole: dict[str, tuple[Any, Any]] = {}  # part -> (optimizer, upstream's state dict)
        self.leaves: dict[str, ShardedBase] = {}
        for number, part in enumerate(parts(optimizer)):
            if part.optimizer is None:  # no parameters of its kind on this rank
                continue
            if isinstance(part, DistributedOptimizer):
                found: Iterator[ShardedBase] = _owned_boxes(part, chunks)
            else:
                state = part.sharded_state_dict(chunks, is_loading=loading)
                self._whole[str(number)] = part, state
                found = (leaf for _, _, leaf in _sharded(state))
            self.leaves |= {f"{number}.{place}": leaf for place, leaf in enumerate(found)}

    @property
    def steps(self) -> int:
        """Steps that AdamW has taken."""
        counts = [0]
        for each in self._adams():
            # never both: upstream also leaves a stale step in the groups of torch's AdamW
            holders = each.state.values() if _counts_per_parameter(each) else each.param_groups
            counts += [int(holder["step"]) for holder in holders if "step" in holder]
        return max(counts)

    def restore(self, loaded: dict[str, Any], steps: int) -> None:
        """Put the loaded leaves into the optimizer; those of a distributed one were read in place."""
        for number, (part, state) in self._whole.items():
            for place, (container, key, _) in enumerate(list(_sharded(state))):
                container[key] = loaded[f"{number}.{place}"]
                if key == "exp_avg" and _counts_per_parameter(part.optimizer):
                    container["step"] = torch.tensor(float(steps))  # torch does not load a state without it
            for container, key, leaf in list(nested_items_iter(state)):
                if isinstance(leaf, LocalNonpersistentObject):
                    container[key] = leaf.unwrap()
            part.load_state_dict(state)
        for each in self._adams():
            _set_steps(each, steps)

    def _adams(self) -> list[torch.optim.Optimizer]:
        return [part.optimizer for part in parts(self._optimizer) if part.optimizer is not None]


def _owned_boxes(part: DistributedOptimizer, chunks: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The parts that this data rank holds, as views of the live tensors."""
    if not part.optimizer.state:  # transformer-engine's AdamW before its first step
        part.load_state_dict(part.state_dict())
        for state in part.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
    described = {id(leaf.data): leaf for leaf in nested_values(chunks)}
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    held = dict(part._get_main_param_and_optimizer_states(parameter))
                    held.pop("step", None)
                    master = held.pop("param")
                    if parameter.dtype != torch.float32:  # else it is the model's weight itself
                        held[_MASTER] = master
                    start = ranges["param"].start
                    for kind, flat in held.items():
                        yield from _boxes(f"{_STATE}{kind}.", described[id(parameter)], flat.detach(), start)


def _boxes(prefix: str, parameter: Any, flat: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """Elements [start, start + len(flat)) of a tensor that is sharded as `parameter` is, in boxes."""
    for whole, at in _regular_parts(parameter):
        low, high = max(start, at), min(start + len(flat), at + whole.data.numel())
        rows = whole.global_offset[whole.prepend_axis_num :]
        for box in boxes_of_range(whole.local_shape, low - at, high - at):
            begin = at + box.start - start
            shape = (1,) * whole.prepend_axis_num + box.shape
            yield ShardedTensor(
                key=prefix + whole.key,
                data=flat[begin : begin + box.numel].view(shape),
                dtype=flat.dtype,
                local_shape=shape,
                global_shape=whole.global_shape,
                global_offset=(
                    *whole.global_offset[: whole.prepend_axis_num],
                    *(base + inside for base, inside in zip(rows, box.offset, strict=True)),
                ),
                axis_fragmentations=None,
                # (pipeline copy, tensor copy, data copy): no two data ranks hold the same elements
                replica_id=(*whole.replica_id[:2], 0),
                allow_shape_mismatch=whole.allow_shape_mismatch,
            )


def _regular_parts(parameter: Any) -> Iterator[tuple[ShardedTensor, int]]:
    """The sharded tensors of a parameter (two for a gated projection), and the first element of each in it."""
    if not isinstance(parameter, ShardedTensorFactory):
        yield parameter, 0
        return
    positions = torch.arange(parameter.data.numel()).view(parameter.data.shape)
    numbered = parameter.build_fn(parameter.key, positions, parameter.replica_id, None)
    for one in nested_values(numbered):
        at = int(one.data.flatten()[0])
        assert torch.equal(one.data.flatten(), torch.arange(at, at + one.data.numel())), one
        yield one, at


def _sharded(state: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(the dict or list that holds it, its key there, the sharded leaf), in upstream's order."""
    for container, key, leaf in nested_items_iter(state):
        if isinstance(leaf, ShardedBase):
            yield container, key, leaf


def _counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether steps are counted per parameter, as torch's AdamW does; transformer-engine's counts per group."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)


def _set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    of_torch = _counts_per_parameter(optimizer)
    for group in optimizer.param_groups:
        if not of_torch and steps:
            group["step"] = steps
        for parameter in group["params"] if of_torch else ():
            if state := optimizer.state.get(parameter):
                # one tensor per parameter: a shared one would be incremented once per parameter
                on = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                state["step"] = torch.tensor(float(steps), device=on)
