"""tools/cpu_support's attention against SGLang's own loops, its sampling against the distribution."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "tools" / "cpu_support" / "src"

# in a process of its own: importing SGLang changes much of torch
COMPARE = """
import torch
from sglang.srt.layers import sampler
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang_cpu_support import sampling
from sglang_cpu_support.attention import BatchedAttention, parts_of
from sglang_cpu_support.plugin import register

kept = [sampler.sampling_from_probs_torch]  # hooks replace every name of it, here too
register()
assert "sglang_cpu_support" in attention_registry.ATTENTION_BACKENDS["torch_native"].__module__

torch.manual_seed(1)
heads, shared, size, slots = 6, 2, 16, 512
def compare(lengths, new):
    keys, values = torch.randn(2, slots, shared, size)
    pools = torch.randperm(len(lengths) + 2)[: len(lengths)]
    table = torch.randint(1, slots, (len(lengths) + 2, 128), dtype=torch.int32)
    ours, theirs = object.__new__(BatchedAttention), object.__new__(TorchNativeAttnBackend)
    ends = torch.tensor(lengths)
    query = torch.randn(sum(new) if new else len(lengths), heads, size)
    def run(backend):
        out = torch.empty_like(query)
        common = dict(scaling=0.3, enable_gqa=True)
        if new:
            added = torch.tensor(new)
            backend._run_sdpa_forward_extend(
                query, out, keys, values, table, pools, ends, ends - added, added, causal=True, **common)
        else:
            backend._run_sdpa_forward_decode(query, out, keys, values, table, pools, ends, **common)
        return out
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-5, atol=1e-6)

compare([5], [])
compare([40, 41, 39, 40], [])
compare([1, 100, 3, 90, 2, 8], [])  # in parts of like length
compare([7, 30, 12], [7, 1, 5])  # a whole prompt, one token, a turn after a cached prefix
table, pools = torch.ones(6, 128, dtype=torch.int32), torch.arange(6)
parts = parts_of(table, pools, torch.tensor([1, 100, 3, 90, 2, 8]))
assert len(parts) > 1 and sorted(r for rows, _, _ in parts for r in rows.tolist()) == list(range(6)), parts
assert all(slots.numel() <= 2 * int(seen.sum()) for _, slots, seen in parts)  # padding: at most half
assert len(parts_of(table, pools[:3], torch.tensor([9, 9, 8]))) == 1

from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
assert sampler.sampling_from_probs_torch is not kept[0]
probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
ids = sampler.sampling_from_probs_torch(probs.expand(100_000, 6), sampling_seed=None, positions=torch.zeros(100_000))
assert ids.shape == (100_000,) and ids.dtype == torch.int32
shares = torch.bincount(ids.long(), minlength=6) / 100_000
assert shares[probs == 0].sum() == 0, shares
torch.testing.assert_close(shares, probs, atol=0.01, rtol=0)  # six standard errors
def theirs(probs, *, sampling_seed, positions):
    return "asked", sampling_seed, positions
assert sampling.around_sampling(theirs, probs, sampling_seed=7, positions=3) == ("asked", 7, 3)
print("same")
"""


@pytest.mark.slow
def test_one_call_for_all_sequences_gives_the_numbers_of_sglangs_loop() -> None:
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(SOURCE)}
    ran = subprocess.run(
        [sys.executable, "-c", COMPARE], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split()[-1] == "same"
