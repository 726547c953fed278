"""unfuse: a model that was changed for inference alone is packed again, and can be trained, saved as such, restored."""

from typing import TypeVar

from torch import nn

from ..modules.converted import Converted
from .members import planned_model

Model = TypeVar("Model", bound=nn.Module)
GRADIENTS = "stompp_gradients"
"""Where a fused model keeps the names of the parameters that wanted a gradient before."""


def unfuse(model: Model) -> Model:
    """Undo `fuse_for_inference`, in place; the model stays packed, and in eval mode. Without effect where not fused.

    Raises:
        NotBinarizedError: the model has no binary layers.
    """
    root = planned_model(model)
    for module in list(root.modules()):
        if isinstance(module, Converted):
            module.unfuse()
    wanting = root.__dict__.pop(GRADIENTS, ())
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in wanting)
    return model
