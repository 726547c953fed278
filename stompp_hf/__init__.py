"""StoMPP for Hugging Face Transformers: train networks with 1-bit weights and activations, stage by stage."""

from .callback import StoMPPTrainerCallback
from .config import StoMPPConfig
from .distillation import Distiller
from .distillation_callback import DistillationCallback
from .errors import StoMPPError
from .fusing import fuse_for_inference, unfuse
from .modules import (
    BinaryAttention,
    BinaryConv1D,
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryEmbedding,
    BinaryLayer,
    BinaryLinear,
)
from .optim import create_optimizer, parameter_groups
from .packing import pack_model, unpack_model
from .plan import get_plan
from .progression import Progression, calibrate
from .quantization_config import StoMPPQuantizationConfig
from .quantizer import StoMPPQuantizer
from .surgery import binarize_model, report, restore_model

__version__ = "0.1.0"

__all__ = [
    "BinaryAttention",
    "BinaryConv1D",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryEmbedding",
    "BinaryLayer",
    "BinaryLinear",
    "DistillationCallback",
    "Distiller",
    "Progression",
    "StoMPPConfig",
    "StoMPPError",
    "StoMPPQuantizationConfig",
    "StoMPPQuantizer",
    "StoMPPTrainerCallback",
    "binarize_model",
    "calibrate",
    "fuse_for_inference",
    "create_optimizer",
    "get_plan",
    "pack_model",
    "parameter_groups",
    "report",
    "restore_model",
    "unfuse",
    "unpack_model",
]
