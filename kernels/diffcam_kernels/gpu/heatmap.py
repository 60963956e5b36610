"""heatmap and overlay: from maps to pictures, in one launch.

    v = clamp((bilinear(M) - min M) / (max M - min M), 0, 1)

Plan: a program owns some whole rows of one picture. It looks over the map for its extremes (a map
is small, and in cache), interpolates down the columns of the map, scaled, which leaves one value for
each row of pixels and column of cells, and keeps these on chip. Then it walks along its rows and
interpolates between two of them for each pixel. What depends on the row alone or on the column
alone is computed once for the tile, and no value needs a division.

The overlay walks in words of four bytes: a word holds bytes of two pixels, whose colours, three
bytes of a word each, are shifted together; two bytes of it are blended at a time. Where rows of an
image are no whole words it walks in single bytes.

Bytes: the maps once, the result once; an overlay reads the image once for each target. FLOP: about
20 a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels import reference
from diffcam_kernels.gpu.launch import Launch, ceil_div, device_of, power_of_two, shrunk
from diffcam_kernels.reference.pictures import MID_GREY

# Rows and columns of a tile, warps of a program. 32 columns of float32 are a line of the cache.
_HEATMAP = (32, 32, 4)
# Columns are words here.
_OVERLAY = (32, 32, 4)
# Columns of cells that a program can hold for each of its rows.
_MAX_COLUMNS = 1024


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
    BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """This program computes BLOCK_H rows of one heatmap."""
    # Maps come first: the other axes of a grid end at 65,535.
    pid_m = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    map_ptr = maps_ptr + pid_m * height * width
    rows = _rows(map_ptr, y, height, width, scale_h, BLOCK_P, BLOCK_J)
    out_ptrs = out_ptr + pid_m * H * W + (y * W)[:, None]
    for start in range(0, W, BLOCK_W):
        x = start + tl.arange(0, BLOCK_W)
        v = _heat(rows, x, width, scale_w)
        if BYTES:
            v = (tl.where(v == v, v, 0.0) * 255 + 0.5).to(tl.uint8)
        mask = (y < H)[:, None] & (x < W)[None, :]
        tl.store(out_ptrs + x[None, :], v.to(out_ptr.dtype.element_ty), mask=mask)


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
    units,  # of a row: words or bytes
    scale_h,
    scale_w,
    share,
    WORDS: tl.constexpr,
    MISSING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """This program computes BLOCK_H rows of one overlay."""
    pid_m = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    map_ptr = maps_ptr + pid_m * height * width
    rows = _rows(map_ptr, y, height, width, scale_h, BLOCK_P, BLOCK_J)
    # One word a colour, so that one look finds all of it.
    entries = tl.arange(0, 256) * 3
    table = tl.load(colours_ptr + entries).to(tl.int32)
    table |= tl.load(colours_ptr + entries + 1).to(tl.int32) << 8
    table |= tl.load(colours_ptr + entries + 2).to(tl.int32) << 16
    unit: tl.constexpr = tl.int32 if WORDS else tl.uint8
    image_ptr = images_ptr.to(tl.pointer_type(unit)) + (pid_m // T) * H * units
    result_ptr = out_ptr.to(tl.pointer_type(unit)) + pid_m * H * units
    for start in range(0, units, BLOCK_U):
        u = start + tl.arange(0, BLOCK_U)
        offs = (y * units)[:, None] + u[None, :]
        mask = (y < H)[:, None] & (u < units)[None, :]
        image = tl.load(image_ptr + offs, mask=mask, other=0).to(tl.int32)
        shift = (u % 3 * 8)[None, :]
        if WORDS:
            # Byte 4 u is of pixel u + u // 3 and of its channel u % 3.
            x = u + u // 3
            colour = (_colours(table, rows, x, width, scale_w, MISSING) >> shift) | (
                _colours(table, rows, x + 1, width, scale_w, MISSING) << (24 - shift)
            )
        else:
            colour = (_colours(table, rows, u // 3, width, scale_w, MISSING) >> shift) & 255
        mixed = _blend(image, colour, share)
        if WORDS:
            mixed |= _blend(image >> 8, colour >> 8, share) << 8
        tl.store(result_ptr + offs, mixed.to(unit), mask=mask)


@triton.jit
def _blend(image, colour, share):
    """Bytes 0 and 2 of words, blended; their products with 256 just fit two bytes each."""
    mixed = (image & 0x00FF00FF) * (256 - share) + (colour & 0x00FF00FF) * share + 0x00800080
    return (mixed >> 8) & 0x00FF00FF


@triton.jit
def _colours(table, rows, x, width, scale_w, MISSING: tl.constexpr):
    """The colours at columns x of pixels, three bytes of a word."""
    v = _heat(rows, x, width, scale_w)
    index = tl.minimum((tl.where(v == v, v, 0.0) * 256).to(tl.int32), 255)
    colour = tl.gather(table, index.reshape(index.numel), 0).reshape(index.shape)
    return tl.where(v == v, colour, MISSING * 0x010101)


@triton.jit
def _rows(map_ptr, y, height, width, scale_h, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr):
    """The heat at rows y of pixels and all columns of cells; NaN if the map holds one anywhere."""
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
    lowest = tl.min(low)
    span = tl.max(high) - lowest
    span = tl.where(span == 0, 1.0, span)
    i, i_next, below = _neighbours(y, height, scale_h)
    offs_j = tl.arange(0, BLOCK_J)[None, :]
    mask = offs_j < width
    # The minimum goes first: what is left to interpolate is of the size of the range.
    top = tl.load(map_ptr + i[:, None] * width + offs_j, mask=mask, other=0.0)
    bottom = tl.load(map_ptr + i_next[:, None] * width + offs_j, mask=mask, other=0.0)
    top, bottom = top.to(tl.float32) - lowest, bottom.to(tl.float32) - lowest
    rows = (top * (1 - below)[:, None] + bottom * below[:, None]) / span
    return tl.where(tl.max(broken) > 0, float("nan"), rows)


@triton.jit
def _heat(rows, x, width, scale_w):
    """The heat at columns x of pixels, from `_rows`."""
    j, j_next, right = _neighbours(x, width, scale_w)
    shape: tl.constexpr = (rows.shape[0], x.shape[0])
    left_heat = tl.gather(rows, tl.broadcast_to(j[None, :], shape), 1)
    right_heat = tl.gather(rows, tl.broadcast_to(j_next[None, :], shape), 1)
    v = left_heat * (1 - right)[None, :] + right_heat * right[None, :]
    # Weights may sum to one unit in the last place above 1. Written so that NaN stays.
    return tl.where(v > 1, 1.0, v)


@triton.jit
def _neighbours(pixels, cells, scale):
    """The cells before and after pixels along an axis, and the weight of the one after."""
    # Pixel centres, as align_corners=False has them.
    position = tl.maximum((pixels + 0.5) * scale - 0.5, 0.0)
    before = tl.minimum(position.to(tl.int32), cells - 1)
    return before, tl.minimum(before + 1, cells - 1), position - before


def plan_heatmap(maps: Tensor, heatmaps: Tensor) -> Launch:
    """The launch that fills heatmaps (N, T, H, W) from maps (N, T, h, w)."""
    height, width = heatmaps.shape[2:]
    sizes, tile, programs = _tile(maps, height, width, _HEATMAP[0])
    return Launch(
        heatmap_kernel,
        programs,
        {"maps_ptr": maps, "out_ptr": heatmaps, **sizes, "W": width},
        {"BYTES": heatmaps.dtype == torch.uint8, **tile, "BLOCK_W": _HEATMAP[1]},
        num_warps=_HEATMAP[2],
    )


def plan_overlay(
    maps: Tensor, images: Tensor, colours: Tensor, share: int, overlays: Tensor
) -> Launch:
    """The launch that fills overlays (N, T, H, W, 3) from maps (N, T, h, w) and images."""
    height, width = images.shape[1:3]
    sizes, tile, programs = _tile(maps, height, width, _OVERLAY[0])
    words = width % 4 == 0 and images.data_ptr() % 4 == 0
    return Launch(
        overlay_kernel,
        programs,
        {
            "maps_ptr": maps,
            "images_ptr": images,
            "colours_ptr": colours,
            "out_ptr": overlays,
            "T": maps.shape[1],
            **sizes,
            "units": width * 3 // (4 if words else 1),
            "share": share,
        },
        {"WORDS": words, "MISSING": MID_GREY, **tile, "BLOCK_U": _OVERLAY[1]},
        num_warps=_OVERLAY[2],
    )


def _tile(
    maps: Tensor, height: int, width: int, rows: int
) -> tuple[dict[str, float], dict[str, int], tuple[int, int]]:
    """Sizes, blocks and programs of both kernels."""
    n, t, h, w = maps.shape
    block_j = power_of_two(w)
    # Wide maps leave room on chip for few rows.
    most = max(1, min(rows, 4096 // block_j))
    block_h = shrunk(most, min(most, 8), height, n * t, 4 * device_of(maps).processors)
    sizes = {"height": h, "width": w, "H": height, "scale_h": h / height, "scale_w": w / width}
    blocks = {"BLOCK_P": min(power_of_two(h * w), 1024), "BLOCK_J": block_j, "BLOCK_H": block_h}
    return sizes, blocks, (n * t, ceil_div(height, block_h))


def heatmap(maps: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """See `diffcam_kernels.reference.heatmap`."""
    if maps.shape[3] > _MAX_COLUMNS:
        return reference.heatmap(maps, height, width, dtype).contiguous()
    heatmaps = torch.empty((*maps.shape[:2], height, width), dtype=dtype, device=maps.device)
    plan_heatmap(maps.contiguous(), heatmaps).run()
    return heatmaps


def overlay(maps: Tensor, images: Tensor, colours: Tensor, share: int) -> Tensor:
    """See `diffcam_kernels.reference.overlay`."""
    if maps.shape[3] > _MAX_COLUMNS:
        return reference.overlay(maps, images, colours, share).contiguous()
    n, t = maps.shape[:2]
    overlays = torch.empty((n, t, *images.shape[1:]), dtype=torch.uint8, device=maps.device)
    plan_overlay(
        maps.contiguous(), images.contiguous(), colours.contiguous(), share, overlays
    ).run()
    return overlays
