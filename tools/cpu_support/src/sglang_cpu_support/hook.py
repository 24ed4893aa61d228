"""The import hooks that `sglang_cpu_support.pth` installs when an interpreter starts.

Two finders, both idle until their import:
- TorchvisionOperators, in front: where torchvision's compiled part could not be loaded, declares the operators that its
  Python part decorates.
- SglKernelStandIn, at the end: finds `sgl_kernel` only if no other finder does.
This file imports only importlib, because every interpreter of the environment runs it at its start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType
from typing import Any

# torchvision/__init__.py first tries to load its compiled part (and ignores a failure), then imports these two
_DECORATES_OPERATORS = ("torchvision._autograd_registrations", "torchvision._meta_registrations")
_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_libraries: list[Any] = []  # torch removes a library's operators when the object is collected


class TorchvisionOperators(MetaPathFinder):
    """Declares torchvision::nms and ::qnms (no kernels: a call raises) unless torchvision registered its own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _DECORATES_OPERATORS and not _libraries:
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                library = torch.library.Library("torchvision", "FRAGMENT")
                library.define("nms" + _NMS)
                library.define("qnms" + _NMS)
                _libraries.append(library)
        return None  # the module itself is found by the usual finders


class SglKernelStandIn(MetaPathFinder):
    """Finds the stand-in for `sgl_kernel`, only in a process with SGLANG_USE_CPU_ENGINE=1."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "sgl_kernel" or os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
            return None
        standin = find_spec("sglang_cpu_support.sgl_kernel_standin")
        assert standin is not None
        assert standin.origin is not None
        return spec_from_file_location(fullname, standin.origin)


def install() -> None:
    """Put both finders in place, once."""
    if not any(isinstance(finder, SglKernelStandIn) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionOperators())
        sys.meta_path.append(SglKernelStandIn())
