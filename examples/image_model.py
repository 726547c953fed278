"""The model of the image classification example: a checkpoint, or from scratch by its config; and its processor."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from image_data import DataArguments, Pixels
from options import HubArguments, MethodArguments, RecordArguments, TeacherArguments, is_binarized, plain_again
from small_images import small_image_config
from stage_edges import StopArguments
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from stompp_hf import StoMPPConfig, binarize_model

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments(HubArguments, MethodArguments, RecordArguments, TeacherArguments, StopArguments):
    """Which model, and how it is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to fine-tune, timm/... too; without it training starts from scratch."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Model to train from scratch: a type, as resnet, or a config on disk or the hub."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Changes to it, as "depths=[2,2],hidden_sizes=[16,32],layer_type=basic".'}
    )
    small_image_stem: bool = field(
        default=False, metadata={"help": "For images of about 32x32: keep the resolution in the first layers."}
    )
    batch_norm_momentum: float | None = field(
        default=None, metadata={"help": "Momentum of all running statistics, if not the model's own."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Where size, mean and standard deviation come from, if not the checkpoint."}
    )
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Re-create a head of another size."})
    compare: bool = field(
        default=False, metadata={"help": "Train by four methods in turn, from equal weights. On if nothing is given."}
    )
    preset: str = field(
        default="default",
        metadata={
            "help": "StoMPP options not given: the library's default, or the paper's rule.",
            "choices": ["default", "paper"],
        },
    )
    evaluate_stages: bool = field(default=False, metadata={"help": "Evaluate whenever a stage has just been frozen."})
    evaluate_binary: bool = field(
        default=False, metadata={"help": "At each evaluation, also evaluate the model as if fully binary now."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path and (self.config_overrides or self.small_image_stem):
            raise ValueError("--config_overrides and --small_image_stem are for training from scratch.")


def load_config(args: ModelArguments, names: list[str]) -> Any:
    """The model's config, with the names of the labels."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    overrides = yaml.safe_load("{" + (args.config_overrides or "").replace("=", ": ") + "}")
    source = args.config_name or args.model_name_or_path
    if source in CONFIG_MAPPING:
        unknown = [name for name in overrides if not hasattr(CONFIG_MAPPING[source](), name)]
        if unknown:
            raise ValueError(f"--config_overrides: a {source} config has no {', '.join(unknown)}.")
        config = CONFIG_MAPPING[source](**overrides, **labels)
    elif source is not None:
        config = AutoConfig.from_pretrained(source, **overrides, **labels, **args.hub)
    else:
        raise ValueError("add --model_name_or_path, or --config_name to train from scratch.")
    return small_image_config(config) if args.small_image_stem else config


def load_processor(args: ModelArguments, data_args: DataArguments, config: Any) -> tuple[Any, Pixels]:
    """The checkpoint's image processor, or one for the config; and what it does to an image."""
    source, known = args.image_processor_name or args.model_name_or_path, getattr(config, "image_size", None)
    if source is not None:
        try:
            processor = AutoImageProcessor.from_pretrained(source, **args.hub)
        except OSError:
            logger.warning("%s has no image processor: ImageNet's mean and standard deviation are used.", source)
        else:
            pixels = Pixels.of_processor(processor)
            if data_args.image_size in (None, pixels.size):
                return processor, pixels
    size = data_args.image_size or (known if isinstance(known, int) else Pixels.size)
    share = 1.0 if size < 64 else 0.875
    processor = ConvNextImageProcessorPil(
        size={"shortest_edge": size}, crop_pct=share, resample=Pixels.resample,
        image_mean=list(Pixels.mean), image_std=list(Pixels.std),
    )  # fmt: skip
    config.image_size = size
    return processor, Pixels.of_processor(processor)


def load_model(
    args: ModelArguments, config: Any, size: int, stompp: StoMPPConfig, resume_from: str | None = None
) -> Any:
    """The model, binarized unless its checkpoint is."""
    if resume_from is not None:  # Trainer cannot: it misses the keys that transformers renames when it saves a ViT
        model = AutoModelForImageClassification.from_pretrained(resume_from)
    elif args.model_name_or_path is not None:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            **args.hub,
        )
    else:
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=args.trust_remote_code)
    # ResNet and others take num_items_in_batch and ignore it. Without this, Trainer would believe that they divide by
    # it, and multiply gradients by the number of processes and of accumulated batches.
    model.accepts_loss_kwargs = False
    for module in model.modules():
        if args.batch_norm_momentum is not None and "BatchNorm" in type(module).__name__:
            module.momentum = args.batch_norm_momentum
    if resume_from is None:
        model = plain_again(model)
    if not is_binarized(model):
        channels = getattr(config, "num_channels", 3)
        model = binarize_model(model, stompp, example_inputs={"pixel_values": torch.randn(1, channels, size, size)})
    return model
