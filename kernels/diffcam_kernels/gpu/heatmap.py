"""heatmap and overlay: from maps to pictures, in one launch.

    v = clamp((bilinear(M) - min M) / (max M - min M), 0, 1)

Plan: a program owns a block of rows and columns of one picture. It looks over the map for its
extremes (a map is small, and in cache). Rows of pixels between the same two rows of cells make a
band: there it interpolates once along each of the two, column by column, and then only between
them, pixel by pixel. Nothing of full size is written but the result.

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

from diffcam_kernels.gpu.launch import Launch, ceil_div, device_of, power_of_two, shrunk
from diffcam_kernels.reference.pictures import MID_GREY

# Most rows of a program, rows and columns of its tile, warps; columns of an overlay are words. Both
# are what was fastest on an H200; an overlay takes longer with one warp and with four.
_HEATMAP = (64, 8, 256, 4)
_OVERLAY = (64, 8, 64, 2)


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
    rows,  # of a program
    BYTES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """This program computes some rows of one heatmap, BLOCK_W columns of them."""
    # Maps come first: the other axes of a grid end at 65,535.
    pid_m = tl.program_id(0).to(tl.int64)
    map_ptr = maps_ptr + pid_m * height * width
    lowest, span = _extremes(map_ptr, height * width, BLOCK_P)
    x = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    out_ptrs = out_ptr + pid_m * H * W + x[None, :]
    y = tl.program_id(1) * rows
    last = tl.minimum(y + rows, H)
    while y < last:
        i, end = _band(y, last, height, scale_h)
        top, rise = _sides(map_ptr, i, x, height, width, scale_w, lowest, span)
        for start in range(y, end, BLOCK_H):
            offs_y = start + tl.arange(0, BLOCK_H)
            v = _heat(top, rise, offs_y, i, scale_h)
            # Rounding may leave [0, 1] by a unit in the last place. Written so that NaN stays.
            v = tl.where(v < 0, 0.0, tl.where(v > 1, 1.0, v))
            if BYTES:
                v = (tl.where(v == v, v, 0.0) * 255 + 0.5).to(tl.uint8)
            mask = (offs_y < end)[:, None] & (x < W)[None, :]
            out_ptrs_y = out_ptrs + (offs_y * W)[:, None]
            tl.store(out_ptrs_y, v.to(out_ptr.dtype.element_ty), mask=mask)
        y = end


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
    groups,  # of GROUP units that make a row; a unit is a word or a byte
    scale_h,
    scale_w,
    rows,  # of a program
    share,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    MISSING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """This program computes some rows of one overlay, BLOCK_U units of them."""
    pid_m = tl.program_id(0).to(tl.int64)
    map_ptr = maps_ptr + pid_m * height * width
    lowest, span = _extremes(map_ptr, height * width, BLOCK_P)
    # Heat counts in 256ths here.
    span /= 256
    # One word a colour, so that one look finds all of it.
    entries = tl.arange(0, 256) * 3
    table = tl.load(colours_ptr + entries).to(tl.int32)
    table |= tl.load(colours_ptr + entries + 1).to(tl.int32) << 8
    table |= tl.load(colours_ptr + entries + 2).to(tl.int32) << 16
    unit: tl.constexpr = tl.int32 if WORDS else tl.uint8
    units = groups * GROUP
    u = tl.program_id(2) * BLOCK_U + tl.arange(0, BLOCK_U)
    image_ptrs = images_ptr.to(tl.pointer_type(unit)) + (pid_m // T) * H * units + u[None, :]
    out_ptrs = out_ptr.to(tl.pointer_type(unit)) + pid_m * H * units + u[None, :]
    # Byte 4 u is of pixel u + u // 3 and, as byte u is, of channel u % 3.
    x = u + u // 3 if WORDS else u // 3
    shift = (u % 3 * 8)[None, :]
    y = tl.program_id(1) * rows
    last = tl.minimum(y + rows, H)
    while y < last:
        i, end = _band(y, last, height, scale_h)
        top, rise = _sides(map_ptr, i, x, height, width, scale_w, lowest, span)
        if WORDS:
            next_top, next_rise = _sides(map_ptr, i, x + 1, height, width, scale_w, lowest, span)
        for start in range(y, end, BLOCK_H):
            offs_y = start + tl.arange(0, BLOCK_H)
            offs = (offs_y * units)[:, None]
            mask = (offs_y < end)[:, None] & (u < units)[None, :]
            image = tl.load(image_ptrs + offs, mask=mask, other=0).to(tl.int32)
            v = _heat(top, rise, offs_y, i, scale_h)
            colour = _colours(table, v, MISSING) >> shift
            if WORDS:
                v = _heat(next_top, next_rise, offs_y, i, scale_h)
                colour |= _colours(table, v, MISSING) << (24 - shift)
            mixed = _blend(image, colour, share)
            if WORDS:
                mixed |= _blend(image >> 8, colour >> 8, share) << 8
            tl.store(out_ptrs + offs, mixed.to(unit), mask=mask)
        y = end


@triton.jit
def _blend(image, colour, share):
    """Bytes 0 and 2 of words, blended: their products with 256 just fit two bytes each."""
    mixed = (image & 0x00FF00FF) * (256 - share) + (colour & 0x00FF00FF) * share + 0x00800080
    return (mixed >> 8) & 0x00FF00FF


@triton.jit
def _colours(table, v, MISSING: tl.constexpr):
    """The colours of some heat in 256ths, three bytes of a word."""
    # Rows beyond the band, which are not stored, lie anywhere.
    index = tl.minimum(tl.maximum(tl.where(v == v, v, 0.0).to(tl.int32), 0), 255)
    colour = tl.gather(table, index.reshape(index.numel), 0).reshape(index.shape)
    return tl.where(v == v, colour, MISSING * 0x010101)


@triton.jit
def _extremes(map_ptr, cells, BLOCK_P: tl.constexpr):
    """The least of a map and what lies between it and the largest.

    With NaN anywhere the least is -inf: from there, all of a map is NaN.
    """
    low = tl.full((BLOCK_P,), float("inf"), tl.float32)
    high = tl.full((BLOCK_P,), -float("inf"), tl.float32)
    offs_p = tl.arange(0, BLOCK_P)
    for start in range(0, cells, BLOCK_P):
        mask = start + offs_p < cells
        m = tl.load(map_ptr + start + offs_p, mask=mask, other=0.0).to(tl.float32)
        m = tl.where(m == m, m, -float("inf"))
        low = tl.minimum(low, tl.where(mask, m, float("inf")))
        high = tl.maximum(high, tl.where(mask, m, -float("inf")))
    lowest = tl.min(low)
    span = tl.max(high) - lowest
    return lowest, tl.where(span == 0, 1.0, span)


@triton.jit
def _band(y, last, height, scale_h):
    """The row of cells before row y of pixels, and the first row of pixels beyond the next one."""
    i = _before(_position(y, scale_h), height)
    # Rounding may move a row to the other band, where it has the same value.
    end = tl.ceil((i + 1.5) / scale_h - 0.5).to(tl.int32)
    end = tl.where(i < height - 1, tl.minimum(end, last), last)
    return i, tl.maximum(end, y + 1)


@triton.jit
def _sides(map_ptr, i, x, height, width, scale_w, lowest, span):
    """The heat at columns x of pixels on row i of cells, and by how much it rises to the next."""
    position = _position(x, scale_w)
    j = _before(position, width)
    j_next = tl.minimum(j + 1, width - 1)
    right = position - j
    row_ptr = map_ptr + i * width
    next_ptr = map_ptr + tl.minimum(i + 1, height - 1) * width
    # The minimum goes first: what is left to interpolate is of the size of the range.
    v00 = tl.load(row_ptr + j).to(tl.float32) - lowest
    v01 = tl.load(row_ptr + j_next).to(tl.float32) - lowest
    v10 = tl.load(next_ptr + j).to(tl.float32) - lowest
    v11 = tl.load(next_ptr + j_next).to(tl.float32) - lowest
    top = (v00 * (1 - right) + v01 * right) / span
    bottom = (v10 * (1 - right) + v11 * right) / span
    return top[None, :], (bottom - top)[None, :]


@triton.jit
def _heat(top, rise, y, i, scale_h):
    """The heat at rows y of pixels, below row i of cells."""
    return top + rise * (_position(y, scale_h) - i)[:, None]


@triton.jit
def _position(pixels, scale):
    """Where pixels lie among cells: by their centres, as align_corners=False has them."""
    return tl.maximum((pixels + 0.5) * scale - 0.5, 0.0)


@triton.jit
def _before(position, cells):
    return tl.minimum(position.to(tl.int32), cells - 1)


def plan_heatmap(maps: Tensor, heatmaps: Tensor) -> Launch:
    """The launch that fills heatmaps (N, T, H, W) from maps (N, T, h, w)."""
    height, width = heatmaps.shape[2:]
    most, block_h, block_w, warps = _HEATMAP
    block_w = min(block_w, power_of_two(width))
    rows = _rows(maps, height, ceil_div(width, block_w), most)
    return Launch(
        heatmap_kernel,
        (maps.shape[0] * maps.shape[1], ceil_div(height, rows), ceil_div(width, block_w)),
        {
            "maps_ptr": maps,
            "out_ptr": heatmaps,
            **_sizes(maps, height, width),
            "W": width,
            "rows": rows,
        },
        {
            "BYTES": heatmaps.dtype == torch.uint8,
            "BLOCK_P": _block_p(maps),
            "BLOCK_H": block_h,
            "BLOCK_W": block_w,
        },
        num_warps=warps,
    )


def plan_overlay(
    maps: Tensor, images: Tensor, colours: Tensor, share: int, overlays: Tensor
) -> Launch:
    """The launch that fills overlays (N, T, H, W, 3) from maps (N, T, h, w) and images."""
    height, width = images.shape[1:3]
    most, block_h, block_u, warps = _OVERLAY
    words = width % 4 == 0 and images.data_ptr() % 4 == 0
    units = width * 3 // (4 if words else 1)
    # Four words to a group where rows are made of them: then the compiler knows that loads of 16
    # bytes are aligned.
    group = 4 if words and units % 4 == 0 else 1
    rows = _rows(maps, height, ceil_div(units, block_u), most)
    return Launch(
        overlay_kernel,
        (maps.shape[0] * maps.shape[1], ceil_div(height, rows), ceil_div(units, block_u)),
        {
            "maps_ptr": maps,
            "images_ptr": images,
            "colours_ptr": colours,
            "out_ptr": overlays,
            "T": maps.shape[1],
            **_sizes(maps, height, width),
            "groups": units // group,
            "rows": rows,
            "share": share,
        },
        {
            "WORDS": words,
            "GROUP": group,
            "MISSING": MID_GREY,
            "BLOCK_P": _block_p(maps),
            "BLOCK_H": block_h,
            "BLOCK_U": block_u,
        },
        num_warps=warps,
    )


def _rows(maps: Tensor, height: int, columns: int, most: int) -> int:
    """Rows of a program: fewer of them while there are too few programs."""
    others = maps.shape[0] * maps.shape[1] * columns
    return shrunk(most, 8, height, others, 4 * device_of(maps).processors)


def _sizes(maps: Tensor, height: int, width: int) -> dict[str, float]:
    h, w = maps.shape[2:]
    scales = {"scale_h": h / height, "scale_w": w / width}
    return {"height": h, "width": w, "H": height, **scales}


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
