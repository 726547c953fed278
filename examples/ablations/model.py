"""The networks of the grid: residual nets from transformers' config, with a small-image stem."""

import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

sys.path.append(str(Path(__file__).resolve().parent.parent))
from grid import Cell, Recipe
from small_images import SmallImageResNetConfig, SmallImageResNetForImageClassification

STANDARD = {
    18: {"layer_type": "basic", "depths": [2, 2, 2, 2]},
    34: {"layer_type": "basic", "depths": [3, 4, 6, 3]},
    50: {"layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
}


class _PlainBasicLayer(ResNetBasicLayer):
    """A basic layer without its residual addition."""

    def forward(self, hidden_state: Any) -> Any:
        return self.activation(self.layer(hidden_state))


class _PlainBottleNeckLayer(ResNetBottleNeckLayer):
    """A bottleneck layer without its residual addition."""

    def forward(self, hidden_state: Any) -> Any:
        return self.activation(self.layer(hidden_state))


PLAIN = {ResNetBasicLayer: _PlainBasicLayer, ResNetBottleNeckLayer: _PlainBottleNeckLayer}


def shapes(cell: Cell, recipe: Recipe) -> dict[str, Any]:
    """Depths and widths of a cell's network, as options of ResNetConfig."""
    if recipe.network == "standard":
        if cell.depth not in STANDARD:
            raise ValueError(f"No standard ResNet-{cell.depth}; there are {', '.join(map(str, STANDARD))}.")
        expansion = 4 if STANDARD[cell.depth]["layer_type"] == "bottleneck" else 1
        widths = [recipe.width * expansion * 2**stage for stage in range(4)]
        return {**STANDARD[cell.depth], "embedding_size": recipe.width, "hidden_sizes": widths}
    if cell.depth % 6:
        raise ValueError(f"A narrow net has three stages of blocks of two convolutions: {cell.depth} is no 6 n.")
    widths = [recipe.width * 2**stage for stage in range(3)]
    # The first stage has the stem's width and stride 1, so that it needs no shortcut of its own.
    return {
        "layer_type": "basic", "depths": [cell.depth // 6] * 3, "hidden_sizes": widths, "embedding_size": widths[0],
    }  # fmt: skip


def build(cell: Cell, recipe: Recipe, classes: int) -> nn.Module:
    """The cell's network with fresh weights, drawn from torch's generator."""
    config = SmallImageResNetConfig(**shapes(cell, recipe), num_labels=classes)
    model = SmallImageResNetForImageClassification(config)
    if not cell.shortcuts:
        for module in model.modules():
            if type(module) in PLAIN:
                module.__class__, module.shortcut = PLAIN[type(module)], nn.Identity()
    return model
