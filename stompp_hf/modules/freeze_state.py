"""FreezeState: how far a member has frozen. The buffer `stompp_state` is its saved form, and the only truth."""

from dataclasses import dataclass, fields

from torch import Tensor

from ..method.windows import PENDING

STAYS_REAL = -1


@dataclass
class FreezeState:
    """How far a member has frozen: what is saved, in the order of the buffer's int64 numbers, and what follows from it.

    weight_ready, activation_ready: whether starting values were set (a weight_ready of `STAYS_REAL`: a run stopped
    before this member's stage); activation_offset: 0 for the levels {-a, a}, 1 for {0, 2a};
    total_steps: of the progression, 0 before its first step; step: how many updates came before this state;
    fingerprint: of the plan that it was trained by.
    stage, share: "pending", "transition" or "frozen", and the frozen fraction; they follow from step, total and the
    member's place. has_frozen: share > 0, which forward asks, since a number that changes would be compiled anew.
    """

    weight_ready: int = 0
    activation_ready: int = 0
    activation_offset: int = 0
    total_steps: int = 0
    step: int = 0
    fingerprint: int = 0

    stage: str = PENDING
    share: float = 0.0
    has_frozen: bool = False

    @property
    def stays_real(self) -> bool:
        """Whether the member is real for good."""
        return self.weight_ready == STAYS_REAL

    def saved(self) -> list[int]:
        """The numbers of the buffer."""
        return [int(getattr(self, name)) for name in SAVED]

    @classmethod
    def of(cls, buffer: Tensor) -> "FreezeState":
        """The state that a buffer out of a file saves, as far as it can be told without its member's place."""
        state = cls()
        state.load(buffer)
        return state

    def load(self, buffer: Tensor) -> None:
        """Take the numbers of a buffer; what follows from them is the member's to say."""
        for name, value in zip(SAVED, buffer.tolist(), strict=True):
            setattr(self, name, value)

    def damage(self) -> str | None:
        """Which numbers no run could have written, or None."""
        flags = {0 if self.stays_real else self.weight_ready, self.activation_ready, self.activation_offset}
        if not flags <= {0, 1} or not self.step >= 0 or self.total_steps < 0:
            return f"stompp_state holds {self.saved()[:5]}"
        return None


SAVED = tuple(field.name for field in fields(FreezeState))[:6]
