"""The methods of the CAM family, by their names.

Each holds what it is about; the contrast that a method takes is no part of it.
"""

from diffcam_fast.methods.ablation import AblationCAM
from diffcam_fast.methods.activation import ClassActivationMap, EigenCAM
from diffcam_fast.methods.base import Method
from diffcam_fast.methods.decom import DecomCAM
from diffcam_fast.methods.fitted import BroadCAM, FittedCAM, ReCAM
from diffcam_fast.methods.gradient import EigenGradCAM, GradientMethod
from diffcam_fast.methods.recipro import ReciproCAM
from diffcam_fast.methods.score import ScoreCAM

_PAPER, _GRAD_CAM, _PLUS_PLUS = "arXiv 2506.08514", "arXiv 1610.02391", "arXiv 1710.11063"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        GradientMethod("diff_grad_cam", "log_odds", _PAPER, needs_contrast=True),
        GradientMethod(
            "diff_grad_cam_pp",
            "log_odds",
            _PAPER,
            needs_contrast=True,
            reduction="grad_cam_pp",
            pooled="positive",
        ),
        GradientMethod("grad_cam", "none", _GRAD_CAM),
        GradientMethod(
            "grad_cam_pp", "none", _PLUS_PLUS, reduction="grad_cam_pp", pooled="positive"
        ),
        GradientMethod("xgrad_cam", "none", "arXiv 2008.02312", reduction="xgrad_cam"),
        GradientMethod("layer_cam", "none", "TIP 2021", reduction="layer_cam", pooled="positive"),
        GradientMethod("hires_cam", "none", "arXiv 2011.08891", reduction="hires_cam"),
        EigenGradCAM("eigen_grad_cam", "none", "pytorch-grad-cam"),
        ClassActivationMap("cam", "none", "arXiv 1512.04150"),
        EigenCAM("eigen_cam", "none", "arXiv 2008.00299"),
        ReciproCAM("recipro_cam", "none", "arXiv 2209.14074"),
        ScoreCAM("score_cam", "none", "arXiv 1910.01279"),
        AblationCAM("ablation_cam", "none", "WACV 2020"),
        DecomCAM("decom_cam", "none", "arXiv 2405.18882"),
        BroadCAM("broad_cam", "none", "arXiv 2309.03509"),
        ReCAM("re_cam", "none", "arXiv 2203.00962"),
    )
}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


__all__ = [
    "METHODS",
    "BroadCAM",
    "EigenGradCAM",
    "FittedCAM",
    "GradientMethod",
    "Method",
    "ReCAM",
    "get_method",
]
