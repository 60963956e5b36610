"""Custom operators `torch.ops.diffcam.*`: the one call site of the engine, whatever the device.

Each checks its operands and computes with the Triton kernels or with the definitions in
`reference`, as `settings.uses_kernels` decides. Fake implementations let `torch.compile`,
`torch.export` and CUDA graphs see through them.

Targets are taken as valid here: reading them back to check their range would stop a GPU, so whoever
accepts them from a user checks them there.
"""

from diffcam_kernels.ops.cams import eigen_cam, gradient_cam, head_cam, pooled_cam
from diffcam_kernels.ops.contrast import contrast_channel_weights, contrast_gradient
from diffcam_kernels.ops.pictures import heatmap, overlay, preprocess

__all__ = [
    "contrast_channel_weights",
    "contrast_gradient",
    "eigen_cam",
    "gradient_cam",
    "head_cam",
    "heatmap",
    "overlay",
    "pooled_cam",
    "preprocess",
]
