"""StoMPP for Hugging Face Transformers: train networks with 1-bit weights and activations, stage by stage."""

from . import console
from .checkpoints import saving  # noqa: F401  # save_pretrained and from_pretrained ask there
from .checkpoints.model_card import model_card, push_to_hub, write_model_card
from .checkpoints.packing import pack_model, unpack_model
from .checkpoints.quantizer import StoMPPQuantizer
from .checkpoints.remote_code import add_remote_code
from .config import StoMPPConfig
from .errors import StoMPPError
from .export.onnx_export import export_onnx
from .inference.fusing import fuse_for_inference, unfuse
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
from .reports.runs import read_run, record_run
from .reports.summary import Summary, summary
from .surgery.binarize import binarize_model, report, restore_model
from .surgery.members import get_plan
from .surgery.quantization_config import StoMPPQuantizationConfig
from .trainer.callback import StoMPPTrainerCallback
from .trainer.distillation_callback import DistillationCallback
from .trainer.gradient_norms import GradientNormCallback
from .trainer.parameter_groups import create_optimizer, parameter_groups
from .trainer.resuming import last_whole_checkpoint
from .training.distillation import Distiller
from .training.live_metrics import LiveMetrics
from .training.progression import Progression, calibrate

console.install()

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
    "GradientNormCallback",
    "LiveMetrics",
    "Progression",
    "StoMPPConfig",
    "StoMPPError",
    "StoMPPQuantizationConfig",
    "StoMPPQuantizer",
    "StoMPPTrainerCallback",
    "Summary",
    "add_remote_code",
    "binarize_model",
    "calibrate",
    "fuse_for_inference",
    "create_optimizer",
    "export_onnx",
    "get_plan",
    "last_whole_checkpoint",
    "model_card",
    "pack_model",
    "parameter_groups",
    "push_to_hub",
    "read_run",
    "record_run",
    "report",
    "restore_model",
    "summary",
    "unfuse",
    "unpack_model",
    "write_model_card",
]
