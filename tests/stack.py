"""A stack of equal linear layers, binarized, one stage a layer: small, without dropout, head or randomness."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stompp_hf import Progression, StoMPPConfig, binarize_model

WIDTH = 64


class Stack(nn.Module):
    """x + tanh(layer(x)) for each layer; `calls` passes over the same layers, the first one recomputed if asked."""

    def __init__(self, depth: int, width: int, calls: int, recompute_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.calls, self.recompute_first = calls, recompute_first

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for call in range(self.calls):
            for layer in self.layers:
                recompute = self.recompute_first and call == 0 and self.training
                x = x + torch.tanh(checkpoint(layer, x, use_reentrant=False) if recompute else layer(x))
        return x


def stack(
    depth: int = 3, width: int = WIDTH, calls: int = 1, recompute_first: bool = False, **options: object
) -> Stack:
    """The same weights each time; windows over the whole run and a quick refresh unless `options` say otherwise."""
    torch.manual_seed(0)
    config = StoMPPConfig(**{"refresh_rate": 4, "end": 1.0, "first_layer": "binarize", **options})  # type: ignore[arg-type]
    return binarize_model(Stack(depth, width, calls, recompute_first), config, torch.zeros(1, width))


def batch(seed: int, rows: int = 8, width: int = WIDTH) -> Tensor:
    """Normal inputs, a pure function of the seed."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def update(model: Stack, optimizer: torch.optim.Optimizer, seed: int, micro_batches: int = 1) -> float:
    """One optimizer step towards small outputs; returns the loss of the last micro-batch."""
    for part in range(micro_batches):
        loss = model(batch(100 * seed + part, width=model.layers[0].in_features)).square().mean()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(model: Stack, progression: Progression, first: int, last: int, lr: float = 1e-3) -> list[float]:
    """Steps [first, last), and the state after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    progression.attach(optimizer)
    losses = []
    for step in range(first, last):
        progression.step(step)
        losses.append(update(model, optimizer, step))
    progression.step(last)
    return losses


def random_states() -> list[object]:
    """The state of every global random generator, in a form that == compares."""
    kind, key, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), kind, key.tolist(), rest, random.getstate()]
