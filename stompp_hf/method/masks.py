"""The soft-refresh mask of one tensor: which entries are frozen, as a pure function of (seed, tensor, step, p).

Each entry owns a uniform draw U, and is frozen while U < p. Entries lie in blocks of r, and each step replaces the draw
of one entry in every block, so 1/r of all entries are redrawn a step and an entry that froze early can thaw. Each block
has a phase of its own: else a step would redraw whole columns of a weight whose width is a multiple of r, and the same
features of the activation. Since every entry is redrawn exactly once in any r consecutive steps, the draws
at step t are those of the steps t - r + 1 ... t, and nothing has to be saved: a resumed run replays r steps of draws.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from ..integrations.torch import version_of

_LEVELS = 1 << 16  # a draw is a 16-bit number: two bytes an entry, and p is resolved to 1/65536


class SoftRefreshMask:
    """Draws of one tensor, and its mask at any step.

    Forward:  M_i(t) = 1 if U_i(t) < p else 0, U_i(t) redrawn at the steps t = i + phase(i // r) (mod r)
    Source:   stochastic partial mask, soft refresh and its rate: Smith and Islam (2026); the rolling, stateless way
              of drawing is this library's choice.

    The draws come from a counter-based generator (Philox) on the CPU, keyed by a hash of (seed, name, step): equal on
    every device, rank and resume.

    Args:
        numel: number of entries of the tensor.
        seed: seed of the run.
        name: name of the tensor, unique in its model.
        refresh_rate: r, in steps; 1 redraws everything at each step.
    """

    def __init__(self, numel: int, seed: int, name: str, refresh_rate: int) -> None:
        self.numel = numel
        self.seed = seed
        self.name = name
        self.refresh_rate = refresh_rate
        self._draws = torch.zeros(numel, dtype=torch.int16)
        self._step: int | None = None
        self._filled: tuple[int, int | None, int, int] | None = None

    def _random(self, what: object, count: int) -> Any:
        """`count` uniform 16-bit numbers of this tensor, always the same for one `what`."""
        text = f"{self.seed}/{self.name}/{what}".encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)
        return np.random.Philox(key=key).random_raw(-(-count // 4)).view(np.uint16)[:count]

    def _redraw(self, step: int) -> None:
        rate, blocks = self.refresh_rate, -(-self.numel // self.refresh_rate)
        phases = self._random("phases", blocks).astype(np.int64)
        places = np.arange(blocks) * rate + (step - phases) % rate
        if blocks and places[-1] >= self.numel:  # the last block may be shorter, and this its missing part
            places = places[:-1]
        self._draws[torch.from_numpy(places)] = torch.from_numpy(self._random(step, len(places)).view(np.int16))

    def draws(self, step: int) -> torch.Tensor:
        """U at `step`, as int16 values (uniform over all 65,536 of them), shape (numel,)."""
        if self._step is None or not 0 <= step - self._step < self.refresh_rate:
            first = step - self.refresh_rate + 1
        else:
            first = self._step + 1
        for past in range(first, step + 1):
            self._redraw(past)
        self._step = step
        return self._draws

    def fill(self, mask: torch.Tensor, step: int, p: float) -> torch.Tensor:
        """Write the mask at `step` and frozen fraction `p` into `mask`, and return it.

        Args:
            mask: of any shape and dtype but uint8, one number an entry; or uint8, their bits (`mask_bits`).
        """
        level = min(_LEVELS, max(0, round(p * _LEVELS)))
        if self._filled == (id(mask), version_of(mask), step, level):
            return mask  # Trainer's callback asks at the end of one step and at the begin of the next
        draws = self.draws(step)
        if level == 0:
            mask.zero_()
        else:
            frozen = draws <= level - 1 - _LEVELS // 2
            if mask.dtype is torch.uint8:
                frozen = torch.from_numpy(np.packbits(frozen.numpy(), bitorder="little"))
            mask.copy_(frozen.view(mask.shape), non_blocking=False)
        self._filled = (id(mask), version_of(mask), step, level)
        return mask
