"""Maps of the weighted methods, Grad-CAM, Grad-CAM++ and XGrad-CAM.

A channel's weight is known only after all of its cells, but needs no other channel. A program owns
a span of channels of one image and target, weighs them, and writes the map of its span.

Where all cells of a channel fit in a tile, registers hold it between the weight and the map. Where
they do not, as where 56 x 56 cells lie channels last, a program reads its span of A again, and a
span is so narrow that the cache still has it.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import (
    ceil_div,
    cells_first,
    device_of,
    power_of_two,
    shrunk,
)
from diffcam_kernels.gpu.pooled_kernels import cell_offsets, rectified
from diffcam_kernels.gpu.tiles import Tiles

# Cells of a channel that registers hold between its weight and its part of the map.
_KEPT_CELLS = 4096
# Values of a tile: 16 for each of 256 threads.
_TILE = 4096


@triton.jit
def _grad_cam(a, g, sum_a, cells):
    return g * (1.0 / cells), g


@triton.jit
def _grad_cam_pp(a, g, sum_a, cells):
    below = 2 + sum_a * g
    alpha = tl.where((below == 0) | (g <= 0), 0.0, 1 / below)
    return alpha * g, alpha


@triton.jit
def _xgrad_cam(a, g, sum_a, cells):
    return g * a, a


@triton.jit
def _numerator(numerator, denominator):
    return numerator


@triton.jit
def _ratio(numerator, denominator):
    return numerator / tl.where(denominator == 0, 1.0, denominator)


@triton.jit
def _ratio_or_zero(numerator, denominator):
    return _ratio(tl.where(denominator == 0, 0.0, numerator), denominator)


@dataclass(frozen=True)
class Weighted:
    """A method whose channels have a weight each.

    Attributes:
        terms: from tiles of A and G, sum_p A and the number of cells to a numerator and a
            denominator for each cell.
        weight: from the sums of both over the cells to the weight.
        reads_a: `terms` reads A too, so that more of a tile is held at a time.
        needs_sum: `terms` reads sum_p A.
    """

    terms: Any
    weight: Any
    reads_a: bool = False
    needs_sum: bool = False


WEIGHTED = {
    "grad_cam": Weighted(_grad_cam, _numerator),
    "grad_cam_pp": Weighted(_grad_cam_pp, _ratio, reads_a=True, needs_sum=True),
    "xgrad_cam": Weighted(_xgrad_cam, _ratio_or_zero, reads_a=True),
}


@triton.jit
def weighted_kernel(
    a_ptr,  # (N, C, h, w), any strides
    g_ptr,  # (N, T, C, h, w), any strides
    out_ptr,  # (N, T, spans, P) float32, contiguous
    T,
    C,
    P,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    stride_gn,
    stride_gt,
    stride_gc,
    stride_gh,
    stride_gw,
    TERMS: tl.constexpr,
    WEIGHT: tl.constexpr,
    FLAT_A: tl.constexpr,
    FLAT_G: tl.constexpr,
    RELU: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes what STEPS blocks of channels add to one map; BLOCK_P holds all P."""
    pid, spans = tl.program_id(0), tl.cdiv(C, STEPS * BLOCK_C)
    pid_t, pid_n = (pid % T).to(tl.int64), (pid // T // spans).to(tl.int64)
    pid_s = pid // T % spans
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    a_base = a_ptr + pid_n * stride_an
    a_base += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)[None, :]
    g_base = g_ptr + pid_n * stride_gn + pid_t * stride_gt
    g_base += cell_offsets(offs_p, width, stride_gh, stride_gw, FLAT_G)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        offs_c = (pid_s * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (offs_c < C)[:, None] & mask_p[None, :]
        rows = offs_c.to(tl.int64)[:, None]
        g = tl.load(g_base + rows * stride_gc, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_base + rows * stride_ac, mask=mask, other=0.0).to(tl.float32)
        numerator, denominator = TERMS(a, g, tl.sum(a, axis=1)[:, None], P)
        w = WEIGHT(tl.sum(numerator, axis=1), tl.sum(denominator, axis=1))
        total += w[:, None] * a
    maps = tl.sum(total, axis=0)
    if RELU:
        maps = rectified(maps)
    out_ptr += ((pid_n * T + pid_t) * spans + pid_s) * P
    tl.store(out_ptr + offs_p, maps, mask=mask_p)


@triton.jit
def weighted_again_kernel(
    a_ptr,  # (N, C, h, w), any strides
    g_ptr,  # (N, T, C, h, w), any strides
    out_ptr,  # (N, T, spans, P) float32, contiguous
    T,
    C,
    P,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    stride_gn,
    stride_gt,
    stride_gc,
    stride_gh,
    stride_gw,
    TERMS: tl.constexpr,
    WEIGHT: tl.constexpr,
    NEEDS_SUM: tl.constexpr,
    FLAT_A: tl.constexpr,
    FLAT_G: tl.constexpr,
    RELU: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes what BLOCK_C channels add to one map, and reads A again for it."""
    pid, spans = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    pid_t, pid_n = (pid % T).to(tl.int64), (pid // T // spans).to(tl.int64)
    pid_s = pid // T % spans
    offs_c = pid_s * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = offs_c.to(tl.int64)[:, None]
    a_rows = a_ptr + pid_n * stride_an + rows * stride_ac
    g_rows = g_ptr + pid_n * stride_gn + pid_t * stride_gt + rows * stride_gc
    # What a method that does not need the sum is given instead; it never reads it.
    sum_a = tl.zeros((BLOCK_C, 1), tl.float32)
    if NEEDS_SUM:
        parts = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in tl.range(0, P, BLOCK_P, num_stages=STAGES):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask = mask_c[:, None] & (offs_p < P)[None, :]
            cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)
            parts += tl.load(a_rows + cells[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_a = tl.sum(parts, axis=1)[:, None]
    above = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    below = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in tl.range(0, P, BLOCK_P, num_stages=STAGES):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = mask_c[:, None] & (offs_p < P)[None, :]
        g_cells = cell_offsets(offs_p, width, stride_gh, stride_gw, FLAT_G)
        a_cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)
        g = tl.load(g_rows + g_cells[None, :], mask=mask, other=0.0).to(tl.float32)
        # The compiler drops what a method does not read.
        a = tl.load(a_rows + a_cells[None, :], mask=mask, other=0.0).to(tl.float32)
        numerator, denominator = TERMS(a, g, sum_a, P)
        above += numerator
        below += denominator
    w = WEIGHT(tl.sum(above, axis=1), tl.sum(below, axis=1))
    out_ptr += ((pid_n * T + pid_t) * spans + pid_s) * P
    for start in tl.range(0, P, BLOCK_P, num_stages=STAGES):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = mask_c[:, None] & (offs_p < P)[None, :]
        cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)
        a = tl.load(a_rows + cells[None, :], mask=mask, other=0.0).to(tl.float32)
        maps = tl.sum(w[:, None] * a, axis=0)
        if RELU:
            maps = rectified(maps)
        tl.store(out_ptr + offs_p, maps, mask=offs_p < P)


def plan_weighted(activations: Tensor, gradients: Tensor, reduction: str) -> Tiles:
    """How the map of a weighted method is cut."""
    n, c, height, width = activations.shape
    maps, padded = n * gradients.shape[1], power_of_two(height * width)
    method, channels = WEIGHTED[reduction], power_of_two(c)
    processors = device_of(activations).processors
    if cells_first(activations) and padded <= _KEPT_CELLS:
        return _whole_rows(activations, maps, padded, method)
    # Registers hold 32 values of A for each thread, and G beside it where both are read at once.
    # Where that leaves only short runs of channels, reading A again is the lesser evil.
    most = 4 * _TILE // padded
    if padded <= 256 or (method.reads_a and most * activations.element_size() >= 64):
        block_c = min(channels, most, 32 if method.reads_a or padded > 64 else 64)
        return _kept(method, 1, block_c, padded, max(4, block_c * padded // 1024))
    if padded <= _KEPT_CELLS and maps * ceil_div(c, 8) < processors:
        # Hardly a program: each has all of its loads in flight at once, though runs are short.
        block_c = min(channels, 4)
        return _kept(method, 1, block_c, padded, max(4, block_c * padded // 512))
    # Long rows need no neighbours; runs of channels fill the sectors of memory.
    rows = cells_first(activations)
    block_c = min(channels, 4 if rows else 32 if method.reads_a else 64)
    block_c = shrunk(block_c, 1 if rows else 8, c, maps, processors)
    constants = {**_functions(method, 3), "NEEDS_SUM": method.needs_sum}
    block_p = min(padded, _TILE // block_c)
    return Tiles(weighted_again_kernel, constants, 1, block_c, block_p, 8)


def _whole_rows(activations: Tensor, maps: int, padded: int, method: Weighted) -> Tiles:
    """Rows of cells, each whole in a tile."""
    c = activations.shape[1]
    if padded <= 64 and method.reads_a:
        # Smaller tiles: three sums over the cells of a tile take more registers than one.
        return _kept(method, 1, min(power_of_two(c), 32), padded, 4)
    block_c = min(power_of_two(c), max(_TILE // padded, 1), 64)
    # The maps of spans are 1 / 32 of what is read, or less, if halves; fewer while programs
    # are few, but a span for each channel makes a long sum. Copies that go ahead of the use need
    # rows that begin at multiples of 16 values, for all that the compiler knows.
    most = ceil_div(min(power_of_two(c), 64), block_c) if activations.stride(1) % 16 == 0 else 1
    wanted = 2 * device_of(activations).processors
    steps = shrunk(most, min(most, 4), ceil_div(c, block_c), maps, wanted)
    # The more a method does with a tile, the earlier the next ones have to be on their way.
    stages = 1 if steps == 1 else 3 if method.reads_a else 2
    return _kept(method, steps, block_c, padded, 8, stages)


def _kept(
    method: Weighted, steps: int, block_c: int, padded: int, warps: int, stages: int = 1
) -> Tiles:
    constants = {**_functions(method, stages), "STEPS": steps}
    return Tiles(weighted_kernel, constants, steps, block_c, padded, warps)


def _functions(method: Weighted, stages: int) -> dict[str, Any]:
    return {"TERMS": method.terms, "WEIGHT": method.weight, "STAGES": stages}
