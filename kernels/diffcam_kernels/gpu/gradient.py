"""gradient_cam: the map of a gradient method from activations and gradients.

A method is one device function in `CELLWISE` or `WEIGHTED`, and nothing else here knows it.

- Cellwise, LayerCAM and HiResCAM: what channel c adds to cell p is a function of A[c, p] and
  G[c, p]. One launch: a program owns a block of cells of one image and target and walks over all
  channels. A and G cross device memory once.
- Weighted, Grad-CAM, Grad-CAM++ and XGrad-CAM: a channel's weight is known only after all of its
  cells, w = sum_p numerator / sum_p denominator, so that two launches are needed: the weights,
  where a program owns a block of channels and walks over all cells, and `pooled_cam`. Grad-CAM
  still reads A and G once each. The other two read A for the weights and again for the map; images
  go in runs whose A and G fit in half of the L2 cache, where the second look finds it. They also
  need sum_p A before their first cell: a program walks twice over a block of channels, which it has
  just read.

Programs of further targets of the same cells run side by side and find A in the cache. No atomics.

Bytes: A and G once, the maps once; weighted methods also the weights, twice. FLOP: 2 N T C P, for
the weighted ones 4 to 10 N T C P.
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
    image_chunks,
    power_of_two,
    shrunk,
)
from diffcam_kernels.gpu.pooled import cell_offsets, plan_pooled_cam, rectified

# Elements of a tile over 128 threads; A, G and the sum of each take 16 registers a thread.
_TILE = 2048


@triton.jit
def _layer_cam(a, g):
    return rectified(g) * a


@triton.jit
def _hires_cam(a, g):
    return g * a


@triton.jit
def _grad_cam(a, g, sum_a, cells):
    return g / cells, tl.zeros_like(g)


@triton.jit
def _xgrad_cam(a, g, sum_a, cells):
    return tl.where(sum_a == 0, 0.0, g * a), a


@triton.jit
def _grad_cam_pp(a, g, sum_a, cells):
    below = 2 + sum_a * g
    alpha = tl.where((below == 0) | (g <= 0), 0.0, 1 / below)
    return alpha * g, alpha


CELLWISE = {"layer_cam": _layer_cam, "hires_cam": _hires_cam}
"""Method -> what a channel adds to a cell, from tiles of A and G."""


@dataclass(frozen=True)
class Weighted:
    """A method whose channels have a weight each.

    Attributes:
        terms: from tiles of A and G, sum_p A and the number of cells to the numerator and the
            denominator; a sum of denominators of 0 counts as 1.
        needs_sum: `terms` reads sum_p A.
    """

    terms: Any
    needs_sum: bool


WEIGHTED = {
    "grad_cam": Weighted(_grad_cam, needs_sum=False),
    "grad_cam_pp": Weighted(_grad_cam_pp, needs_sum=True),
    "xgrad_cam": Weighted(_xgrad_cam, needs_sum=True),
}


@triton.jit
def cellwise_kernel(
    a_ptr,  # (N, C, h, w), any strides
    g_ptr,  # (N, T, C, h, w), any strides
    out_ptr,  # (N, T, P) float32, contiguous
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
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes BLOCK_P cells of one map."""
    pid, blocks = tl.program_id(0), tl.cdiv(P, BLOCK_P)
    pid_t, pid_n = (pid % T).to(tl.int64), (pid // T // blocks).to(tl.int64)
    offs_p = pid // T % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, BLOCK_C)
    mask_p = offs_p < P
    a_ptrs = a_ptr + pid_n * stride_an + offs_c[:, None] * stride_ac
    a_ptrs += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)[None, :]
    g_ptrs = g_ptr + pid_n * stride_gn + pid_t * stride_gt + offs_c[:, None] * stride_gc
    g_ptrs += cell_offsets(offs_p, width, stride_gh, stride_gw, FLAT_G)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, C, BLOCK_C):
        mask = (start + offs_c < C)[:, None] & mask_p[None, :]
        a = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        total += METHOD(a, g)
        a_ptrs += BLOCK_C * stride_ac
        g_ptrs += BLOCK_C * stride_gc
    maps = tl.sum(total, axis=0)
    if RELU:
        maps = rectified(maps)
    tl.store(out_ptr + (pid_n * T + pid_t) * P + offs_p, maps, mask=mask_p)


@triton.jit
def gradient_weights_kernel(
    a_ptr,  # (N, C, h, w), any strides
    g_ptr,  # (N, T, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
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
    NEEDS_SUM: tl.constexpr,
    FLAT_A: tl.constexpr,
    FLAT_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes the weights of BLOCK_C channels for one target of one image."""
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    pid_t, pid_n = (pid % T).to(tl.int64), (pid // T // blocks).to(tl.int64)
    offs_c = pid // T % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    a_rows = a_ptr + pid_n * stride_an + offs_c[:, None].to(tl.int64) * stride_ac
    g_rows = g_ptr + pid_n * stride_gn + pid_t * stride_gt
    g_rows += offs_c[:, None].to(tl.int64) * stride_gc
    # What a method that does not need the sum is given instead; it never reads it.
    sum_a = tl.zeros((BLOCK_C, 1), tl.float32)
    if NEEDS_SUM:
        parts = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for start in range(0, P, BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            mask = mask_c[:, None] & (offs_p < P)[None, :]
            cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)
            parts += tl.load(a_rows + cells[None, :], mask=mask, other=0.0).to(tl.float32)
        sum_a = tl.sum(parts, axis=1)[:, None]
    above = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    below = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = mask_c[:, None] & (offs_p < P)[None, :]
        g_cells = cell_offsets(offs_p, width, stride_gh, stride_gw, FLAT_G)
        g = tl.load(g_rows + g_cells[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEEDS_SUM:
            a_cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT_A)
            a = tl.load(a_rows + a_cells[None, :], mask=mask, other=0.0).to(tl.float32)
            numerator, denominator = METHOD(a, g, sum_a, P)
        else:
            numerator, denominator = METHOD(g, g, sum_a, P)
        above += numerator
        below += denominator
    divisor = tl.sum(below, axis=1)
    weights = tl.sum(above, axis=1) / tl.where(divisor == 0, 1.0, divisor)
    tl.store(w_ptr + (pid_n * T + pid_t) * C + offs_c, weights, mask=mask_c)


def plan_gradient_cam(
    activations: Tensor,
    gradients: Tensor,
    reduction: str,
    maps: Tensor,
    weights: Tensor,
    relu: bool,
) -> list[Launch]:
    """The launches that fill maps (N, T, h, w); weights (N, T, C) is room for those of weighted
    methods.
    """
    if reduction in CELLWISE:
        return [_plan_cellwise(activations, gradients, reduction, maps, relu)]
    method, launches = WEIGHTED[reduction], []
    # Gradients pass through the cache between the two looks at the activations.
    runs = image_chunks(activations, 1 + gradients.shape[1]) if method.needs_sum else [slice(None)]
    for run in runs:
        a, g, w = activations[run], gradients[run], weights[run]
        launches += [
            _plan_weights(a, g, method, w),
            *plan_pooled_cam(a, w, maps[run], relu),
        ]
    return launches


def _plan_cellwise(
    activations: Tensor, gradients: Tensor, reduction: str, maps: Tensor, relu: bool
) -> Launch:
    n, c, height, width = activations.shape
    t, p = gradients.shape[1], height * width
    wanted = 2 * device_of(activations).processors
    if cells_first(activations):
        block_p = shrunk(min(power_of_two(p), 64), 16, p, n * t, wanted)
        block_c = min(power_of_two(c), _TILE // block_p)
    else:
        block_c = min(power_of_two(c), 512)
        block_p = min(power_of_two(p), _TILE // block_c)
    return Launch(
        cellwise_kernel,
        (t * ceil_div(p, block_p) * n,),
        {
            "a_ptr": activations,
            "g_ptr": gradients,
            "out_ptr": maps,
            **_sizes(activations, gradients),
        },
        {
            "METHOD": CELLWISE[reduction],
            **_layout(activations, gradients),
            "RELU": relu,
            **{"BLOCK_C": block_c, "BLOCK_P": block_p},
        },
    )


def _plan_weights(
    activations: Tensor, gradients: Tensor, method: Weighted, weights: Tensor
) -> Launch:
    n, c, height, width = activations.shape
    t, p = gradients.shape[1], height * width
    wanted = 2 * device_of(activations).processors
    if cells_first(gradients):
        block_p = min(power_of_two(p), 256)
        block_c = shrunk(min(power_of_two(c), _TILE // block_p), 1, c, n * t, wanted)
    else:
        block_c = shrunk(min(power_of_two(c), 64), 16, c, n * t, wanted)
        block_p = min(power_of_two(p), _TILE // block_c)
    return Launch(
        gradient_weights_kernel,
        (t * ceil_div(c, block_c) * n,),
        {
            "a_ptr": activations,
            "g_ptr": gradients,
            "w_ptr": weights,
            **_sizes(activations, gradients),
        },
        {
            "METHOD": method.terms,
            "NEEDS_SUM": method.needs_sum,
            **_layout(activations, gradients),
            **{"BLOCK_C": block_c, "BLOCK_P": block_p},
        },
    )


def plan_channel_means(activations: Tensor, means: Tensor) -> Launch:
    """The launch that fills the mean of each channel over the cells, (N, C): Grad-CAM's weights."""
    return _plan_weights(activations, activations[:, None], WEIGHTED["grad_cam"], means)


def _sizes(activations: Tensor, gradients: Tensor) -> dict[str, int]:
    _, c, height, width = activations.shape
    strides = (*activations.stride(), *gradients.stride())
    names = ("an", "ac", "ah", "aw", "gn", "gt", "gc", "gh", "gw")
    return {
        **{"T": gradients.shape[1], "C": c, "P": height * width, "width": width},
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
    }


def _layout(activations: Tensor, gradients: Tensor) -> dict[str, bool]:
    return {"FLAT_A": flat_cells(activations), "FLAT_G": flat_cells(gradients)}


def gradient_cam(activations: Tensor, gradients: Tensor, reduction: str, relu: bool) -> Tensor:
    """See `diffcam_kernels.reference.gradient_cam`."""
    n, t, c = gradients.shape[:3]
    maps = activations.new_empty((n, t, *activations.shape[2:]), dtype=torch.float32)
    weights = maps.new_empty((n, t, c if reduction in WEIGHTED else 0))
    for launch in plan_gradient_cam(activations, gradients, reduction, maps, weights, relu):
        launch.run()
    return maps
