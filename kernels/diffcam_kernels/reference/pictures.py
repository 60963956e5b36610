"""Pictures, in and out of the network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_kernels.reference.precision import accumulate_dtype

MID_GREY = 128
"""What stands in a picture for a value that is not a number."""


def heatmap(maps: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Min-max of each map to [0, 1], then bilinear upsampling (align_corners=False).

    A constant map gives zeros exactly; NaN gives NaN.

    Args:
        maps: (N, T, h, w).
        height: H of the result, in pixels.
        width: W of the result, in pixels.
        dtype: of the result; None: float32 (float64 for float64 maps). uint8 holds round(255 v),
            and 0 for NaN.

    Returns:
        (N, T, H, W) in [0, 1], or 0 to 255 in uint8.
    """
    m = maps.to(accumulate_dtype(maps))
    dtype = dtype or m.dtype
    if m.numel() == 0:
        return m.new_zeros((*m.shape[:2], height, width), dtype=dtype)
    low, high = m.amin(dim=(2, 3), keepdim=True), m.amax(dim=(2, 3), keepdim=True)
    unit = (m - low) / torch.where(high == low, 1.0, high - low)
    resized = F.interpolate(unit, size=(height, width), mode="bilinear", align_corners=False)
    # Interpolation weights may sum to one unit in the last place above 1.
    resized = resized.clamp(0.0, 1.0)
    if dtype == torch.uint8:
        return (resized.nan_to_num(0.0) * 255 + 0.5).to(torch.uint8)
    return resized.to(dtype)


def overlay(maps: Tensor, images: Tensor, colours: Tensor, share: int) -> Tensor:
    """The heatmaps of the maps in colour, blended over images, in integers.

    A heat v takes the colour floor(256 v), as matplotlib does; NaN is mid grey.

    Args:
        maps: (N, T, h, w).
        images: (N, H, W, 3) uint8.
        colours: (256, 3) uint8.
        share: weight of the colours in 256ths, 0 to 256.

    Returns:
        (N, T, H, W, 3) uint8.
    """
    heat = heatmap(maps, images.shape[1], images.shape[2])
    index = (heat.nan_to_num(0.0) * 256).clamp(max=255).to(torch.int64)
    colour = torch.where(heat.isnan()[..., None], MID_GREY, colours.to(torch.int32)[index])
    mixed = images.to(torch.int32)[:, None] * (256 - share) + colour * share
    return ((mixed + 128) >> 8).to(torch.uint8)


def preprocess(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """(x / 255 - mean) / std, from pictures to what a network takes.

    Args:
        images: (N, H, W, C) uint8.
        mean: C numbers, subtracted from values in 0..1.
        std: C numbers above 0, divide afterwards.
        dtype: of the result, floating point.
        channels_last: memory format of the result.

    Returns:
        (N, C, H, W).
    """
    x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    low, scale = (torch.tensor(c, device=x.device)[:, None, None] for c in (list(mean), list(std)))
    x = (x - low) / scale
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return x.to(dtype).contiguous(memory_format=layout)
