"""Tiny random models of vision, speech and image-text architectures, and a small convolutional net of our own.

As in models.py, every number of layers and stages and every name in `left` is written by hand from the architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from stompp_hf import Progression, StoMPPConfig, binarize_model

BATCH, LABELS = 4, 3
IMAGES, AUDIO = hf.AutoModelForImageClassification, hf.AutoModelForAudioClassification

_RESNET = {"embedding_size": 8, "depths": [2, 2], "num_labels": LABELS}
_REGNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "groups_width": 4, "num_labels": LABELS}
_TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_TEXT = {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SPEECH = {"conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "classifier_proj_size": 16}
_SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_labels": LABELS}
_MOBILE = {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4, "depth_divisible_by": 4, "num_labels": LABELS}
_MOBILE |= {"output_stride": 8, "finegrained_output": False}


@dataclass(frozen=True)
class Case:
    """One architecture: how to build it, and what binarizing it must give."""

    auto: type
    config: Callable[[], hf.PretrainedConfig]
    layers: int
    stages: int
    left: dict[str, str]
    absorbed: int = 0
    size: int = 32
    paused: set[str] = field(default_factory=set)

    def build(self, seed: int = 0) -> hf.PreTrainedModel:
        """The model, with the same weights for the same seed, in training mode."""
        torch.manual_seed(seed)
        return self.auto.from_config(self.config()).train()

    def batch(self, seed: int = 0) -> dict[str, Any]:
        """Images, sounds, or pairs of images and texts, with what gives a loss."""
        generator = torch.Generator().manual_seed(seed)
        if self.auto is AUDIO:
            sounds = torch.randn(BATCH, 20 * self.size, generator=generator)
            return {"input_values": sounds, "labels": torch.arange(BATCH) % LABELS}
        images = {"pixel_values": torch.randn(BATCH, 3, self.size, self.size, generator=generator)}
        if self.auto is IMAGES:
            return {**images, "labels": torch.arange(BATCH) % LABELS}
        ids = torch.randint(3, 100, (BATCH, 8), generator=generator)
        ids[:, -1] = 2
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, "return_loss": True}


def _resnet(kind: str, sizes: list[int], layers: int, shortcuts: list[int], absorbed: int) -> Case:
    """The first convolution, the classifier, and the shortcuts that change the shape stay real."""
    left = {"resnet.embedder.embedder.convolution": "first layer", "classifier.1": "head"}
    left |= {f"resnet.encoder.stages.{stage}.layers.0.shortcut.convolution": "shortcut" for stage in shortcuts}
    config = {**_RESNET, "hidden_sizes": sizes, "layer_type": kind}
    return Case(IMAGES, lambda: hf.ResNetConfig(**config), layers, 4, left, absorbed)


def _regnet(kind: str, layers: int, absorbed: int) -> Case:
    left = {"regnet.embedder.embedder.convolution": "first layer", "classifier.1": "head"}
    left |= {f"regnet.encoder.stages.{stage}.layers.0.shortcut.convolution": "shortcut" for stage in (0, 1)}
    return Case(IMAGES, lambda: hf.RegNetConfig(**_REGNET, layer_type=kind), layers, 4, left, absorbed)


def _mobilenet(tf_padding: bool) -> Case:
    stem = [f"mobilenet_v2.conv_stem.{name}.convolution" for name in ("first_conv", "conv_3x3", "reduce_1x1")]
    left = {**dict.fromkeys(stem, "first layer"), "mobilenet_v2.conv_1x1.convolution": "head", "classifier": "head"}
    # 16 inverted residuals of three convolutions, with a ReLU6 between them; F.pad may stand behind it
    return Case(IMAGES, lambda: hf.MobileNetV2Config(**_MOBILE, tf_padding=tf_padding), 16 * 3, 16, left, 16 * 2)


CASES: dict[str, Case] = {
    # two convolutions a block, the first one's ReLU feeds the second alone
    "resnet": _resnet("basic", [8, 16], 4 * 2, [1], 4),
    "resnet-bottleneck": _resnet("bottleneck", [16, 32], 4 * 3, [0, 1], 4 * 2),
    "mobilenet_v2": _mobilenet(True),
    "mobilenet_v2-torch": _mobilenet(False),
    "convnextv2": Case(
        IMAGES,
        lambda: hf.ConvNextV2Config(
            hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=32, num_labels=LABELS
        ),
        4 * 3, 4,  # a depthwise convolution and two linear layers
        {
            "convnextv2.embeddings.patch_embeddings": "first layer",
            "convnextv2.encoder.stages.1.downsampling_layer.1": "down-sampling",
            "classifier": "head",
        },
    ),
    "vit": Case(
        IMAGES, lambda: hf.ViTConfig(**_TOWER, image_size=16, patch_size=4, num_labels=LABELS), 2 * 6, 2,
        {"vit.embeddings.patch_embeddings.projection": "first layer", "classifier": "head"}, size=16,
    ),
    "swin": Case(
        IMAGES,
        lambda: hf.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=LABELS
        ),
        4 * 6, 4,
        {
            "swin.embeddings.patch_embeddings.projection": "first layer",
            "swin.encoder.layers.0.downsample.reduction": "down-sampling",
            "classifier": "head",
        },
    ),
    "regnet-x": _regnet("x", 4 * 3, 4 * 2),
    # squeeze and excitation: two more, and the ReLU before it feeds a pool and a product too
    "regnet-y": _regnet("y", 4 * 5, 4 * 2),
    "efficientnet": Case(
        IMAGES,
        lambda: hf.EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, num_labels=LABELS
        ),
        4 + 7 * 5, 8,  # ceil(0.3 * (1, 2, 2, 3, 3, 4, 1)) blocks; the first has no expansion
        {
            "efficientnet.embeddings.convolution": "first layer",
            "efficientnet.encoder.top_conv": "head",
            "classifier": "head",
        },
    ),
    "wav2vec2": Case(
        AUDIO, lambda: hf.Wav2Vec2Config(**_TOWER, **_SPEECH), 2 + 1 + 2 * 6, 2 + 1 + 2,
        {
            "wav2vec2.feature_extractor.conv_layers.0.conv": "first layer: it reads the model's input",
            "wav2vec2.encoder.pos_conv_embed.conv": "ParametrizedConv1d has no binary class",
            "projector": "head",
            "classifier": "head",
        },
        paused={
            "wav2vec2.encoder.dropout",
            *(f"wav2vec2.encoder.layers.{index}.feed_forward.intermediate_dropout" for index in (0, 1)),
        },
    ),
    "clip": Case(
        hf.AutoModel,
        lambda: hf.CLIPConfig(
            text_config={**_TOWER, **_TEXT}, vision_config={**_TOWER, "image_size": 16, "patch_size": 4},
            projection_dim=16,
        ),
        2 * 2 * 6, 2 * 2,
        {
            "vision_model.embeddings.patch_embedding": "first layer",
            "visual_projection": "head",
            "text_projection": "head",
        },
        size=16,
    ),
}  # fmt: skip


# ---- a small net of our own ----


class ConvNet(nn.Module):
    """A stem, four blocks (a plain, a depthwise, a strided and a reflecting convolution), and a head."""

    def __init__(self, width: int, shortcuts: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        convolutions = [
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Conv2d(width, width, 3, padding=1, stride=1 if shortcuts else 2, groups=2),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
        ]
        self.blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(width), conv) for conv in convolutions)
        self.head, self.shortcuts = nn.Linear(width, LABELS), shortcuts

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x) if self.shortcuts else block(x)
        return self.head(x.mean((2, 3)))


def conv_net(width: int = 8, size: int = 8, shortcuts: bool = False, **options: Any) -> ConvNet:
    """The same weights each time; windows over the whole run and a quick refresh unless `options` say otherwise."""
    torch.manual_seed(0)
    config = StoMPPConfig(**{"refresh_rate": 4, "end": 1.0, **options})
    return binarize_model(ConvNet(width, shortcuts), config, images(0, 1, size))


def images(seed: int, count: int = BATCH, size: int = 8) -> Tensor:
    """Normal inputs, a pure function of the seed."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Of a classification into labels that do not depend on the images."""
    return nn.functional.cross_entropy(model(images(seed)), torch.arange(BATCH) % LABELS)


def train(model: nn.Module, progression: Progression, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps [first, last), and the state after them."""
    for step in range(first, last):
        progression.step(step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    progression.step(last)
