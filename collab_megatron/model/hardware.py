"""What the time model (launch/step_time.py) knows about a device: FLOP/s, bandwidths, latencies, and which share of
them real kernels reach. Pure.

Peaks are from NVIDIA's data sheets. The shares and latencies of GPUs are assumptions of the usual size, because this
project has not measured them; `from_probe` makes the row of a CPU from what tools/plan_run.py measures on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from collab_megatron.errors import UserError
from collab_megatron.model.flops import peak_flops


@dataclass(frozen=True)
class Hardware:
    """One device (a GPU, or the cores of a CPU machine) and its connections. Rates in units per second."""

    name: str
    flops: float  # peak of matrix products in the model's dtype
    memory: float  # bytes of device memory
    link: float  # bytes between two devices of a node, in one direction
    network: float  # bytes between two nodes, of one device, in one direction
    disk: float  # bytes
    gemm_share: float  # of `flops`, in matrix products of many tokens
    decode_share: float  # of `flops`, in matrix products of one token of each running request
    memory_share: float  # of `memory`
    engine_share: float  # of an engine's round that is spent in the model; the rest is sampling and small kernels
    round_s: float  # per round of the engine, whatever the model: scheduler, launches
    hop_s: float  # latency of a collective inside a node
    far_hop_s: float  # of one between nodes
    sync_s: float  # of a weight sync: pause, begin, end, flush, probe
    sync_share: float  # of `network` or `link`, in a weight sync
    checksums: float  # bytes of weights whose checksums are compared
    shares_device: bool = False  # all ranks of trainer and engines together have one such device, as on a CPU

    def scaled(self, devices: int) -> float:
        """Factor on the rates of `devices` ranks."""
        return 1.0 if self.shares_device else float(devices)


_GPU = {
    "disk": 2e9,
    "gemm_share": 0.55,
    "decode_share": 0.4,
    "memory_share": 0.75,
    "engine_share": 0.85,
    "round_s": 0.002,
    "hop_s": 15e-6,
    "far_hop_s": 40e-6,
    "sync_s": 0.5,
    "sync_share": 0.3,
    "checksums": 100e9,
}
GPUS: dict[str, dict[str, float]] = {
    # memory: HBM3, HBM3e, HBM3e, HBM2e. link: NVLink, half of the data sheet's sum of both directions. network: one
    # 400 Gb/s (A100: 200 Gb/s) adapter for each GPU
    "H100": {"memory": 3.35e12, "link": 450e9, "network": 50e9},
    "H200": {"memory": 4.8e12, "link": 450e9, "network": 50e9},
    "B200": {"memory": 8.0e12, "link": 900e9, "network": 50e9},
    "A100": {"memory": 2.0e12, "link": 300e9, "network": 25e9},
}


def gpu(name: str) -> Hardware:
    """A GPU by name. Raises UserError for an unknown one."""
    row, peak = GPUS.get(name.upper()), peak_flops(name.upper())
    if row is None or peak is None:
        raise UserError(f"--device {name[:40]} is not known: it may be {', '.join(GPUS)} or cpu")
    return Hardware(name=name.upper(), flops=peak, shares_device=False, **row, **_GPU)


def from_probe(*, flops: float, memory: float) -> Hardware:
    """A CPU machine from two measured rates: FLOP/s of fp32 matrix products, bytes per second through memory.

    The other figures are of docs/benchmarks.md: an engine's round takes 11 ms for a model of 1.3 M parameters, of which
    some 8 do not depend on the model; 56 % of a round of a model of 135 M are matrix products; gloo over loopback moves
    2.3 GB/s; the checksums of its 538 MB take 1 s."""
    return Hardware(
        name="cpu",
        flops=flops,
        memory=memory,
        link=2.3e9,
        network=1e9,
        disk=1.2e9,
        gemm_share=1.0,
        decode_share=1.0,
        memory_share=1.0,
        engine_share=0.56,
        round_s=0.008,
        hop_s=2e-4,
        far_hop_s=5e-4,
        sync_s=0.05,
        sync_share=1.0,
        checksums=0.5e9,
        shares_device=True,
    )
