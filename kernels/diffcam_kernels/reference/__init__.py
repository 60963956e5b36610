"""The definition of every operator, in plain PyTorch.

Kernels and exported graphs are held against these functions. They accumulate in float32, or in
float64 where an operand is float64, whatever the dtype of the inputs; they are written to be read,
not to be fast.
"""

from diffcam_kernels.reference.cams import (
    REDUCTIONS,
    channel_weights,
    eigen_cam,
    gradient_cam,
    head_cam,
    pooled_cam,
)
from diffcam_kernels.reference.contrast import (
    contrast_gradient,
    contrast_score,
    contrast_weights,
    predicted,
)
from diffcam_kernels.reference.pictures import MID_GREY, heatmap, overlay, preprocess
from diffcam_kernels.reference.precision import accumulate_dtype

__all__ = [
    "MID_GREY",
    "REDUCTIONS",
    "accumulate_dtype",
    "channel_weights",
    "contrast_gradient",
    "contrast_score",
    "contrast_weights",
    "eigen_cam",
    "gradient_cam",
    "head_cam",
    "heatmap",
    "overlay",
    "pooled_cam",
    "predicted",
    "preprocess",
]
