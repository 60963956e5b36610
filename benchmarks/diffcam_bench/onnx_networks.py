"""The networks of the ONNX sweep: all of torchvision, convolutional families of timm, and earlier
layers of ten of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffcam_bench.rows import optional

# The smallest network of a family, as `diffcam bench families` takes it; 40 of the families that
# its table lists as explained, those without attention over positions, without mixing of tokens
# and without state space, one or two of each module of timm, small ones where there are more.
TIMM = (
    "convmixer_768_32",
    "convnext_zepto_rms",
    "convnextv2_atto",
    "cs3darknet_focus_s",
    "cspresnet50",
    "darknet17",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "eca_resnext26ts",
    "ecaresnext26t_32x4d",
    "efficientnet_lite0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fbnetv3_b",
    "gernet_s",
    "ghostnet_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "mixnet_s",
    "mobilenetv3_small_050",
    "mobileone_s1",
    "nf_regnet_b0",
    "poolformer_s12",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m1",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "skresnet18",
    "starnet_s050",
)

# From a third of the depth on, so that the backward runs through blocks of each kind.
EARLIER: Mapping[str, tuple[str, str, str]] = {
    "torchvision:convnext_tiny": ("features.1", "features.3", "features.5"),
    "torchvision:densenet121": (
        "features.transition1",
        "features.transition2",
        "features.denseblock3",
    ),
    "torchvision:efficientnet_b0": ("features.2", "features.4", "features.6"),
    "torchvision:inception_v3": ("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e"),
    "torchvision:mobilenet_v3_small": ("features.1", "features.4", "features.8"),
    "torchvision:regnet_y_400mf": (
        "trunk_output.block1",
        "trunk_output.block2",
        "trunk_output.block3",
    ),
    "torchvision:resnet50": ("layer1", "layer2", "layer3"),
    "torchvision:shufflenet_v2_x1_0": ("maxpool", "stage2", "stage3"),
    "torchvision:squeezenet1_1": ("features.4", "features.7", "features.10"),
    "torchvision:vgg16": ("features.9", "features.16", "features.23"),
}

ROUTES = ("pytorch", "onnx-dynamo", "onnx-torchscript")
"""From the PyTorch model; from its plain ONNX file, as PyTorch's two exporters write it."""


@dataclass(frozen=True)
class Case:
    """A network whose files are compared with it.

    Attributes:
        model: `timm:NAME` or `torchvision:NAME`.
        layers: module names, beside the layer that is found without being asked.
    """

    model: str
    layers: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str, str]]:
        """Model, layer asked for and route of each of its rows."""
        found = [(self.model, "", route) for route in ROUTES]
        return found + [(self.model, layer, "pytorch") for layer in self.layers]


def cases(text: str | None = None) -> list[Case]:
    """The whole sweep, or the networks whose name holds a text."""
    models = optional("torchvision.models")
    names = [f"torchvision:{name}" for name in models.list_models(module=models)]
    names += [f"timm:{name}" for name in TIMM]
    return [Case(n, EARLIER.get(n, ())) for n in sorted(names) if text is None or text in n]
