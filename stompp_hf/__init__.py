"""StoMPP for Hugging Face Transformers: train networks with 1-bit weights and activations, stage by stage."""

import importlib.util
from typing import TYPE_CHECKING, Any

from . import console, hooks
from .method import packed_product  # noqa: F401  # for programs of torch.export, which know them by name

if TYPE_CHECKING:
    from .checkpoints.model_card import (
        model_card as model_card,
        push_to_hub as push_to_hub,
        write_model_card as write_model_card,
    )
    from .checkpoints.packing import pack_model as pack_model, unpack_model as unpack_model
    from .checkpoints.quantizer import StoMPPQuantizer as StoMPPQuantizer
    from .checkpoints.remote_code import add_remote_code as add_remote_code
    from .config import StoMPPConfig as StoMPPConfig
    from .errors import StoMPPError as StoMPPError
    from .export.gguf_export import export_gguf as export_gguf
    from .export.onnx_export import export_onnx as export_onnx
    from .inference.fusing import fuse_for_inference as fuse_for_inference
    from .modules import (
        BinaryAttention as BinaryAttention,
        BinaryConv1D as BinaryConv1D,
        BinaryConv1d as BinaryConv1d,
        BinaryConv2d as BinaryConv2d,
        BinaryConv3d as BinaryConv3d,
        BinaryEmbedding as BinaryEmbedding,
        BinaryLayer as BinaryLayer,
        BinaryLinear as BinaryLinear,
    )
    from .reports.runs import read_run as read_run, record_run as record_run
    from .reports.stage_curve import record_stages as record_stages, stage_curve as stage_curve
    from .reports.summary import Summary as Summary, summary as summary
    from .surgery.binarize import binarize_model as binarize_model, report as report, restore_model as restore_model
    from .surgery.members import get_plan as get_plan
    from .surgery.quantization_config import StoMPPQuantizationConfig as StoMPPQuantizationConfig
    from .surgery.unfusing import unfuse as unfuse
    from .trainer.callback import StoMPPTrainerCallback as StoMPPTrainerCallback
    from .trainer.distillation_callback import DistillationCallback as DistillationCallback
    from .trainer.gradient_norms import GradientNormCallback as GradientNormCallback
    from .trainer.parameter_groups import create_optimizer as create_optimizer, parameter_groups as parameter_groups
    from .trainer.resuming import last_whole_checkpoint as last_whole_checkpoint
    from .trainer.stopping import StopFreezingCallback as StopFreezingCallback
    from .training.distillation import Distiller as Distiller
    from .training.live_metrics import LiveMetrics as LiveMetrics
    from .training.progression import Progression as Progression, calibrate as calibrate

console.install()
hooks.install()

__version__ = "0.1.0"

_HOMES = {
    "checkpoints.model_card": "model_card push_to_hub write_model_card",
    "checkpoints.packing": "pack_model unpack_model",
    "checkpoints.quantizer": "StoMPPQuantizer",
    "checkpoints.remote_code": "add_remote_code",
    "config": "StoMPPConfig",
    "errors": "StoMPPError",
    "export.gguf_export": "export_gguf",
    "export.onnx_export": "export_onnx",
    "inference.fusing": "fuse_for_inference",
    "modules": "BinaryAttention BinaryConv1D BinaryConv1d BinaryConv2d BinaryConv3d "
    "BinaryEmbedding BinaryLayer BinaryLinear",
    "reports.runs": "read_run record_run",
    "reports.stage_curve": "record_stages stage_curve",
    "reports.summary": "Summary summary",
    "surgery.binarize": "binarize_model report restore_model",
    "surgery.members": "get_plan",
    "surgery.quantization_config": "StoMPPQuantizationConfig",
    "surgery.unfusing": "unfuse",
    "trainer.callback": "StoMPPTrainerCallback",
    "trainer.stopping": "StopFreezingCallback",
    "trainer.distillation_callback": "DistillationCallback",
    "trainer.gradient_norms": "GradientNormCallback",
    "trainer.parameter_groups": "create_optimizer parameter_groups",
    "trainer.resuming": "last_whole_checkpoint",
    "training.distillation": "Distiller",
    "training.live_metrics": "LiveMetrics",
    "training.progression": "Progression calibrate",
}
"""Where each public name comes from. It is imported when it is used: Trainer, for one, brings half the world along."""
_HOME = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names.split()}

__all__ = list(_HOME)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
            return globals()[name]
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")  # a room
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
