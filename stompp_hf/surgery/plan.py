"""The plan of a binarized model: which layers, in which order, in which stages. Saved with the model as JSON."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..config import StoMPPConfig
from ..errors import CheckpointError, ConfigError, StoMPPError
from ..method.windows import Place, Window

FORMAT_VERSION = 1
TRAINING_FORMAT, PACKED_FORMAT = "training", "packed"
FLOAT32, INT8 = "float32", "int8"
STORED = (FLOAT32, "float16", "bfloat16", INT8)
KINDS = ("layer", "embedding", "attention")
OWN_NAMES = "modules"
"""Tensors are stored under the names of the model's modules, whatever transformers converts for its class."""
_DICTIONARIES = ("left", "bypassed", "paused", "shifted")


@dataclass
class Entry:
    """One member: its name, its place in the progression and in execution order, and what enters it.

    producer: class name of the module whose output enters it; absorbed: the activation it computes itself;
    position: its place in execution order; shape: one sample of its input in the probe, or, for attention, [heads, key
    heads, head size, value size]; kind: "layer", "embedding", or "attention" (a child of the module named before it).
    """

    name: str
    stage: int
    stage_name: str
    producer: str | None = None
    absorbed: str | None = None
    position: int = 0
    shape: list[int] | None = None
    kind: str = "layer"


@dataclass
class Plan:
    """What becomes binary in a model, in the order in which it freezes, and what was left real and why.

    bypassed: activations that were "absorbed" or "dropped", or became a "relu"; paused: dropouts, and shifted: ReLUs
    that became RPReLUs, with the binary layers that read them; attention: the implementation ("sdpa" or "eager") that
    binary attention stands in for, if there is any; a reload goes back to it, so that it computes the same; packed:
    whether signs stand in place of latent weights; real: how a packed checkpoint stores what stays real, and int8: the
    tables in int8.
    """

    config: StoMPPConfig
    entries: list[Entry]
    left: dict[str, str] = field(default_factory=dict)
    bypassed: dict[str, str] = field(default_factory=dict)
    paused: dict[str, list[str]] = field(default_factory=dict)
    shifted: dict[str, list[str]] = field(default_factory=dict)
    attention: str | None = None
    packed: bool = False
    real: str = FLOAT32
    int8: list[str] = field(default_factory=list)

    def renamed(self, rename: Callable[[str], str]) -> "Plan":
        """The same plan with other names for the modules of the model."""

        def all_renamed(found: dict[str, list[str]]) -> dict[str, list[str]]:
            return {rename(name): [rename(reader) for reader in readers] for name, readers in found.items()}

        last = self.config.last_stage
        return replace(
            self,
            config=replace(self.config, last_stage=rename(last)) if last in self.stage_names else self.config,
            entries=[replace(e, name=rename(e.name), stage_name=rename(e.stage_name)) for e in self.entries],
            bypassed={rename(name): how for name, how in self.bypassed.items()},
            paused=all_renamed(self.paused),
            shifted=all_renamed(self.shifted),
        )

    def moved(self, rename: Callable[[str], str]) -> "Plan":
        """As `renamed`, with other names for what stays real, too: the plan is of another module."""
        left = {rename(name): reason for name, reason in self.left.items()}
        return replace(self.renamed(rename), left=left, int8=[rename(name) for name in self.int8])

    def inside(self, prefix: str) -> "Plan":
        """What a plan says of the module called `prefix`, with names relative to it and stages without gaps."""
        start = f"{prefix}."
        entries = [entry for entry in self.entries if entry.name.startswith(start)]
        order = {stage: number for number, stage in enumerate(sorted({entry.stage for entry in entries}))}
        values: dict[str, Any] = {
            changed: {name: value for name, value in getattr(self, changed).items() if name.startswith(start)}
            for changed in _DICTIONARIES
        }
        for changed in ("paused", "shifted"):  # with the readers that are inside
            found = values[changed].items()
            values[changed] = {name: [r for r in readers if r.startswith(start)] for name, readers in found}
        values["entries"] = [replace(entry, stage=order[entry.stage]) for entry in entries]
        if self.config.last_stage is not None:
            last = self.freezing
            values["config"] = replace(self.config, last_stage=str(sum(stage < last for stage in order)))
        values["int8"] = [name for name in self.int8 if name.startswith(start)]
        return replace(self, **values).moved(lambda name: name.removeprefix(start))

    @staticmethod
    def joined(plans: "Mapping[str, Plan]") -> "Plan":
        """One plan that shows several, each of the module of its name: its stages come one after the other."""
        named = [
            plan.moved(lambda name, prefix=prefix: f"{prefix}.{name}" if prefix else name)  # type: ignore[misc]
            for prefix, plan in plans.items()
        ]
        values: dict[str, Any] = {"entries": [], "int8": [], **{changed: {} for changed in _DICTIONARIES}}
        for plan in named:
            before = len({entry.stage for entry in values["entries"]})
            values["entries"] += [replace(entry, stage=entry.stage + before) for entry in plan.entries]
            values["int8"] += plan.int8
            for changed in _DICTIONARIES:
                values[changed] |= getattr(plan, changed)
        if len(named) > 1:
            values["config"] = replace(named[0].config, last_stage=None)  # each part has its own
        return replace(named[0], packed=all(plan.packed for plan in named), **values)

    def of_kind(self, kind: str) -> list[str]:
        """Names of the entries of one kind that freeze, in that order; without those behind `last_stage`."""
        last = len(self.entries) if self.config.last_stage is None else self.freezing
        return [entry.name for entry in self.entries if entry.kind == kind and entry.stage < last]

    @property
    def stages_in_words(self) -> str:
        """How many stages there are, and how many of them freeze."""
        words = f"{self.stage_count} stages"
        return words if self.config.last_stage is None else f"{self.freezing} of {words} (the rest stays real)"

    @property
    def stage_count(self) -> int:
        """Number of stages."""
        return 1 + max(entry.stage for entry in self.entries)

    @property
    def stage_names(self) -> list[str]:
        """Name of each stage, in the order in which they freeze."""
        return list({entry.stage: entry.stage_name for entry in self.entries}.values())

    @property
    def freezing(self) -> int:
        """How many stages freeze: those up to `last_stage`.

        Raises:
            ConfigError: there is no such stage.
        """
        last, names = self.config.last_stage, self.stage_names
        if self.config.binarize == "nothing":
            return 0
        if last is None:
            return len(names)
        if last in names:
            return names.index(last) + 1
        if last.isdecimal() and int(last) <= len(names):
            return int(last)
        if "." in last and last.replace(".", "", 1).isdecimal():
            return max(1, round(float(last) * len(names)))
        raise ConfigError(
            f"StoMPPConfig: last_stage={last!r} is no stage of this model, which has {len(names)}: {', '.join(names)}. "
            f"Use a name, a number up to {len(names)}, or a share, as in last_stage=0.5."
        )

    def fingerprint(self, prefix: str = "") -> int:
        """A number that two plans share exactly if they freeze the same layers at the same times.

        Names are compared without `prefix`, a model's `base_model_prefix`, which AutoModel drops.
        """
        config = self.config
        text = json.dumps(
            [
                [config.binarize, config.schedule, config.refresh_rate, config.within_stage, config.mask_seed],
                [config.start, config.end, *([] if config.last_stage is None else [self.freezing])],
                [[entry.name.removeprefix(f"{prefix}."), entry.stage] for entry in self.entries],
            ]
        )
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    def places(self, prefix: str = "") -> dict[str, Place]:
        """The place of every member, by name; `prefix` as for `fingerprint`.

        Stage k of n has [start + (end - start) k / n, start + (end - start)(k + 1) / n) of the run; with
        within_stage="forward" its members split that part in order. Those behind `last_stage` never freeze.
        """
        config, count, freezing, found = self.config, self.stage_count, self.freezing, {}
        known = Place(
            start=config.start, end=config.end, schedule=config.schedule, refresh_rate=config.refresh_rate,
            mask_seed=config.mask_seed, fingerprint=self.fingerprint(prefix),
        )  # fmt: skip
        for stage in range(count):
            known = replace(known, never=stage >= freezing)
            inside = [entry.name for entry in self.entries if entry.stage == stage]
            parts = len(inside) if config.within_stage == "forward" else 1
            for index, name in enumerate(inside):
                part = stage * parts + (index if parts > 1 else 0)
                label = name.removeprefix(f"{prefix}.") if prefix else name
                found[name] = replace(known, index=part, count=count * parts, label=label)
        return found

    def windows(self, total: int) -> dict[str, Window]:
        """The window of every member in a run of `total` steps, by name."""
        return {name: place.window(total) for name, place in self.places().items()}

    def to_dict(self, **more: Any) -> dict[str, Any]:
        """The plan as plain JSON values, with `more` of them, and with a digest of all."""
        values = {
            "format": PACKED_FORMAT if self.packed else TRAINING_FORMAT,
            "format_version": FORMAT_VERSION,
            "names": OWN_NAMES,
            "config": self.config.to_dict(),
            "modules": [copy.copy(vars(entry)) for entry in self.entries],
            **{name: copy.copy(getattr(self, name)) for name in (*_DICTIONARIES, "attention", "real", "int8")},
            **more,
        }
        return {**values, "digest": digest(values)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """The inverse of `to_dict`.

        Raises:
            CheckpointError: a newer format, or values that are no plan.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config: format_version is {version!r}, and this release of stompp_hf reads "
                f"{FORMAT_VERSION}; install the release that wrote the checkpoint, or a newer one."
            )
        try:
            entries = [_checked(Entry(**entry)) for entry in values["modules"]]
            others: dict[str, Any] = {name: dict(values.get(name) or {}) for name in _DICTIONARIES}
            config = StoMPPConfig.from_dict(values["config"])
            packed = values.get("format") == PACKED_FORMAT
            others |= {"real": values.get("real", FLOAT32), "int8": list(values.get("int8") or [])}
            plan = cls(config, entries, **others, attention=values.get("attention"), packed=packed)
            if plan.real not in STORED or not all(isinstance(name, str) for name in plan.int8):
                raise ValueError(f"real is {plan.real!r}, and int8 {plan.int8!r}")
            gaps = {entry.stage for entry in entries} != set(range(len({entry.stage for entry in entries})))
        except StoMPPError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"quantization_config is damaged ({error!r}); save the model again.") from error
        if not entries or gaps:
            raise CheckpointError("quantization_config is damaged: its stages are not numbered from 0 without a gap.")
        if "digest" in values and values["digest"] != digest(values):
            raise CheckpointError(
                "quantization_config was changed after it was saved, by hand or by damage, and the model may compute "
                "something else than it did. Take config.json from where the checkpoint came from; to load this one as "
                "it is, delete 'digest' from quantization_config."
            )
        return plan


UNSIGNED = ("format", "format_version", "quant_method", "digest")
"""What is checked by itself, or added by transformers."""


def digest(values: dict[str, Any]) -> str:
    """A digest of a plan's JSON values: a changed name or option may be a valid one, and change what is computed."""
    text = json.dumps({name: value for name, value in values.items() if name not in UNSIGNED}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _checked(entry: Entry) -> Entry:
    """The entry, if its fields are of their types.

    Raises:
        TypeError: one is not.
    """
    texts = (entry.name, entry.stage_name, entry.kind)
    optional = [text for text in (entry.producer, entry.absorbed) if text is not None]
    numbers = (entry.stage, entry.position, *(entry.shape or []))
    if not all(isinstance(text, str) for text in (*texts, *optional)):
        raise TypeError(f"a name in {entry} is no string")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError(f"a number in {entry} is no whole number")
    if entry.kind not in KINDS:
        raise ValueError(f"the kind of {entry} is none of {', '.join(KINDS)}")
    return entry
