"""Makes torchvision importable beside a CPU build of torch, for the tests marked timm; import it before transformers.

The published wheels of torchvision are compiled for the CUDA build. Beside the CPU build their compiled operators do
not load, and a declaration of two of them is all that the Python part needs; nothing here ever calls them.
"""

import importlib.util

import torch

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
