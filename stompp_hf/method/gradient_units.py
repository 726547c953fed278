"""The units of a gradient that is a sum over many entries, as that of a scale or a threshold is."""

import math

from torch import Tensor


def per_root(tensor: Tensor, entries: int) -> Tensor:
    """The tensor itself, with a gradient in units of the square root of how many entries it sums over.

    Forward:  t
    Backward: dL/dt = g / sqrt(entries)
    Shapes:   t any shape, finite, any float dtype; returns the same, bit for bit.
    Source:   LSQ (Esser et al., 2020), section 2.2, with Q_P = 1: a sum of n numbers of random sign is sqrt(n) times as
              large as one of them, and would fill the norm that a script clips.
    """
    plain = tensor.detach()
    return plain - (plain - tensor) * (1.0 / math.sqrt(max(1, entries)))
