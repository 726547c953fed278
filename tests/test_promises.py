"""What other people's optimizers do: STE-free, no frozen sign moves, or the optimizer is refused or named."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stack import batch, stack, update
from torch import Tensor, nn
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from stompp_hf import Progression
from stompp_hf.errors import ConfigError, HoldError
from stompp_hf.surgery.adapters import _needs_weight

TOTAL, WIDTH = 30, 16


def held_stack(**options: Any) -> Any:
    return stack(3, WIDTH, **{"frozen_gradient": "zero", **options})


class Momentum(torch.optim.Optimizer):
    """SGD with momentum and decay, as many write their own; a missing gradient counts as zero."""

    def __init__(self, parameters: Any, lr: float = 0.2) -> None:
        super().__init__(parameters, {"lr": lr})

    def moved(self, parameter: Tensor, lr: float) -> Tensor:
        """Where a parameter goes."""
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        speed = self.state[parameter].setdefault("speed", torch.zeros_like(parameter))
        speed.mul_(0.95).add_(grad + 0.1 * parameter)
        return parameter - lr * speed

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One step."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.place(parameter, self.moved(parameter, group["lr"]))

    def place(self, parameter: Tensor, value: Tensor) -> None:
        """Put a parameter where it goes."""
        parameter.copy_(value)


class Replacing(Momentum):
    """Replaces the tensor, under the eyes of no version counter."""

    def place(self, parameter: Tensor, value: Tensor) -> None:
        parameter.data = value.clone()


class Nested(Momentum):
    """Moves all weights, and then calls its parent's step: both fire the hooks."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.9).sub_(0.01)
        super().step(closure)


class Sign(Momentum):
    """Moves every entry by the same amount, as Lion does."""

    def moved(self, parameter: Tensor, lr: float) -> Tensor:
        return parameter - lr * (super().moved(parameter, lr) - parameter).sign()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "none as zero": Momentum,
    "replaces data": Replacing,
    "nested": Nested,
    "signs": Sign,
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
}


def frozen_entries(layer: Any) -> Tensor:
    if layer.weight_mask is not None:
        return layer.weight_mask.clone()
    return torch.full(layer.weight.shape, layer.stage_state == "frozen")


def train_and_compare(model: Any, progression: Progression, train: Callable[[int], Any]) -> tuple[int, int]:
    """Train to the end; numbers of frozen entries seen, and of those that an update changed in any bit."""
    seen = changed = 0
    for step in range(TOTAL):
        progression.step(step)
        before = [(frozen_entries(layer), layer.weight.detach().clone()) for layer in model.layers]
        train(step)
        for layer, (frozen, weight) in zip(model.layers, before, strict=True):
            seen += int(frozen.sum())
            changed += int((frozen & (layer.weight.detach() != weight)).sum())
    progression.step(TOTAL)
    return seen, changed


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_frozen_latent_keeps_every_bit(name: str) -> None:
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), OPTIMIZERS[name](model.parameters())
    progression.attach(optimizer)
    start = [layer.weight.detach().clone() for layer in model.layers]
    seen, changed = train_and_compare(model, progression, lambda step: update(model, optimizer, step))
    assert seen > 5000 and changed == 0
    assert all((layer.weight != old).any() for layer, old in zip(model.layers, start, strict=True))


def test_a_step_with_a_closure_is_held() -> None:
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), Momentum(model.parameters())
    progression.attach(optimizer)

    def train(step: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(batch(step, width=WIDTH)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    assert train_and_compare(model, progression, train)[1] == 0


def test_each_optimizer_holds_its_own() -> None:
    """Two over a half each, in turn: one must not touch the gradients, nor undo the steps, of the other."""
    model = held_stack()
    progression = Progression(model, TOTAL)
    parts = [list(model.layers[0].parameters()), [p for layer in model.layers[1:] for p in layer.parameters()]]
    first, second = Momentum(parts[0][:1]), torch.optim.AdamW(parts[1], lr=0.02)
    first.add_param_group({"params": parts[0][1:]})
    progression.attach(first)
    progression.attach(second)

    def train(step: int) -> None:
        model(batch(step, width=WIDTH)).square().mean().backward()
        for optimizer in (first, second):
            grads = [p.grad for p in model.parameters()]
            optimizer.step()
            others = parts[1] if optimizer is first else parts[0]
            after = {id(p): p.grad for p in model.parameters()}
            before = dict(zip(map(id, model.parameters()), grads, strict=True))
            assert all(after[id(p)] is before[id(p)] for p in others)
        first.zero_grad()
        second.zero_grad()

    assert train_and_compare(model, progression, train)[1] == 0


def stepped_in_backward(model: nn.Module) -> dict[Tensor, torch.optim.Optimizer]:
    optimizers: dict[Tensor, torch.optim.Optimizer] = {p: Momentum([p]) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    return optimizers


@pytest.mark.parametrize("layerwise", [False, True], ids=["each", "transformers' dummy"])
def test_optimizers_that_step_in_the_backward_pass_are_held(caplog: Any, layerwise: bool) -> None:
    model = held_stack()
    progression, optimizers = Progression(model, TOTAL), stepped_in_backward(model)
    for one in [LayerWiseDummyOptimizer(optimizer_dict=optimizers)] if layerwise else optimizers.values():
        progression.attach(one)
    seen, changed = train_and_compare(
        model, progression, lambda step: model(batch(step, width=WIDTH)).square().mean().backward()
    )
    assert seen > 5000 and changed == 0
    assert "attach" not in caplog.text and "lacks" not in caplog.text


# ---- refused, by name ----


class Swapping(torch.optim.AdamW):
    """Has an average of the weights, which eval() puts in their place, as schedule-free optimizers do."""

    def eval(self) -> None:
        """To the average."""

    def train(self) -> None:
        """Back."""


class LineSearch(torch.optim.SGD):
    """Tries several lengths of one step."""

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """One step."""


class Elsewhere(torch.optim.Optimizer):
    """A subclass that never calls its parent's __init__, as wrappers do."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]

    def step(self, closure: Any = None) -> None:
        """One step."""


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS moves all weights several times"),
        (lambda p: LineSearch(p, lr=0.1), "LineSearch moves all weights several times"),
        (lambda p: Swapping(p), r"Swapping has train\(\) and eval\(\)"),
        (Elsewhere, "Elsewhere has no step hooks"),
        (lambda p: torch.optim.AdamW([nn.Parameter(q.detach().clone()) for q in p]), "AdamW has none of this model's"),
    ],
    ids=["lbfgs", "line search", "schedule-free", "no init", "copies"],
)
def test_what_cannot_be_held_is_refused_by_name(kind: Any, why: str) -> None:
    model = held_stack()
    with pytest.raises(ConfigError, match=f"{why}.*(windowed_ste|'ste'|AdamW)"):
        Progression(model, TOTAL).attach(kind(model.parameters()))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    surrogate = held_stack(frozen_gradient="windowed_ste")
    Progression(surrogate, TOTAL).attach(kind(surrogate.parameters()))  # nothing is promised there, and nothing held


# ---- named, where it moves weights behind our back ----


class Ahead:
    """Steps an optimizer, and pulls the weights back to slow ones every few steps, outside of its step()."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.slow = [p.detach().clone() for p in self.parameters]

    def step(self) -> None:
        self.inner.step()
        for parameter, slow in zip(self.parameters, self.slow, strict=True):
            parameter.data.lerp_(slow, 0.5)


def pulled_back(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return inner, Ahead(inner).step


def another(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable[[], Any]]:
    return torch.optim.AdamW(model.parameters(), lr=0.0), Momentum(model.parameters()).step


@pytest.mark.parametrize("mover", [pulled_back, another])
def test_a_sign_that_moves_all_the_same_is_an_error_that_names_the_optimizer(mover: Any) -> None:
    model = held_stack()
    attached, step_all = mover(model)
    progression = Progression(model, TOTAL)
    progression.attach(attached)
    with pytest.raises(HoldError, match=rf"layers\.0 .*{type(attached).__name__} is attached.*windowed_ste"):
        for step in range(TOTAL):
            progression.step(step)
            model(batch(step, width=WIDTH)).square().mean().backward()
            step_all()
            attached.zero_grad()


def test_one_sign_is_enough_and_the_end_is_looked_at_too() -> None:
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), torch.optim.SGD(model.parameters(), lr=0.1)
    progression.attach(optimizer)
    for step in range(TOTAL):
        progression.step(step)
        update(model, optimizer, step)
    with torch.no_grad():
        model.layers[1].weight[3, 5] *= -1
    with pytest.raises(HoldError, match=r"layers\.1 "):
        progression.step(TOTAL)


def test_weights_that_were_loaded_are_no_mover() -> None:
    """Going back to a checkpoint, with the same progression; and clipping latents, which moves no sign."""
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), Momentum(model.parameters())
    progression.attach(optimizer)
    saved: dict[int, Any] = {}
    for step in [*range(20), *range(15, TOTAL)]:
        if step == 15 and 15 in saved:
            model.load_state_dict(saved[15])
        progression.step(step)
        saved.setdefault(step, {k: v.clone() for k, v in model.state_dict().items()})
        update(model, optimizer, step)
        with torch.no_grad():
            for layer in model.layers:
                layer.weight.clamp_(-0.2, 0.2)
    progression.step(TOTAL)


def test_without_an_optimizer_a_moved_sign_is_told_once(caplog: Any) -> None:
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), Momentum(model.parameters())
    for step in range(TOTAL):
        progression.step(step)
        update(model, optimizer, step)
    assert caplog.text.count("nothing holds them. Call progression.attach(optimizer)") == 1


@pytest.mark.parametrize("regime", ["ste", "clipped_ste", "windowed_ste"])
def test_with_a_surrogate_nothing_is_held_or_watched(regime: str) -> None:
    model = held_stack(frozen_gradient=regime)
    progression, optimizer = Progression(model, TOTAL), Momentum(model.parameters(), lr=0.5)
    progression.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert train_and_compare(model, progression, lambda step: update(model, optimizer, step))[1] > 0


# ---- steps that go wrong ----


def in_mid_window(model: Any) -> tuple[Progression, torch.optim.Optimizer]:
    progression, optimizer = Progression(model, TOTAL), torch.optim.SGD(model.parameters(), lr=0.1)
    progression.attach(optimizer)
    for step in range(17):
        progression.step(step)
        update(model, optimizer, step)
    progression.step(17)
    assert model.layers[0].stage_state == "frozen" and 0.1 < model.layers[1].weight_mask.float().mean() < 0.9
    return progression, optimizer


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_gradient_leaves_frozen_entries_alone(value: float) -> None:
    model = held_stack()
    _, optimizer = in_mid_window(model)
    layer = model.layers[1]
    frozen, before = layer.weight_mask.clone(), layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, value)
    optimizer.step()
    assert torch.equal(layer.weight[frozen], before[frozen]) and not layer.weight[~frozen].isfinite().any()


def test_pending_weights_at_rate_zero_survive_an_infinite_gradient() -> None:
    model = held_stack(pending_lr=0.0)
    _, optimizer = in_mid_window(model)
    layer = model.layers[2]
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.full_like(layer.weight, float("inf"))
    optimizer.step()
    assert layer.stage_state == "pending" and torch.equal(layer.weight, before)


def test_steps_that_a_gradient_scaler_skips() -> None:
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), torch.optim.AdamW(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    progression.attach(optimizer)

    def train(step: int) -> None:
        loss = model(batch(step, width=WIDTH)).square().mean()
        scaler.scale(loss * (float("inf") if step % 5 == 4 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert train_and_compare(model, progression, train)[1] == 0


class Failing(Momentum):
    """Fails once, in the middle of a step."""

    failed = False

    def place(self, parameter: Tensor, value: Tensor) -> None:
        super().place(parameter, value)
        if not self.failed and len(self.state) == 2:
            self.failed = True
            raise MemoryError


def test_a_step_that_raised_does_not_come_back_later() -> None:
    """What was kept for it is not what the next step puts back."""
    model = held_stack()
    progression, optimizer = Progression(model, TOTAL), Failing(model.parameters())
    progression.attach(optimizer)

    def train(step: int) -> None:
        try:
            update(model, optimizer, step)
        except MemoryError:
            optimizer.zero_grad()

    moved = [layer.weight.detach().clone() for layer in model.layers]
    seen, changed = train_and_compare(model, progression, train)
    assert optimizer.failed and seen > 5000 and changed == 0
    assert all((layer.weight != old).any() for layer, old in zip(model.layers, moved, strict=True))


# ---- attached more than once ----


@pytest.mark.parametrize("again", ["no", "same", "other"])
def test_attaching_again_changes_nothing(again: str) -> None:
    model = held_stack(pending_lr=0.5, start=0.5)
    first, optimizer = Progression(model, TOTAL), torch.optim.SGD(model.parameters(), lr=0.5)
    first.attach(optimizer)
    if again == "same":
        first.attach(optimizer)
    progression = Progression(model, TOTAL) if again == "other" else first
    if again == "other":  # without a detach() of the first
        progression.attach(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 2  # one that holds, one that slows down
    progression.step(0)
    before = model.layers[0].weight.detach().clone()
    model.layers[0].weight.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(model.layers[0].weight.detach(), before - 0.25)
    progression.detach()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# ---- adapters of older releases of PEFT ----


@pytest.mark.parametrize("option", ["use_dora", "alora_invocation_tokens", "arrow_config", "use_qalora"])
def test_variants_of_lora_are_known_by_name(option: str) -> None:
    """Before 0.20 PEFT's options have no mark that says so."""
    fields = [("peft_type", str, "LORA"), ("init_lora_weights", bool, True), (option, Any, None)]
    config = dataclasses.make_dataclass("OlderLoraConfig", fields)
    assert _needs_weight(config()) is None
    assert option in (_needs_weight(config(**{option: True})) or "")
