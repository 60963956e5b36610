"""pooled_cam: the sum of the channels, weighted by a vector for each target.

    M[n, t, p] = sum_c w[n, t, c] A[n, c, p]

Plan: where rows in memory begin at multiples of 16 bytes, a program owns a block of cells of one
image and some targets, and walks over all channels, with the tiles of its next steps in flight, in
shared memory. There are two such kernels. For one target, partial sums for each place of a tile, so
that lanes are summed once, at the end. For more of them a matrix product on the tensor cores, for
up to 16 targets a program, with the float32 weights as a sum of numbers that these take, which
loses nothing that float32 would keep. Cells are dealt out evenly: 49 of them as 13, 13, 13 and 10,
not as 16, 16, 16 and 1. Programs that read the same cells for further targets run side by side, and
find them in the L2 cache.

Copies into shared memory crawl where rows begin anywhere, as those of 7 x 7 cells do, and a walk
over channels takes long where cells are few. There a program owns a span of channels, loads its
tile once into registers, and reduces it for each target; a second launch adds the maps of the
spans.

No two programs write the same cell: no atomics, and the order of a sum does not depend on the rest
of the batch.

Bytes: A once, the weights once for each block of cells, the maps once; in spans also a map for each
span, twice. FLOP: 2 N T C P.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import (
    Launch,
    ceil_div,
    cells_first,
    flat_cells,
    power_of_two,
)
from diffcam_kernels.gpu.pieces import PRODUCTS
from diffcam_kernels.gpu.spans import plan_sum_spans


@triton.jit
def pooled_cam_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, P) float32, contiguous
    T,
    C,
    P,
    cells,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program computes `cells` cells, at most BLOCK_P, of one map."""
    # One axis: the others of a grid end at 65,535. Targets are next to each other, then cells.
    pid, blocks = tl.program_id(0), tl.cdiv(P, cells)
    row = (pid // T // blocks).to(tl.int64) * T + pid % T
    place = tl.arange(0, BLOCK_P)
    offs_p, offs_c = pid // T % blocks * cells + place, tl.arange(0, BLOCK_C)
    mask_p = (place < cells) & (offs_p < P)
    places = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)
    a_ptrs = a_ptr + row // T * stride_an + offs_c[:, None] * stride_ac + places[None, :]
    w_ptrs = w_ptr + row * C + offs_c
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        mask_c = start + offs_c < C
        a = tl.load(a_ptrs, mask=mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask_c, other=0.0)
        total += w[:, None] * a
        a_ptrs += BLOCK_C * stride_ac
        w_ptrs += BLOCK_C
    maps = tl.sum(total, axis=0)
    if RELU:
        maps = rectified(maps)
    tl.store(out_ptr + row * P + offs_p, maps, mask=mask_p)


@triton.jit
def pooled_cams_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, P) float32, contiguous
    T,
    C,
    P,
    cells,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    PRODUCT: tl.constexpr,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program computes `cells` cells, at most BLOCK_P, of BLOCK_T maps of one image."""
    pid, blocks_t, blocks_p = tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(P, cells)
    place = tl.arange(0, BLOCK_P)
    offs_t = pid % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_p = pid // blocks_t % blocks_p * cells + place
    pid_n = (pid // blocks_t // blocks_p).to(tl.int64)
    mask_t, mask_p = offs_t < T, (place < cells) & (offs_p < P)
    a_rows = a_ptr + pid_n * stride_an
    a_rows += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)[:, None]
    w_rows = w_ptr + (pid_n * T + offs_t[None, :]) * C
    # Each warp sums a run of channels of its own, and reads no tile that another warp reads.
    offs_c = tl.arange(0, RUNS)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    a_ptrs = a_rows[None, :, :] + offs_c[:, None, :] * stride_ac
    w_ptrs = w_rows[None, :, :] + offs_c[:, :, None]
    sums = tl.zeros((RUNS, BLOCK_P, BLOCK_T), tl.float32)
    for start in tl.range(0, C, RUNS * BLOCK_C, num_stages=STAGES):
        mask_c = start + offs_c < C
        a = tl.load(a_ptrs, mask=mask_c[:, None, :] & mask_p[None, :, None], other=0.0)
        w = tl.load(w_ptrs, mask=mask_c[:, :, None] & mask_t[None, None, :], other=0.0)
        # Tensor cores cut off what float32 would round. A sum over all channels there would drift;
        # subtracted, the product of a tile cannot be merged into one.
        sums -= PRODUCT(a, -w)
        a_ptrs += RUNS * BLOCK_C * stride_ac
        w_ptrs += RUNS * BLOCK_C
    total = tl.sum(sums, axis=0)
    finite = tl.abs(total) < float("inf")
    if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0:
        # Pieces of what is not finite, or times it, need not sum to it: channel by channel.
        exact = tl.zeros((BLOCK_P, BLOCK_T), tl.float32)
        for c in range(0, C):
            a = tl.load(a_rows + c * stride_ac, mask=mask_p[:, None], other=0.0)
            exact += a.to(tl.float32) * tl.load(w_rows + c, mask=mask_t[None, :], other=0.0)
        total = tl.where(finite, total, exact)
    if RELU:
        total = rectified(total)
    out_ptrs = out_ptr + (pid_n * T + offs_t[None, :]) * P + offs_p[:, None]
    tl.store(out_ptrs, total, mask=mask_p[:, None] & mask_t[None, :])


@triton.jit
def pooled_spans_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, spans, P) float32, contiguous
    T,
    C,
    P,
    cells,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes what BLOCK_C channels add to `cells` cells, at most BLOCK_P, of all
    maps of one image.
    """
    pid, blocks = tl.program_id(0), tl.cdiv(P, cells)
    spans = tl.maximum(tl.cdiv(C, BLOCK_C), 1)
    pid_s, pid_n = pid // blocks % spans, (pid // blocks // spans).to(tl.int64)
    place = tl.arange(0, BLOCK_P)
    offs_p, offs_c = pid % blocks * cells + place, pid_s * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = (place < cells) & (offs_p < P), offs_c < C
    w_ptrs = w_ptr + pid_n * T * C + offs_c
    w = tl.load(w_ptrs, mask=mask_c, other=0.0)
    a_ptrs = a_ptr + pid_n * stride_an + offs_c.to(tl.int64)[:, None] * stride_ac
    a_ptrs += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)[None, :]
    a = tl.load(a_ptrs, mask=mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (pid_n * T * spans + pid_s) * P + offs_p
    for _ in range(1, T):
        # The next weights are on their way before these are used.
        w_ptrs += C
        next_w = tl.load(w_ptrs, mask=mask_c, other=0.0)
        tl.store(out_ptrs, _map_of_tile(w, a, RELU), mask=mask_p)
        out_ptrs += spans * P
        w = next_w
    tl.store(out_ptrs, _map_of_tile(w, a, RELU), mask=mask_p)


@triton.jit
def _map_of_tile(w, a, RELU: tl.constexpr):
    maps = tl.sum(w[:, None] * a, axis=0)
    if RELU:
        maps = rectified(maps)
    return maps


@triton.jit
def cell_offsets(offs_p, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Where cell p = i w + j lies; one stride serves where rows follow each other."""
    if FLAT:
        return offs_p.to(tl.int64) * stride_w
    else:
        row, column = offs_p // width, offs_p % width
        return row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def rectified(x):
    """max(x, 0), and NaN where x is."""
    return tl.where(x < 0, 0.0, x)


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time.

    Attributes:
        c: channels, a power of two; in a product, of each warp.
        p: places for cells, a power of two.
        warps: of the program.
        stages: tiles in flight.
    """

    c: int
    p: int
    warps: int
    stages: int = 1


def plan_pooled_cam(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool) -> list[Launch]:
    """The launches that fill maps (N, T, h, w) from A (N, C, h, w) and w (N, T, C), with room of
    their own for the maps of spans.

    No tile depends on the number of images: the order of a sum would.
    """
    operands = activations, weights, maps, relu
    if _in_spans(activations):
        return plan_spans(*operands, _span_tile(activations))
    if weights.shape[1] == 1:
        return [plan_sums(*operands, _sums_tile(activations))]
    return [plan_products(*operands, _products_tile(activations))]


def _in_spans(activations: Tensor) -> bool:
    first = cells_first(activations)
    # The stride between rows of what lies closest in memory; the compiler looks for 16 elements.
    stride = activations.stride(1 if first else 3)
    if not flat_cells(activations):
        stride |= activations.stride(2)
    few = activations.shape[2:].numel() <= 128
    return stride % 16 != 0 or (first and few)


def _span_tile(activations: Tensor) -> Tile:
    """As much as registers hold well: the fewer spans, the fewer maps to write and read again."""
    block_p = min(power_of_two(activations.shape[2:].numel()), 64)
    return Tile(min(power_of_two(activations.shape[1]), 8192 // block_p), block_p, 8)


def _sums_tile(activations: Tensor) -> Tile:
    """For one target: the axis that lies closest in memory takes 128 bytes or more of it."""
    c, p = activations.shape[1], activations.shape[2:].numel()
    if cells_first(activations):
        return Tile(min(32, power_of_two(c)), 64, 4, 4)
    # Whole runs of channels; a few cells for each program, so that there are many programs.
    block_c = min(power_of_two(c), 512)
    return Tile(block_c, min(4096 // block_c, power_of_two(p)), 4, 3)


def _products_tile(activations: Tensor) -> Tile:
    """For more targets: 16 cells and 16 channels are the least that the tensor cores take."""
    p = activations.shape[2:].numel()
    if cells_first(activations):
        return Tile(16, 64, 2, 4)
    if p > 256:
        # Many cells are many programs: of few warps each, which need not add up as many runs.
        return Tile(64, 16, 2, 4)
    # 128 bytes of each cell for each warp.
    return Tile(128 // activations.element_size(), 16, 4, 3)


def plan_sums(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool, tile: Tile) -> Launch:
    """A walk over all channels for each target."""
    cells, sizes = _sizes(activations, weights, tile.p)
    return Launch(
        pooled_cam_kernel,
        (weights.shape[1] * ceil_div(sizes["P"], cells) * len(activations),),
        {"a_ptr": activations, "w_ptr": weights, "out_ptr": maps, **sizes},
        {
            **{"FLAT": flat_cells(activations), "RELU": relu},
            **{"BLOCK_C": tile.c, "BLOCK_P": tile.p, "STAGES": tile.stages},
        },
        num_warps=tile.warps,
    )


def plan_products(
    activations: Tensor, weights: Tensor, maps: Tensor, relu: bool, tile: Tile
) -> Launch:
    """A walk over all channels for up to 16 targets."""
    t = weights.shape[1]
    cells, sizes = _sizes(activations, weights, tile.p)
    # The tensor cores take 8 at least, and 16 at most keep the sums in few registers.
    block_t = min(max(power_of_two(t), 8), 16)
    return Launch(
        pooled_cams_kernel,
        (ceil_div(t, block_t) * ceil_div(sizes["P"], cells) * len(activations),),
        {"a_ptr": activations, "w_ptr": weights, "out_ptr": maps, **sizes},
        {
            "PRODUCT": PRODUCTS[activations.dtype],
            **{"FLAT": flat_cells(activations), "RELU": relu},
            **{"RUNS": tile.warps, "BLOCK_T": block_t},
            **{"BLOCK_C": tile.c, "BLOCK_P": tile.p, "STAGES": tile.stages},
        },
        num_warps=tile.warps,
    )


def plan_spans(
    activations: Tensor, weights: Tensor, maps: Tensor, relu: bool, tile: Tile
) -> list[Launch]:
    """Maps of spans of channels, and their sum; one span is the map."""
    n, t = weights.shape[:2]
    cells, sizes = _sizes(activations, weights, tile.p)
    spans = max(ceil_div(sizes["C"], tile.c), 1)
    parts = maps if spans == 1 else maps.new_empty((n, t, spans, *maps.shape[2:]))
    launch = Launch(
        pooled_spans_kernel,
        (ceil_div(sizes["P"], cells) * spans * n,),
        {"a_ptr": activations, "w_ptr": weights, "out_ptr": parts, **sizes},
        {
            **{"FLAT": flat_cells(activations), "RELU": relu and spans == 1},
            **{"BLOCK_C": tile.c, "BLOCK_P": tile.p},
        },
        num_warps=tile.warps,
    )
    return [launch] if spans == 1 else [launch, plan_sum_spans(parts, maps, relu)]


def _sizes(activations: Tensor, weights: Tensor, places: int) -> tuple[int, dict[str, int]]:
    """The cells of a program, in as few blocks as its places allow, all of a size; and what every
    kernel is told.
    """
    c, p = activations.shape[1], activations.shape[2:].numel()
    cells = max(ceil_div(p, max(ceil_div(p, places), 1)), 1)
    if cells_first(activations) and activations.stride(1) % 16 == 0:
        # Where rows begin at multiples of 16, so do blocks: loads stay wide.
        cells = min(ceil_div(cells, 16) * 16, places)
    strides = zip(("an", "ac", "ah", "aw"), activations.stride(), strict=True)
    return cells, {
        **{"T": weights.shape[1], "C": c, "P": p, "cells": cells, "width": activations.shape[3]},
        **{f"stride_{name}": stride for name, stride in strides},
    }


def fill_pooled_cam(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool) -> None:
    """Fills maps (N, T, h, w) from A (N, C, h, w) and w (N, T, C) float32, contiguous."""
    for launch in plan_pooled_cam(activations, weights, maps, relu):
        launch.run()


def pooled_cam(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """See `diffcam_kernels.reference.pooled_cam`."""
    n, t = weights.shape[:2]
    maps = activations.new_empty((n, t, *activations.shape[2:]), dtype=torch.float32)
    fill_pooled_cam(activations, weights.to(torch.float32).contiguous(), maps, relu)
    return maps
