"""eigen_cam: the first principal component of every image of a batch, without a decomposition.

    M = s u,   u the leading eigenvector of the Gram matrix X X^T (P, P), s^2 its eigenvalue

Plan, up to 64 cells: one program an image, one launch. It walks over the channels, subtracts their
means and adds their products to the Gram matrix, which stays on chip, then squares that matrix 24
times, each time scaled to trace 1: what remains is u u^T unless the two largest singular values
agree to 1e-7 or so. The column of the largest diagonal entry is u. A crosses device memory once.

More cells do not fit: PyTorch's batched products then do the same, on the smaller of X X^T and
X^T X.

Squares are taken of A: its magnitude must lie between 1e-15 and 1e15.

Bytes: A and M once. FLOP: 2 N C P^2 + 48 N P^3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, flat_cells, power_of_two
from diffcam_kernels.gpu.pooled_kernels import cell_offsets

MAX_CELLS = 64
_SQUARINGS = 24


@triton.jit
def eigen_cam_kernel(
    a_ptr,  # (N, C, h, w), any strides
    out_ptr,  # (N, P) float32, contiguous
    C,
    P,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    CENTER: tl.constexpr,
    SQUARINGS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes the map of one image."""
    pid_n = tl.program_id(0).to(tl.int64)
    offs_p, offs_c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    mask_p = offs_p < P
    cells = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)
    a_ptrs = a_ptr + pid_n * stride_an + cells[:, None] + offs_c[None, :] * stride_ac
    gram = tl.zeros((BLOCK_P, BLOCK_P), tl.float32)
    for start in range(0, C, BLOCK_C):
        mask = mask_p[:, None] & (start + offs_c < C)[None, :]
        x = tl.load(a_ptrs, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            x = tl.where(mask, x - (tl.sum(x, axis=0) / P)[None, :], 0.0)
        gram = tl.dot(x, tl.trans(x), gram, input_precision="tf32x3")
        a_ptrs += BLOCK_C * stride_ac
    diagonal = offs_p[:, None] == offs_p[None, :]
    trace = tl.sum(tl.where(diagonal, gram, 0.0))
    # 0 has no direction: the map is 0.
    power = gram / tl.where(trace == 0, 1.0, trace)
    # The traces t_k before each scaling tell the eigenvalue: log s^2 = log t + sum_k log t_k / 2^k.
    logarithm, share = 0.0, 0.5
    for _ in range(SQUARINGS):
        power = tl.dot(power, power, input_precision="tf32x3")
        size = tl.sum(tl.where(diagonal, power, 0.0))
        size = tl.where(size == 0, 1.0, size)
        power = power / size
        logarithm += tl.log(size) * share
        share *= 0.5
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


def plan_eigen_cam(activations: Tensor, maps: Tensor, center: bool) -> Launch:
    """The launch that fills maps (N, h, w) from A (N, C, h, w) of up to `MAX_CELLS` cells."""
    n, c, height, width = activations.shape
    # Matrix products take 16 rows and columns at least.
    return Launch(
        eigen_cam_kernel,
        (n,),
        {
            "a_ptr": activations,
            "out_ptr": maps,
            **{"C": c, "P": height * width, "width": width},
            **dict(zip(_STRIDES, activations.stride(), strict=True)),
        },
        {
            "FLAT": flat_cells(activations),
            "CENTER": center,
            "SQUARINGS": _SQUARINGS,
            "BLOCK_C": min(max(power_of_two(c), 16), 32),
            "BLOCK_P": max(power_of_two(height * width), 16),
        },
        num_stages=2,
    )


_STRIDES = ("stride_an", "stride_ac", "stride_ah", "stride_aw")


def eigen_cam(activations: Tensor, center: bool) -> Tensor:
    """See `diffcam_kernels.reference.eigen_cam`."""
    n, _, height, width = activations.shape
    if 0 in activations.shape:
        return activations.new_zeros((n, height, width), dtype=torch.float32)
    if height * width > MAX_CELLS:
        return _by_products(activations, center)
    maps = activations.new_empty((n, height, width), dtype=torch.float32)
    plan_eigen_cam(activations, maps, center).run()
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
