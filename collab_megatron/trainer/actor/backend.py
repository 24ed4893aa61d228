"""Backend of a rank: process groups, device, layers, fusions, optimizer; chosen once, and logged with the reason."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass

import torch

from collab_megatron.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """All differences between a CPU rank and a GPU rank."""

    name: str  # cpu | cuda
    device: torch.device
    process_group: str  # gloo | nccl
    transformer_engine: bool  # its layers; else those of local/layers.py
    gradient_fusion: bool  # weight gradients are added to the buffer inside the matmul (of transformer-engine or apex)
    overlap: bool  # gradients are reduced during the backward pass
    optimizer: str  # whose Adam megatron uses: transformer_engine | apex | torch; optimizer.cpu_offload uses torch's


def choose_backend(wanted: str, local_rank: int) -> Backend:
    """wanted: auto | cpu | cuda. Raises UserError if the machine does not have it."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise UserError(
            "parallel.device is cuda (with auto, the launcher found a GPU), but torch finds no CUDA device: install a "
            "torch built for CUDA and a matching driver, or set parallel.device=cpu to train on the CPU"
        )
    if wanted == "cpu" and has_cuda:
        raise UserError(
            "parallel.device is cpu (with auto, the launcher found no GPU), but torch finds CUDA devices: set "
            "parallel.device=cuda, or hide them with CUDA_VISIBLE_DEVICES=''"
        )
    has_te, has_apex = _has_transformer_engine(), _importable("apex")
    if not has_cuda:
        backend = Backend("cpu", torch.device("cpu"), "gloo", False, False, False, _adam())
        reason = "torch finds no CUDA device"
    else:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU, because this machine has {torch.cuda.device_count()}: start "
                "fewer ranks on it"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # transformer-engine's layers have it built in; megatron's own need this extension of apex, and the local ones
        # neither (kernels.into_rows)
        fusion = has_te or _importable("fused_weight_gradient_mlp_cuda")
        backend = Backend("cuda", device, "nccl", has_te, fusion, True, _adam())
        reason = f"CUDA is there; transformer-engine {_has(has_te)}, apex {_has(has_apex)}"
    logger.info("backend %s: %s (%s)", backend.name, _summary(backend), reason)
    return backend


def _summary(backend: Backend) -> str:
    """The backend in a few words, for the log."""
    layers = "transformer-engine's layers" if backend.transformer_engine else "megatron's local layers"
    fusion = "fused" if backend.gradient_fusion else "plain"
    return f"{backend.process_group}, {layers}, {fusion} weight gradients, Adam of {backend.optimizer}"


def _adam() -> str:
    """Asked of megatron, which tries each while it is imported: an installed package may still fail to import."""
    from megatron.core.optimizer import Adam  # here: importing it before cpu_support has run would fail without CUDA

    return str(Adam.__module__).split(".")[0]


def _has_transformer_engine() -> bool:
    """Asked of megatron too, which imports its torch part: the core wheel is found without that part (it is built for
    one version of torch), and its layers would then be stand-ins that fail when the model is built."""
    from megatron.core.extensions.transformer_engine import HAVE_TE  # here: as in _adam

    if not HAVE_TE and _importable("transformer_engine"):
        try:
            importlib.import_module("transformer_engine.pytorch")
            reason = "megatron-core does not support this version"
        except Exception as error:  # noqa: BLE001  (a library that cannot be loaded raises anything)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("transformer-engine is installed but cannot be used, so megatron's layers are: %s", reason)
    return bool(HAVE_TE)


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _has(there: bool) -> str:
    return "installed" if there else "not installed"
