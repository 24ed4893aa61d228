"""Stands in for `sgl_kernel` in an SGLang server on CPU: the names that SGLang 0.5.23 imports there.

They have no implementation: all belong to speculative decoding and its moves of the KV cache, which a plain server
never calls. No `torch.ops.sgl_kernel` operator is registered, on purpose: SGLang looks for `convert_weight_packed`
there, does not find it, and uses its own PyTorch code for every layer.
"""

from collections.abc import Callable
from typing import NoReturn

__version__ = "0+cpu.standin"


def _absent(name: str) -> Callable[..., NoReturn]:
    def raise_not_built(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} has no CPU build here (tools/cpu_support stands in for it): "
            "start the server without speculative decoding"
        )

    raise_not_built.__name__ = name
    return raise_not_built


# sglang/kernels/ops/kvcache/cache_move.py
copy_all_layer_kv_cache_cpu = _absent("copy_all_layer_kv_cache_cpu")
# sglang/srt/mem_cache/allocation.py
assign_req_to_token_pool_cpu = _absent("assign_req_to_token_pool_cpu")
# sglang/kernels/ops/speculative/cache_locs.py
assign_draft_cache_locs_contiguous_cpu = _absent("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _absent("assign_extend_cache_locs_cpu")
# sglang/kernels/ops/speculative/eagle.py
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _absent("fill_bonus_tokens_cpu")
# sglang/kernels/ops/speculative/multi_layer_eagle.py
rotate_input_ids_cpu = _absent("rotate_input_ids_cpu")
# sglang/kernels/ops/speculative/spec_tree.py
build_tree_kernel_efficient_cpu = _absent("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _absent("verify_tree_greedy_cpu")
