"""preprocess: from uint8 pictures to the normalised input of a network, in one launch.

    out[n, c, y, x] = image[n, y, x, c] / (255 std[c]) - mean[c] / std[c]

Plan: programs walk the result in the order of its memory, planes for NCHW and pixels for
channels_last, so that stores are wide; the bytes of a picture are read once from device memory and,
for NCHW, twice more from the cache.

Bytes: the images once, the result once. FLOP: 2 a value.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div

# Values of a program, over 256 threads: 16 bytes of a picture for each.
_BLOCK = 4096


@triton.jit
def preprocess_kernel(
    images_ptr,  # (N, H, W, C) uint8, any strides
    scale_ptr,  # (C,) float32
    shift_ptr,  # (C,) float32
    out_ptr,  # (N, C, H, W) in the order of memory: planes or pixels
    C,
    W,
    size,
    stride_in,
    stride_ih,
    stride_iw,
    stride_ic,
    CHANNELS_LAST: tl.constexpr,
    SAME_ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program computes BLOCK values: of one plane, or of one image."""
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    mask = offs < size
    if CHANNELS_LAST:
        pid_n, channel, pixel = pid, offs % C, offs // C
    else:
        pid_n, channel, pixel = pid // C, (pid % C).to(tl.int32), offs
    if SAME_ORDER:
        offsets = offs
    else:
        offsets = (pixel // W) * stride_ih + (pixel % W) * stride_iw + channel * stride_ic
    x = tl.load(images_ptr + pid_n * stride_in + offsets, mask=mask, other=0).to(tl.float32)
    y = x * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)
    tl.store(out_ptr + pid * size + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def plan_preprocess(images: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Launch:
    """The launch that fills out (N, C, H, W), contiguous or channels_last."""
    n, height, width, c = images.shape
    pixels = not out.is_contiguous()
    size = height * width * (c if pixels else 1)
    return Launch(
        preprocess_kernel,
        (n if pixels else n * c, ceil_div(size, _BLOCK)),
        {
            "images_ptr": images,
            "scale_ptr": scale,
            "shift_ptr": shift,
            "out_ptr": out,
            **{"C": c, "W": width, "size": size},
            **dict(zip(_STRIDES, images.stride(), strict=True)),
        },
        {
            "CHANNELS_LAST": pixels,
            "SAME_ORDER": pixels and images[:1].is_contiguous(),
            "BLOCK": _BLOCK,
        },
        num_warps=8,
    )


_STRIDES = ("stride_in", "stride_ih", "stride_iw", "stride_ic")


def preprocess(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """See `diffcam_kernels.reference.preprocess`."""
    n, height, width, c = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(
        (n, c, height, width), dtype=dtype, device=images.device, memory_format=layout
    )
    scale, shift = _constants(tuple(mean), tuple(std), images.device)
    plan_preprocess(images, scale, shift, out).run()
    return out


@functools.lru_cache(maxsize=64)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factor and summand of each channel, kept on the device: making them waits for it."""
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale, device=device), torch.tensor(shift, device=device)
