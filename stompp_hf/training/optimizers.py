"""What `Progression.attach` does: ask whether an optimizer's steps can be held and whether it has what is to learn."""

import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..config import StoMPPConfig
from ..console import warn_once
from ..errors import ConfigError, HoldError
from ..integrations.sharding import complete_states, is_sharded, refuse_optimizer, reshard
from ..integrations.torch import remove_all
from ..modules import BinaryLayer, Member
from ..modules.calibration import in_processes
from ..surgery.adapters import has_adapters
from ..surgery.members import weighted
from .committed_signs import CommittedSigns
from .hold_frozen import hold_frozen, parameters_of, skip_blocked
from .learning_rates import Rate, largest_share, rates, scale_steps

logger = logging.getLogger(__name__)

_INSTEAD = (
    "Use one that steps once in step(), as torch.optim.AdamW, SGD or Adafactor do; or a surrogate gradient, under "
)
_INSTEAD += "which nothing is held, as in StoMPPConfig(frozen_gradient='windowed_ste')."

_hooks: WeakKeyDictionary[Any, dict[int, list[Any]]] = WeakKeyDictionary()
"""For each optimizer the handles of its hooks, by the id of the model that they are for."""


def is_ste_free(config: StoMPPConfig) -> bool:
    """Whether frozen entries pass no gradient, and are held."""
    return config.is_ste_free and config.binarize != "nothing"


class Optimizers:
    """The optimizers of a model in training: what they must leave alone, and whether they did.

    Args:
        model: the model.
        members: its members, by name.
        shares: of a step that what is pending makes, that members make from then on, and of that their scales.
        begins: the first step of each member's window, by name.
        now: gives the step at which the model stands.
    """

    def __init__(
        self,
        model: nn.Module,
        members: dict[str, Member],
        shares: tuple[float, float | None, float],
        begins: dict[str, int],
        now: Callable[[], int],
    ) -> None:
        self._model, self._members, self._now = model, members, now
        self._shares, self._begins = shares, begins
        self._layers = weighted(members)
        self._held = {name: layer for name, layer in self._layers.items() if is_ste_free(layer.stompp_config)}
        self._signs = CommittedSigns(self._held)
        self._optimizers: list[Any] = []
        self._hooks: list[Any] = []
        self._all_there = False

    def attach(self, optimizer: Any) -> None:
        """See `Progression.attach`."""
        refuse_optimizer(optimizer)
        if reshard(self._model):
            complete_states(optimizer)
        for one in steppers(optimizer):
            hooks = self._hook(one)
            if hooks:
                replace_hooks(one, self._model, hooks)
            self._hooks += hooks
            if one not in self._optimizers:
                self._optimizers.append(one)
        self._all_there = False
        warn_of_half_precision(self._model, self._layers)
        warn_of_still_latents(self._model, self._layers)
        warn_of_left_out(self._model, self._members, self._optimizers, last=False)

    def _hook(self, one: Any) -> list[Any]:
        apart = in_processes() and not any(is_sharded(p) for p in self._model.parameters())
        found = self._rates(one)
        if self._held:
            require_hooks(one, "frozen_gradient='zero'", "frozen_gradient='ste'")
            refuse_unholdable(one)
        if apart:
            require_hooks(one, "training on several processes", "train on one")
        pending, binary, scales = self._shares
        asked = pending != 1.0 or scales != 1.0 or binary not in (None, 1.0)
        require_parameters(one, self._model, bool(self._held) or asked)
        hooks: list[Any] = []
        if self._held:
            hooks += hold_frozen(one, list(self._held.values()), self._now)
        if apart:
            hooks += skip_blocked(one, self._model.parameters(), self._now)
        if found:
            hooks += scale_steps(one, found, self._now)
        return hooks

    def _rates(self, one: Any) -> list[Rate]:
        """The rates of what moves by another share of this optimizer's steps than the whole; empty if nothing does."""
        pending, binary, scales = self._shares
        if self._shares == (1.0, 1.0, 1.0):
            return []
        found = rates(self._model, self._members, self._begins, pending, binary, scales)
        if binary is not None or pending != 1.0 or scales != 1.0:
            asked = f"pending_lr={pending}, binary_lr={binary}, scale_lr={scales}"
            require_hooks(one, asked, "pending_lr=1.0, binary_lr=1.0, scale_lr=1.0")
            return found
        most = largest_share(one, found)
        if most == 1.0:
            return []
        try:  # nobody asked: what cannot be done is left
            require_hooks(one, "", "")
            refuse_unholdable(one)
        except ConfigError:
            warn_once(
                logger, self._model,
                "binary layers learn at the rate of %s, whose steps cannot be scaled: too slow for them where it suits "
                "real weights. Use torch.optim.AdamW; or raise the rate, and say so: StoMPPConfig(binary_lr=1.0).",
                _class_of(one),
            )  # fmt: skip
            return []
        logger.info("binary layers move at up to %.3g times the rate of %s (binary_lr)", most, _class_of(one))
        return found

    def before(self, step: int) -> None:
        """Before the model goes to `step`: look whether the optimizers kept to it.

        Raises:
            HoldError: a frozen sign moved, although the optimizer was attached.
        """
        if self._optimizers and not self._all_there:
            warn_of_left_out(self._model, self._members, self._optimizers, last=True)
            warn_of_half_precision(self._model, self._layers)
            self._all_there = True
        moved = self._signs.moved(step)
        if not moved:
            return
        names = " and ".join(sorted({type(one).__name__ for one in self._optimizers}))
        if not names:
            warn_once(
                logger, self._model,
                "frozen signs changed (first %s), and frozen_gradient='zero' forbids it: nothing holds them. Call "
                "progression.attach(optimizer) before the first step.",
                moved[0],
            )  # fmt: skip
            return
        raise HoldError(
            f"frozen signs of {_some(moved)} changed before step {step}, which frozen_gradient='zero' forbids. {names} "
            "is attached, and something moves weights outside of its step(). Attach every optimizer that moves them, "
            "and of a wrapper the one in it; or use torch.optim.AdamW; or a surrogate gradient, as in "
            "StoMPPConfig(frozen_gradient='windowed_ste'). Then go on from the last checkpoint."
        )

    def after(self, step: int) -> None:
        """Once the model stands at `step`: remember what is frozen."""
        self._signs.note(step)

    @property
    def attached(self) -> list[Any]:
        """Those that are attached."""
        return list(self._optimizers)

    def release(self) -> None:
        """Let go of all of them."""
        remove_all(self._hooks)
        self._optimizers = []


# ---- which object really steps ----


def steppers(optimizer: Any) -> list[Any]:
    """The optimizers that move the weights: what accelerate's wrapper holds; of a layer-wise one, one a parameter."""
    if any(cls.__name__ == "AcceleratedOptimizer" for cls in type(optimizer).__mro__):
        return steppers(optimizer.optimizer)
    inner = getattr(optimizer, "optimizer_dict", None)  # transformers' dummy: each steps in the backward pass
    return [optimizer] if inner is None else list(inner.values())


def require_hooks(optimizer: Any, option: str, instead: str) -> None:
    """Raise ConfigError, naming the optimizer, if nobody can look on when it steps."""
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
        optimizer.register_step_post_hook(lambda *_: None).remove()
    except AttributeError:  # also of a subclass that never called torch.optim.Optimizer's own __init__
        raise ConfigError(
            f"{option} needs an optimizer whose steps can be hooked, and {type(optimizer).__name__} has no step hooks. "
            f"Use a torch.optim optimizer, or {instead}."
        ) from None


def refuse_unholdable(optimizer: Any) -> None:
    """Raise ConfigError for an optimizer that moves weights where no hook can put them back."""
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{name} moves all weights several times inside one step(closure), and measures the loss there with frozen "
            f"signs that have moved: frozen_gradient='zero' forbids it. {_INSTEAD}"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ConfigError(
            f"{name} has train() and eval(), which put other weights into the model outside of step(), with other "
            f"signs: frozen_gradient='zero' forbids it. {_INSTEAD}"
        )


def require_parameters(optimizer: Any, model: nn.Module, holds: bool) -> None:
    """Say that an optimizer has none of a model's parameters: an error where some would have to be held."""
    own = parameters_of(optimizer) if hasattr(optimizer, "param_groups") else set()
    if not own or not own.isdisjoint(id(parameter) for parameter in model.parameters()):
        return
    text = (
        f"{type(optimizer).__name__} has none of this model's parameters: it was made for another model, for a copy of "
        "this one, or it steps copies. Make it after binarize_model: "
        "torch.optim.AdamW(stompp_hf.parameter_groups(model, weight_decay=0.01))."
    )
    if holds:
        raise ConfigError(text)
    warn_once(logger, model, "%s", text)


def replace_hooks(optimizer: Any, model: nn.Module, handles: list[Any]) -> None:
    """Note the hooks that an optimizer has for a model, and remove those that it had: nothing is held twice."""
    of_models = _hooks.setdefault(optimizer, {})
    remove_all(of_models.get(id(model), []))
    of_models[id(model)] = handles


# ---- what will not learn, although it should ----


def warn_of_half_precision(model: nn.Module, layers: dict[str, BinaryLayer]) -> None:
    """Say it if latents became half precision after binarize_model, which makes them float32."""
    half = [n for n, layer in layers.items() if layer.like.dtype in (torch.float16, torch.bfloat16)]
    if half and not layers[half[0]].stompp_config.keep_dtype:
        warn_once(
            logger, model,
            "the latent weights of %s are %s, and small updates vanish on them: model.half(), .to(dtype), or an "
            "evaluation with bf16_full_eval or fp16_full_eval before training did that. Call model.float() first, and "
            "load the weights anew if their lost digits matter; or say StoMPPConfig(keep_dtype=True).",
            _some(half), layers[half[0]].like.dtype,
        )  # fmt: skip


def warn_of_still_latents(model: nn.Module, layers: dict[str, BinaryLayer]) -> None:
    """Say it if latents that are going to freeze do not learn. Beside PEFT's adapters that is what is wanted."""
    freezing = {n: layer for n, layer in layers.items() if _will_freeze(layer)}
    still = [n for n, layer in freezing.items() if not layer.weight.requires_grad]
    if still and not has_adapters(model):
        warn_once(
            logger, model,
            "the latent weights of %s do not learn (requires_grad=False), and are going to be frozen at the signs that "
            "they have. Let them learn: requires_grad_(True); or leave these layers real: "
            "StoMPPConfig(exclude_modules=[...]).",
            _some(still),
        )  # fmt: skip


def warn_of_left_out(model: nn.Module, members: dict[str, Member], optimizers: Iterable[Any], last: bool) -> None:
    """Say which parameters that freezing needs are in none of the optimizers that are attached.

    last: no other optimizer will be attached. Until then there is only said what is sure: one that has every parameter
    but those that binarize_model added was made before it.
    """
    members = {name: member for name, member in members.items() if _will_freeze(member)}
    if not all(hasattr(one, "param_groups") for one in optimizers):
        return  # nobody knows what it has
    held: set[int] = set().union(*(parameters_of(optimizer) for optimizer in optimizers))
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    added = [trained[id(t)] for m in members.values() for t in m.own_tensors().values() if id(t) in trained]
    missing = [name for key, name in trained.items() if key not in held]
    lacking = [name for name in added if name in missing]
    if lacking and (last or sorted(lacking) == sorted(added) == sorted(missing)):
        warn_once(
            logger, model,
            "the optimizer lacks parameters that binarize_model added (%s): they stay what they are set to when their "
            "stage begins. Make the optimizer after binarize_model; if another one has them, attach that too; if they "
            "are not to learn: StoMPPConfig(learn_weight_scale=False, learn_activation_scale=False, "
            "learn_activation_threshold=False).",
            _some(lacking),
        )  # fmt: skip
    latent = {id(layer.weight) for layer in weighted(members).values()}
    if last and (weights := [name for key, name in trained.items() if key in latent - held]):
        warn_once(
            logger, model,
            "no optimizer that is attached has the latent weights %s: attach each one, "
            "progression.attach(optimizer), before the first step.",
            _some(weights),
        )  # fmt: skip


def _will_freeze(member: Member) -> bool:
    return not member.is_settled


def _class_of(optimizer: Any) -> str:
    return type(optimizer).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
