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

from ..errors import DistillationError
from ..integrations.sharding import is_sharded
from ..integrations.torch import forget_graphs, remove_all
from ..modules.stage_member import with_idle
from ..surgery.blocks import block_of
from ..surgery.members import get_plan, members, planned_model
from .compared import Place, embedding_places, hidden_places, relation_places
from .teacher_losses import check_weights, hidden_loss, logits_loss, relation_loss


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


class Distiller:
    """Adds teacher losses to what a model's forward returns as `loss`, in training mode only.

    Forward:  loss = task * loss + logits * logits_loss + hidden * mean over blocks of hidden_loss
                     + relations * mean over the queries, keys and values of all blocks of relation_loss
              A sum over n blocks, as in BiT, is n times the weight.
              An output without a loss (no labels given) gets the teacher's part alone: unlabelled data will do.

    Two forward hooks on the model do it, so Trainer, accelerate and DDP need no subclass, and outputs keep their shape.
    The teacher sees the same inputs without the labels, in eval mode and without gradient; it is no part of the
    model, so nothing saves, converts or wraps it. Blocks are compared by their place; where the teacher has more of
    them, at evenly spaced ones.

    With task = logits = 0 a head behind the blocks gets no gradient and stays what it was, under weight decay, too: the
    teacher's own, if the student began as a copy of it.

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
        relations: weight of the attention relations' loss; 0 leaves it out. The teacher may be of another width.
        embeddings: whether what enters the first block is one of the hidden states: where embeddings are trained or
            become binary.

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
        relations: float = 0.0,
        embeddings: bool = False,
    ) -> None:
        check_weights(logits, hidden, task, temperature, relations, embeddings)
        self.logits, self.hidden, self.task, self.temperature = logits, hidden, task, temperature
        self.relations, self.embeddings = relations, embeddings
        self.last: dict[str, Tensor] = {}
        """Parts of the last loss by name (task, logits, hidden, relations), detached."""
        self.used = True
        """Whether the last loss that was added has got a gradient."""
        self.autocast: torch.dtype | None = None
        """What the teacher computes in, if not in its own dtype: Trainer's autocast begins inside the student."""
        blocks = blocks_of(model)
        self._names = list(blocks)
        if (hidden or relations) and not blocks:
            raise DistillationError(
                f"{type(model).__name__} has no repeated blocks whose hidden states (or relations) could be compared; "
                "use hidden=0, relations=0."
            )
        self._teacher: nn.Module | None = None
        self._states: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}
        self._goals: dict[str, Tensor] = {}
        self._listening = False
        root = planned_model(model)
        self._chains = _by_container(_all_blocks(root))
        firsts = [chain[0] for chain in self._chains.values() if set(chain) & set(self._names)]
        self._places = self._places_of(root, self._names, firsts)
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, with_kwargs=True),
        ]
        for part in self._places.values():
            for key, place in part.items():
                self._handles.append(place.module.register_forward_hook(self._keeps(key, place), with_kwargs=True))
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
        if not self._places:
            return
        blocks, firsts = self._teacher_blocks(teacher)
        for name, part in self._places_of(teacher, blocks, firsts).items():
            if missing := self._places[name].keys() - part.keys():
                raise DistillationError(
                    f"the teacher, a {type(teacher).__name__}, has nothing to compare with "
                    f"{self._places[name][min(missing)].name}: use a teacher of the same class, or {name}=0."
                )
            for key, place in part.items():

                def keep(module: nn.Module, args: Any, kw: Any, out: Any, key: str = key, place: Place = place) -> None:
                    self._targets[key] = _tensor_at(place, args, kw, out)

                self._teacher_handles.append(place.module.register_forward_hook(keep, with_kwargs=True))

    def _places_of(self, model: nn.Module, blocks: list[str], firsts: list[str]) -> dict[str, dict[str, Place]]:
        """What is compared, by the option that asks for it."""
        found = {}
        if self.hidden:
            found["hidden"] = hidden_places(model, blocks)
            if self.embeddings:
                found["hidden"] |= embedding_places(model, firsts)
        if self.relations:
            found["relations"] = relation_places(model, blocks)
        return found

    def _teacher_blocks(self, teacher: nn.Module) -> tuple[list[str], list[str]]:
        """As many of the teacher's blocks as the student has, evenly spaced, the last one among them; its first ones.

        The student's are counted with those that stay real, and then left out where they do.
        """
        theirs = _by_container(_all_blocks(teacher))
        chosen: dict[str, str] = {}
        firsts = []
        for container, blocks in self._chains.items():
            if not set(blocks) & set(self._names):
                continue
            found = theirs.get(container, [])
            if len(found) < len(blocks):
                raise DistillationError(
                    f"the teacher, a {type(teacher).__name__}, has {len(found)} blocks where the student has "
                    f"{len(blocks)} ({blocks[0]}, ...): their hidden states cannot be compared. Use a teacher of the "
                    "same class and at least the same depth, or hidden=0."
                )
            firsts.append(found[0])
            for place, name in enumerate(blocks, 1):
                chosen[name] = found[place * len(found) // len(blocks) - 1]
        return [chosen[name] for name in self._names], firsts

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

    def _keeps(self, key: str, place: Place) -> Callable[..., None]:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._listening:  # activation checkpointing runs the block again
                return
            if not torch.is_grad_enabled():
                raise DistillationError(
                    f"{place.name} runs without gradients, so that the teacher's loss would not reach it. With "
                    "activation checkpointing: gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            self._states[key] = _tensor_at(place, args, kwargs, output)

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
            parts["hidden"] = self.hidden * share * self._part("hidden", kwargs)
        if self.relations:
            parts["relations"] = self.relations * share * self._part("relations", kwargs)
        self._states, self._targets, self._goals = {}, {}, {}
        own = outputs.get("loss")
        if own is not None and self.task:
            parts["task"] = self.task * own
        loss: Any = sum(parts.values())
        if not parts.keys() & {"task", "logits"}:  # nothing uses the head
            loss = with_idle(loss, (p for p in model.parameters() if not is_sharded(p)))
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

    def _part(self, name: str, kwargs: dict[str, Any]) -> Tensor:
        """The mean over what is compared for `name`, hidden or relations."""
        real = kwargs.get("attention_mask")
        real = real if isinstance(real, Tensor) else None
        losses = []
        for key, place in self._places[name].items():
            if key not in self._states or key not in self._targets:
                raise DistillationError(f"{place.name} did not run in this forward; use {name}=0.")
            mine, goal = self._states[key], self._targets[key]
            if name == "relations":
                fits = mine.dim() == goal.dim() == 3 and mine.shape[:2] == goal.shape[:2]
                if not fits or mine.shape[2] % place.heads or goal.shape[2] % place.heads:
                    raise DistillationError(
                        f"{place.name} gives {tuple(mine.shape)} and the teacher's {tuple(goal.shape)}, which are not "
                        f"(batch, length, {place.heads} heads of one size); use relations=0."
                    )
                losses.append(relation_loss(mine, goal, place.heads, real))
                continue
            if mine.shape != goal.shape:
                raise DistillationError(
                    f"{place.name} gives {tuple(mine.shape)} and the teacher's block {tuple(goal.shape)}: use a "
                    "teacher of the same width, or hidden=0."
                )
            losses.append(hidden_loss(mine, goal, real))
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


def _all_blocks(model: nn.Module) -> list[str]:
    """The names of all repeated blocks of a model, in the order in which they are registered."""
    leaves = [name for name, module in model.named_modules() if next(module.children(), None) is None]
    return [name for name in dict.fromkeys(block_of(model, leaf) for leaf in leaves) if name is not None]


def _tensor_at(place: Place, args: Any, kwargs: Any, output: Any) -> Tensor:
    tensor = place.read(args, kwargs, output)
    if not isinstance(tensor, Tensor):
        raise DistillationError(
            f"{place.name} takes or returns a {type(tensor).__name__} where a tensor is compared; use hidden=0."
        )
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
