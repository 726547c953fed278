"""Progression: from (step, total steps) to the state of every stage. Drives the masks; knows no Trainer."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..config import StoMPPConfig
from ..console import warn_once
from ..errors import CheckpointError, ConfigError
from ..integrations.sharding import local, refuse_unsupported, reshard, write_after_forward
from ..integrations.torch import BatchNorm, clamp_min_all, is_compiled, remove_all
from ..method.windows import Window
from ..modules import FROZEN, PENDING, Member
from ..modules.calibration import Observer, Watch, padding_masks
from ..modules.stage_member import write_states
from ..surgery.members import driven_model, get_plan, members, planned_models, weighted
from ..surgery.ownership import stop_at
from ..surgery.running import run, undisturbed
from ..surgery.unattended import attended
from . import compiling
from .finite_checks import InputChecks, check_latents
from .observation import Observation
from .optimizers import Optimizers

logger = logging.getLogger(__name__)

SCALE_FLOOR = 1e-6
"""No learnable scale falls below it: one that crossed zero would turn the surrogate gradient around."""


class Progression:
    """The state of every stage of a binarized model as a pure function of the step.

    Use it without Trainer:

        progression = Progression(model, total_steps=max_steps)
        progression.attach(optimizer)
        for step, batch in enumerate(loader):
            progression.step(step)
            ...
        progression.step(max_steps)

    `step(s)` applies the state after s updates: p = schedule((s - begin) / (end - begin)) inside a window. The total
    is fixed by a model's first `step` and is saved with the model; a later Progression keeps it. Making one changes
    nothing.

    Args:
        model: a binarized model, or a wrapper of one (DDP, PEFT, compiled); parts of it that were binarized apart are
            driven together, each through its own windows.
        total_steps: number of optimizer steps of the run.
        rescale: take `total_steps` even if the model was trained under another total; refuses to thaw a frozen stage.

    Raises:
        NotBinarizedError: the model has no binary layers.
        ConfigError: total_steps is no positive number; or the model is compiled, STE-free, and its attention is not
            `eager`.
        CheckpointError: rescaling would thaw a stage that is frozen.
        ShardingError: the model is split over processes by DeepSpeed or FSDP1, or over GPUs by DataParallel.

    Source: Smith and Islam (2026) for order, schedule and refresh; windows as fractions of the run and the stateless
    draws are this library's choice.
    """

    def __init__(self, model: nn.Module, total_steps: int, *, rescale: bool = False) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(f"Progression: total_steps={total_steps!r} must be a positive number of optimizer steps.")
        refuse_unsupported(model)
        self.model, self.plan = driven_model(model), get_plan(model)
        self.layers: dict[str, Member] = members(model)
        self._roots = list(planned_models(model).values())
        if self.config.is_ste_free and any(map(is_compiled, model.modules())):
            compiling.refuse_untraceable(self.model)
        self.total_steps = self._settle_total(total_steps, rescale)
        self.windows: dict[str, Window] = {}
        self._find_windows()
        self.current_step = next(iter(self.layers.values())).step
        self._observation = Observation(self.model, self.layers, self.windows, self.total_steps)
        self._checks = InputChecks()
        self._compiled = compiling.Held(model, len(self.layers))
        self._warn_of_short_windows()

    @property
    def config(self) -> StoMPPConfig:
        """The configuration that the model was binarized with."""
        return self.plan.config

    def _find_windows(self) -> None:
        self.windows.update({name: layer.place.window(self.total_steps) for name, layer in self.layers.items()})
        first = min((self.windows[n].begin for n, layer in self.layers.items() if not layer.always_real), default=0)
        begins = {n: first if layer.always_real else self.windows[n].begin for n, layer in self.layers.items()}
        shares = self.config.pending_lr, self.config.binary_lr, self.config.scale_lr
        self._optimizers = Optimizers(self.model, self.layers, shares, begins, lambda: self.current_step)

    def _settle_total(self, asked: int, rescale: bool) -> int:
        known = {layer.total_steps: layer.step for layer in self.layers.values()}
        known.pop(0, None)
        if len(known) > 1:
            raise CheckpointError(
                f"parts of this model were trained by progressions of {' and '.join(map(str, sorted(known)))} "
                "steps, and cannot go on together. Train each by itself, or restore_model and binarize them together."
            )
        saved, step = next(iter(known.items()), (0, 0))
        if saved in (0, asked):
            return asked
        if not rescale:
            warn_once(
                logger, self.model,
                "this model's progression was fixed at %d steps when its training began; it stays so, although this "
                "run has %d. To stretch or shrink what is left: Progression(model, %d, rescale=True), or "
                "StoMPPTrainerCallback(rescale=True).",
                saved, asked, asked,
            )  # fmt: skip
            return saved
        places = [(entry.stage_name, self.layers[entry.name].place) for entry in self.plan.entries]
        thawed = {name for name, place in places if place.window(saved).end <= step < place.window(asked).end}
        if thawed:
            raise CheckpointError(
                f"rescale=True: with {asked} steps in place of {saved}, {', '.join(sorted(thawed))} would thaw at step "
                f"{step}. Use a total of at most {saved}, or keep the old one (rescale=False)."
            )
        return asked

    def _warn_of_short_windows(self) -> None:
        places = [(window, self.layers[name].place) for name, window in self.windows.items()]
        places = [(window, place) for window, place in places if not place.never]
        rates = {w.end - w.begin: place.refresh(self.total_steps) for w, place in places}
        short = {steps: rate for steps, rate in rates.items() if 0 <= steps < 2 * rate and rate > 1}
        if short and self.config.end > self.config.start:
            warn_once(
                logger, self.model,
                "stages freeze within %d steps, less than twice the refresh rate (%d): few entries are drawn anew "
                "before they are frozen for good. Train longer, use fewer stages (stages=...), or refresh_rate=%d.",
                min(short), short[min(short)], max(1, min(short) // 5),
            )  # fmt: skip

    # ---- pure functions of the step ----

    def state(self, step: int) -> dict[str, tuple[str, float]]:
        """State ("pending", "transition", "frozen") and target frozen fraction of every layer, by name, at `step`."""
        return {name: layer.place.state(step, self.total_steps) for name, layer in self.layers.items()}

    def is_complete(self, step: int | None = None) -> bool:
        """Whether every layer is frozen at `step` (default: the current one)."""
        return not self.unfinished_stages(step)

    def stage_in_transition(self, step: int | None = None) -> tuple[int, str, float]:
        """Number (from 1), name and target frozen fraction of the stage that is freezing, or is next to freeze."""
        step = self.current_step if step is None else step
        freezing = [entry for entry in self.plan.entries if not self.layers[entry.name].always_real]
        for entry in freezing:
            if step < self.windows[entry.name].end:
                _, share = self.layers[entry.name].place.state(step, self.total_steps)
                return entry.stage + 1, entry.stage_name, share
        last = (freezing or self.plan.entries)[-1]
        return last.stage + 1, last.stage_name, float(bool(freezing))

    def unfinished_stages(self, step: int | None = None) -> list[str]:
        """Names of the stages that are not fully frozen at `step`."""
        step = self.current_step if step is None else step
        late = (e for e in self.plan.entries if step < self.windows[e.name].end and not self.layers[e.name].always_real)
        return list({entry.stage_name: None for entry in late})

    def frozen_layers(self) -> list[str]:
        """Names of the layers that are frozen now."""
        return [name for name, layer in weighted(self.layers).items() if layer.stage_state == FROZEN]

    @property
    def outcome(self) -> str:
        """What a model is once its progression is complete, in words."""
        if self.config.binarize == "nothing":
            return "full precision"
        real = [name for name, layer in self.layers.items() if layer.always_real]
        stages = {entry.stage for entry in self.plan.entries if entry.name not in real}
        return f"{len(stages)} of {self.plan.stage_count} stages binary" if real else "fully binary"

    # ---- driving the model ----

    def step(self, step: int) -> None:
        """Apply the state after `step` updates: states, masks, and the starting values that are due.

        Call it before each optimizer step (0, 1, 2, ...) and once more with the total at the end. Calling it twice
        with one step changes nothing.

        Raises:
            ConfigError: no step of this progression. Once it has ended, later ones are as its end.
            HoldError: STE-free, a frozen sign moved since the last step.
            NonFiniteError: an activation seen by the sampled check was NaN or infinite, or the values that a stage is
                to start from are.
            NotCalibratedError: nothing but padding reached a layer while its stage froze.
        """
        if type(step) is int and step > self.total_steps and self.current_step == self.total_steps:
            step = self.total_steps  # training goes on behind the end: everything is frozen, and stays so
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self.total_steps:
            raise ConfigError(
                f"Progression.step({step!r}): a step is a whole number from 0 to total_steps={self.total_steps}, the "
                "state after so many updates. Is total_steps the number of optimizer steps of the whole run?"
            )
        for root in self._roots:
            attended(root)
        reshard(self.model)
        self._optimizers.before(step)
        self._checks.read(self.current_step)
        if step != self.current_step:
            self._observation.take(step)
        for layer in self.layers.values():
            layer.advance(step, self.total_steps)
        write_states(list(self.layers.values()))
        self._keep_scales_positive()
        self.current_step = step
        self._optimizers.after(step)
        self._observation.begin(step)
        self._arm_checks(step)
        self._compiled.renew(looks=self._observation.is_on or self._checks.are_on)

    def _keep_scales_positive(self) -> None:
        scales = [local(scale.detach()) for layer in self.layers.values() for scale in layer.scales()]
        if scales:
            clamp_min_all(scales, SCALE_FLOOR)

    def attach(self, optimizer: Any) -> None:
        """Hold frozen entries against the optimizer's inertia and decay (STE-free); apply the rates.

        Forward: STE-free, after each optimizer step, latents of frozen entries are what they were before it, so the
        sign of a frozen entry cannot change while it stays frozen; unfrozen entries, scales and biases go on learning.
        What is pending moves by pending_lr times the optimizer's step; binary layers, once their window has opened, by
        binary_lr times it, and their scales and thresholds by scale_lr times that. In several processes parameters that
        no gradient reaches are skipped, as they are in one.

        Call it for each optimizer before the first step; only its own parameters are held, and attaching it again
        changes nothing. The next `step` looks whether every frozen sign is the committed one.

        Args:
            optimizer: a torch optimizer, accelerate's wrapper of one, or transformers' layer-wise one.

        Raises:
            ConfigError: something has to be held, and the optimizer has no step hooks, has none of this model's
                parameters, or moves weights where no hook can put them back (LBFGS, schedule-free ones).
            ShardingError: it is DeepSpeed's.
        """
        self._optimizers.attach(optimizer)

    def detach(self) -> None:
        """Let go of the optimizers, remove what this object put on the model, and put torch.compile's settings back."""
        self._compiled.release()
        self._observation.end()
        self._checks.disarm()
        self._optimizers.release()

    def stop_after(self, stage: int) -> None:
        """Let no stage behind the `stage`-th (from 1; 0: none) freeze: what has begun there is real again, for good.

        The model then is what `last_stage` makes: once the others are frozen it is finished. Latents of later stages
        stay as they are; where these were binary already, put back weights from before their windows opened.

        Raises:
            ConfigError: no stage of this model; or its parts were binarized apart, and have stages of their own.
        """
        if len(self._roots) > 1:
            raise ConfigError("stop_after: parts of this model were binarized apart; say last_stage for each of them.")
        stop_at(self._roots[0], stage)
        optimizers = self._optimizers.attached
        self._optimizers.release()
        self._find_windows()
        for optimizer in optimizers:
            self.attach(optimizer)
        self.step(self.current_step)

    def check_latents(self) -> None:
        """Raise NonFiniteError if a latent weight is NaN or infinite."""
        check_latents(self.layers, self.current_step)

    def _arm_checks(self, step: int) -> None:
        self._checks.disarm()
        if self.config.check_every and step % self.config.check_every == 0 and step < self.total_steps:
            self._checks.arm({name: layer for name, layer in self.layers.items() if layer.stage_state != PENDING})

    # ---- the model as if it were fully binary now ----

    @contextlib.contextmanager
    def committed(self, batches: Iterable[Any]) -> Iterator[None]:
        """Inside the block the model is fully binary, as if every stage froze now; then everything is put back.

        Layers that have no activation values yet get some from `batches`, and batch-norm statistics are re-estimated
        on them, all of it for the time of the block.
        """
        norms = [m for m in self.model.modules() if isinstance(m, BatchNorm)]
        saved = [(b, b.detach().clone()) for norm in norms for b in norm.buffers()]
        with contextlib.ExitStack() as stack:
            reshard(self.model)
            for layer in self.layers.values():
                stack.enter_context(layer.values_kept())
                layer.advance(self.total_steps, self.total_steps)
            write_states(list(self.layers.values()))
            try:
                calibrate(self.model, batches, batch_norm=bool(norms))
                yield
            finally:
                reshard(self.model)
                with torch.no_grad():
                    for buffer, before in saved:
                        buffer.copy_(before)


def calibrate(model: nn.Module, batches: Iterable[Any], *, batch_norm: bool = False) -> nn.Module:
    """Set the activation values of committed layers that have none, from data, in forward order.

    A layer takes its values from its first call and then runs binary, so that the layers behind it see what they will
    see; over several batches the values are those of all rows seen. Training does this by itself.

    Args:
        model: a binarized model.
        batches: what the model is called with: mappings of keyword arguments, tuples, or tensors.
        batch_norm: re-estimate batch-norm statistics on the same batches.
    """
    root = driven_model(model)
    reshard(root)
    watch = Watch(by_hand=True)
    due = [
        (layer, Observer(watch))
        for layer in members(root).values()
        if layer.stage_state != PENDING and layer.needs_activation_values and not layer.activation_ready
    ]
    norms = [m for m in root.modules() if batch_norm and isinstance(m, BatchNorm)]
    if not due and not norms:
        return model
    handles = write_after_forward(root, [layer for layer, _ in due])
    with undisturbed(root, except_for=norms):
        for batch in batches:
            watch.masks = padding_masks(batch) if hasattr(batch, "keys") else []
            for layer, observer in due:
                layer.observer, layer.training = observer, True  # to these layers training means: look
            for norm in norms:
                norm.training = True
            run(root, batch)
    remove_all(handles)
    reshard(root)
    for layer, observer in due:
        layer.observer = None
        if observer.rows:
            layer.calibrate_observed(observer)
    return model
