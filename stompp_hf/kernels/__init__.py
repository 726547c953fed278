"""1-bit products in compiled C, on a GPU in Triton: what of it is used, and its calls. Plain torch is always there."""

from . import attending as attending, choosing as choosing, gpu as gpu, native as native, training as training
from .attending import attention as attention
from .calls import (
    conv as conv,
    inner_loop as inner_loop,
    lane_linear as lane_linear,
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
    Route as Route,
    apply as apply,
    choice as choice,
    describe as describe,
    is_eager as is_eager,
    is_exported as is_exported,
    route as route,
    switched_off as switched_off,
    use as use,
)
from .kept import countable as countable, derived as derived, unchanged as unchanged
