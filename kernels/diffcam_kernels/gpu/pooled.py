"""pooled_cam: the sum of the channels, weighted by a vector for each target.

    M[n, t, p] = sum_c w[n, t, c] A[n, c, p]

Plan: a program owns a block of cells of one image and some targets, and walks over all channels.
There are two such kernels. For one target, partial sums for each place of a tile, so that lanes are
summed once, at the end. For more of them a matrix product on the tensor cores, for up to 16 targets
a program, with the float32 weights as a sum of numbers that these take, which loses nothing that
float32 would keep. Cells are dealt out evenly: 49 of them as 13, 13, 13 and 10, not as 16, 16, 16
and 1. Programs that read the same cells for further targets run side by side, and find them in the
L2 cache.

In NCHW, a walk takes long where cells are few, and copies of the next tiles into shared memory
crawl where rows begin anywhere. There a program owns a span of channels instead, loads its tile
once into registers, and reduces it for each target; a second launch adds the maps of the spans. A
product gains more, where cells are many, than its narrow copies cost.

No two programs write the same cell: no atomics, and the order of a sum does not depend on the rest
of the batch.

Bytes: A once, the weights once for each block of cells, the maps once; in spans also a map for each
span, twice. FLOP: 2 N T C P.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_kernels.gpu.launch import (
    Launch,
    ceil_div,
    cells_first,
    flat_cells,
    power_of_two,
)
from diffcam_kernels.gpu.pieces import PRODUCTS
from diffcam_kernels.gpu.pooled_kernels import (
    pooled_cam_kernel,
    pooled_cams_kernel,
    pooled_spans_kernel,
)
from diffcam_kernels.gpu.spans import plan_sum_spans

# Up to so many cells of an image make few programs, and rows of them make short runs in memory.
FEW_CELLS = 128


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
    if maps.numel() == 0:
        return []
    operands = activations, weights, maps, relu
    one = weights.shape[1] == 1
    if cells_first(activations) and (
        _few_cells(activations) or (one and not _even_rows(activations))
    ):
        return _plan_spans(*operands)
    return [_plan_sums(*operands) if one else _plan_products(*operands)]


def _few_cells(activations: Tensor) -> bool:
    return activations.shape[2:].numel() <= FEW_CELLS


def _even_rows(activations: Tensor) -> bool:
    """Whether rows of cells begin at multiples of 16 elements: what the compiler looks for."""
    stride = activations.stride(1)
    if not flat_cells(activations):
        stride |= activations.stride(2)
    return stride % 16 == 0


def _span_tile(activations: Tensor) -> Tile:
    """As much as registers hold well: the fewer spans, the fewer maps to write and read again."""
    block_p = min(power_of_two(activations.shape[2:].numel()), 64)
    return Tile(min(power_of_two(activations.shape[1]), 8192 // block_p), block_p, 4)


def _sums_tile(activations: Tensor) -> Tile:
    """For one target: the axis that lies closest in memory takes 128 bytes or more of it."""
    c, p = activations.shape[1], activations.shape[2:].numel()
    if cells_first(activations):
        return Tile(min(32, power_of_two(c)), 64, 4, 4)
    # Whole runs of channels; a few cells for each program, so that there are many programs, which
    # hide each other's loads wherever the runs begin: no copies ahead.
    block_c = min(power_of_two(c), 512)
    return Tile(block_c, min(4096 // block_c, power_of_two(p)), 4)


def _products_tile(activations: Tensor) -> Tile:
    """For more targets: 16 cells and 16 channels are the least that the tensor cores take."""
    if cells_first(activations):
        # Rows that begin anywhere are copied in narrow pieces: more threads, fewer pieces each.
        return Tile(16, 64, 2, 4) if _even_rows(activations) else Tile(16, 32, 4, 4)
    if _few_cells(activations):
        # 128 bytes of each cell for each warp.
        return Tile(128 // activations.element_size(), 16, 4, 3)
    # Many cells are many programs: of few warps each, which need not add up as many runs.
    return Tile(32, 32, 2, 4)


def _plan_sums(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool) -> Launch:
    """A walk over all channels for one target."""
    tile = _sums_tile(activations)
    cells, sizes = _sizes(activations, tile.p)
    return Launch(
        pooled_cam_kernel,
        (ceil_div(sizes["P"], cells) * len(activations),),
        {"a_ptr": activations, "w_ptr": weights, "out_ptr": maps, **sizes},
        {
            **{"FLAT": flat_cells(activations), "RELU": relu},
            **{"BLOCK_C": tile.c, "BLOCK_P": tile.p, "STAGES": tile.stages},
        },
        num_warps=tile.warps,
    )


def _plan_products(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool) -> Launch:
    """A walk over all channels for up to 16 targets."""
    t, tile = weights.shape[1], _products_tile(activations)
    cells, sizes = _sizes(activations, tile.p)
    # The tensor cores take 8 at least, and 16 at most keep the sums in few registers.
    block_t = min(max(power_of_two(t), 8), 16)
    return Launch(
        pooled_cams_kernel,
        (ceil_div(t, block_t) * ceil_div(sizes["P"], cells) * len(activations),),
        {"a_ptr": activations, "w_ptr": weights, "out_ptr": maps, "T": t, **sizes},
        {
            "PRODUCT": PRODUCTS[activations.dtype],
            **{"FLAT": flat_cells(activations), "RELU": relu},
            **{"RUNS": tile.warps, "BLOCK_T": block_t},
            **{"BLOCK_C": tile.c, "BLOCK_P": tile.p, "STAGES": tile.stages},
        },
        num_warps=tile.warps,
    )


def _plan_spans(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool) -> list[Launch]:
    """Maps of spans of channels, and their sum; one span is the map."""
    (n, t), tile = weights.shape[:2], _span_tile(activations)
    cells, sizes = _sizes(activations, tile.p)
    spans = max(ceil_div(sizes["C"], tile.c), 1)
    parts = maps if spans == 1 else maps.new_empty((n, t, spans, *maps.shape[2:]))
    launch = Launch(
        pooled_spans_kernel,
        (ceil_div(sizes["P"], cells) * spans * n,),
        {"a_ptr": activations, "w_ptr": weights, "out_ptr": parts, "T": t, **sizes},
        {
            **{"FLAT": flat_cells(activations), "RELU": relu and spans == 1},
            **{"BLOCK_C": tile.c, "BLOCK_P": tile.p},
        },
        num_warps=tile.warps,
    )
    return [launch] if spans == 1 else [launch, plan_sum_spans(parts, maps, relu)]


def _sizes(activations: Tensor, places: int) -> tuple[int, dict[str, int]]:
    """The cells of a program, in as few blocks as its places allow, all of a size; and what every
    kernel is told.
    """
    c, p = activations.shape[1], activations.shape[2:].numel()
    cells = ceil_div(p, ceil_div(p, places))
    if cells_first(activations) and _even_rows(activations):
        # Where rows begin at multiples of 16, so do blocks: loads stay wide.
        cells = min(ceil_div(cells, 16) * 16, places)
    strides = zip(("an", "ac", "ah", "aw"), activations.stride(), strict=True)
    return cells, {
        **{"C": c, "P": p, "cells": cells, "width": activations.shape[3]},
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
