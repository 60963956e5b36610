"""Maps of the cellwise methods, LayerCAM and HiResCAM.

What channel c adds to cell p is a function of A[c, p] and G[c, p]. A program owns a block of cells
of one image and target and walks over all channels; or, where such programs are too few for the
device, over a span of them.

Rows that begin anywhere, as those of 7 x 7 cells, are read value by value. Where a program walks
over several tiles, each is one run of memory instead, and only the sum over them is sorted into
rows, in shared memory.
"""

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

# Values of a tile: 16 for each of 128 threads.
_TILE = 2048


@triton.jit
def _layer_cam(a, g):
    return rectified(g) * a


@triton.jit
def _hires_cam(a, g):
    return g * a


CELLWISE = {"layer_cam": _layer_cam, "hires_cam": _hires_cam}
"""Method -> what a channel adds to a cell, from tiles of A and G."""


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
def cellwise_runs_kernel(
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
    RUN: tl.constexpr,
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
    total = tl.zeros((RUN,), tl.float32)
    a = _run(a_image, first, C, P, RUN, BLOCK_C)
    g = _run(g_image, first, C, P, RUN, BLOCK_C)
    # The next run is on its way before this one is used, as above.
    for step in range(1, STEPS):
        next_a = _run(a_image, first + step * BLOCK_C, C, P, RUN, BLOCK_C)
        next_g = _run(g_image, first + step * BLOCK_C, C, P, RUN, BLOCK_C)
        total += METHOD(a.to(tl.float32), g.to(tl.float32))
        a, g = next_a, next_g
    total += METHOD(a.to(tl.float32), g.to(tl.float32))
    maps = tl.sum(_tile_of_run(total, P, BLOCK_C, BLOCK_P), axis=0)
    if RELU:
        maps = rectified(maps)
    offs_p = tl.arange(0, BLOCK_P)
    out_ptr += ((pid_n * T + pid_t) * spans + pid_s) * P
    tl.store(out_ptr + offs_p, maps, mask=offs_p < P)


@triton.jit
def _run(image_ptr, first, C, P, RUN: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels first to first + BLOCK_C of an image (C, P) without gaps, as one run of memory.

    Rows of an odd number of cells begin anywhere; a run of 16 of them, at a multiple of 16 bytes.
    """
    offs = tl.arange(0, RUN)
    mask = (offs < BLOCK_C * P) & (first * P + offs < C * P)
    return tl.load(image_ptr + first * P + offs, mask=mask, other=0.0)


@triton.jit
def _tile_of_run(run, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The run as a tile (BLOCK_C, BLOCK_P), 0 beyond P."""
    # Neighbouring threads take channels, so that few of them share the sums over cells.
    offs_p, offs_c = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_C)[None, :]
    index = tl.where(offs_p < P, offs_c * P + offs_p, 0)
    tile = tl.gather(run, tl.reshape(index, (BLOCK_P * BLOCK_C,)), 0)
    return tl.trans(tl.where(offs_p < P, tl.reshape(tile, (BLOCK_P, BLOCK_C)), 0.0))


def plan_cellwise(activations: Tensor, gradients: Tensor, reduction: str) -> Tiles:
    """How the map of a cellwise method is cut."""
    n, c, height, width = activations.shape
    maps, p = n * gradients.shape[1], height * width
    wanted = 2 * device_of(activations).processors
    channels, padded, method = power_of_two(c), power_of_two(p), {"METHOD": CELLWISE[reduction]}
    if not cells_first(activations):
        # Whole runs of channels; a few cells for each program, so that there are many programs.
        block_c = min(channels, _TILE)
        block_p, steps = min(padded, _TILE // block_c), ceil_div(c, block_c)
    else:
        if _in_runs(activations, gradients):
            block_c = min(channels, _TILE // padded)
            blocks = ceil_div(c, block_c)
            steps = shrunk(power_of_two(blocks), 1, blocks, maps, 2 * wanted)
            # Over fewer tiles the sort would take longer than it saves.
            if steps >= 8:
                constants = {**method, "STEPS": steps, "RUN": power_of_two(block_c * p)}
                return Tiles(cellwise_runs_kernel, constants, steps, block_c, padded, 4)
        # Short rows are cut in two: twice the programs, and the other half of a row runs beside it.
        block_p = min(padded, 32 if p <= 64 else 64)
        block_c = min(channels, _TILE // block_p)
        # All channels, or a part of them while programs are too few.
        blocks, others = ceil_div(c, block_c), maps * ceil_div(p, block_p)
        steps = shrunk(power_of_two(blocks), 1, blocks, others, wanted)
    constants = {**method, "STEPS": steps}
    return Tiles(cellwise_kernel, constants, steps, block_c, block_p, 4, ceil_div(p, block_p))


def _in_runs(activations: Tensor, gradients: Tensor) -> bool:
    """Whether channels follow each other without gaps, in short rows not of whole 16 bytes."""
    height, width = activations.shape[-2:]
    p = height * width
    without_gaps = all(x.stride()[-3:] == (p, width, 1) for x in (activations, gradients))
    return without_gaps and p <= 64 and p * activations.element_size() % 16 != 0
