"""Member: what freezes in a stage, whatever it is; its place in the progression, and how its own tensors are saved.

Layers, embeddings and attention products are members. `Progression` sets a member's state from outside; forward only
reads it, and draws nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import StoMPPConfig
from .calibration import Observer, in_processes

PENDING, TRANSITION, FROZEN = "pending", "transition", "frozen"

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object


class _Keep(torch.autograd.Function):
    """x itself; the other tensors are in its graph, and get undefined gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *[None] * ctx.others


class Member(_Module):
    """Something that is pending, in transition or frozen, with tensors of its own that are saved with the model."""

    own_names: ClassVar[tuple[str, ...]]
    """The parameters and buffers that binarization adds; those that a configuration has no use for are None."""
    mask_names: ClassVar[tuple[str, ...]]
    """The attributes that hold masks during a transition."""
    mirror_names: ClassVar[tuple[str, ...]]
    """Python's mirrors of what the buffers save: forward must not wait for a device to read a flag or a clip."""

    stompp_config: StoMPPConfig
    stompp_state: Tensor
    stage_state: str
    frozen_share: float
    has_frozen: bool
    """Whether any entry is frozen: forward asks for this, since a number that changes would be compiled anew."""
    observer: Observer | None
    weight_ready: bool
    activation_ready: bool
    activation_offset: float
    total_steps: int
    step: int
    fingerprint: int
    state_read: bool

    def _begin(self, config: StoMPPConfig, device: torch.device) -> None:
        self._own("stompp_state", torch.zeros(6, dtype=torch.int64, device=device))
        self.stompp_config = config
        self.stage_state, self.frozen_share, self.has_frozen, self.observer = PENDING, 0.0, False, None
        for name in self.mask_names:
            setattr(self, name, None)
        self.weight_ready = self.activation_ready = False
        self.activation_offset = 0.0
        self.total_steps = self.step = self.fingerprint = 0
        self.state_read = device.type != "meta"

    def _own(self, name: str, value: Tensor | None, learnable: bool = False) -> None:
        if learnable and value is not None:
            parameter = nn.Parameter(value, requires_grad=True)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # init_weights() leaves it alone
            self.register_parameter(name, parameter)
        else:
            self.register_buffer(name, value)

    # ---- what Progression asks for ----

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device that masks are to have."""
        raise NotImplementedError

    def masked_tensors(self) -> dict[str, torch.Size]:
        """Shapes of the masks that a transition needs, by the attribute that holds them."""
        raise NotImplementedError

    @property
    def needs_activation_values(self) -> bool:
        """Whether any activation value is taken from data."""
        raise NotImplementedError

    def calibrate_weight(self) -> None:
        """Set the values that come from latents; nothing, where there are none."""

    def calibrate_observed(self, observer: Observer, first_call: bool = False) -> None:
        """Set the activation values from what an observer saw, in all calls or in the first one only."""
        raise NotImplementedError

    def enter(self, state: str, frozen_share: float) -> None:
        """Set the state; outside a transition the masks are dropped."""
        self.stage_state, self.frozen_share, self.has_frozen = state, frozen_share, frozen_share > 0.0
        if state != TRANSITION:
            for name in self.mask_names:
                setattr(self, name, None)

    def with_idle(self, x: Tensor) -> Tensor:
        """x, with the parameters in its graph that a pending member does not use yet; in several processes only.

        Without find_unused_parameters, DistributedDataParallel waits for a gradient of every parameter.
        """
        if not (in_processes() and torch.is_grad_enabled()):
            return x
        own = (getattr(self, name, None) for name in self.own_names)
        idle = [tensor for tensor in own if tensor is not None and tensor.requires_grad]
        return _Keep.apply(x, *idle) if idle else x  # type: ignore[no-any-return]

    def _read_edges(self) -> None:
        """Mirror the clips' edges."""
        raise NotImplementedError

    def own_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that binarization added, by name."""
        found = {name: getattr(self, name, None) for name in self.own_names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    # ---- saving ----

    def write_state(self) -> None:
        """Put the Python mirrors into the buffer that is saved, unless a load is still to set them from it."""
        values = [
            *(int(self.weight_ready), int(self.activation_ready), int(self.activation_offset)),
            *(self.total_steps, self.step, self.fingerprint),
        ]
        if self.state_read and not self.stompp_state.is_meta:
            self.stompp_state.copy_(torch.tensor(values, dtype=torch.int64))

    def read_state(self) -> None:
        """Put the saved buffer into the Python mirrors (after loading)."""
        if self.stompp_state.is_meta:
            return
        weight, activation, offset, total, step, fingerprint = self.stompp_state.tolist()
        self.weight_ready, self.activation_ready = bool(weight), bool(activation)
        self.activation_offset = float(offset)
        self._read_edges()
        self.total_steps, self.step, self.fingerprint = total, step, fingerprint
        self.state_read = True

    def damage(self) -> str | None:
        """What is wrong with loaded tensors that have the right shapes, or None."""
        own = {name: tensor for name, tensor in self.own_tensors().items() if not tensor.is_meta}
        for name, tensor in own.items():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                return f"{name} holds NaN"
        if "stompp_state" in own:
            weight, activation, offset, total, step, _ = own["stompp_state"].tolist()
            if not {weight, activation, offset} <= {0, 1} or total < 0 or step < 0:
                return f"stompp_state holds {[weight, activation, offset, total, step]}"
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write_state()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = [name for name in self.own_names if prefix + name in state_dict]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if found:
            reason = self.damage()
            if reason is not None:
                error_msgs.append(f"{prefix.removesuffix('.')}: {reason}.")
                return
            self.read_state()
        else:  # a checkpoint of the plain model: our own tensors keep their values, and their absence is no error
            own = {prefix + name for name in self.own_names}
            missing_keys[:] = [key for key in missing_keys if key not in own]

    @contextlib.contextmanager
    def values_kept(self) -> Iterator[None]:
        """Restore calibrated values, flags and state on leaving the block."""
        tensors = {name: tensor.detach().clone() for name, tensor in self.own_tensors().items()}
        names = (*self.mirror_names, *self.mask_names, "stage_state", "frozen_share", "has_frozen", "observer")
        mirrors = {name: getattr(self, name) for name in names}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in tensors.items():
                    getattr(self, name).copy_(value)
            for name, value in mirrors.items():
                setattr(self, name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        for name in self.mask_names:
            mask = getattr(self, name, None)
            if mask is not None:  # masks are no buffers: nothing saves or broadcasts them, so they move by hand
                setattr(self, name, fn(mask))
        return result
