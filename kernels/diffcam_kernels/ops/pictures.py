"""Pictures, in and out of the network."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcam_kernels import reference as ref
from diffcam_kernels.ops.checks import (
    outside_autocast,
    require,
    require_floating,
    require_one_device,
)
from diffcam_kernels.settings import uses_kernels

_HEATMAPS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8)


@torch.library.custom_op("diffcam::heatmap", mutates_args=())
@outside_autocast
def heatmap(maps: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Maps as pictures in [0, 1], (N, T, H, W); see `diffcam_kernels.reference.heatmap`.

    Raises:
        ValueError: the maps are not (N, T, h, w), the size is not positive, or the dtype is neither
            floating point nor uint8.
    """
    require(maps.ndim == 4, f"maps must be (N, T, h, w), got {tuple(maps.shape)}")
    require(height > 0 and width > 0, f"size must be positive, got {(height, width)}")
    require(
        dtype is None or dtype in _HEATMAPS,
        f"dtype must be floating point or uint8, got {dtype}",
    )
    require_floating(maps=maps)
    dtype = dtype or ref.accumulate_dtype(maps)
    if uses_kernels(maps) and dtype != torch.float64 and maps.numel():
        from diffcam_kernels.gpu import heatmap as gpu

        return gpu.heatmap(maps, height, width, dtype)
    return ref.heatmap(maps, height, width, dtype).contiguous()


@heatmap.register_fake
def _(maps: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = (*maps.shape[:2], height, width)
    return maps.new_empty(shape, dtype=dtype or ref.accumulate_dtype(maps))


@torch.library.custom_op("diffcam::overlay", mutates_args=())
@outside_autocast
def overlay(maps: Tensor, images: Tensor, colours: Tensor, share: int) -> Tensor:
    """Coloured heatmaps blended over images, (N, T, H, W, 3) uint8; see
    `diffcam_kernels.reference.overlay`.

    Raises:
        ValueError: an operand has the wrong shape, dtype or device, or the share is not from 0 to
            256.
    """
    require(maps.ndim == 4, f"maps must be (N, T, h, w), got {tuple(maps.shape)}")
    require(
        images.ndim == 4
        and images.shape[0] == maps.shape[0]
        and images.shape[3] == 3
        and images.dtype == torch.uint8,
        f"images must be (N, H, W, 3) uint8 with N = {maps.shape[0]}, got {tuple(images.shape)} "
        f"{images.dtype}",
    )
    require(
        tuple(colours.shape) == (256, 3) and colours.dtype == torch.uint8,
        f"colours must be (256, 3) uint8, got {tuple(colours.shape)} {colours.dtype}",
    )
    require(0 <= share <= 256, f"share must be from 0 to 256, got {share}")
    require_floating(maps=maps)
    require_one_device(maps=maps, images=images, colours=colours)
    if uses_kernels(maps) and maps.numel():
        from diffcam_kernels.gpu import heatmap as gpu

        return gpu.overlay(maps, images, colours, share)
    return ref.overlay(maps, images, colours, share).contiguous()


@overlay.register_fake
def _(maps: Tensor, images: Tensor, colours: Tensor, share: int) -> Tensor:
    return images.new_empty((*maps.shape[:2], *images.shape[1:]))


@torch.library.custom_op("diffcam::preprocess", mutates_args=())
@outside_autocast
def preprocess(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """(x / 255 - mean) / std, (N, C, H, W); see `diffcam_kernels.reference.preprocess`.

    Raises:
        ValueError: the images are not (N, H, W, C) uint8, the numbers do not fit their channels, or
            the dtype is not floating point.
    """
    require(
        images.ndim == 4 and images.dtype == torch.uint8,
        f"images must be (N, H, W, C) uint8, got {tuple(images.shape)} {images.dtype}",
    )
    channels = images.shape[3]
    require(
        len(mean) == len(std) == channels and min(std, default=1) > 0,
        f"need {channels} means and {channels} standard deviations above 0, got {list(mean)} and "
        f"{list(std)}",
    )
    require(dtype.is_floating_point, f"dtype must be floating point, got {dtype}")
    if uses_kernels(images) and dtype != torch.float64:
        from diffcam_kernels.gpu import preprocess as gpu

        return gpu.preprocess(images, mean, std, dtype, channels_last)
    return ref.preprocess(images, mean, std, dtype, channels_last)


@preprocess.register_fake
def _(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    n, height, width, channels = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.new_empty((n, channels, height, width), dtype=dtype).to(memory_format=layout)
