"""1-bit products in compiled C, on a GPU in Triton: what of it is used, and its calls. Plain torch is always there."""

from ..integrations.torch import (
    QUESTIONS as QUESTIONS,
    Seen as Seen,
    has_tangent as has_tangent,
    is_watched as is_watched,
)
from . import choosing as choosing, gpu as gpu, native as native
from .calls import (
    conv as conv,
    inner_loop as inner_loop,
    linear as linear,
    memory_format as memory_format,
    output_size as output_size,
    pack as pack,
    real_linear as real_linear,
    sizes_fit as sizes_fit,
    unpack as unpack,
)
from .choosing import (
    DTYPES as DTYPES,
    EXACT as EXACT,
    Route as Route,
    apply as apply,
    choice as choice,
    describe as describe,
    is_eager as is_eager,
    is_exported as is_exported,
    route as route,
    switched_off as switched_off,
    trains_with as trains_with,
    use as use,
)
from .kept import countable as countable, derived as derived, unchanged as unchanged
from .native import Choice as Choice
from .training import (
    levels as levels,
    mix as mix,
    mix_backward as mix_backward,
    mix_weight_backward as mix_weight_backward,
    through_window as through_window,
)
