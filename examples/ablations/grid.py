"""The grid: what one cell is, and the presets that list cells together with the recipe they share."""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from stompp_hf import StoMPPConfig

METHODS = {
    "full_precision": "zero",
    "vanilla_ste": "ste",
    "vanilla_clipped_ste": "clipped_ste",
    "stompp": "zero",
    "stompp_ste": "ste",
    "stompp_clipped_ste": "clipped_ste",
    "vanilla_scaled_ste": "ste",
    "stompp_scaled_ste": "ste",
}
"""What frozen entries pass back: nothing (STE-free), or an identity or clipped surrogate gradient.

The paper has full precision, vanilla STE, stompp and stompp_ste. The others are there because the identity surrogate
doubles the gradient's energy at every shortcut, so that it explodes with depth: a clipped surrogate does not, and with
a scale a = mean |u| at every activation (in place of the paper's 1) the identity hardly does.
"""
BINARIZE = {"bnn": "weights_and_activations", "bwn": "weights"}
ORDERS = ("forward", "global", "reverse")


@dataclass(frozen=True)
class Cell:
    """One training run: a method, a network and a seed.

    Cells of one seed are pairs: they start from the same weights and see the same images in the same order.
    """

    method: str
    binarize: str = "bnn"
    depth: int = 18
    seed: int = 0
    order: str = "forward"
    schedule: str = "cubic"
    refresh_rate: int = 100
    stages: str | int = "module"
    activation_mask: str = "feature"
    start: float = 0.0
    end: float = 1.0
    lr: float = 0.1
    shortcuts: bool = True

    @property
    def id(self) -> str:
        """A stable, readable name; the less common options appear where they differ from the default."""
        words = ["fp" if self.method == "full_precision" else self.binarize, self.method]
        if self.method.startswith("stompp"):
            words += [self.order, self.schedule, f"r{self.refresh_rate}"]
            words += [f"stages_{self.stages}"] if self.stages != Cell.stages else []
            words += [] if self.activation_mask == Cell.activation_mask else [f"{self.activation_mask}_mask"]
            words += [f"from{self.start:g}to{self.end:g}"] if (self.start, self.end) != (0.0, 1.0) else []
        words += [f"lr{self.lr:g}"] if self.lr != Cell.lr else []
        words += [] if self.shortcuts else ["plain"]
        return "-".join([*words, f"d{self.depth}", f"s{self.seed}"])

    @property
    def group(self) -> str:
        """The id without the seed."""
        return self.id.rpartition("-")[0]

    def baseline(self, method: str = "vanilla_ste") -> "Cell":
        """Vanilla STE on the same network and seed."""
        shared = {name: getattr(self, name) for name in ("binarize", "depth", "seed", "lr", "shortcuts")}
        return Cell(method, **shared)

    def config(self) -> StoMPPConfig:
        """The options of the library for this cell: the paper's rule, but for the method's own change."""
        scale = {"activation_scale": "layer", "learn_activation_scale": True} if "scaled" in self.method else {}
        config = StoMPPConfig.paper(
            **scale,
            binarize=BINARIZE[self.binarize],
            frozen_gradient=METHODS[self.method],
            order=self.order,
            schedule=self.schedule,
            refresh_rate=self.refresh_rate,
            stages=self.stages,
            activation_mask=self.activation_mask,
            start=self.start,
            end=self.end,
            mask_seed=self.seed,
        )
        if self.method.startswith("vanilla"):
            return replace(config.as_vanilla_ste(), frozen_gradient=METHODS[self.method])
        return config.as_full_precision() if self.method == "full_precision" else config


@dataclass(frozen=True)
class Recipe:
    """What all cells of a preset share: data, network and optimizer."""

    network: str  # narrow: depth counts binary convolutions; standard: the ResNet of that name
    width: int  # channels of the first stage
    image_size: int
    train_images: int  # drawn anew for each seed; 0 takes all
    test_images: int  # at the end of the run; 0 takes all
    curve_images: int  # the first of them, at each epoch
    epochs: int
    batch: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0  # 0 does not clip
    probes: int = 40  # points in time of the gradient-flow records


@dataclass(frozen=True)
class Preset:
    """A recipe and its cells."""

    recipe: Recipe
    cells: list[Cell]


def product(**axes: Iterable[Any]) -> list[Cell]:
    """Cells over the product of some fields' values."""
    return [Cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def _quick(seeds: list[int]) -> Preset:
    recipe = Recipe("narrow", 4, 8, train_images=64, test_images=32, curve_images=32, epochs=3, batch=16, probes=6)
    cells = product(method=["vanilla_ste"], depth=[6], lr=[0.05], seed=seeds)
    cells += product(
        method=["stompp", "stompp_ste"],
        order=["forward", "reverse"],
        depth=[6],
        lr=[0.05],
        refresh_rate=[1],
        seed=seeds,
    )
    return Preset(recipe, cells)


def _cpu(seeds: list[int]) -> Preset:
    """CIFAR-10 at 16x16 in a narrow net: minutes a cell on one core.

    The windows are short (steps / depth), so the refresh rate is too: at depth 102 every entry is drawn twice in a
    window. Gradients are clipped for all methods alike: without it the identity surrogate makes the loss infinite.
    """
    recipe = Recipe(
        "narrow", 8, 16, train_images=8000, test_images=5000, curve_images=1000, epochs=6, batch=50, max_grad_norm=1.0
    )
    vanilla = ["vanilla_ste", "vanilla_clipped_ste"]
    stompp = ["stompp", "stompp_ste"]
    cells = []
    for depth in (18, 48):
        cells += product(method=vanilla, depth=[depth], seed=seeds)
        cells += product(method=stompp, order=ORDERS, refresh_rate=[4], depth=[depth], seed=seeds)
        cells += product(method=["stompp_clipped_ste"], refresh_rate=[4], depth=[depth], seed=seeds)
    cells += product(method=["vanilla_scaled_ste"], depth=[48], seed=seeds)
    cells += product(method=["stompp_scaled_ste"], refresh_rate=[4], depth=[48], seed=seeds)
    cells += product(method=["vanilla_ste"], binarize=["bwn"], depth=[48], seed=seeds)
    cells += product(
        method=["stompp"], binarize=["bwn"], order=["forward", "reverse"], refresh_rate=[4], depth=[48], seed=seeds
    )
    # Longer windows (of three convolutions each), an earlier end, and masks over elements: why depth 48 is no better.
    for change in ({"stages": [16]}, {"end": [0.7]}, {"activation_mask": ["element"]}):
        cells += product(method=["stompp"], refresh_rate=[4], depth=[48], seed=seeds, **change)
    # Two harsher points, where STE should break: more layers, and no shortcuts around a frozen one.
    for harsh in ({"depth": [102]}, {"depth": [18], "shortcuts": [False]}):
        cells += product(method=vanilla, seed=seeds, **harsh)
        cells += product(method=["stompp"], order=["forward", "reverse"], refresh_rate=[4], seed=seeds, **harsh)
        cells += product(method=["stompp_ste"], refresh_rate=[4], seed=seeds, **harsh)
    return Preset(recipe, cells)


def _paper(seeds: list[int]) -> Preset:
    """The settings of Smith and Islam (2026), on a GPU; the number of epochs is this library's choice."""
    recipe = Recipe("standard", 64, 32, train_images=0, test_images=0, curve_images=10000, epochs=200, batch=256)
    cells = []
    for depth in (18, 50):
        for binarize in BINARIZE:
            cells += product(method=["full_precision"], depth=[depth], seed=seeds) if binarize == "bnn" else []
            cells += product(method=["vanilla_ste"], binarize=[binarize], depth=[depth], seed=seeds)
            cells += product(
                method=["stompp", "stompp_ste"], binarize=[binarize], order=ORDERS, depth=[depth], seed=seeds
            )
    schedules = ["cosine", "linear", "quadratic", "flipped_quadratic"]  # cubic, r = 100 and lr = 0.1 are above
    cells += product(method=["stompp"], schedule=schedules, seed=seeds)
    cells += product(method=["stompp"], refresh_rate=[10, 30, 300, 1000], seed=seeds)
    cells += product(method=["vanilla_ste", "stompp"], lr=[0.05], seed=seeds)
    return Preset(recipe, cells)


PRESETS = {"quick": _quick, "cpu": _cpu, "paper": _paper}


def settings(cell: Cell, recipe: Recipe, data: str) -> dict[str, Any]:
    """All that decides a cell's result, as plain JSON values."""
    return {"cell": asdict(cell), "recipe": asdict(recipe), "data": data}
