"""The interfaces of other libraries, over this engine.

The names here are those of pytorch-grad-cam; `compat.torchcam`, `compat.captum` and
`compat.quantus` hold the others. docs/migrate.md sets old and new code side by side, and says where
results differ.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    **dict.fromkeys(
        (
            "AblationCAM",
            "DiffGradCAM",
            "DiffGradCAMPlusPlus",
            "EigenCAM",
            "EigenGradCAM",
            "GradCAM",
            "GradCAMElementWise",
            "GradCAMPlusPlus",
            "HiResCAM",
            "LayerCAM",
            "ReciproCAM",
            "ScoreCAM",
            "XGradCAM",
        ),
        "diffcam_fast.compat.grad_cam",
    ),
    **dict.fromkeys(
        (
            "BinaryClassifierOutputTarget",
            "ClassifierOutputReST",
            "ClassifierOutputSoftmaxTarget",
            "ClassifierOutputTarget",
            "FinerWeightedTarget",
            "RawScoresOutputTarget",
            "SemanticSegmentationTarget",
            "SoftmaxOutputTarget",
        ),
        "diffcam_fast.compat.targets",
    ),
    **dict.fromkeys(("preprocess_image", "show_cam_on_image"), "diffcam_fast.compat.image"),
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
