"""head_cam of a few images in phases of one kernel: means, logits, channel weights, maps.

Each phase needs all of the one before, so that a launch of several of them waits for all of its
programs in between: they are as many as the device holds at once (a cooperative launch), and each
takes work items in turns. Where programs cannot wait for each other, as in the interpreter, each
phase is a launch of its own, of the same code.

- Means: an item is a block of channels of one image.
- Logits: an item is a block of classes, whole rows of W, which stay in registers for all images.
- Channel weights: an item is a block of channels, whole columns of W, which stay in registers for
  all targets of all images; every item makes the contrast of each of them anew.
- Maps: an item is one cell of one image, whose channels lie one after the other.

What is computed for an image does not depend on how many there are. No result goes through an
atomic operation: only the arrivals of programs are counted so.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.contrast import (
    contrast_mode,
    gradient_tile,
    row_sums,
    row_targets,
    store_scores,
)
from diffcam_kernels.gpu.launch import (
    Launch,
    ceil_div,
    device_of,
    flat_cells,
    power_of_two,
)
from diffcam_kernels.gpu.pooled_kernels import rectified

# Elements of a tile of W: 64 for each of 256 threads.
_TILE = 16384
_WARPS = 8
# Cells of a tile of the means.
_MEAN_CELLS = 32
# Channels of a tile of the maps; the weights of several targets leave room for fewer.
_MAP_CHANNELS, _MAPS_CHANNELS = 2048, 1024


@triton.jit
def head_cam_kernel(
    a_ptr,  # (N, C, P), neighbouring channels
    weight_ptr,  # (K, C) W, rows of neighbouring channels
    bias_ptr,  # (K,) or None: 0
    targets_ptr,  # (N, T) int64, or None: the prediction
    means_ptr,  # (N, C) float32, contiguous
    z_ptr,  # (N, K) float32, contiguous
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, P) float32, contiguous
    chosen_ptr,  # (N, T) int64
    scores_ptr,  # (N, T) float32
    arrived_ptr,  # (1,) int32: arrivals at barriers; zero before the first
    N,
    T,
    C,
    P,
    K,
    coldness,
    stride_an,
    stride_ap,
    stride_wk,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    MODE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALL_C: tl.constexpr,
    ALL_K: tl.constexpr,
    SOME_C: tl.constexpr,
    SOME_K: tl.constexpr,
    MEAN_P: tl.constexpr,
    MAP_C: tl.constexpr,
):
    """This program takes its turns in the phases FIRST to LAST."""
    if FIRST == 0:
        _means(a_ptr, means_ptr, N, C, P, stride_an, stride_ap, SOME_C, MEAN_P)
        if LAST == 0:
            # For the launch that follows.
            if tl.program_id(0) == 0:
                tl.store(arrived_ptr, 0)
        else:
            _wait_for_all(arrived_ptr, 1)
    if FIRST <= 1 and LAST >= 1:
        _logits(weight_ptr, bias_ptr, means_ptr, z_ptr, N, C, K, stride_wk, ALL_C, SOME_K)
        if LAST > 1:
            _wait_for_all(arrived_ptr, 2 - FIRST)
    if FIRST <= 2 and LAST >= 2:
        _weights(
            weight_ptr,
            targets_ptr,
            z_ptr,
            w_ptr,
            chosen_ptr,
            scores_ptr,
            N,
            T,
            C,
            P,
            K,
            coldness,
            stride_wk,
            MODE,
            BLOCK_T,
            ALL_K,
            SOME_C,
        )
        if LAST > 2:
            _wait_for_all(arrived_ptr, 3 - FIRST)
    if LAST == 3:
        _maps(
            a_ptr,
            w_ptr,
            out_ptr,
            N,
            T,
            C,
            P,
            stride_an,
            stride_ap,
            RELU,
            BLOCK_T,
            MAP_C,
        )


@triton.jit
def _wait_for_all(arrived_ptr, number):
    """A barrier of the whole grid, the number-th since the count of arrivals was zero."""
    # All threads have stored before one of them says so, and none reads before it has waited.
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < number * tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def _means(
    a_ptr,
    means_ptr,
    N,
    C,
    P,
    stride_an,
    stride_ap,
    SOME_C: tl.constexpr,
    MEAN_P: tl.constexpr,
):
    blocks = tl.cdiv(C, SOME_C)
    for item in range(tl.program_id(0), N * blocks, tl.num_programs(0)):
        offs_c, n = item % blocks * SOME_C + tl.arange(0, SOME_C), (item // blocks).to(tl.int64)
        mask_c = offs_c < C
        a_rows = a_ptr + n * stride_an + offs_c[None, :]
        total = tl.zeros((MEAN_P, SOME_C), tl.float32)
        for start in range(0, P, MEAN_P):
            offs_p = start + tl.arange(0, MEAN_P)
            mask = (offs_p < P)[:, None] & mask_c[None, :]
            a_ptrs = a_rows + offs_p[:, None].to(tl.int64) * stride_ap
            total += tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(means_ptr + n * C + offs_c, tl.sum(total, axis=0) / P, mask=mask_c)


@triton.jit
def _logits(
    weight_ptr,
    bias_ptr,
    means_ptr,
    z_ptr,
    N,
    C,
    K,
    stride_wk,
    ALL_C: tl.constexpr,
    SOME_K: tl.constexpr,
):
    offs_c = tl.arange(0, ALL_C)
    mask_c = offs_c < C
    for item in range(tl.program_id(0), tl.cdiv(K, SOME_K), tl.num_programs(0)):
        offs_k = item * SOME_K + tl.arange(0, SOME_K)
        mask_k = offs_k < K
        weight = tl.load(
            weight_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_c[None, :],
            mask=mask_k[:, None] & mask_c[None, :],
            other=0.0,
        )
        shift = tl.zeros((SOME_K,), tl.float32)
        if bias_ptr is not None:
            shift += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        for n in range(N):
            mean = tl.load(means_ptr + n * C + offs_c, mask=mask_c, other=0.0)
            z = tl.sum(weight.to(tl.float32) * mean[None, :], axis=1) + shift
            tl.store(z_ptr + n * K + offs_k, z, mask=mask_k)


@triton.jit
def _weights(
    weight_ptr,
    targets_ptr,
    z_ptr,
    w_ptr,
    chosen_ptr,
    scores_ptr,
    N,
    T,
    C,
    P,
    K,
    coldness,
    stride_wk,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALL_K: tl.constexpr,
    SOME_C: tl.constexpr,
):
    offs_k = tl.arange(0, ALL_K)
    mask_k = offs_k < K
    blocks = tl.cdiv(T, BLOCK_T)
    for item in range(tl.program_id(0), tl.cdiv(C, SOME_C), tl.num_programs(0)):
        offs_c = item * SOME_C + tl.arange(0, SOME_C)
        mask_c = offs_c < C
        weight = tl.load(
            weight_ptr + offs_k[:, None].to(tl.int64) * stride_wk + offs_c[None, :],
            mask=mask_k[:, None] & mask_c[None, :],
            other=0.0,
        )
        for block in range(N * blocks):
            n, offs_t = block // blocks, block % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
            mask_t = offs_t < T
            offs_r = n * T + offs_t
            z_ptrs = z_ptr + n * K + tl.zeros((BLOCK_T,), tl.int32)
            target, broken = row_targets(z_ptrs, targets_ptr, offs_r, mask_t, K, ALL_K)
            m, s, rest = row_sums(
                z_ptrs, None, None, mask_t, target, broken, K, coldness, MODE, ALL_K
            )
            if item == 0:
                store_scores(z_ptrs, chosen_ptr, scores_ptr, offs_r, mask_t, target, rest)
            inside = mask_t[:, None] & mask_k[None, :]
            d = gradient_tile(z_ptrs, None, None, offs_k, inside, target, m, s, coldness, MODE)
            w = tl.sum(d[:, :, None] * weight.to(tl.float32)[None, :, :], axis=1) / P
            w_ptrs = w_ptr + offs_r[:, None] * C + offs_c[None, :]
            tl.store(w_ptrs, w, mask=mask_t[:, None] & mask_c[None, :])


@triton.jit
def _maps(
    a_ptr,
    w_ptr,
    out_ptr,
    N,
    T,
    C,
    P,
    stride_an,
    stride_ap,
    RELU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    MAP_C: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    for item in range(tl.program_id(0), N * P * blocks, tl.num_programs(0)):
        offs_t = item % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        p, n = (item // blocks % P).to(tl.int64), (item // blocks // P).to(tl.int64)
        mask_t = offs_t < T
        a_cell = a_ptr + n * stride_an + p * stride_ap
        w_rows = w_ptr + (n * T + offs_t[:, None]) * C
        total = tl.zeros((BLOCK_T, MAP_C), tl.float32)
        for start in range(0, C, MAP_C):
            offs_c = start + tl.arange(0, MAP_C)
            mask_c = offs_c < C
            a = tl.load(a_cell + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            w_ptrs = w_rows + offs_c[None, :]
            w = tl.load(w_ptrs, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
            total += w * a[None, :]
        maps = tl.sum(total, axis=1)
        if RELU:
            maps = rectified(maps)
        tl.store(out_ptr + (n * T + offs_t) * P + p, maps, mask=mask_t)


@dataclass(frozen=True)
class Room:
    """What the phases write.

    Attributes:
        means: (N, C) float32.
        logits: (N, K) float32.
        weights: (N, T, C) float32.
        maps: (N, T, h, w) float32.
        chosen: (N, T) int64.
        scores: (N, T) float32.
        arrived: (1,) int32, of this call alone: two calls may run at once on two streams.
    """

    means: Tensor
    logits: Tensor
    weights: Tensor
    maps: Tensor
    chosen: Tensor
    scores: Tensor
    arrived: Tensor


def fits_phases(activations: Tensor, weight: Tensor) -> bool:
    """Whether the phases take these operands: blocks of whole rows and of whole columns of W fit in
    the registers of a program, and neighbouring channels of A and of W are neighbours in memory.
    Where cells are instead, the channels of one cell lie far apart.
    """
    k, c = weight.shape
    return (
        weight.stride(1) == 1
        and weight.stride(0) >= c
        and activations.stride(1) == 1
        and flat_cells(activations)
        and min(k, activations.numel()) > 0
        and _some(c, 8) >= 8
        and _some(k, 16) >= 16
    )


def waits(tensor: Tensor) -> bool:
    """Whether all programs of a launch can wait for each other where this tensor is."""
    return tensor.device.type == "cuda" and torch.version.hip is None


# The phases of each launch. The first one is on its own: it also sets the count of arrivals to
# zero, which takes a launch in any case.
TOGETHER = ((0, 0), (1, 3))
APART = ((0, 0), (1, 1), (2, 2), (3, 3))


def plan_phases(
    activations: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    temperature: float | None,
    relu: bool,
    room: Room,
    phases: tuple[tuple[int, int], ...],
) -> list[Launch]:
    """The launches that fill all of the room; `fits_phases` says for which operands.

    Args:
        activations: (N, C, h, w).
        weight: W, (K, C).
        bias: (K,).
        targets: (N, T), contiguous.
        temperature: as in `contrast_gradient`.
        relu: clip negative cells to 0.
        room: what is filled.
        phases: the first and the last phase of each launch.
    """
    n, c, height, width = activations.shape
    t, k, p = room.chosen.shape[1], len(weight), height * width
    mode, coldness = contrast_mode(temperature, None)
    block_t, some_k, some_c = min(power_of_two(t), 8), _some(c, 8), _some(k, 16)
    items = (
        n * ceil_div(c, some_c),
        ceil_div(k, some_k),
        ceil_div(c, some_c),
        n * p * ceil_div(t, block_t),
    )
    arguments = {
        **{"a_ptr": activations, "weight_ptr": weight, "bias_ptr": bias, "targets_ptr": targets},
        **{"means_ptr": room.means, "z_ptr": room.logits, "w_ptr": room.weights},
        **{"out_ptr": room.maps, "chosen_ptr": room.chosen, "scores_ptr": room.scores},
        "arrived_ptr": room.arrived,
        **{"N": n, "T": t, "C": c, "P": p, "K": k, "coldness": coldness},
        "stride_an": activations.stride(0),
        **{"stride_ap": activations.stride(3) if width > 1 else activations.stride(2)},
        "stride_wk": weight.stride(0),
    }
    blocks = {
        **{"MODE": mode, "RELU": relu, "BLOCK_T": block_t},
        # A value for each thread at least: threads that hold copies of one would write it twice.
        **{"ALL_C": max(32 * _WARPS, power_of_two(c)), "ALL_K": max(16, power_of_two(k))},
        **{"SOME_C": some_c, "SOME_K": some_k, "MEAN_P": min(_MEAN_CELLS, power_of_two(p))},
        "MAP_C": min(_MAP_CHANNELS if t == 1 else _MAPS_CHANNELS, power_of_two(c)),
    }
    processors = device_of(activations).processors
    return [
        Launch(
            head_cam_kernel,
            # One that waits holds one program on each processor, whatever the registers it takes.
            (min(processors, max(items[first : last + 1])) if last > first else items[first],),
            arguments,
            {"FIRST": first, "LAST": last, **blocks},
            # The tiles of the means are small.
            num_warps=4 if last == 0 else _WARPS,
            cooperative=last > first,
        )
        for first, last in phases
    ]


def _some(size: int, most: int) -> int:
    """How many whole runs of this size fit in a tile of W, up to some number."""
    return min(most, _TILE // max(16, power_of_two(size)))
