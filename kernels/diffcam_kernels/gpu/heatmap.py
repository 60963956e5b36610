"""heatmap and overlay: from maps to pictures, in one launch.

    v = clamp((bilinear(M) - min M) / (max M - min M), 0, 1)

Plan: a program owns a run of output values of one map. It looks over the map for its extremes (a
map is small, and in cache), then interpolates between the four nearest cells. The overlay takes the
colour of v from a table and blends it with the image, byte by byte in the order of memory, so that
loads and stores are wide; each pixel is interpolated once for each of its three bytes. Nothing of
full size is written but the result.

Bytes: the maps once, the result once; an overlay reads the image once for each target. FLOP: about
20 a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div, power_of_two
from diffcam_kernels.reference.pictures import MID_GREY

# Values of a program, over 256 threads: 32 bytes of float32, or 16 of uint8, for each.
_BLOCK, _BYTES_BLOCK = 2048, 4096


@triton.jit
def heatmap_kernel(
    maps_ptr,  # (N, T, h, w), contiguous
    out_ptr,  # (N, T, H, W) floating point or uint8, contiguous
    height,
    width,
    H,
    W,
    scale_h,
    scale_w,
    BYTES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program computes BLOCK values of one heatmap."""
    # Maps come first: the other axes of a grid end at 65,535.
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H * W
    pid_m = tl.program_id(0).to(tl.int64)
    map_ptr = maps_ptr + pid_m * height * width
    v = _values(map_ptr, offs // W, offs % W, mask, height, width, scale_h, scale_w, BLOCK_P)
    if BYTES:
        v = (tl.where(v == v, v, 0.0) * 255 + 0.5).to(tl.uint8)
    tl.store(out_ptr + pid_m * H * W + offs, v.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def overlay_kernel(
    maps_ptr,  # (N, T, h, w), contiguous
    images_ptr,  # (N, H, W, 3) uint8, contiguous
    colours_ptr,  # (256, 3) uint8, contiguous
    out_ptr,  # (N, T, H, W, 3) uint8, contiguous
    T,
    height,
    width,
    H,
    W,
    scale_h,
    scale_w,
    share,
    MISSING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program computes BLOCK bytes of one overlay."""
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < H * W * 3
    pid_m = tl.program_id(0).to(tl.int64)
    map_ptr = maps_ptr + pid_m * height * width
    pixel, channel = offs // 3, offs % 3
    v = _values(map_ptr, pixel // W, pixel % W, mask, height, width, scale_h, scale_w, BLOCK_P)
    index = tl.minimum((tl.where(v == v, v, 0.0) * 256).to(tl.int32), 255)
    colour = tl.load(colours_ptr + index * 3 + channel, mask=mask, other=0).to(tl.int32)
    colour = tl.where(v == v, colour, MISSING)
    image_ptr = images_ptr + (pid_m // T) * H * W * 3
    image = tl.load(image_ptr + offs, mask=mask, other=0).to(tl.int32)
    mixed = (image * (256 - share) + colour * share + 128) >> 8
    tl.store(out_ptr + pid_m * H * W * 3 + offs, mixed.to(tl.uint8), mask=mask)


@triton.jit
def _values(map_ptr, y, x, mask, height, width, scale_h, scale_w, BLOCK_P: tl.constexpr):
    """The heat at pixels (y, x), in [0, 1]; NaN where the map holds one anywhere."""
    low = tl.full((BLOCK_P,), float("inf"), tl.float32)
    high = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    broken = tl.zeros((BLOCK_P,), tl.int32)
    offs_p = tl.arange(0, BLOCK_P)
    for start in range(0, height * width, BLOCK_P):
        inside = start + offs_p < height * width
        m = tl.load(map_ptr + start + offs_p, mask=inside, other=0.0).to(tl.float32)
        broken = tl.maximum(broken, (m != m).to(tl.int32))
        low = tl.minimum(low, tl.where(inside, m, float("inf")))
        high = tl.maximum(high, tl.where(inside, m, -float("inf")))
    lowest, highest = tl.min(low), tl.max(high)
    # Pixel centres, as align_corners=False has them.
    row = tl.maximum((y + 0.5) * scale_h - 0.5, 0.0)
    column = tl.maximum((x + 0.5) * scale_w - 0.5, 0.0)
    i = tl.minimum(row.to(tl.int32), height - 1)
    j = tl.minimum(column.to(tl.int32), width - 1)
    below, right = row - i, column - j
    i_next, j_next = tl.minimum(i + 1, height - 1), tl.minimum(j + 1, width - 1)
    # The minimum goes first: what is left to interpolate is of the size of the range.
    v00 = tl.load(map_ptr + i * width + j, mask=mask, other=0.0).to(tl.float32) - lowest
    v01 = tl.load(map_ptr + i * width + j_next, mask=mask, other=0.0).to(tl.float32) - lowest
    v10 = tl.load(map_ptr + i_next * width + j, mask=mask, other=0.0).to(tl.float32) - lowest
    v11 = tl.load(map_ptr + i_next * width + j_next, mask=mask, other=0.0).to(tl.float32) - lowest
    top = v00 * (1 - right) + v01 * right
    bottom = v10 * (1 - right) + v11 * right
    span = highest - lowest
    v = (top * (1 - below) + bottom * below) / tl.where(span == 0, 1.0, span)
    # Written so that NaN stays.
    v = tl.where(v < 0, 0.0, tl.where(v > 1, 1.0, v))
    return tl.where(tl.max(broken) > 0, float("nan"), v)


def plan_heatmap(maps: Tensor, heatmaps: Tensor) -> Launch:
    """The launch that fills heatmaps (N, T, H, W) from maps (N, T, h, w)."""
    height, width = heatmaps.shape[2:]
    in_bytes = heatmaps.dtype == torch.uint8
    block = _BYTES_BLOCK if in_bytes else _BLOCK
    return Launch(
        heatmap_kernel,
        (maps.shape[0] * maps.shape[1], ceil_div(height * width, block)),
        {"maps_ptr": maps, "out_ptr": heatmaps, **_sizes(maps, height, width)},
        {"BYTES": in_bytes, "BLOCK_P": _block_p(maps), "BLOCK": block},
        num_warps=8,
    )


def plan_overlay(
    maps: Tensor, images: Tensor, colours: Tensor, share: int, overlays: Tensor
) -> Launch:
    """The launch that fills overlays (N, T, H, W, 3) from maps (N, T, h, w) and images."""
    height, width = images.shape[1:3]
    return Launch(
        overlay_kernel,
        (maps.shape[0] * maps.shape[1], ceil_div(height * width * 3, _BYTES_BLOCK)),
        {
            "maps_ptr": maps,
            "images_ptr": images,
            "colours_ptr": colours,
            "out_ptr": overlays,
            "T": maps.shape[1],
            **_sizes(maps, height, width),
            "share": share,
        },
        {"MISSING": MID_GREY, "BLOCK_P": _block_p(maps), "BLOCK": _BYTES_BLOCK},
        num_warps=8,
    )


def _sizes(maps: Tensor, height: int, width: int) -> dict[str, float]:
    h, w = maps.shape[2:]
    return {
        **{"height": h, "width": w, "H": height, "W": width},
        **{"scale_h": h / height, "scale_w": w / width},
    }


def _block_p(maps: Tensor) -> int:
    return min(power_of_two(maps.shape[2] * maps.shape[3]), 1024)


def heatmap(maps: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """See `diffcam_kernels.reference.heatmap`."""
    heatmaps = torch.empty((*maps.shape[:2], height, width), dtype=dtype, device=maps.device)
    plan_heatmap(maps.contiguous(), heatmaps).run()
    return heatmaps


def overlay(maps: Tensor, images: Tensor, colours: Tensor, share: int) -> Tensor:
    """See `diffcam_kernels.reference.overlay`."""
    n, t = maps.shape[:2]
    overlays = torch.empty((n, t, *images.shape[1:]), dtype=torch.uint8, device=maps.device)
    plan_overlay(
        maps.contiguous(), images.contiguous(), colours.contiguous(), share, overlays
    ).run()
    return overlays
