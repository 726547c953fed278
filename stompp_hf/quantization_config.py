"""The plan of a binarized model, in the form in which transformers saves and reads it."""

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .config import METHOD
from .errors import CheckpointError
from .plan import PACKED_FORMAT, TRAINING_FORMAT, Plan


class StoMPPQuantizationConfig(QuantizationConfigMixin):
    """The plan of a binarized model, in the form in which transformers saves and reads it.

    format: "training" (latent weights) or "packed" (8 signs a byte); files of both have the same format_version.

    Holds plain JSON values; `plan()` gives the checked `Plan`. Unknown keys are kept: a newer release may add some,
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

    def plan(self) -> Plan:
        """The plan, checked; raises CheckpointError where the values are none."""
        if self.format not in (TRAINING_FORMAT, PACKED_FORMAT):
            raise CheckpointError(
                f"quantization_config: format={self.format!r} is unknown to this release, which reads "
                f"{TRAINING_FORMAT!r} and {PACKED_FORMAT!r}; install a newer stompp_hf."
            )
        return Plan.from_dict(self.__dict__)
