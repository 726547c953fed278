"""One cell: train, look on the way, and return a record of plain JSON values."""

import platform
import time
from typing import Any

import torch
from data import Batches, Data, digest
from grid import Cell, Recipe
from model import build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stompp_hf
from stompp_hf import Progression, binarize_model
from stompp_hf.errors import NonFiniteError
from stompp_hf.surgery.members import binary_layers
from stompp_hf.training.metrics import blocked_unfrozen, blocked_upstream, frozen_fraction, gradient_flow

CURVE_POINTS = 1000
"""Points of the training curves, at most; each is the mean over a few steps."""
RECALIBRATION_BATCHES = 25


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, count: int, batch: int = 500) -> float:
    """Percent correct on the first `count` test images (0: all), in eval mode."""
    images, labels = (tensor[: count or None] for tensor in (data.test.images, data.test.labels))
    model.eval()
    right = sum(
        int((model(data.normalised(part)).logits.argmax(1) == wanted).sum())
        for part, wanted in zip(images.split(batch), labels.split(batch), strict=True)
    )
    model.train()
    return 100.0 * right / len(labels)


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Batches, first_step: int) -> None:
    """Replace batch-norm running statistics by plain averages over training batches of the model as it is now."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for step in range(first_step, first_step + RECALIBRATION_BATCHES):
        model(batches[step][0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Curves:
    """Loss and accuracy on the training batches, averaged over a few steps; nothing waits for the device."""

    def __init__(self, total: int) -> None:
        self.every = -(-total // CURVE_POINTS)
        self.values: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Note one step."""
        self.values.append(torch.stack([loss.detach().float(), 100.0 * (logits.argmax(1) == labels).float().mean()]))

    def record(self) -> dict[str, list[float]]:
        """Step (of the middle), loss and training accuracy of each point."""
        parts = torch.stack(self.values).split(self.every)
        means = [part.mean(0).tolist() for part in parts]
        return {
            "step": [index * self.every + len(part) / 2 for index, part in enumerate(parts)],
            "loss": [round(loss, 5) for loss, _ in means],
            "accuracy": [round(share, 3) for _, share in means],
        }


class Flow:
    """Gradient norm and blocked share of every binary layer, in execution order, at a few points in time."""

    def __init__(self, total: int, points: int) -> None:
        self.due = {round(total * (point + 0.5) / points) for point in range(points)} if points else set()
        names = ("layer", "step", "norm", "blocked", "blocked_upstream", "starved")
        self.record: dict[str, Any] = {name: [] for name in names}

    def add(self, model: nn.Module, step: int) -> None:
        """Read the gradients, if it is time; between backward and the optimizer's step."""
        if step not in self.due:
            return
        flow = gradient_flow(model)
        self.record["layer"] = list(flow)
        self.record["step"].append(step)
        self.record["norm"].append([float(f"{layer.norm:.4g}") for layer in flow.values()])
        self.record["blocked"].append([round(layer.blocked, 5) for layer in flow.values()])
        self.record["blocked_upstream"].append(round(blocked_upstream(model), 5))
        self.record["starved"].append(round(blocked_unfrozen(model), 5))


def train_cell(cell: Cell, recipe: Recipe, data: Data, device: str = "cpu") -> dict[str, Any]:
    """Train one cell from scratch and return its record; a run that diverges counts as chance, and says so."""
    began, began_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(cell.seed)
    model: Any = build(cell, recipe, data.classes).to(device)
    start = digest(torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()]))
    batches = data.batches(cell.seed, recipe.train_images, recipe.batch)
    total = recipe.epochs * batches.steps_per_epoch
    model = binarize_model(model, cell.config(), {"pixel_values": batches[0][0][:2]})
    progression = Progression(model, total)
    curves, flow = Curves(total), Flow(total, recipe.probes)
    course: dict[str, list[float]] = {"step": [], "accuracy": [], "frozen_fraction": []}
    chance, diverged = 100.0 / data.classes, None
    final = recalibrated = chance
    try:
        train(model, progression, cell, recipe, batches, curves, flow, course)
        final = accuracy(model, data, recipe.test_images)
        recalibrate_bn(model, batches, total)
        recalibrated = accuracy(model, data, recipe.test_images)
    except NonFiniteError as error:
        diverged = str(error)
    return {
        "accuracy": final,
        "accuracy_recalibrated": recalibrated,
        "diverged": diverged,
        "pair": {"weights": start, "first_batch": digest(batches[0][0]), "last_batch": digest(batches[total - 1][0])},
        "binary_layers": len(binary_layers(model)),
        "steps": total,
        "boundaries": sorted(
            {edge for w in progression.windows.values() for edge in (w.begin, w.end) if edge <= total}
        ),
        "course": course,
        "training": curves.record(),
        "gradient_flow": flow.record,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "versions": {"torch": torch.__version__, "stompp_hf": stompp_hf.__version__},
    }


def train(
    model: Any, progression: Progression, cell: Cell, recipe: Recipe, batches: Batches, curves: Curves, flow: Flow,
    course: dict[str, list[float]],
) -> None:  # fmt: skip
    """The loop: the paper's SGD, with a look at the test images at each epoch."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=cell.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    progression.attach(optimizer)
    model.train()
    total = progression.total_steps

    def look(step: int) -> None:
        course["step"].append(step)
        course["accuracy"].append(accuracy(model, batches.data, recipe.curve_images))
        course["frozen_fraction"].append(round(frozen_fraction(model), 5))

    for step in range(total):
        progression.step(step)
        if step and step % batches.steps_per_epoch == 0:
            look(step)
        images, labels = batches[step]
        logits = model(images).logits
        loss = cross_entropy(logits, labels)
        loss.backward()
        curves.add(loss, logits, labels)
        flow.add(model, step)
        if recipe.max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    progression.step(total)
    progression.check_latents()
    progression.detach()
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss of the last step is {float(loss)}.")
    look(total)
