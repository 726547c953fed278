"""Distiller: teacher losses added inside the model's own forward, for Trainer and custom loops alike.

In forward order the stages behind the one in transition are still real and expect the features of the full-precision
model. Matching the teacher's hidden states at the blocks gives each stage that target while it freezes.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, logsigmoid, mse_loss

from ..errors import ConfigError, DistillationError
from ..integrations.torch import forget_graphs, remove_all
from ..method.class_divergence import class_divergence
from ..surgery.blocks import block_of
from ..surgery.members import get_plan, members, planned_model


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks around a binarized model's binary layers, by name, in execution order."""
    root = planned_model(model)
    entries = sorted(get_plan(root).entries, key=lambda entry: entry.position)
    names = dict.fromkeys(block_of(root, entry.name) for entry in entries)
    return {name: root.get_submodule(name) for name in names if name is not None}


def snapshot(model: nn.Module) -> nn.Module:
    """A copy of a binarized model as it computes before anything is frozen: a teacher for its own binarization.

    Raises:
        DistillationError: the parameters are sharded (FSDP), so that no process holds a whole model.
    """
    root = planned_model(model)
    if any(hasattr(parameter, "full_tensor") for parameter in root.parameters()):
        raise DistillationError(
            f"{type(root).__name__} is sharded over processes and cannot be its own teacher: fine-tune it first, and "
            "give teacher=PATH."
        )
    return as_if_pending(copy.deepcopy(root)).eval().requires_grad_(False)


def as_if_pending(model: Any) -> Any:
    """The same binarized model, as it computes before anything is frozen; in place."""
    for member in members(model).values():
        member.begin_anew()
        member.observer = None
    return model


def hidden_loss(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared error of hidden states, in units of the teacher's variance.

    Forward:  L = mean |h - h_T|^2 / mean |h_T - m|^2, m the mean of each feature over the batch; 0 for a perfect
              match, about 1 for a student that knows the means only. Padded positions are left out.
    Shapes:   student, teacher (batch, length, features) or (batch, channels, *size), any float dtype; real (batch,
              length), nonzero where a position is no padding. Returns a float32 scalar (float64 for float64).
    Source:   the loss is the field's; dividing by the variance, so that one weight fits all blocks, is this library's
              choice.
    """
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(wide), teacher.detach().to(wide)
    if real is not None and student.shape[:2] == real.shape and student.dim() == 3:
        student, teacher = student[real.bool()], teacher[real.bool()]
        others = [0]
    else:
        others = [0, *range(2, student.dim())] if student.dim() > 3 else list(range(student.dim() - 1))
    spread = (teacher - teacher.mean(others, keepdim=True)).square().mean()
    return mse_loss(student, teacher) / spread.clamp_min(torch.finfo(wide).tiny)


def logits_loss(
    student: Tensor, teacher: Tensor, kind: str, temperature: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Divergence of the student's predictions from the teacher's.

    Forward:  classes:    T^2 * KL(softmax(z_T / T) || softmax(z / T))
              regression: (z - z_T)^2
              labels (multi-label): T^2 * sum over labels of KL of two Bernoulli distributions
              each averaged over all leading dimensions, or summed with `weight` (0 leaves a position out)
    Shapes:   student, teacher (..., classes); weight: the leading dimensions. Returns a float32 scalar.
    Source:   Hinton et al. (2015); the kinds are this library's choice.
    """
    if kind == "regression":
        each = (student.float() - teacher.detach().float()).square().mean(-1)
    elif kind == "classes":
        each = class_divergence(student, teacher, temperature)
    else:
        z, target = student.float() / temperature, teacher.detach().float() / temperature
        yes = kl_div(logsigmoid(z), logsigmoid(target), reduction="none", log_target=True)
        no = kl_div(logsigmoid(-z), logsigmoid(-target), reduction="none", log_target=True)
        each = (yes + no).sum(-1) * temperature**2
    return each.mean() if weight is None else (each * weight).sum()


def check_weights(logits: float, hidden: float, task: float, temperature: float) -> None:
    """Raise ConfigError for weights that are negative or teach nothing, or a temperature that is not positive."""
    for name, value in (("logits", logits), ("hidden", hidden), ("task", task)):
        if not 0.0 <= value < float("inf"):
            raise ConfigError(f"distillation: {name}={value!r} must be a weight of 0 or more, as in {name}=1.0.")
    if logits == hidden == 0.0:
        raise ConfigError("distillation: logits and hidden are both 0: nothing to teach. Give one, as in hidden=1.0.")
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"distillation: temperature={temperature!r} must be positive, as in temperature=1.0.")


class Distiller:
    """Adds teacher losses to what a model's forward returns as `loss`, in training mode only.

    Forward:  loss = task * loss + logits * logits_loss + hidden * mean over blocks of hidden_loss
              An output without a loss (no labels given) gets the teacher's part alone: unlabelled data will do.

    Two forward hooks on the model do it, so Trainer, accelerate and DDP need no subclass, and outputs keep their shape.
    The teacher sees the same inputs without the labels, in eval mode and without gradient; it is no part of the
    model, so nothing saves, converts or wraps it. Blocks are compared by their place; where the teacher has more of
    them, at evenly spaced ones.

    Use:  distiller = Distiller(model, teacher)        # after binarize_model
          ... train ...
          distiller.detach()

    Args:
        model: a binarized model, or a wrapper of one.
        teacher: a full-precision model of the same task; None until one is set (`distiller.teacher = ...`): then
            forward is untouched.
        logits: weight of the divergence of predictions; 0 leaves it out.
        hidden: weight of the hidden states' loss; 0 leaves it out.
        task: weight of the model's own loss.
        temperature: T of the predictions' divergence.

    Raises:
        ConfigError: weights that are negative or all zero, or a temperature that is not positive.
        DistillationError: hidden states that cannot be compared, or outputs without logits.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | None = None,
        logits: float = 1.0,
        hidden: float = 1.0,
        task: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        check_weights(logits, hidden, task, temperature)
        self.logits, self.hidden, self.task, self.temperature = logits, hidden, task, temperature
        self.last: dict[str, Tensor] = {}
        """Parts of the last loss by name (task, logits, hidden), detached."""
        self.used = True
        """Whether the last loss that was added has got a gradient."""
        self.autocast: torch.dtype | None = None
        """What the teacher computes in, if not in its own dtype: Trainer's autocast begins inside the student."""
        blocks = blocks_of(model)
        self._names = list(blocks)
        if hidden and not blocks:
            raise DistillationError(
                f"{type(model).__name__} has no repeated blocks whose hidden states could be compared; use hidden=0."
            )
        self._teacher: nn.Module | None = None
        self._states: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._goals: dict[str, Tensor] = {}
        self._listening = False
        root = planned_model(model)
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, with_kwargs=True),
        ]
        if hidden:
            self._handles += [b.register_forward_hook(self._keeps(i)) for i, b in enumerate(blocks.values())]
        self._teacher_handles: list[Any] = []
        self.teacher = teacher
        forget_graphs()

    # ---- the teacher ----

    @property
    def teacher(self) -> nn.Module | None:
        """The full-precision model, in eval mode and without gradients; None leaves forward untouched."""
        return self._teacher

    @teacher.setter
    def teacher(self, teacher: nn.Module | None) -> None:
        remove_all(self._teacher_handles)
        self._teacher = teacher
        if teacher is None:
            return
        teacher.eval().requires_grad_(False)
        if self.hidden:
            for index, block in enumerate(self._teacher_blocks(teacher)):

                def keep(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                    self._targets[index] = _first_tensor(output)

                self._teacher_handles.append(block.register_forward_hook(keep))

    def _teacher_blocks(self, teacher: nn.Module) -> list[nn.Module]:
        """As many of the teacher's blocks as the student has, evenly spaced, the last one among them."""
        leaves = [name for name, module in teacher.named_modules() if next(module.children(), None) is None]
        names = dict.fromkeys(block_of(teacher, name) for name in leaves)
        theirs, mine = _by_container(name for name in names if name is not None), _by_container(self._names)
        chosen: dict[str, nn.Module] = {}
        for container, blocks in mine.items():
            found = theirs.get(container, [])
            if len(found) < len(blocks):
                raise DistillationError(
                    f"the teacher, a {type(teacher).__name__}, has {len(found)} blocks where the student has "
                    f"{len(blocks)} ({blocks[0]}, ...): their hidden states cannot be compared. Use a teacher of the "
                    "same class and at least the same depth, or hidden=0."
                )
            for place, name in enumerate(blocks, 1):
                chosen[name] = teacher.get_submodule(found[place * len(found) // len(blocks) - 1])
        return [chosen[name] for name in self._names]

    # ---- hooks ----

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._states, self._targets, self._goals = {}, {}, {}
        self._listening = self._teacher is not None and model.training and torch.is_grad_enabled()
        if not self._listening:
            return
        assert self._teacher is not None
        place = next(model.parameters()).device
        if next(self._teacher.parameters()).device != place:
            self._teacher.to(place)
        aside = {"num_items_in_batch"}
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            aside.add("labels")  # a decoder's inputs are made from them
        given = {name: value for name, value in kwargs.items() if name not in aside}
        mixed = contextlib.nullcontext() if self.autocast is None else torch.autocast(place.type, self.autocast)
        with torch.no_grad(), mixed:
            outputs = self._teacher(*args, **given)
        self._goals = dict(_predictions(outputs))

    def _keeps(self, index: int) -> Callable[..., None]:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._listening:  # not when activation checkpointing runs the block again
                self._states[index] = _first_tensor(output)

        return keep

    def _after(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self._listening:
            return None
        self._listening = False
        if not hasattr(outputs, "items"):
            raise DistillationError(
                f"{type(model).__name__} returned a {type(outputs).__name__}, not an output with names: use "
                "return_dict=True, transformers' default."
            )
        parts: dict[str, Tensor] = {}
        share = _share(model, kwargs)
        if self.logits:
            parts["logits"] = self.logits * share * self._logits_part(model, kwargs, outputs)
        if self.hidden:
            parts["hidden"] = self.hidden * share * self._hidden_part(kwargs)
        self._states, self._targets, self._goals = {}, {}, {}
        own = outputs.get("loss")
        if own is not None and self.task:
            parts["task"] = self.task * own
        loss: Any = sum(parts.values())
        self.last = {name: part.detach() for name, part in parts.items()}
        if loss.requires_grad:
            self.used = False
            loss.register_hook(self._mark_used)
        outputs["loss"] = loss
        return outputs

    def _mark_used(self, grad: Tensor) -> None:
        self.used = True

    def _logits_part(self, model: nn.Module, kwargs: dict[str, Any], outputs: Any) -> Tensor:
        mine = dict(_predictions(outputs))
        if not mine or mine.keys() != self._goals.keys():
            raise DistillationError(
                f"{type(model).__name__} returned {_names(mine)} and the teacher {_names(self._goals)}: their "
                "predictions cannot be compared. Use a teacher of the same task, or logits=0 with hidden."
            )
        kind = _kind_of_task(model)
        losses = []
        for name, logits in mine.items():
            goal = self._goals[name]
            if logits.shape != goal.shape:
                raise DistillationError(
                    f"{name} has the shape {tuple(logits.shape)} and the teacher's {tuple(goal.shape)}: use a teacher "
                    "with the same labels, or logits=0 with hidden."
                )
            losses.append(logits_loss(logits, goal, kind, self.temperature, _weight(model, logits, kwargs)))
        return torch.stack(losses).mean()

    def _hidden_part(self, kwargs: dict[str, Any]) -> Tensor:
        real = kwargs.get("attention_mask")
        losses = []
        for index, name in enumerate(self._names):
            if index not in self._states or index not in self._targets:
                raise DistillationError(f"{name} did not run in this forward; use hidden=0.")
            mine, goal = self._states[index], self._targets[index]
            if mine.shape != goal.shape:
                raise DistillationError(
                    f"{name} gives {tuple(mine.shape)} and the teacher's block {tuple(goal.shape)}: use a teacher of "
                    "the same width, or hidden=0."
                )
            losses.append(hidden_loss(mine, goal, real if isinstance(real, Tensor) else None))
        return torch.stack(losses).mean()

    def detach(self) -> None:
        """Remove all hooks; the model's forward is its own again."""
        remove_all(self._handles)
        remove_all(self._teacher_handles)
        self._teacher = None
        forget_graphs()


def _by_container(blocks: Iterable[str]) -> dict[str, list[str]]:
    """Blocks by their names without numbers: `encoder.layer.3` and `encoder.layer.0` are alike."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        found.setdefault(".".join(part for part in block.split(".") if not part.isdecimal()), []).append(block)
    return found


def _first_tensor(output: Any) -> Tensor:
    tensor = output if isinstance(output, Tensor) else output[0]
    if not isinstance(tensor, Tensor):
        raise DistillationError(f"a block returned a {type(output).__name__} without a tensor in front; use hidden=0.")
    return tensor


def _predictions(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The outputs that are logits: logits, start_logits, logits_per_image, ..."""
    if hasattr(outputs, "items"):
        yield from ((k, v) for k, v in outputs.items() if "logits" in k and isinstance(v, Tensor))


def _names(found: dict[str, Tensor]) -> str:
    return ", ".join(found) or "no logits"


def _kind_of_task(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or (problem is None and getattr(config, "num_labels", 2) == 1):
        return "regression"
    return "labels" if problem == "multi_label_classification" else "classes"


def _labelled(model: nn.Module, labels: Tensor) -> Tensor:
    """Which positions of (batch, length) logits have a label; in a causal language model each predicts the next one."""
    if any(word in type(model).__name__ for word in ("CausalLM", "LMHead")):
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return labels != -100


def _weight(model: nn.Module, logits: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """Weights of the positions of token-wise logits, of sum 1: 0 where there is no label, or padding; else None."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if logits.dim() != 3:
        return None
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:2]:
        real = _labelled(model, labels)
    elif labels is None and isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        real = mask != 0
    else:
        return None
    return real / real.sum().clamp_min(1)


def _share(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """This call's part of the labels of an optimizer step: Trainer has token-wise losses divided by all of them."""
    labels, total = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if total is None or not isinstance(labels, Tensor) or labels.dim() != 2:
        return 1.0
    return _labelled(model, labels).sum() / total
