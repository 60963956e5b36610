"""contrast_gradient: from logits to d = e_c - q.

    q_j = exp((z_j - m) / temperature) / s,   m = max_{j != c} z_j,   s = sum_{j != c} of the same

Plan: a row is one target of one image. A first walk over its logits finds the arg-max, where the
target is the prediction; a second one m, s and the score S, online as in a streaming softmax; a
last one q. Only the first reads device memory: a row of 22,000 logits fits the nearest cache.

`channel_weights` and `head` build on the same device functions.

Bytes: logits and d once. FLOP: about 8 N T K.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div, power_of_two

_ONE_HOT, _GIVEN, _MEAN, _RUNNER_UP, _SOFTMAX = 0, 1, 2, 3, 4
ONE_HOT = tl.constexpr(_ONE_HOT)
GIVEN = tl.constexpr(_GIVEN)
MEAN = tl.constexpr(_MEAN)
RUNNER_UP = tl.constexpr(_RUNNER_UP)
SOFTMAX = tl.constexpr(_SOFTMAX)

# Elements of a tile over 128 threads: of logits of several rows, whose addresses take registers of
# their own, and of one row, or of W for it.
_ROWS_TILE = 1024
ROW_TILE = 4096


@triton.jit
def contrast_gradient_kernel(
    z_ptr,  # (N, K) logits
    targets_ptr,  # (N, T) int64, or None: the prediction
    reference_ptr,  # (N, T, K) bool, or None: all classes
    blend_ptr,  # (N, K) float32, q itself, or None
    d_ptr,  # (N, T, K) float32, contiguous
    chosen_ptr,  # (N, T) int64
    scores_ptr,  # (N, T) float32
    rows,
    T,
    K,
    coldness,
    stride_zn,
    stride_rn,
    stride_rt,
    stride_bn,
    MODE: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program computes BLOCK_R rows of d, or of q instead, with their targets and scores."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rows
    pid_n, pid_t = (offs_r // T).to(tl.int64), offs_r % T
    z_ptrs = z_ptr + pid_n * stride_zn
    blend_ptrs, reference_ptrs = blend_ptr, reference_ptr
    if blend_ptr is not None:
        blend_ptrs += pid_n * stride_bn
    if reference_ptr is not None:
        reference_ptrs += pid_n * stride_rn + pid_t * stride_rt
    target, broken = row_targets(z_ptrs, targets_ptr, offs_r, mask_r, K, BLOCK_K)
    m, s, rest = row_sums(
        z_ptrs, reference_ptrs, blend_ptrs, mask_r, target, broken, K, coldness, MODE, BLOCK_K
    )
    store_scores(z_ptrs, chosen_ptr, scores_ptr, offs_r, mask_r, target, rest)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        inside = mask_r[:, None] & (offs_k < K)[None, :]
        d = gradient_tile(
            z_ptrs, reference_ptrs, blend_ptrs, offs_k, inside, target, m, s, coldness, MODE
        )
        if REST:
            d = tl.where(offs_k[None, :] == target[:, None], 1.0, 0.0) - d
        tl.store(d_ptr + offs_r[:, None].to(tl.int64) * K + offs_k[None, :], d, mask=inside)


@triton.jit
def row_targets(z_ptrs, targets_ptr, offs_r, mask_r, K, BLOCK_K: tl.constexpr):
    """The target of each row, and whether a logit of the row is NaN."""
    best = tl.full(offs_r.shape, -float("inf"), tl.float32)
    target = tl.zeros(offs_r.shape, tl.int32)
    broken = tl.zeros(offs_r.shape, tl.int32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        inside = mask_r[:, None] & (offs_k < K)[None, :]
        z = tl.load(z_ptrs[:, None] + offs_k[None, :], mask=inside, other=-float("inf"))
        z = z.to(tl.float32)
        broken = tl.maximum(broken, tl.max((z != z).to(tl.int32), axis=1))
        if targets_ptr is None:
            z = tl.where(z != z, float("inf"), z)
            here, index = tl.max(z, axis=1, return_indices=True)
            # Only a larger logit moves it: of equal ones the first stays.
            target = tl.where(here > best, start + index, target)
            best = tl.maximum(best, here)
    if targets_ptr is not None:
        asked = tl.load(targets_ptr + offs_r, mask=mask_r, other=0)
        # No class: NaN, rather than a read outside of the logits.
        known = (asked >= 0) & (asked < K)
        target = tl.where(known, asked, -1).to(tl.int32)
    return target, broken > 0


@triton.jit
def _others(z_ptrs, reference_ptrs, offs_k, inside, target):
    """Logits of the classes to contrast with, -inf everywhere else."""
    z = tl.load(z_ptrs[:, None] + offs_k[None, :], mask=inside, other=-float("inf"))
    taken = offs_k[None, :] != target[:, None]
    if reference_ptrs is not None:
        taken &= tl.load(reference_ptrs[:, None] + offs_k[None, :], mask=inside, other=0) != 0
    return tl.where(taken, z.to(tl.float32), -float("inf"))


@triton.jit
def row_sums(
    z_ptrs,
    reference_ptrs,
    blend_ptrs,
    mask_r,
    target,
    broken,
    K,
    coldness,
    MODE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What q needs of each row: m (for the runner-up its class) and s, NaN where a logit is; and
    the share of the other classes in the score, sum_j q_j z_j.
    """
    m = tl.full(target.shape, -float("inf"), tl.float32)
    s = tl.zeros(target.shape, tl.float32)
    rest = tl.zeros(target.shape, tl.float32)
    best = tl.zeros(target.shape, tl.int32)
    if MODE != ONE_HOT:
        for start in range(0, K, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            inside = mask_r[:, None] & (offs_k < K)[None, :]
            if MODE == GIVEN:
                z = tl.load(z_ptrs[:, None] + offs_k[None, :], mask=inside, other=0.0)
                q = tl.load(blend_ptrs[:, None] + offs_k[None, :], mask=inside, other=0.0)
                rest += tl.sum(tl.where(q == 0, 0.0, q * z.to(tl.float32)), axis=1)
            else:
                z = _others(z_ptrs, reference_ptrs, offs_k, inside, target)
                here, index = tl.max(z, axis=1, return_indices=True)
                new = tl.maximum(m, here)
                if MODE == SOFTMAX:
                    # exp(-inf - -inf) is no weight but NaN.
                    e = tl.where(z == -float("inf"), 0.0, tl.exp((z - new[:, None]) * coldness))
                    decay = tl.where(m == new, 1.0, tl.exp((m - new) * coldness))
                    s = s * decay + tl.sum(e, axis=1)
                    rest = rest * decay + tl.sum(tl.where(e == 0, 0.0, e * z), axis=1)
                elif MODE == MEAN:
                    s += tl.sum((z > -float("inf")).to(tl.float32), axis=1)
                    rest += tl.sum(tl.where(z > -float("inf"), z, 0.0), axis=1)
                else:
                    best = tl.where(here > m, start + index, best)
                m = new
        if MODE == RUNNER_UP:
            rest, m, s = m, best.to(tl.float32), s + 1
        elif MODE != GIVEN:
            rest = rest / s
        if MODE != GIVEN:
            s = tl.where(broken, float("nan"), s)
            rest = tl.where(broken, float("nan"), rest)
    return m, s, rest


@triton.jit
def gradient_tile(
    z_ptrs,
    reference_ptrs,
    blend_ptrs,
    offs_k,
    inside,
    target,
    m,
    s,
    coldness,
    MODE: tl.constexpr,
):
    """A tile of d = e_c - q, 0 outside."""
    one_hot = tl.where(offs_k[None, :] == target[:, None], 1.0, 0.0)
    if MODE == ONE_HOT:
        d = one_hot
    elif MODE == GIVEN:
        d = one_hot - tl.load(blend_ptrs[:, None] + offs_k[None, :], mask=inside, other=0.0)
    elif MODE == RUNNER_UP:
        d = one_hot - tl.where(offs_k[None, :] == m.to(tl.int32)[:, None], 1.0, 0.0) / s[:, None]
    else:
        z = _others(z_ptrs, reference_ptrs, offs_k, inside, target)
        if MODE == MEAN:
            e = tl.where(z > -float("inf"), 1.0, 0.0)
        else:
            e = tl.where(z == -float("inf"), 0.0, tl.exp((z - m[:, None]) * coldness))
        d = one_hot - e / s[:, None]
    d = tl.where((target < 0)[:, None], float("nan"), d)
    return tl.where(inside, d, 0.0)


@triton.jit
def store_scores(z_ptrs, chosen_ptr, scores_ptr, offs_r, mask_r, target, rest):
    """Targets, and S = z_c - sum_j q_j z_j."""
    z = tl.load(z_ptrs + target, mask=mask_r & (target >= 0), other=float("nan")).to(tl.float32)
    tl.store(chosen_ptr + offs_r, target.to(tl.int64), mask=mask_r)
    tl.store(scores_ptr + offs_r, z - rest, mask=mask_r)


def contrast_mode(temperature: float | None, blend: Tensor | None) -> tuple[int, float]:
    """The mode, and 1 / temperature where it counts."""
    if blend is not None:
        return _GIVEN, 0.0
    if temperature is None:
        return _ONE_HOT, 0.0
    # Past the range of float32 a temperature is its limit.
    if temperature > torch.finfo(torch.float32).max:
        return _MEAN, 0.0
    if temperature < torch.finfo(torch.float32).tiny:
        return _RUNNER_UP, 0.0
    return _SOFTMAX, min(1 / temperature, torch.finfo(torch.float32).max)


def contrast_operands(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    blend: Tensor | None,
    chosen: Tensor,
    scores: Tensor,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Arguments that both kernels take, before and after their own, and the mode."""
    mode, coldness = contrast_mode(temperature, blend)
    before = {
        "z_ptr": logits,
        "targets_ptr": targets,
        "reference_ptr": reference if mode in (_MEAN, _RUNNER_UP, _SOFTMAX) else None,
        "blend_ptr": blend,
        "chosen_ptr": chosen,
        "scores_ptr": scores,
    }
    numbers = {
        "rows": chosen.numel(),
        "T": chosen.shape[1],
        "K": logits.shape[1],
        "coldness": coldness,
        "stride_zn": logits.stride(0),
        "stride_rn": 0 if reference is None else reference.stride(0),
        "stride_rt": 0 if reference is None else reference.stride(1),
        "stride_bn": 0 if blend is None else blend.stride(0),
    }
    return before, numbers, mode


def plan_contrast_gradient(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    blend: Tensor | None,
    d: Tensor,
    chosen: Tensor,
    scores: Tensor,
    *,
    rest: bool = False,
) -> Launch:
    """The launch that fills d (N, T, K), or q with `rest`, targets and scores (N, T).

    Classes lie one after the other in the logits, the reference and the blend.
    """
    tensors, numbers, mode = contrast_operands(
        logits, targets, temperature, reference, blend, chosen, scores
    )
    block_k = min(power_of_two(logits.shape[1]), ROW_TILE)
    block_r = min(max(_ROWS_TILE // block_k, 1), 8, power_of_two(chosen.numel()))
    return Launch(
        contrast_gradient_kernel,
        (ceil_div(chosen.numel(), block_r),),
        {**tensors, "d_ptr": d, **numbers},
        {"MODE": mode, "REST": rest, "BLOCK_R": block_r, "BLOCK_K": block_k},
    )


def contrast_gradient(
    logits: Tensor,
    targets: Tensor | None,
    temperature: float | None,
    reference: Tensor | None,
    blend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `diffcam_kernels.reference.contrast_gradient`; also the targets, and the scores S."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    targets = None if targets is None else targets.contiguous()
    reference, blend = class_by_class(reference, blend)
    chosen, scores = chosen_and_scores(logits, targets)
    d = torch.empty((*chosen.shape, logits.shape[1]), dtype=torch.float32, device=logits.device)
    plan_contrast_gradient(logits, targets, temperature, reference, blend, d, chosen, scores).run()
    return d, chosen, scores


def class_by_class(
    reference: Tensor | None, blend: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The operands with their classes one after the other, as they are in all but odd views."""
    if reference is not None and reference.stride(2) != 1:
        reference = reference.contiguous()
    if blend is not None:
        blend = blend.to(torch.float32)
        blend = blend if blend.stride(1) == 1 else blend.contiguous()
    return reference, blend


def chosen_and_scores(logits: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for targets and scores (N, T)."""
    shape = (logits.shape[0], 1) if targets is None else tuple(targets.shape)
    return (
        torch.empty(shape, dtype=torch.int64, device=logits.device),
        torch.empty(shape, dtype=torch.float32, device=logits.device),
    )
