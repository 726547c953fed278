"""ResNet and MobileNetV2 for images of about 32x32 pixels, as CIFAR networks have them, in a form that can be saved.

Importing this file registers both with AutoConfig and AutoModelForImageClassification.
"""

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PretrainedConfig,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class SmallImageResNetConfig(ResNetConfig):
    """A ResNet whose stem keeps the resolution."""

    model_type = "small_image_resnet"
    image_size: int = 32


class SmallImageResNetForImageClassification(ResNetForImageClassification):
    """ResNet with a 3x3 first convolution of stride 1 and no max-pool."""

    config_class = SmallImageResNetConfig

    def __init__(self, config: SmallImageResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(config.num_channels, config.embedding_size, activation=config.hidden_act)
        stem.pooler = nn.Identity()
        self.post_init()  # initializes the new convolution, as the others were; a second call leaves those alone


class SmallImageMobileNetV2Config(MobileNetV2Config):
    """A MobileNetV2 with resolution, padding and dropout as CIFAR networks have them."""

    model_type = "small_image_mobilenet_v2"
    image_size: int = 32
    tf_padding: bool = False
    classifier_dropout_prob: float = 0.2


class SmallImageMobileNetV2ForImageClassification(MobileNetV2ForImageClassification):
    """MobileNetV2 that divides the resolution by 8 instead of 32: stem and first downsampling block have stride 1."""

    config_class = SmallImageMobileNetV2Config

    def __init__(self, config: SmallImageMobileNetV2Config) -> None:
        super().__init__(config)
        for layer in (self.mobilenet_v2.conv_stem.first_conv, self.mobilenet_v2.layer[0].conv_3x3):
            layer.convolution.stride = (1, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # transformers' 0.997 keeps the last batch's statistics only


MODELS = {
    SmallImageResNetConfig: SmallImageResNetForImageClassification,
    SmallImageMobileNetV2Config: SmallImageMobileNetV2ForImageClassification,
}
for _config, _model in MODELS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)


def small_image_config(config: PretrainedConfig) -> PretrainedConfig:
    """The small-image sibling of a ResNet or MobileNetV2 config; options left at their default take the sibling's."""
    for small in MODELS:
        plain = small.__base__
        if type(config) is plain:
            default = plain().to_dict()
            return small(**{key: value for key, value in config.to_dict().items() if value != default.get(key)})
        if isinstance(config, small):
            return config
    names = " and ".join(cls.__base__.model_type for cls in MODELS)
    raise ValueError(f"--small_image_stem is for {names}, not {config.model_type}.")
