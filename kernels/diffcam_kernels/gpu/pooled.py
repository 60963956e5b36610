"""pooled_cam: the sum of the channels, weighted by a vector for each target.

    M[n, t, p] = sum_c w[n, t, c] A[n, c, p]

Plan: a program owns a block of cells of one image and up to 8 targets, walks over all channels, and
keeps one partial sum for each place of its tile, so that lanes are summed once, at the end. A is
read once for 8 targets; programs that read the same cells for further targets run side by side,
and find them in the L2 cache. No two programs write the same cell: no atomics, and the order of a
sum does not depend on the rest of the batch.

Bytes: A once, the weights once for each block of cells, the maps once. FLOP: 2 N T C P.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import (
    Device,
    Launch,
    ceil_div,
    cells_first,
    device_of,
    flat_cells,
    power_of_two,
    shrunk,
)

# Elements of a tile over 128 threads: each has an accumulator for each target. One target takes 32
# registers of a thread; for 8 the tile is smaller, but leaves half-precision loads their 16 bytes.
_ACCUMULATORS = 4096
_SMALLEST_TILE = 1024


@triton.jit
def pooled_cam_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, P) float32, contiguous
    T,
    C,
    P,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """This program computes (BLOCK_T, BLOCK_P) cells of the maps of one image."""
    # One axis: the others of a grid end at 65,535. Targets are next to each other, then cells.
    pid, blocks_t, blocks_p = tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(P, BLOCK_P)
    offs_t = pid % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_p = pid // blocks_t % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    pid_n = (pid // blocks_t // blocks_p).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    mask_t, mask_p = offs_t < T, offs_p < P
    cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)
    a_ptrs = a_ptr + pid_n * stride_an + offs_c[:, None] * stride_ac + cells[None, :]
    w_ptrs = w_ptr + (pid_n * T + offs_t[:, None]) * C + offs_c[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C, BLOCK_P), tl.float32)
    # Tiles are smaller the more targets there are; unrolling keeps as many loads in flight.
    for start in tl.range(0, C, BLOCK_C, loop_unroll_factor=UNROLL):
        mask_c = start + offs_c < C
        a = tl.load(a_ptrs, mask=mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        total += w[:, :, None] * a[None, :, :]
        a_ptrs += BLOCK_C * stride_ac
        w_ptrs += BLOCK_C
    maps = tl.sum(total, axis=1)
    if RELU:
        maps = rectified(maps)
    out_ptrs = out_ptr + (pid_n * T + offs_t[:, None]) * P + offs_p[None, :]
    tl.store(out_ptrs, maps, mask=mask_t[:, None] & mask_p[None, :])


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


def plan_pooled_cam(activations: Tensor, weights: Tensor, maps: Tensor, relu: bool) -> Launch:
    """The launch that fills maps (N, T, h, w) from A (N, C, h, w) and w (N, T, C)."""
    n, c, height, width = activations.shape
    t, p = weights.shape[1], height * width
    block_t = min(power_of_two(t), 8)
    block_c, block_p = _tile(activations, n, block_t, device_of(activations))
    return Launch(
        pooled_cam_kernel,
        (ceil_div(t, block_t) * ceil_div(p, block_p) * n,),
        {
            "a_ptr": activations,
            "w_ptr": weights,
            "out_ptr": maps,
            **{"T": t, "C": c, "P": p, "width": width},
            **dict(zip(_STRIDES, activations.stride(), strict=True)),
        },
        {
            "FLAT": flat_cells(activations),
            "RELU": relu,
            **{"BLOCK_T": block_t, "BLOCK_C": block_c, "BLOCK_P": block_p},
            # More would spill.
            "UNROLL": min(block_t, 2),
        },
    )


_STRIDES = ("stride_an", "stride_ac", "stride_ah", "stride_aw")


def _tile(activations: Tensor, n: int, block_t: int, device: Device) -> tuple[int, int]:
    """(BLOCK_C, BLOCK_P): the axis that lies closest in memory takes 128 bytes or more of it."""
    size = max(_ACCUMULATORS // block_t, _SMALLEST_TILE)
    p = activations.shape[2] * activations.shape[3]
    if not cells_first(activations):
        # Whole runs of channels; a few cells for each program, so that there are many programs.
        block_c = min(power_of_two(activations.shape[1]), size // 2, 512)
        return block_c, min(size // block_c, power_of_two(p))
    # Half the run, twice the programs: pays while there are too few of them for the device.
    block_p = shrunk(min(power_of_two(p), 64), 16, p, n, 2 * device.processors)
    return min(size // block_p, power_of_two(activations.shape[1])), block_p


def pooled_cam(activations: Tensor, weights: Tensor, relu: bool) -> Tensor:
    """See `diffcam_kernels.reference.pooled_cam`."""
    n, t = weights.shape[:2]
    maps = activations.new_empty((n, t, *activations.shape[2:]), dtype=torch.float32)
    weights = weights.to(torch.float32).contiguous()
    plan_pooled_cam(activations, weights, maps, relu).run()
    return maps
