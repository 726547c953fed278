"""The plans of a binarized model, in the form in which transformers saves and reads them."""

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import METHOD
from ..errors import CheckpointError
from .plan import OWN_NAMES, PACKED_FORMAT, TRAINING_FORMAT, Plan

PARTS_FORMAT = "parts"


class StoMPPQuantizationConfig(QuantizationConfigMixin):
    """The plans of a binarized model, in the form in which transformers saves and reads them.

    format: "training" (latent weights) or "packed" (8 signs a byte); files of both have the same format_version. Or
    "parts": `parts` holds the plans of several modules, by their names, each in one of the two.

    Holds plain JSON values; `plans()` gives the checked `Plan`s. Unknown keys are kept: a newer release may add some,
    and `format_version` tells whether they matter.

    Raises:
        CheckpointError: a key would hide a method of this class.
    """

    def __init__(self, /, format: str = TRAINING_FORMAT, **values: Any) -> None:
        values.pop("quant_method", None)
        hidden = sorted(name for name in values if hasattr(type(self), name))
        if hidden:
            raise CheckpointError(f"quantization_config is damaged: it has the keys {', '.join(hidden)}.")
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers takes a plain string for outside methods
        self.format = format
        self.__dict__.update(values)

    @classmethod
    def of(cls, plans: Mapping[str, Plan], mark: str | None = None) -> "StoMPPQuantizationConfig":
        """What config.json says of a model's plans, given by the names of the modules that they are about.

        mark: of the save that it is written by; its weights have the same.
        """
        marked = {} if mark is None else {"save": mark}
        if list(plans) != [""]:
            return cls(PARTS_FORMAT, parts={name: plan.to_dict() for name, plan in plans.items()}, **marked)
        return cls(**plans[""].to_dict(**marked))

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its key: transformers takes what a live model's config holds for a dictionary."""
        return vars(self).get(name, default)

    def plans(self) -> dict[str, Plan]:
        """The plans, checked, by the name of the module that each is about: "" is the model itself.

        Raises:
            CheckpointError: the values are none.
        """
        if self.format != PARTS_FORMAT:
            return {"": self._plan()}
        parts = vars(self).get("parts")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, dict) for part in parts.values()):
            raise CheckpointError("quantization_config is damaged: its format is 'parts', and it names none.")
        return {name: StoMPPQuantizationConfig(**part)._plan() for name, part in parts.items()}

    def plan(self) -> Plan:
        """All of it as one plan, to be looked at; raises CheckpointError where the values are none."""
        return Plan.joined(self.plans())

    def _plan(self) -> Plan:
        if self.format not in (TRAINING_FORMAT, PACKED_FORMAT):
            raise CheckpointError(
                f"quantization_config: format={self.format!r} is unknown to this release, which reads "
                f"{TRAINING_FORMAT!r} and {PACKED_FORMAT!r}, or {PARTS_FORMAT!r} in these; install a newer stompp_hf."
            )
        return Plan.from_dict(self.__dict__)

    @property
    def has_own_names(self) -> bool:
        """Whether tensors are stored under the names of the model's modules, whatever its class converts."""
        parts = [vars(self)] if self.format != PARTS_FORMAT else vars(self).get("parts", {}).values()
        return all(part.get("names") == OWN_NAMES for part in parts)
