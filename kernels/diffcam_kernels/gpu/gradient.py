"""gradient_cam: the map of a gradient method from activations and gradients.

A method is one device function in `CELLWISE` or a pair in `WEIGHTED`; nothing else here knows it.

- Cellwise, LayerCAM and HiResCAM: what channel c adds to cell p is a function of A[c, p] and
  G[c, p]. A program owns a block of cells of one image and target and walks over all channels; or,
  where such programs are too few for the device, over a span of them.
- Weighted, Grad-CAM, Grad-CAM++ and XGrad-CAM: a channel's weight is known only after all of its
  cells, but needs no other channel. A program owns a span of channels of one image and target,
  weighs them, and writes the map of its span.

A second launch adds the maps of spans, in order; where one span holds all channels, there is none.

A and G cross device memory once. Where all cells of a channel fit in a tile, registers hold it
between the weight and the map; where rows are short and without gaps, a tile is one run of memory,
sorted into rows in shared memory. Where cells are more, as where 56 x 56 cells lie channels last, a
program reads its span of A again, and a span is so narrow that the cache still has it.

Programs of further targets of the same cells run side by side and find A in the cache. No atomics.

Bytes: A and G once, the maps once; weighted methods also a map for each span, twice. FLOP: 2 N T C
P, for the weighted ones 4 to 10 N T C P.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import (
    Launch,
    ceil_div,
    cells_first,
    device_of,
    flat_cells,
    power_of_two,
    shrunk,
)
from diffcam_kernels.gpu.pooled import cell_offsets, rectified
from diffcam_kernels.gpu.spans import plan_sum_spans

# Cells of a channel that registers hold between its weight and its part of the map.
_KEPT_CELLS = 4096
# Values of a tile: 32 for each of 128 threads, or 16 for each of 256.
_TILE = 4096


@triton.jit
def _layer_cam(a, g):
    return rectified(g) * a


@triton.jit
def _hires_cam(a, g):
    return g * a


CELLWISE = {"layer_cam": _layer_cam, "hires_cam": _hires_cam}
"""Method -> what a channel adds to a cell, from tiles of A and G."""


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
def cellwise_kernel(
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
    METHOD: tl.constexpr,
    FLAT_A: tl.constexpr,
    FLAT_G: tl.constexpr,
    RELU: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes what STEPS blocks of channels add to BLOCK_P cells of one map."""
    # Targets are next to each other, then blocks of cells, then spans.
    pid, blocks, spans = tl.program_id(0), tl.cdiv(P, BLOCK_P), tl.cdiv(C, STEPS * BLOCK_C)
    pid_t, pid_n = (pid % T).to(tl.int64), (pid // T // blocks // spans).to(tl.int64)
    pid_s = pid // T // blocks % spans
    offs_p = pid // T % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = pid_s * STEPS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p = offs_p < P
    rows = offs_c[:, None].to(tl.int64)
    a_ptrs = a_ptr + pid_n * stride_an + rows * stride_ac
    a_ptrs += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)[None, :]
    g_ptrs = g_ptr + pid_n * stride_gn + pid_t * stride_gt + rows * stride_gc
    g_ptrs += cell_offsets(offs_p, width, stride_gh, stride_gw, FLAT_G)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    mask = (offs_c < C)[:, None] & mask_p[None, :]
    a = tl.load(a_ptrs, mask=mask, other=0.0)
    g = tl.load(g_ptrs, mask=mask, other=0.0)
    # The next tile is on its way before this one is used: left alone, the assembler puts each load
    # right before its use, and hardly any are in flight.
    for step in range(1, STEPS):
        a_ptrs += BLOCK_C * stride_ac
        g_ptrs += BLOCK_C * stride_gc
        mask = (step * BLOCK_C + offs_c < C)[:, None] & mask_p[None, :]
        next_a = tl.load(a_ptrs, mask=mask, other=0.0)
        next_g = tl.load(g_ptrs, mask=mask, other=0.0)
        total += METHOD(a.to(tl.float32), g.to(tl.float32))
        a, g = next_a, next_g
    total += METHOD(a.to(tl.float32), g.to(tl.float32))
    maps = tl.sum(total, axis=0)
    if RELU:
        maps = rectified(maps)
    out_ptr += ((pid_n * T + pid_t) * spans + pid_s) * P
    tl.store(out_ptr + offs_p, maps, mask=mask_p)


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
    DENSE: tl.constexpr,
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
    a_image = a_ptr + pid_n * stride_an
    a_base = a_image + cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)[None, :]
    g_image = g_ptr + pid_n * stride_gn + pid_t * stride_gt
    g_base = g_image + cell_offsets(offs_p, width, stride_gh, stride_gw, FLAT_G)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        offs_c = (pid_s * STEPS + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = (offs_c < C)[:, None] & mask_p[None, :]
        rows = offs_c.to(tl.int64)[:, None]
        if DENSE:
            first = (pid_s * STEPS + step) * BLOCK_C
            g = dense_run(g_image, first, C, P, DENSE, BLOCK_C)
            g = tile_of_run(g, P, BLOCK_C, BLOCK_P).to(tl.float32)
            a = dense_run(a_image, first, C, P, DENSE, BLOCK_C)
            a = tile_of_run(a, P, BLOCK_C, BLOCK_P).to(tl.float32)
        else:
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
def cellwise_dense_kernel(
    a_ptr,  # (N, C, h, w), images without gaps
    g_ptr,  # (N, T, C, h, w), the same
    out_ptr,  # (N, T, spans, P) float32, contiguous
    T,
    C,
    P,
    stride_an,
    stride_gn,
    stride_gt,
    METHOD: tl.constexpr,
    RELU: tl.constexpr,
    STEPS: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes what STEPS blocks of channels add to one map; BLOCK_P holds all P."""
    pid, spans = tl.program_id(0), tl.cdiv(C, STEPS * BLOCK_C)
    pid_t, pid_n = (pid % T).to(tl.int64), (pid // T // spans).to(tl.int64)
    pid_s = pid // T % spans
    a_image = a_ptr + pid_n * stride_an
    g_image = g_ptr + pid_n * stride_gn + pid_t * stride_gt
    first = pid_s * STEPS * BLOCK_C
    # A place in a run is the same channel of its block and the same cell in every step.
    total = tl.zeros((DENSE,), tl.float32)
    a = dense_run(a_image, first, C, P, DENSE, BLOCK_C)
    g = dense_run(g_image, first, C, P, DENSE, BLOCK_C)
    # The next run is on its way before this one is used, as above.
    for step in range(1, STEPS):
        next_a = dense_run(a_image, first + step * BLOCK_C, C, P, DENSE, BLOCK_C)
        next_g = dense_run(g_image, first + step * BLOCK_C, C, P, DENSE, BLOCK_C)
        total += METHOD(a.to(tl.float32), g.to(tl.float32))
        a, g = next_a, next_g
    total += METHOD(a.to(tl.float32), g.to(tl.float32))
    maps = tl.sum(tile_of_run(total, P, BLOCK_C, BLOCK_P), axis=0)
    if RELU:
        maps = rectified(maps)
    offs_p = tl.arange(0, BLOCK_P)
    out_ptr += ((pid_n * T + pid_t) * spans + pid_s) * P
    tl.store(out_ptr + offs_p, maps, mask=offs_p < P)


@triton.jit
def dense_run(image_ptr, first, C, P, RUN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels first to first + BLOCK_C of an image (C, P) without gaps, as one run of memory.

    Rows of an odd number of cells begin anywhere; a run of 16 of them, at a multiple of 16 bytes.
    """
    offs = tl.arange(0, RUN)
    mask = (offs < BLOCK_C * P) & (first * P + offs < C * P)
    return tl.load(image_ptr + first * P + offs, mask=mask, other=0.0)


@triton.jit
def tile_of_run(run, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The run as a tile (BLOCK_C, BLOCK_P), 0 beyond P."""
    # Neighbouring threads take channels, so that few of them share the sums over cells.
    offs_p, offs_c = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)[None, :]
    index = tl.where(offs_p < P, offs_c * P + offs_p, 0)
    tile = tl.gather(run, tl.reshape(index, (BLOCK_P * BLOCK_C,)), 0)
    return tl.trans(tl.where(offs_p < P, tl.reshape(tile, (BLOCK_P, BLOCK_C)), 0.0))


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


def plan_gradient_cam(
    activations: Tensor, gradients: Tensor, reduction: str, maps: Tensor, relu: bool
) -> list[Launch]:
    """The launches that fill maps (N, T, h, w), with room of their own for the maps of spans."""
    n, c, height, width = activations.shape
    t, blocks = gradients.shape[1], 1
    sizes = _sizes(activations, gradients)
    layout = {"FLAT_A": flat_cells(activations), "FLAT_G": flat_cells(gradients)}
    if reduction in CELLWISE:
        plan = _plan_cellwise(activations, gradients)
        own = {"METHOD": CELLWISE[reduction], "STEPS": plan.steps}
        kernel, blocks = cellwise_kernel, ceil_div(height * width, plan.block_p)
        if plan.dense:
            kernel, own["DENSE"], layout = cellwise_dense_kernel, plan.dense, {}
            needed = ("T", "C", "P", "stride_an", "stride_gn", "stride_gt")
            sizes = {name: sizes[name] for name in needed}
    else:
        method = WEIGHTED[reduction]
        plan = _plan_weighted(activations, gradients, method)
        own = {"TERMS": method.terms, "WEIGHT": method.weight, "STAGES": plan.stages}
        if plan.kept:
            kernel, own = weighted_kernel, {**own, "STEPS": plan.steps, "DENSE": plan.dense}
        else:
            kernel, own = weighted_again_kernel, {**own, "NEEDS_SUM": method.needs_sum}
    spans = ceil_div(c, plan.steps * plan.block_c)
    parts = maps if spans == 1 else maps.new_empty((n, t, spans, height, width))
    launch = Launch(
        kernel,
        (t * blocks * spans * n,),
        {"a_ptr": activations, "g_ptr": gradients, "out_ptr": parts, **sizes},
        {
            **own,
            **layout,
            "RELU": relu and spans == 1,
            **{"BLOCK_C": plan.block_c, "BLOCK_P": plan.block_p},
        },
        num_warps=plan.warps,
    )
    return [launch] if spans == 1 else [launch, plan_sum_spans(parts, maps, relu)]


@dataclass(frozen=True)
class _Spans:
    """How a map is cut into programs.

    Attributes:
        steps: tiles of a program, along the channels.
        block_c: channels of a tile.
        block_p: cells of a tile.
        warps: of a program.
        kept: a tile holds all cells of its channels; for weighted methods.
        dense: values of a run of memory that holds a tile; 0 where a tile is no run, or is better
            read by rows.
        stages: tiles that are on their way at a time.
    """

    steps: int
    block_c: int
    block_p: int
    warps: int
    kept: bool = True
    stages: int = 1
    dense: int = 0


def _plan_cellwise(activations: Tensor, gradients: Tensor) -> _Spans:
    n, c, height, width = activations.shape
    t, p = gradients.shape[1], height * width
    wanted = 2 * device_of(activations).processors
    if not cells_first(activations):
        # Whole runs of channels; a few cells for each program, so that there are many programs.
        block_c = min(power_of_two(c), 2048)
        block_p = min(power_of_two(p), max(2048 // block_c, 1))
        return _Spans(ceil_div(c, block_c), block_c, block_p, 4)
    run = _run(activations, gradients, 64)
    if run:
        block_c = min(power_of_two(c), 64)
        blocks = ceil_div(c, block_c)
        steps = shrunk(power_of_two(blocks), 1, blocks, n * t, 2 * wanted)
        return _Spans(steps, block_c, power_of_two(p), 4, dense=run)
    # Short rows are cut in two: twice the programs, and the other half of a row runs beside it.
    block_p = min(power_of_two(p), 32 if p <= 64 else 64)
    block_c = min(power_of_two(c), 2048 // block_p)
    # All channels, or a part of them while programs are too few.
    others = n * t * ceil_div(p, block_p)
    steps = shrunk(power_of_two(ceil_div(c, block_c)), 1, ceil_div(c, block_c), others, wanted)
    return _Spans(steps, block_c, block_p, 4)


def _plan_weighted(activations: Tensor, gradients: Tensor, method: Weighted) -> _Spans:
    n, c, height, width = activations.shape
    maps, padded = n * gradients.shape[1], power_of_two(height * width)
    if cells_first(activations) and padded <= _KEPT_CELLS:
        block_c = min(power_of_two(c), 32 if method.reads_a else 64)
        run = _run(activations, gradients, block_c)
        if run:
            return _Spans(1, block_c, padded, 4, dense=run)
        return _whole_rows(activations, maps, padded, method)
    channels = power_of_two(c)
    programs = maps * ceil_div(c, 8)
    if 128 < padded <= _KEPT_CELLS and programs < device_of(activations).processors:
        # Hardly a program: each has all of its loads in flight at once, though runs are short.
        block_c = min(channels, 4)
        return _Spans(1, block_c, padded, max(4, block_c * padded // 512))
    # Registers hold 32 values of A for each thread, and G beside it where both are read at once;
    # more cells leave only short runs of channels, for which reading A again is the lesser evil.
    if padded <= (1024 if method.reads_a else 128):
        block_c = min(channels, 32 if method.reads_a else 64, 4 * _TILE // padded)
        return _Spans(1, block_c, padded, max(4, block_c * padded // 1024))
    # Long rows need no neighbours; runs of channels fill the sectors of memory.
    rows = cells_first(activations)
    block_c = min(channels, 4 if rows else 32 if method.reads_a else 64)
    block_c = shrunk(block_c, 1 if rows else 8, c, maps, device_of(activations).processors)
    return _Spans(1, block_c, min(padded, _TILE // block_c), 8, kept=False, stages=3)


def _run(activations: Tensor, gradients: Tensor, block_c: int) -> int:
    """The power of two that holds a block of channels as one run of memory; 0 for none.

    For short rows that are no multiple of 16 bytes: lanes would read them value by value.
    """
    channels, height, width = activations.shape[-3:]
    p = height * width
    without_gaps = all(x.stride()[-3:] == (p, width, 1) for x in (activations, gradients))
    if not without_gaps or p > 64 or p * activations.element_size() % 16 == 0:
        return 0
    return power_of_two(min(power_of_two(channels), block_c) * p)


def _whole_rows(activations: Tensor, maps: int, padded: int, method: Weighted) -> _Spans:
    c = activations.shape[1]
    wanted = 2 * device_of(activations).processors
    if padded <= 64 and method.reads_a:
        # Smaller tiles: three sums over the cells of a tile take more registers than one.
        return _Spans(1, min(power_of_two(c), 32), padded, 4)
    block_c = min(power_of_two(c), max(_TILE // padded, 1), 64)
    # The maps of spans are 1 / 32 of what is read, or less, if halves; fewer while programs
    # are few, but a span for each channel makes a long sum. Copies that go ahead of the use need
    # rows that begin at multiples of 16 values, for all that the compiler knows.
    most = ceil_div(min(power_of_two(c), 64), block_c) if activations.stride(1) % 16 == 0 else 1
    steps = shrunk(most, min(most, 4), ceil_div(c, block_c), maps, wanted)
    stages = 1 if steps == 1 else 3 if padded <= 1024 else 2
    return _Spans(steps, block_c, padded, 8, stages=stages)


def _sizes(activations: Tensor, gradients: Tensor) -> dict[str, int]:
    _, c, height, width = activations.shape
    strides = (*activations.stride(), *gradients.stride())
    names = ("an", "ac", "ah", "aw", "gn", "gt", "gc", "gh", "gw")
    return {
        **{"T": gradients.shape[1], "C": c, "P": height * width, "width": width},
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
    }


def gradient_cam(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    """See `diffcam_kernels.reference.gradient_cam`."""
    shape = (*gradients.shape[:2], *activations.shape[2:])
    maps = activations.new_empty(shape, dtype=torch.float32)
    for launch in plan_gradient_cam(activations, gradients, reduction, maps, relu):
        launch.run()
    return maps
