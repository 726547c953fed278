"""Member: what freezes in a stage, whatever it is; its place in the progression, and how its own tensors are saved.

Layers, embeddings and attention products are members. The buffer `stompp_state` says how far a member has frozen, and
nothing else does: whoever writes it, `Progression` or a load, a copy, an average, forward obeys it, and draws nothing.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import StoMPPConfig
from ..errors import CheckpointError, NonFiniteError
from ..integrations.torch import buffers_of, copy_all, is_in_functorch, version_of
from ..integrations.transformers import mark_initialized
from ..kernels import countable
from ..method.gradient_units import per_root
from ..method.surrogates import SURROGATES, Surrogate
from ..method.windows import FROZEN, PENDING, TRANSITION, Place
from .calibration import ActivationValues, Observer, in_processes
from .converted import Converted
from .freeze_state import SAVED, STAYS_REAL, FreezeState
from .transition_masks import TransitionMasks

__all__ = ["FROZEN", "PENDING", "TRANSITION", "Member", "filled"]


def filled(shape: Iterable[int], value: float, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor of one value beside another one; on the meta device without the Python that torch fills by."""
    empty = torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    return empty if empty.is_meta else empty.fill_(value)


class _Keep(torch.autograd.Function):
    """x itself; the other tensors are in its graph, and get undefined gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:  # type: ignore[override]
        ctx.others = len(others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *[None] * ctx.others


def with_idle(x: Tensor, tensors: Iterable[Tensor | None]) -> Tensor:
    """x, with the tensors that train in its graph, whether anything uses them or not; in several processes only.

    Without find_unused_parameters, DistributedDataParallel waits for a gradient of every parameter.
    """
    if not (in_processes() and torch.is_grad_enabled()):
        return x
    idle = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return _Keep.apply(x, *idle) if idle else x  # type: ignore[no-any-return]


def _saved_number(name: str, kind: type) -> Any:
    """A number of the state: reading follows the buffer, setting writes it."""

    def read(member: Any) -> Any:
        return kind(getattr(member.follow(), name))

    def write(member: Any, value: Any) -> None:
        setattr(member.follow(), name, int(value))
        member.write_state()

    return property(read, write, doc=f"`FreezeState.{name}`.")


class Member(TransitionMasks, Converted):
    """Something that is pending, in transition or frozen, with tensors of its own that are saved with the model."""

    edge_names: ClassVar[tuple[str, ...]]
    """The buffers that hold clips: forward has their edges as numbers, not to wait for a device."""

    stompp_config: StoMPPConfig
    stompp_state: Tensor
    freezing: FreezeState
    observer: Observer | None
    _seen: list[tuple[str, Tensor, int | None]]

    weight_ready: bool = _saved_number("weight_ready", bool)
    activation_ready: bool = _saved_number("activation_ready", bool)
    activation_offset: float = _saved_number("activation_offset", float)
    total_steps: int = _saved_number("total_steps", int)
    step: int = _saved_number("step", int)
    fingerprint: int = _saved_number("fingerprint", int)

    def _begin(self, config: StoMPPConfig, like: Tensor) -> None:
        self._own("stompp_state", filled((len(SAVED),), 0, like, torch.int64))
        # Not one by one: a module looks twice at what is given to it, and a model has many members.
        vars(self).update(stompp_config=config, place=Place(), observer=None, freezing=FreezeState(), _seen=[])
        self.drop_masks()

    def _own(self, name: str, value: Tensor | None, learnable: bool = False) -> None:
        value = countable(value)  # a state is followed by the changes of its buffers
        if learnable and value is not None:
            parameter = nn.Parameter(value, requires_grad=True)
            mark_initialized(parameter)
            self.register_parameter(name, parameter)
        else:
            self.register_buffer(name, value)

    # ---- what Progression asks for ----

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype that it computes with."""
        raise NotImplementedError

    @property
    def needs_activation_values(self) -> bool:
        """Whether any activation value is taken from data."""
        raise NotImplementedError

    def calibrate_weight(self) -> None:
        """Set the values that come from latents; nothing, where there are none."""

    def calibrate_observed(self, observer: Observer, first_call: bool = False) -> None:
        """Set the activation values from what an observer saw, in all calls or in the first one only."""

    def calibrate_unseen(self) -> None:
        """Set the activation values of a member that no data ever reached."""

    def with_idle(self, x: Tensor) -> Tensor:
        """x, with the parameters in its graph that a pending member does not use yet."""
        return with_idle(x, (getattr(self, name, None) for name in self.own_names))

    def _read_edges(self) -> None:
        """Take the clips' edges as numbers."""

    @property
    def surrogate(self) -> Surrogate:
        """What frozen entries pass back."""
        return SURROGATES[self.stompp_config.frozen_gradient]

    # ---- what reports ask for ----

    @property
    def plain_kind(self) -> str:
        """What it is a binary form of: the name of its plain class, or a word for it."""
        raise NotImplementedError

    def bits(self) -> tuple[list[int], list[int]]:
        """Bits of an entry of its weight, and of what it reads, as it computes now; empty where there is none."""
        raise NotImplementedError

    @property
    def ends_in_1bit_products(self) -> bool:
        """Whether both operands of its product are binary once it is frozen."""
        return self.stompp_config.binary_activations and not self.always_real

    def _bits_of(self, binary: bool, dtype: torch.dtype) -> list[int]:
        return [1 if binary and self.stage_state == FROZEN else 8 * dtype.itemsize]

    @property
    def always_real(self) -> bool:
        return self.place.never or self.follow().stays_real

    @property
    def is_settled(self) -> bool:
        """Whether no window is still to change it: it is frozen, or real for good."""
        return self.always_real or self.stage_state == FROZEN

    def packed_bytes(self, name: str, tensor: Tensor) -> int | None:
        if name not in self.own_names or self.always_real:
            return None
        return tensor.numel() * max(4, tensor.element_size()) if tensor.is_floating_point() else tensor.nbytes

    def scales(self) -> list[Tensor]:
        """The learnable scales."""
        return [t for name, t in self.own_tensors().items() if name.endswith("_scale") and t.requires_grad]

    def in_units(self, tensor: Tensor | None, entries: int) -> Any:
        """A scale or threshold as forward reads it, with its gradient in the units that `scale_gradient` says.

        entries: how many entries of a weight, or of one sample of an operand, each of its numbers acts on.
        """
        if tensor is None or self.stompp_config.scale_gradient == "sum":
            return tensor
        return per_root(tensor, entries) if tensor.requires_grad and torch.is_grad_enabled() else tensor

    # ---- the state ----

    @property
    def stage_state(self) -> str:
        """ "pending", "transition" or "frozen"."""
        return self.follow().stage

    @property
    def frozen_share(self) -> float:
        """Target share of frozen entries."""
        return self.follow().share

    @property
    def has_frozen(self) -> bool:
        """Whether any entry is frozen."""
        return self.follow().has_frozen

    def follow(self) -> FreezeState:
        """The state; taken from the buffers anew where somebody else wrote to them: a load, a copy, an average.

        A compiled graph holds one state, and is not asked.
        """
        if not torch.compiler.is_compiling():
            buffers = buffers_of(self)
            for name, tensor, version in self._seen:
                now: Any = buffers[name]
                if now is not tensor or version is None or version != version_of(now):
                    self._take()
                    break
        return self.freezing

    def _looked(self) -> None:
        """Note which buffers, in which version, the state was taken from."""
        buffers = ((name, buffers_of(self)[name]) for name in ("stompp_state", *self.edge_names))
        self._seen = [(name, buffer, version_of(buffer)) for name, buffer in buffers if buffer is not None]

    def _take(self) -> None:
        """`taken`, and CheckpointError where no run could have written what the buffers hold."""
        if _is_readable(self.stompp_state) and (reason := self.taken()) is not None:
            raise CheckpointError(
                f"{self.place.label or type(self).__name__}: {reason}. No training run wrote these tensors: they are "
                "of a damaged file, or of another model, or an average that takes buffers in (use_buffers=True, timm's "
                "ModelEmaV2). Average parameters, and copy buffers, as timm's ModelEmaV3 does."
            )

    def taken(self, has_nan: bool = True) -> str | None:
        reason = self.damage(has_nan)
        if not _is_readable(self.stompp_state):
            return reason  # offloaded, or a tracer's: the values are what they were
        self.freezing.load(self.stompp_state)
        if reason is not None:
            self._seen = [("stompp_state", self.stompp_state, None)]  # whoever asks next is told as well
            return reason
        self._read_edges()
        with torch.inference_mode(False):  # masks that are made while an average is evaluated stay when it trains
            self._stand(*self._due())
        return None

    def _due(self) -> tuple[str, float]:
        """State and frozen fraction that follow from the saved numbers."""
        return self._planned()

    def _planned(self) -> tuple[str, float]:
        """The same by the member's place in the plan, whatever its class makes of it."""
        freezing = self.freezing
        return (PENDING, 0.0) if freezing.stays_real else self.place.state(freezing.step, freezing.total_steps)

    def _stand(self, state: str, share: float) -> None:
        """Enter a state of the progression, with its masks."""
        self.enter(state, share)
        if state != TRANSITION:
            return
        freezing = self.freezing
        rate = self.place.refresh(freezing.total_steps)
        self.draw_masks(freezing.step, share, rate, self.stompp_state.device)

    def enter(self, state: str, share: float) -> None:
        """Stand in a state until the buffer is written next; outside a transition the masks are dropped."""
        freezing = self.freezing
        freezing.stage, freezing.share, freezing.has_frozen = state, share, share > 0.0
        self._looked()
        if state != TRANSITION:
            self.drop_masks()

    def advance(self, step: int, total: int) -> None:
        """Stand where the progression is after `step` of `total` updates, with starting values that come from latents.

        The buffer is written by `write_states`, for all members of a model at once.
        """
        freezing = self.follow()
        freezing.step, freezing.total_steps, freezing.fingerprint = step, total, self.place.fingerprint
        state, share = self._planned()
        if state != PENDING:
            self.calibrate_weight()
        self._stand(state, share)

    def begin_anew(self) -> None:
        """Stand before the first step, with the starting values as they are."""
        self.freezing.step = self.freezing.total_steps = 0
        self.write_state()
        self.enter(PENDING, 0.0)

    def write_state(self) -> None:
        """Put the state into the buffer that is saved."""
        write_states([self])

    def _wrote(self) -> None:
        """After own writes into state and tensors: take the edges, and save the state."""
        self._read_edges()
        self.write_state()

    def _refuse_infinite(self, values: ActivationValues) -> None:
        if not values.is_finite():
            raise NonFiniteError(
                f"what enters {self.place.label or 'this layer'} is not finite where its stage begins; its scale would "
                "stay so for good. Look at the data, or lower the learning rate; then resume from the last checkpoint."
            )

    def damage(self, has_nan: bool = True) -> str | None:
        own = {name: tensor for name, tensor in self.own_tensors().items() if not tensor.is_meta}
        for name, tensor in own.items() if has_nan else ():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                return f"{name} holds NaN"
        if "stompp_state" not in own:
            return None
        found = FreezeState.of(own["stompp_state"])
        began = self.place.state(found.step, found.total_steps)[0] != PENDING
        if began and not found.weight_ready and self._needs_weight_values:
            return "its stage has begun, and its weight scale was never set"
        if self.place.never and (found.weight_ready or found.activation_ready) and not found.stays_real:
            return "its stage had begun to freeze, and here it stays real (last_stage)"
        return found.damage()

    def stay_real(self) -> None:
        """Be real from now on, and for good, whatever was frozen; the saved state says so."""
        self.freezing.weight_ready, self.freezing.activation_ready = STAYS_REAL, 0
        self.observer = None
        self.enter(PENDING, 0.0)
        self.write_state()

    _needs_weight_values = False

    # ---- saving ----

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        _, _, missing_keys, _, error_msgs = others
        super()._load_from_state_dict(state_dict, prefix, *others)
        if not self.is_without_own(state_dict, prefix, missing_keys):
            try:
                self._take()
            except CheckpointError as error:
                error_msgs.append(str(error))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.follow()
        result = super()._apply(fn, recurse)
        self.move_masks(fn)
        self._looked()  # the same numbers elsewhere
        return result

    @contextlib.contextmanager
    def values_kept(self) -> Iterator[None]:
        """Restore starting values and state on leaving the block."""
        self.follow()
        tensors = {name: tensor.detach().clone() for name, tensor in self.own_tensors().items()}
        freezing, observer = replace(self.freezing), self.observer
        draws, masks = dict(self._draws), self.held_masks()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in tensors.items():
                    getattr(self, name).copy_(value)
            self.freezing, self.observer, self._draws = freezing, observer, draws
            self._read_edges()
            self._looked()
            for name, mask in masks.items():
                setattr(self, name, mask)


def write_states(members: list[Member]) -> None:
    """Put the states of members into their buffers, with one transfer a device."""
    by_device: dict[torch.device, list[Member]] = {}
    for member in members:
        if not member.stompp_state.is_meta:
            by_device.setdefault(member.stompp_state.device, []).append(member)
    for device, found in by_device.items():
        values = torch.tensor([member.freezing.saved() for member in found]).to(device)
        copy_all([member.stompp_state for member in found], list(values))
    for member in members:
        member._looked()


def _is_readable(tensor: Tensor) -> bool:
    """Whether a buffer has numbers of its own: not offloaded, and no tracer's stand-in."""
    return type(tensor) is Tensor and not tensor.is_meta and not is_in_functorch(tensor)
