"""The mean of each channel over the cells: Grad-CAM's weights, and what a pooled linear head sees.

Plan: a program owns a block of channels of one image and walks over all cells. No atomics.

Bytes: A once, the means once. FLOP: N C P.
"""

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
from diffcam_kernels.gpu.pooled_kernels import cell_offsets


@triton.jit
def channel_means_kernel(
    a_ptr,  # (N, C, h, w), any strides
    out_ptr,  # (N, C) float32, contiguous
    C,
    P,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes the means of BLOCK_C channels of one image; STEPS tiles hold all P."""
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    pid_n = (pid // blocks).to(tl.int64)
    offs_c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = a_ptr + pid_n * stride_an + offs_c[:, None].to(tl.int64) * stride_ac
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    # A constant number of steps: a loop of one step is none, and all its loads are in flight.
    for step in tl.range(0, STEPS, num_stages=STAGES):
        offs_p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = mask_c[:, None] & (offs_p < P)[None, :]
        cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)
        # Scaled first, so that a sum of large values stays finite, as a mean does.
        total += tl.load(rows + cells[None, :], mask=mask, other=0.0).to(tl.float32) * (1.0 / P)
    tl.store(out_ptr + pid_n * C + offs_c, tl.sum(total, axis=1), mask=mask_c)


def plan_channel_means(activations: Tensor, means: Tensor) -> Launch:
    """The launch that fills the mean of each channel over the cells, (N, C)."""
    n, c, height, width = activations.shape
    p = height * width
    wanted = 2 * device_of(activations).processors
    warps, stages = 8, 3
    if cells_first(activations):
        block_p = min(power_of_two(p), 1024)
        block_c = shrunk(min(power_of_two(c), 4096 // block_p), 1, c, n, wanted)
    else:
        # Runs of 128 bytes; with longer ones there are fewer programs.
        run = 128 // activations.element_size()
        block_c = shrunk(min(power_of_two(c), run), 16, c, n, wanted)
        block_p = min(power_of_two(p), 64)
        warps, stages = 4, 4
    names = ("stride_an", "stride_ac", "stride_ah", "stride_aw")
    return Launch(
        channel_means_kernel,
        (ceil_div(c, block_c) * n,),
        {
            "a_ptr": activations,
            "out_ptr": means,
            **{"C": c, "P": p, "width": width},
            **dict(zip(names, activations.stride(), strict=True)),
        },
        {
            "FLAT": flat_cells(activations),
            "STEPS": ceil_div(p, block_p),
            "STAGES": stages if block_p < p else 1,
            **{"BLOCK_C": block_c, "BLOCK_P": block_p},
        },
        num_warps=warps,
    )
