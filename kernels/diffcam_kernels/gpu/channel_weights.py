"""contrast_channel_weights: from logits to the weights of channels under a pooled linear head.

    w = d W / P

Plan: a single row of few classes does not write d: a program owns a block of channels and
multiplies each piece of d with W as it is made. Otherwise the rows that `mixture` makes of the
logits are multiplied with W as `product` plans it, and mixed.

Bytes: logits, W and the result once. FLOP: about 8 N T K, and for the product 2 N K C where targets
share it, 2 N T K C where they do not.
"""

import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.contrast import (
    ROW_TILE,
    chosen_and_scores,
    class_by_class,
    contrast_operands,
    gradient_tile,
    plan_contrast_gradient,
    row_sums,
    row_targets,
    store_scores,
)
from diffcam_kernels.gpu.launch import Launch, ceil_div, device_of, power_of_two, shrunk
from diffcam_kernels.gpu.mixture import plan_mixture, plan_shared, shares_rows
from diffcam_kernels.gpu.product import Parts, multiply

# Every program walks over all classes, and the device is as wide as there are blocks of channels:
# beyond these many it is the walk that takes long.
_FUSED_CLASSES = 4096


@triton.jit
def contrast_channel_weights_kernel(
    z_ptr,  # (N, K) logits
    targets_ptr,  # (N, T) int64, or None: the prediction
    reference_ptr,  # (N, T, K) bool, or None: all classes
    blend_ptr,  # (N, K) float32, q itself, or None
    weight_ptr,  # (K, C) W, any strides
    w_ptr,  # (N, T, C) float32, contiguous
    chosen_ptr,  # (N, T) int64
    scores_ptr,  # (N, T) float32
    rows,
    T,
    K,
    C,
    cells,
    coldness,
    stride_zn,
    stride_rn,
    stride_rt,
    stride_bn,
    stride_wk,
    stride_wc,
    MODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
):
    """This program computes BLOCK_C channels of one row of w; the first one of the row also stores
    its target and score.
    """
    offs_r = tl.program_id(0) + tl.arange(0, 1)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_r, mask_c = offs_r < rows, offs_c < C
    pid_n, pid_t = (offs_r // T).to(tl.int64), offs_r % T
    z_ptrs = z_ptr + pid_n * stride_zn
    blend_ptrs, reference_ptrs = blend_ptr, reference_ptr
    if blend_ptr is not None:
        blend_ptrs += pid_n * stride_bn
    if reference_ptr is not None:
        reference_ptrs += pid_n * stride_rn + pid_t * stride_rt
    target, broken = row_targets(z_ptrs, targets_ptr, offs_r, mask_r, K, BLOCK_ROW)
    m, s, rest = row_sums(
        z_ptrs, reference_ptrs, blend_ptrs, mask_r, target, broken, K, coldness, MODE, BLOCK_ROW
    )
    if tl.program_id(1) == 0:
        store_scores(z_ptrs, chosen_ptr, scores_ptr, offs_r, mask_r, target, rest)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    offs_w = offs_c[None, :].to(tl.int64) * stride_wc
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        weight = tl.load(
            weight_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_w,
            mask=mask_k[:, None] & mask_c[None, :],
            other=0.0,
        ).to(tl.float32)
        d = gradient_tile(
            z_ptrs,
            reference_ptrs,
            blend_ptrs,
            offs_k,
            mask_r[:, None] & mask_k[None, :],
            target,
            m,
            s,
            coldness,
            MODE,
        )
        total += tl.trans(d) * weight
    w = tl.sum(total, axis=0)[None, :] / cells
    w_ptrs = w_ptr + offs_r[:, None].to(tl.int64) * C + offs_c[None, :]
    tl.store(w_ptrs, w, mask=mask_r[:, None] & mask_c[None, :])


def is_fused(logits: Tensor, chosen: Tensor) -> bool:
    """Whether there is one row of few classes, so that d is multiplied as it is made."""
    return chosen.numel() <= 1 and logits.shape[1] <= _FUSED_CLASSES


def plan_contrast_channel_weights(
    logits: Tensor,
    weight: Tensor,
    cells: int,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    blend: Tensor | None,
    w: Tensor,
    chosen: Tensor,
    scores: Tensor,
) -> Launch:
    """The launch that fills w (N, T, C), targets and scores (N, T), reading W once for each row."""
    tensors, numbers, mode = contrast_operands(
        logits, targets, temperature, reference, blend, chosen, scores
    )
    rows, c = chosen.numel(), weight.shape[1]
    # A matrix product takes 16 rows at least.
    processors = device_of(logits).processors
    block_c = min(64, max(16, power_of_two(c)))
    block_c = shrunk(block_c, 16, c, rows, processors)
    return Launch(
        contrast_channel_weights_kernel,
        (rows, max(1, ceil_div(c, block_c))),
        {
            **tensors,
            "weight_ptr": weight,
            "w_ptr": w,
            **numbers,
            "C": c,
            "cells": cells,
            "stride_wk": weight.stride(0),
            "stride_wc": weight.stride(1),
        },
        {
            "MODE": mode,
            "BLOCK_K": min(ROW_TILE // block_c, max(16, power_of_two(logits.shape[1]))),
            "BLOCK_C": block_c,
            "BLOCK_ROW": min(ROW_TILE, power_of_two(logits.shape[1])),
        },
    )


def contrast_channel_weights(
    logits: Tensor,
    weight: Tensor,
    cells: int,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    blend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `diffcam_kernels.reference.channel_weights`; also the targets, and the scores S."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = None if targets is None else targets.contiguous()
    reference, blend = class_by_class(reference, blend)
    chosen, scores = chosen_and_scores(logits, targets)
    w = scores.new_empty((*chosen.shape, weight.shape[1]))
    fill_channel_weights(
        logits, weight, cells, targets, temperature, reference, blend, w, chosen, scores
    )
    return w, chosen, scores


def fill_channel_weights(
    logits: Tensor,
    weight: Tensor,
    cells: int,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    blend: Tensor | None,
    w: Tensor,
    chosen: Tensor,
    scores: Tensor,
) -> None:
    """Fills w (N, T, C), targets and scores (N, T), by the plan for so many rows."""
    operands = (targets, temperature, reference, blend)
    if is_fused(logits, chosen):
        plan_contrast_channel_weights(logits, weight, cells, *operands, w, chosen, scores).run()
        return
    a = b = None
    (n, t), k = chosen.shape, logits.shape[1]
    if shares_rows(t, *operands[1:]):
        rows, a, b = (scores.new_empty(shape) for shape in ((n, k), (n, t), (n, t, t)))
        plan_shared(logits, targets, temperature, rows, a, b, chosen, scores).run()
    else:
        rows = scores.new_empty((n * t, k))
        plan_contrast_gradient(logits, *operands, rows, chosen, scores, rest=True).run()
    if w.numel():
        weight = weight.detach()
        # Without a contrast q is 0, and a product of no parts.
        nothing = temperature is None and blend is None
        parts = (
            Parts(w.new_empty((0, len(rows), w.shape[2]))) if nothing else multiply(rows, weight)
        )
        plan_mixture(parts, weight, cells, chosen, a, b, w).run()
