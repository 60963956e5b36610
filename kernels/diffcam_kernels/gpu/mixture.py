"""Channel weights of several targets of one image from one product with W.

    w_t = (W[c_t] - q_t W) / P,   q_t W = a_t u + sum_{c in C, c != c_t} b_tc W[c],   u = e W

C are the targets of the image, and e_j = exp((z_j - max) / temperature) for the classes outside of
C, 0 inside: what all q_t have in common up to a factor. So W is multiplied with one row an image,
whatever the number of targets. Nothing is subtracted from u, so no digits of it cancel, and the
target, of the largest weight by far, takes no part in a product of half-precision pieces, whose
sum is only as exact as its largest term.

Where targets have little in common (`shares_rows`), q is a row of its own for each of them, a = 1
and b = 0.

Bytes: logits and e once, u and the rows W[c] once for each target. FLOP: 4 N K, 2 N T T C.
"""

import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.contrast import MEAN, ONE_HOT, SOFTMAX, contrast_mode, row_targets
from diffcam_kernels.gpu.launch import Launch, ceil_div, power_of_two
from diffcam_kernels.gpu.product import Parts, joined

# Past these many the coefficients, which are as many as pairs of targets, are no longer few.
_MOST_TARGETS = 8
# Elements of a row over 256 threads: an image has a single program.
_BLOCK_K = 8192
_BLOCK_C = 512


@triton.jit
def shared_kernel(
    z_ptr,  # (N, K) logits
    targets_ptr,  # (N, T) int64, or None: the prediction
    e_ptr,  # (N, K) float32, contiguous; not written where all of it is 0, without a contrast
    a_ptr,  # (N, T) float32
    b_ptr,  # (N, T, T) float32
    chosen_ptr,  # (N, T) int64
    scores_ptr,  # (N, T) float32
    T,
    K,
    coldness,
    stride_zn,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program computes e, a, b, the targets and the scores of one image."""
    pid, offs_t = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_T)
    z_row, mask_t = z_ptr + pid * stride_zn, offs_t < T
    offs_one = tl.arange(0, 1)
    best, broken = row_targets(z_row + offs_one, None, offs_one, offs_one < 1, K, BLOCK_K)
    targets_row, best = targets_ptr, tl.sum(best, axis=0)
    target = tl.where(mask_t, best, -1)
    if targets_ptr is not None:
        targets_row += pid * T
        asked = tl.load(targets_row + offs_t, mask=mask_t, other=-1)
        # No class: NaN, rather than a read outside of the logits.
        target = tl.where((asked >= 0) & (asked < K), asked, -1).to(tl.int32)
    m = -float("inf")
    s = 0.0
    rest = 0.0
    for start in range(0, K if MODE != ONE_HOT else 0, BLOCK_K):
        z = _outside(z_row, targets_row, best, start + tl.arange(0, BLOCK_K), T, K)
        if MODE == SOFTMAX:
            new = tl.maximum(m, tl.max(z, axis=0))
            # exp(-inf - -inf) is no weight but NaN.
            e = tl.where(z == -float("inf"), 0.0, tl.exp((z - new) * coldness))
            decay = tl.where(m == new, 1.0, tl.exp((m - new) * coldness))
            s = s * decay + tl.sum(e, axis=0)
            rest = rest * decay + tl.sum(tl.where(e == 0, 0.0, e * z), axis=0)
            m = new
        elif MODE == MEAN:
            s += tl.sum((z > -float("inf")).to(tl.float32), axis=0)
            rest += tl.sum(tl.where(z > -float("inf"), z, 0.0), axis=0)
    broken = tl.max(broken.to(tl.int32), axis=0) > 0
    _coefficients(
        z_row,
        a_ptr + pid * T,
        b_ptr + pid * T * T,
        chosen_ptr + pid * T,
        scores_ptr + pid * T,
        target,
        offs_t,
        broken,
        m,
        s,
        rest,
        T,
        coldness,
        MODE,
    )
    if MODE != ONE_HOT:
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            z = _outside(z_row, targets_row, best, offs_k, T, K)
            if MODE == SOFTMAX:
                e = tl.where(z == -float("inf"), 0.0, tl.exp((z - m) * coldness))
            else:
                e = tl.where(z > -float("inf"), 1.0, 0.0)
            tl.store(e_ptr + pid * K + offs_k, e, mask=offs_k < K)


@triton.jit
def _outside(z_row, targets_row, best, offs_k, T, K):
    """Logits of the classes that are no target of the image, -inf everywhere else."""
    z = tl.load(z_row + offs_k, mask=offs_k < K, other=-float("inf")).to(tl.float32)
    if targets_row is None:
        z = tl.where(offs_k == best, -float("inf"), z)
    else:
        for t in range(T):
            z = tl.where(offs_k == tl.load(targets_row + t), -float("inf"), z)
    return z


@triton.jit
def _coefficients(
    z_row,
    a_row,
    b_row,
    chosen_row,
    scores_row,
    target,
    offs_t,
    broken,
    m,
    s,
    rest,
    T,
    coldness,
    MODE: tl.constexpr,
):
    mask_t, known = offs_t < T, target >= 0
    z = tl.load(z_row + target, mask=known, other=float("nan")).to(tl.float32)
    differ = target[:, None] != target[None, :]
    # A class that is asked for twice counts once.
    later = offs_t[:, None] >= offs_t[None, :]
    first = tl.min((differ | later).to(tl.int32), axis=0) > 0
    taken = (known & first)[None, :] & differ
    others = tl.where(taken, z[None, :], -float("inf"))
    b = tl.zeros(others.shape, tl.float32)
    a = tl.zeros(offs_t.shape, tl.float32)
    subtracted = tl.zeros(offs_t.shape, tl.float32)
    if MODE == SOFTMAX:
        most = tl.maximum(m, tl.max(others, axis=1))
        e = tl.where(others == -float("inf"), 0.0, tl.exp((others - most[:, None]) * coldness))
        decay = tl.where(most == m, 1.0, tl.exp((m - most) * coldness))
        total = s * decay + tl.sum(e, axis=1)
        a, b = decay / total, e / total[:, None]
        weighted = tl.sum(tl.where(e == 0, 0.0, e * others), axis=1)
        subtracted = (rest * decay + weighted) / total
    elif MODE == MEAN:
        e = tl.where(others > -float("inf"), 1.0, 0.0)
        total = s + tl.sum(e, axis=1)
        a, b = 1 / total, e / total[:, None]
        weighted = tl.sum(tl.where(e == 0, 0.0, others), axis=1)
        subtracted = (rest + weighted) / total
    spoilt = target < 0
    if MODE != ONE_HOT:
        spoilt |= broken
        subtracted = tl.where(broken, float("nan"), subtracted)
    tl.store(a_row + offs_t, tl.where(spoilt, float("nan"), a), mask=mask_t)
    b_ptrs = b_row + offs_t[:, None] * T + offs_t[None, :]
    tl.store(b_ptrs, b, mask=mask_t[:, None] & mask_t[None, :])
    tl.store(chosen_row + offs_t, target.to(tl.int64), mask=mask_t)
    tl.store(scores_row + offs_t, z - subtracted, mask=mask_t)


@triton.jit
def mixture_kernel(
    y_ptr,  # (PARTS, rows, C) float32, contiguous: u
    unscale_ptr,  # (rows,) float32, or None: 1
    weight_ptr,  # (K, C) W, any strides
    chosen_ptr,  # (N, T) int64
    a_ptr,  # (N, T) float32, or None: 1
    b_ptr,  # (N, T, T) float32, or None: 0
    w_ptr,  # (N, T, C) float32, contiguous
    rows,
    T,
    C,
    cells,
    stride_wk,
    stride_wc,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program computes BLOCK_C channels of the weights of one target."""
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    offs_c, pid_r = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C), (pid // blocks).to(tl.int64)
    mask_c = offs_c < C
    row = pid_r
    if a_ptr is not None:
        row = pid_r // T
    rest = joined(y_ptr, unscale_ptr, row, offs_c, mask_c, rows, C, PARTS)
    columns = weight_ptr + offs_c.to(tl.int64) * stride_wc
    if a_ptr is not None:
        rest *= tl.load(a_ptr + pid_r)
        for t in range(T):
            b = tl.load(b_ptr + pid_r * T + t)
            target = tl.load(chosen_ptr + row * T + t)
            # A weight of infinity takes no part where b is 0.
            there = tl.where(mask_c, b, 0.0) != 0
            weight = tl.load(columns + target * stride_wk, mask=there, other=0.0)
            rest += b * weight.to(tl.float32)
    target = tl.load(chosen_ptr + pid_r)
    # What was no class is NaN.
    known = tl.where(mask_c, target, -1) >= 0
    own = tl.load(columns + target * stride_wk, mask=known, other=float("nan"))
    w = (own.to(tl.float32) - rest) / cells
    tl.store(w_ptr + pid_r * C + offs_c, w, mask=mask_c)


def shares_rows(
    targets: int, temperature: float | None, reference: Tensor | None, blend: Tensor | None
) -> bool:
    """Whether e exists: one blend for all targets but for what each leaves out."""
    mode, _ = contrast_mode(temperature, blend)
    alike = mode == ONE_HOT.value or (reference is None and mode in (MEAN.value, SOFTMAX.value))
    return targets <= _MOST_TARGETS and alike


def plan_shared(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    e: Tensor,
    a: Tensor,
    b: Tensor,
    chosen: Tensor,
    scores: Tensor,
) -> Launch:
    """The launch that fills e (N, K), a (N, T), b (N, T, T), targets and scores (N, T)."""
    mode, coldness = contrast_mode(temperature, None)
    (n, k), t = logits.shape, chosen.shape[1]
    block_k = min(_BLOCK_K, power_of_two(k))
    return Launch(
        shared_kernel,
        (n,),
        {
            **{"z_ptr": logits, "targets_ptr": targets, "e_ptr": e, "a_ptr": a, "b_ptr": b},
            **{"chosen_ptr": chosen, "scores_ptr": scores},
            **{"T": t, "K": k, "coldness": coldness, "stride_zn": logits.stride(0)},
        },
        {"MODE": mode, "BLOCK_T": power_of_two(t), "BLOCK_K": block_k},
        num_warps=8 if block_k == _BLOCK_K else 4,
    )


def plan_mixture(
    parts: Parts,
    weight: Tensor,
    cells: int,
    chosen: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    w: Tensor,
) -> Launch:
    """The launch that fills w (N, T, C) from u, (N, C) in parts; or q W, (N T, C), without a."""
    c = weight.shape[1]
    block_c = min(_BLOCK_C, power_of_two(c))
    return Launch(
        mixture_kernel,
        (chosen.numel() * ceil_div(c, block_c),),
        {
            **{"y_ptr": parts.y, "unscale_ptr": parts.unscale, "weight_ptr": weight},
            **{"chosen_ptr": chosen, "a_ptr": a, "b_ptr": b, "w_ptr": w},
            **{"rows": parts.y.shape[1], "T": chosen.shape[1], "C": c, "cells": cells},
            **{"stride_wk": weight.stride(0), "stride_wc": weight.stride(1)},
        },
        {"PARTS": len(parts.y), "BLOCK_C": block_c},
    )
