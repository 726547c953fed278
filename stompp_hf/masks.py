"""The soft-refresh mask of one tensor: which entries are frozen, as a pure function of (seed, tensor, step, p).

Each entry i owns a uniform draw U_i, and is frozen while U_i < p. At step t the draws of the entries
i = t (mod r) are replaced, so 1/r of all entries are redrawn a step and an entry that froze early can thaw. Since
every entry is redrawn exactly once in any r consecutive steps, the draws at step t are those of the steps
t - r + 1 ... t, and nothing has to be saved: a resumed run replays r steps of draws.
"""

import hashlib

import numpy as np
import torch

_LEVELS = 1 << 16  # a draw is a 16-bit number: two bytes an entry, and p is resolved to 1/65536


class SoftRefreshMask:
    """Draws of one tensor, and its mask at any step.

    Forward:  M_i(t) = 1 if U_i(t) < p else 0, U_i(t) redrawn at the steps t with t = i (mod r)
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
        self._filled: tuple[int, int, int, int] | None = None

    def _redraw(self, step: int) -> None:
        slot = self._draws[step % self.refresh_rate :: self.refresh_rate]
        if slot.numel() == 0:
            return
        text = f"{self.seed}/{self.name}/{step}".encode()
        key = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)
        raw = np.random.Philox(key=key).random_raw(-(-slot.numel() // 4))
        slot.copy_(torch.from_numpy(raw.view(np.int16)[: slot.numel()]))

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
        """Write the mask at `step` and frozen fraction `p` into `mask` (any shape and float dtype), and return it."""
        level = min(_LEVELS, max(0, round(p * _LEVELS)))
        if self._filled == (id(mask), mask._version, step, level):
            return mask  # Trainer's callback asks at the end of one step and at the begin of the next
        draws = self.draws(step)
        if level == 0:
            mask.zero_()
        else:
            frozen = draws <= level - 1 - _LEVELS // 2
            mask.copy_(frozen.view(mask.shape), non_blocking=False)
        self._filled = (id(mask), mask._version, step, level)
        return mask
