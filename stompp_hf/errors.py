"""The errors of this library. Each one says which option or module, what was wrong, and the call that would work."""


class StoMPPError(Exception):
    """Base class of every error that this library raises on its own account."""


class ConfigError(StoMPPError, ValueError):
    """An option, or a pair of options, that makes no sense."""


class AlreadyBinarizedError(StoMPPError, ValueError):
    """`binarize_model` was called on a model that has binary layers already."""


class PatternError(StoMPPError, ValueError):
    """A pattern in `target_modules`, `exclude_modules` or `order` matches no module."""


class NothingToBinarizeError(StoMPPError, ValueError):
    """No module is left to binarize; the message says which rule removed which candidates."""


class NotBinarizedError(StoMPPError, ValueError):
    """A model without binary layers was handed to something that needs them."""


class NotCalibratedError(StoMPPError, RuntimeError):
    """A committed layer was run before its activation values were set."""


class PackingError(StoMPPError, ValueError):
    """A model cannot be packed or unpacked in the state in which it is."""


class DerivativeError(StoMPPError, RuntimeError):
    """A derivative was asked for that a binary layer does not give."""


class ExportError(StoMPPError, RuntimeError):
    """A model cannot be written in another library's format, here and now."""


class CheckpointError(StoMPPError, ValueError):
    """A checkpoint does not fit the model, or the run that it is to continue."""


class NonFiniteError(StoMPPError, ArithmeticError):
    """A latent weight or an activation is NaN or infinite; sign() would have hidden it."""


class HoldError(StoMPPError, RuntimeError):
    """A frozen sign moved, although the gradient of frozen entries is zero."""


class ShapeError(StoMPPError, ValueError):
    """An input has another size than the masks of `activation_mask="element"`."""


class ShardingError(StoMPPError, RuntimeError):
    """A model is split over processes in a way that this library cannot follow."""


class DistillationError(StoMPPError, ValueError):
    """A teacher and a student cannot be compared, or the teacher's loss is never used."""


class WeightError(StoMPPError, AttributeError):
    """The weight of a frozen layer would be replaced or taken away, by somebody who read it as a real layer's."""


class AdapterError(StoMPPError, ValueError):
    """A PEFT adapter would be merged into a binary weight, or needs that weight to compute."""


class RunError(StoMPPError, ValueError):
    """A folder or a log holds no training run that can be shown."""


class ExtraError(StoMPPError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class KernelError(StoMPPError, RuntimeError):
    """The compiled kernels were asked for and are not there, or had no memory."""
