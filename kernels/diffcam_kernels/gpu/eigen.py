"""eigen_cam: the first principal component of every image of a batch, without a decomposition.

    M = s u,   u the leading eigenvector of the Gram matrix X X^T (P, P), s^2 its eigenvalue

Plan, up to 64 cells, two launches. In the first a program takes a run of channels of one image and
adds up their products; the length of a run is fixed, so that an image has the same map in any
batch. In the second a program adds up the parts of one image and squares the matrix twice, then
scales it to trace 1, until one eigenvalue is left: what remains is u u^T. That takes about
log2(15 / log(s^2 / s_2^2)) squarings, and at most 24, unless the two largest singular values agree
to 1e-7 or so. The column of the largest diagonal entry is u.

Means over the cells are subtracted from the Gram matrix, its rows and its columns, not from X: then
no sum stands between a load and its product. So that means far above deviations lose no digits
there, the first cell of each channel is subtracted before.

More cells do not fit: PyTorch's batched products then do the same, on the smaller of X X^T and
X^T X.

Squares are taken of A: its magnitude must lie between 1e-15 and 1e15.

Bytes: A and M once, 64 P values an image and run written and read again, in cache as a rule. FLOP:
2 N C P^2 + up to 48 N P^3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div, flat_cells, power_of_two
from diffcam_kernels.gpu.pooled_kernels import cell_offsets

MAX_CELLS = 64
_SQUARINGS = 24
# Channels of a program: few, as one image has no others to fill the device.
_RUN = 256
# Channels in one product: with more, registers run out. There are no loads ahead of it, which were
# slower.
_PRODUCT = 32
_WARPS = 4


@triton.jit
def gram_kernel(
    a_ptr,  # (N, C, h, w), any strides
    parts_ptr,  # (N, R, BLOCK_P, BLOCK_P) float32, contiguous
    C,
    P,
    width,
    runs,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    CENTER: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes the part of one Gram matrix that RUN channels make."""
    pid = tl.program_id(0).to(tl.int64)
    first = (pid % runs).to(tl.int32) * RUN
    offs_p, offs_c = tl.arange(0, BLOCK_P), first + tl.arange(0, BLOCK_C)
    mask_p = offs_p < P
    cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)
    channels = offs_c.to(tl.int64) * stride_ac
    origin_ptrs = a_ptr + (pid // runs) * stride_an + channels
    a_ptrs = origin_ptrs[None, :] + cells[:, None]
    gram = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
    for start in range(0, tl.minimum(C - first, RUN), BLOCK_C):
        mask = mask_p[:, None] & (start + offs_c < C)[None, :]
        x = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            origin = tl.load(origin_ptrs, mask=start + offs_c < C, other=0.0)
            x = tl.where(mask_p[:, None], x - origin.to(tl.float32)[None, :], 0.0)
        gram = tl.dot(x, tl.trans(x), gram, input_precision="tf32x3")
        origin_ptrs += BLOCK_C * stride_ac
        a_ptrs += BLOCK_C * stride_ac
    offs = offs_p[:, None] * BLOCK_P + offs_p[None, :]
    # Whole rows: columns beyond P are 0.
    tl.store(parts_ptr + pid * BLOCK_P * BLOCK_P + offs, gram, mask=mask_p[:, None])


@triton.jit
def eigenvector_kernel(
    parts_ptr,  # (N, R, BLOCK_P, BLOCK_P) float32, contiguous
    out_ptr,  # (N, P) float32, contiguous
    P,
    runs,
    CENTER: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes the map of one image."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    diagonal = offs_p[:, None] == offs_p[None, :]
    part_ptrs = parts_ptr + pid_n * runs * BLOCK_P * BLOCK_P
    part_ptrs += offs_p[:, None] * BLOCK_P + offs_p[None, :]
    gram = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
    for _ in range(runs):
        gram += tl.load(part_ptrs, mask=mask_p[:, None], other=0.0)
        part_ptrs += BLOCK_P * BLOCK_P
    trace = tl.sum(tl.where(diagonal, gram, 0.0))
    if CENTER:
        gram -= (tl.sum(gram, axis=0) / P)[None, :]
        gram -= (tl.sum(gram, axis=1) / P)[:, None]
        gram = tl.where(mask_p[:, None] & mask_p[None, :], gram, 0.0)
        # What channels of one value leave is rounding: it is 0.
        noise = trace * 1e-6
        trace = tl.sum(tl.where(diagonal, gram, 0.0))
        gram = tl.where(trace <= noise, 0.0, gram)
        trace = tl.where(trace <= noise, 0.0, trace)
    # 0 has no direction: the map is 0.
    power = gram / tl.where(trace == 0, 1.0, trace)
    # The traces t_k before each scaling tell the eigenvalue: log s^2 = log t + sum_k log t_k / 4^k.
    logarithm, share, size, step = 0.0, 0.25, 0.0, 0
    # All but the largest eigenvalue share e before, the fourth power of which is left. A trace of
    # 1 - 4 e leaves less than float32 holds here. NaN ends it as well.
    while (step < SQUARINGS) & (size < 0.97):
        power = tl.dot(power, power, input_precision="tf32x3")
        power = tl.dot(power, power, input_precision="tf32x3")
        size = tl.sum(tl.where(diagonal, power, 0.0))
        # Where there is nothing, there is nothing to wait for.
        size = tl.where(size == 0, 1.0, size)
        power = power / size
        logarithm += tl.log(size) * share
        share *= 0.25
        step += 2
    entries = tl.sum(tl.where(diagonal, power, 0.0), axis=1)
    column = tl.argmax(_comparable(entries), axis=0)
    u = tl.sum(tl.where(offs_p[None, :] == column, power, 0.0), axis=1)
    length = tl.sqrt(tl.sum(u * u))
    u = u / tl.where(length == 0, 1.0, length)
    # Of equal magnitudes argmax takes the first cell.
    largest = tl.argmax(_comparable(tl.abs(u)), axis=0)
    sign = tl.where(tl.sum(tl.where(offs_p == largest, u, 0.0)) < 0, -1.0, 1.0)
    tl.store(
        out_ptr + pid_n * P + offs_p, sign * tl.sqrt(trace * tl.exp(logarithm)) * u, mask=mask_p
    )


@triton.jit
def _comparable(x):
    """x with 0 for NaN, among which there is no largest."""
    return tl.where(x == x, x, 0.0)


def plan_eigen_cam(activations: Tensor, parts: Tensor, maps: Tensor, center: bool) -> list[Launch]:
    """The launches that fill maps (N, h, w) from A (N, C, h, w) of up to `MAX_CELLS` cells.

    Args:
        activations: A.
        parts: what the second reads from the first, see `empty_parts`.
        maps: the result.
        center: subtract from each channel its mean over the cells first.
    """
    n, c, height, width = activations.shape
    runs, block_p = parts.shape[1:3]
    gram = Launch(
        gram_kernel,
        (n * runs,),
        {
            "a_ptr": activations,
            "parts_ptr": parts,
            **{"C": c, "P": height * width, "width": width, "runs": runs},
            **dict(zip(_STRIDES, activations.stride(), strict=True)),
        },
        {
            "FLAT": flat_cells(activations),
            "CENTER": center,
            "RUN": _RUN,
            # Matrix products take 16 rows and columns at least.
            "BLOCK_C": min(max(power_of_two(c), 16), _PRODUCT),
            "BLOCK_P": block_p,
        },
        num_warps=_WARPS,
    )
    vector = Launch(
        eigenvector_kernel,
        (n,),
        {"parts_ptr": parts, "out_ptr": maps, "P": height * width, "runs": runs},
        {"CENTER": center, "SQUARINGS": _SQUARINGS, "BLOCK_P": block_p},
        num_warps=_WARPS,
    )
    return [gram, vector]


_STRIDES = ("stride_an", "stride_ac", "stride_ah", "stride_aw")


def empty_parts(activations: Tensor) -> Tensor:
    """Memory for the parts of each Gram matrix, (N, R, P, P) for R runs of channels, P padded."""
    n, c, height, width = activations.shape
    block_p = max(power_of_two(height * width), 16)
    shape = (n, ceil_div(c, _RUN), block_p, block_p)
    return activations.new_empty(shape, dtype=torch.float32)


def eigen_cam(activations: Tensor, center: bool) -> Tensor:
    """See `diffcam_kernels.reference.eigen_cam`."""
    n, _, height, width = activations.shape
    if 0 in activations.shape:
        return activations.new_zeros((n, height, width), dtype=torch.float32)
    if height * width > MAX_CELLS:
        return _by_products(activations, center)
    maps = activations.new_empty((n, height, width), dtype=torch.float32)
    for launch in plan_eigen_cam(activations, empty_parts(activations), maps, center):
        launch.run()
    return maps


def _by_products(activations: Tensor, center: bool) -> Tensor:
    x = activations.to(torch.float32).flatten(2).transpose(1, 2)
    if center:
        x = x - x.mean(dim=1, keepdim=True)
    wide = x.shape[2] >= x.shape[1]
    power = x @ x.mT if wide else x.mT @ x
    for _ in range(_SQUARINGS):
        size = power.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
        power = power / torch.where(size == 0, 1.0, size)
        power = power @ power
    column = power.diagonal(dim1=1, dim2=2).argmax(dim=1)
    vector: Tensor = power.take_along_dim(column[:, None, None], dim=2)
    if not wide:
        vector = x @ vector
    length = vector.norm(dim=1, keepdim=True)
    u = vector / torch.where(length == 0, 1.0, length)
    m = (u * (x.mT @ u).norm(dim=1, keepdim=True))[:, :, 0]
    m = m * torch.where(m.gather(1, m.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)
    maps: Tensor = m.reshape(-1, *activations.shape[2:])
    return maps
