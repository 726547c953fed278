"""Progression: from (step, total steps) to the state of every stage. Drives the masks; knows no Trainer."""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import compiling
from .config import StoMPPConfig
from .errors import CheckpointError, ConfigError, NonFiniteError
from .hold import hold_frozen, skip_blocked
from .masks import SoftRefreshMask
from .modules import FROZEN, PENDING, TRANSITION, BinaryLayer, Member
from .modules.calibration import Observer, in_processes, padding_masks, reduced
from .pending_lr import first_steps, slow_pending
from .plan import Plan, members, planned_model
from .running import run, undisturbed
from .schedules import frozen_fraction
from .sharding import (
    complete_states,
    everywhere,
    is_sharded,
    local,
    refuse_optimizer,
    refuse_unsupported,
    reshard,
    write_after_forward,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """The steps [begin, end) in which a layer freezes; empty (begin == end): straight from pending to frozen."""

    begin: int
    end: int

    def state(self, step: int) -> tuple[str, float]:
        """State at `step`, and the share of the window that has passed."""
        if step < self.begin:
            return PENDING, 0.0
        if step >= self.end:
            return FROZEN, 1.0
        return TRANSITION, (step - self.begin) / (self.end - self.begin)

    @property
    def observed_at(self) -> int:
        """The training step whose inputs set the activation values: the last one with nothing frozen yet."""
        return self.begin if self.end > self.begin or self.begin == 0 else self.begin - 1


def _cut(total: int, start: float, end: float, part: int, parts: int) -> int:
    return round(total * (start + (end - start) * part / parts))


def windows(plan: Plan, total_steps: int) -> dict[str, Window]:
    """The window of every layer, by name.

    Stage k of n has [start + (end - start) k / n, start + (end - start)(k + 1) / n) of the run, in whole steps; with
    within_stage="forward" its layers split that window in order.
    """
    config, count = plan.config, plan.stage_count
    if config.binarize == "nothing":
        never = Window(total_steps + 1, total_steps + 1)
        return {entry.name: never for entry in plan.entries}
    result = {}
    for stage in range(count):
        inside = [entry.name for entry in plan.entries if entry.stage == stage]
        parts = len(inside) if config.within_stage == "forward" else 1
        for index, name in enumerate(inside):
            place = stage * parts + (index if parts > 1 else 0)
            edges = [_cut(total_steps, config.start, config.end, place + i, count * parts) for i in (0, 1)]
            result[name] = Window(*edges)
    return result


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
    is fixed when a model's training first starts and is saved with the model; a later Progression keeps it.

    Args:
        model: a binarized model, or a wrapper of one (DDP, PEFT, compiled).
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
        self.model = planned_model(model)
        self.layers: dict[str, Member] = members(self.model)
        self.plan: Plan = self.model.stompp_plan  # type: ignore[assignment]
        if self.config.frozen_gradient == "zero" and compiling.is_compiled(model):
            compiling.refuse_untraceable(self.model)
        self.total_steps = self._settle_total(total_steps, rescale)
        self.windows = windows(self.plan, self.total_steps)
        self.current_step = next(iter(self.layers.values())).step
        self._masks: dict[str, SoftRefreshMask] = {}
        self._handles: list[Any] = []
        self._holds: list[Any] = []
        self._checks: list[tuple[str, torch.Tensor]] = []
        self._check_handles: list[Any] = []
        fingerprint = self.plan.fingerprint(getattr(self.model, "base_model_prefix", ""))
        for layer in self.layers.values():
            layer.total_steps, layer.fingerprint = self.total_steps, fingerprint
        self._warn_of_short_windows()

    @property
    def config(self) -> StoMPPConfig:
        """The configuration that the model was binarized with."""
        return self.plan.config

    def _weighted(self) -> dict[str, BinaryLayer]:
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, BinaryLayer)}

    def _settle_total(self, asked: int, rescale: bool) -> int:
        layer = next(iter(self.layers.values()))
        saved, step = layer.total_steps, layer.step
        if saved in (0, asked):
            return asked
        if not rescale:
            logger.warning(
                "this model's progression was fixed at %d steps when its training began; it stays so, although this "
                "run has %d. To stretch or shrink what is left: Progression(model, %d, rescale=True), or "
                "StoMPPTrainerCallback(rescale=True).",
                saved, asked, asked,
            )  # fmt: skip
            return saved
        old, new = windows(self.plan, saved), windows(self.plan, asked)
        thawed = {e.stage_name for e in self.plan.entries if old[e.name].end <= step < new[e.name].end}
        if thawed:
            raise CheckpointError(
                f"rescale=True: with {asked} steps in place of {saved}, {', '.join(sorted(thawed))} would thaw at step "
                f"{step}. Use a total of at most {saved}, or keep the old one (rescale=False)."
            )
        return asked

    def _warn_of_short_windows(self) -> None:
        rate = self.config.refresh_rate
        short = {w.end - w.begin for w in self.windows.values() if 0 <= w.end - w.begin < 2 * rate}
        if short and self.config.end > self.config.start and self.config.binarize != "nothing":
            logger.warning(
                "stages freeze within %d steps, less than twice the refresh rate (%d): few entries get a second draw. "
                "Train longer, use fewer stages (stages=...), or lower refresh_rate.",
                min(short), rate,
            )  # fmt: skip

    # ---- pure functions of the step ----

    def state(self, step: int) -> dict[str, tuple[str, float]]:
        """State ("pending", "transition", "frozen") and target frozen fraction of every layer, by name, at `step`."""
        result = {}
        for name, window in self.windows.items():
            state, t = window.state(step)
            result[name] = (state, frozen_fraction(self.config.schedule, t) if state == TRANSITION else t)
        return result

    def is_complete(self, step: int | None = None) -> bool:
        """Whether every layer is frozen at `step` (default: the current one)."""
        step = self.current_step if step is None else step
        if self.config.binarize == "nothing":
            return True
        return all(window.end <= step for window in self.windows.values())

    def stage_in_transition(self, step: int | None = None) -> tuple[int, str, float]:
        """Number (from 1), name and target frozen fraction of the stage that is freezing, or is next to freeze."""
        step = self.current_step if step is None else step
        for entry in self.plan.entries:
            window = self.windows[entry.name]
            if step < window.end:
                _, t = window.state(step)
                return entry.stage + 1, entry.stage_name, frozen_fraction(self.config.schedule, t)
        return self.plan.stage_count, self.plan.entries[-1].stage_name, float(self.config.binarize != "nothing")

    def unfinished_stages(self, step: int | None = None) -> list[str]:
        """Names of the stages that are not fully frozen at `step`."""
        step = self.current_step if step is None else step
        if self.config.binarize == "nothing":
            return []
        return list({e.stage_name: None for e in self.plan.entries if step < self.windows[e.name].end})

    # ---- driving the model ----

    def step(self, step: int) -> None:
        """Apply the state after `step` updates: states, masks, and the starting values that are due.

        Call it before each optimizer step (0, 1, 2, ...) and once more with the total at the end. Calling it twice
        with one step changes nothing.

        Raises:
            NonFiniteError: an activation seen by the sampled check was NaN or infinite.
        """
        reshard(self.model)
        self._read_checks()
        self._take_observed(step)
        for name, (state, p) in self.state(step).items():
            layer = self.layers[name]
            if state != PENDING:
                layer.calibrate_weight()
            layer.enter(state, p)
            if state == TRANSITION:
                self._draw(name, layer, step, p)
            else:
                for attribute in layer.masked_tensors():
                    self._masks.pop(f"{name}.{attribute}", None)
            layer.step = step
        self.current_step = step
        self._observe(step)
        self._arm_checks(step)
        compiling.begin_step(len(self.layers), looks=bool(self._handles or self._check_handles))

    def _draw(self, name: str, layer: Member, step: int, p: float) -> None:
        for attribute, shape in layer.masked_tensors().items():
            key = f"{name}.{attribute}"
            if key not in self._masks:
                prefix = getattr(self.model, "base_model_prefix", "")
                label = key.removeprefix(f"{prefix}.") if prefix else key
                rate = self.config.refresh_rate
                self._masks[key] = SoftRefreshMask(shape.numel(), self.config.mask_seed, label, rate)
            mask = getattr(layer, attribute)
            if mask is None:
                mask = torch.zeros(shape, dtype=layer.like.dtype, device=layer.stompp_state.device)
                setattr(layer, attribute, mask)
            self._masks[key].fill(mask, step, p)

    def _observe(self, step: int) -> None:
        due = [
            layer
            for name, layer in self.layers.items()
            if self.windows[name].observed_at <= step and self.config.binary_activations
            and layer.needs_activation_values and not layer.activation_ready
        ]  # fmt: skip
        if not due:
            return
        masks: list[torch.Tensor] = []
        for layer in due:
            layer.observer = layer.observer or Observer()
            layer.observer.masks = masks  # one list for all, which the model's hook keeps current

        def note_masks(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            masks[:] = padding_masks(kwargs)

        self._drop_handles()
        self._handles.append(self.model.register_forward_pre_hook(note_masks, with_kwargs=True))
        self._handles += write_after_forward(self.model, [layer for layer in due if layer.frozen_share > 0.0])

    def _take_observed(self, step: int) -> None:
        looking = [layer for layer in self.layers.values() if layer.observer is not None and step != self.current_step]
        if looking:
            # A layer that ran on any process takes its values on all of them: they are summed over processes.
            ran = [int(bool(layer.observer and layer.observer.rows)) for layer in looking]
            ran = reduced(torch.tensor(ran, device=looking[0].stompp_state.device), "max").tolist()
            for layer in itertools.compress(looking, ran):
                assert layer.observer is not None
                layer.calibrate_observed(layer.observer)
                layer.observer = None
        if all(layer.observer is None for layer in self.layers.values()):
            self._drop_handles()

    def _drop_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def attach(self, optimizer: Any) -> None:
        """Hold frozen entries against the optimizer's inertia and decay (STE-free), and apply `pending_lr`.

        Forward: STE-free, after each optimizer step, latents of frozen entries are what they were before it, so the
        sign of a frozen entry cannot change while it stays frozen; unfrozen entries, scales and biases go on learning.
        With pending_lr below 1, what is still pending moves by that share of the optimizer's step. In several processes
        parameters that no gradient reaches are skipped, as they are in one.

        Args:
            optimizer: a torch optimizer, or accelerate's wrapper of one.

        Raises:
            ConfigError: the optimizer has no step hooks, and one is needed.
            ShardingError: it is DeepSpeed's.
        """
        refuse_optimizer(optimizer)
        if reshard(self.model):
            complete_states(optimizer)
        if self.config.frozen_gradient == "zero" and self.config.binarize != "nothing":
            self._holds += hold_frozen(optimizer, list(self._weighted().values()))
        if in_processes() and not any(is_sharded(p) for p in self.model.parameters()):
            self._holds += skip_blocked(optimizer, self.model.parameters())
        if self.config.pending_lr != 1.0:
            parameters = first_steps(self.model, {name: window.begin for name, window in self.windows.items()})
            self._holds += slow_pending(optimizer, parameters, self.config.pending_lr, lambda: self.current_step)

    def detach(self) -> None:
        """Let go of the optimizers, remove what this object put on the model, and put torch.compile's settings back."""
        compiling.end()
        for layer in self.layers.values():
            layer.observer = None
        for handle in (*self._holds, *self._handles, *self._check_handles):
            handle.remove()
        self._holds, self._handles, self._check_handles = [], [], []

    # ---- looking for what sign() hides ----

    def check_latents(self) -> None:
        """Raise NonFiniteError if a latent weight is NaN or infinite."""
        for name, layer in self._weighted().items():
            if not everywhere(torch.isfinite(local(layer.weight)).all(), layer.weight):
                raise NonFiniteError(
                    f"the latent weight of {name} is not finite (step {self.current_step}). Lower the learning rate, "
                    "or clip gradients (max_grad_norm); then resume from the last checkpoint."
                )

    def _arm_checks(self, step: int) -> None:
        for handle in self._check_handles:
            handle.remove()
        self._check_handles.clear()
        if not self.config.check_every or step % self.config.check_every or step == self.total_steps:
            return
        for name, layer in self.layers.items():
            if layer.stage_state == PENDING:
                continue

            def note(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = name) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self._checks.append((name, torch.isfinite(x.detach()).all()))  # read one step later: no wait

            self._check_handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))

    def _read_checks(self) -> None:
        checks, self._checks = self._checks, []
        for name, finite in checks:
            if not bool(finite):
                raise NonFiniteError(
                    f"the input of {name} was not finite near step {self.current_step}; sign() would hide it. Lower "
                    "the learning rate, or check the data; then resume from the last checkpoint."
                )

    # ---- the model as if it were fully binary now ----

    @contextlib.contextmanager
    def committed(self, batches: Iterable[Any]) -> Iterator[None]:
        """Inside the block the model is fully binary, as if every stage froze now; then everything is put back.

        Layers that have no activation values yet get some from `batches`, and batch-norm statistics are re-estimated
        on them, all of it for the time of the block.
        """
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        saved = [(b, b.detach().clone()) for norm in norms for b in norm.buffers()]
        with contextlib.ExitStack() as stack:
            reshard(self.model)
            for layer in self.layers.values():
                stack.enter_context(layer.values_kept())
                layer.calibrate_weight()
                layer.enter(FROZEN if self.config.binarize != "nothing" else PENDING, 1.0)
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
    root = planned_model(model)
    reshard(root)
    due = [
        (layer, Observer())
        for layer in members(root).values()
        if layer.stage_state != PENDING and layer.needs_activation_values and not layer.activation_ready
    ]
    norms = [m for m in root.modules() if batch_norm and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not due and not norms:
        return model
    handles = write_after_forward(root, [layer for layer, _ in due])
    with undisturbed(root, except_for=norms):
        for batch in batches:
            for layer, observer in due:
                observer.masks = padding_masks(batch) if hasattr(batch, "keys") else []
                layer.observer, layer.training = observer, True  # to these layers training means: look
            for norm in norms:
                norm.training = True
            run(root, batch)
    for handle in handles:
        handle.remove()
    reshard(root)
    for layer, observer in due:
        layer.observer = None
        if observer.rows:
            layer.calibrate_observed(observer)
    return model
