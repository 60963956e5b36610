"""preprocess: from uint8 pictures to the normalised input of a network, in one launch.

    out[n, c, y, x] = image[n, y, x, c] / (255 std[c]) - mean[c] / std[c]

Plan, by the order of values in memory:

- the same in the picture and in the result (channels_last, or one channel): programs walk over both
  in steps of a multiple of C, so that a thread meets the same channels at every step and looks up
  their factors once;
- NHWC of three channels to NCHW: a thread reads four pixels as three words and writes four values
  of each plane;
- any other: programs walk the planes or pixels of the result; for NCHW a byte of the picture is
  read once from device memory and C - 1 times from the cache.

Bytes: the images once, the result once. FLOP: 2 a value.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div, device_of, shrunk

# Values of a program and its warps: 16 bytes of a picture for each thread.
_BLOCK, _WARPS = 1024, 2
# Bytes that a program writes for each value of its block, over its steps: more steps save look-ups.
_STEP_BYTES = 8
# Groups of four pixels of a program, one for each thread, and its warps.
_QUADS, _QUAD_WARPS = 128, 4


@triton.jit
def same_order_kernel(
    images_ptr,  # (N, H, W, C) uint8, each image contiguous
    scale_ptr,  # (C,) float32
    shift_ptr,  # (C,) float32
    out_ptr,  # like images, floating point
    C,
    size,  # values of an image
    programs,  # of an image
    stride_in,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program computes up to STEPS blocks of one image, C blocks apart."""
    # One axis, as the others of a grid end at 65,535.
    pid_n, pid = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    first = (pid // C).to(tl.int64) * (C * STEPS) + pid % C
    offs = tl.arange(0, BLOCK)
    channel = ((pid % C) * BLOCK + offs) % C
    scale, shift = tl.load(scale_ptr + channel), tl.load(shift_ptr + channel)
    image_ptr, out_ptr = images_ptr + pid_n * stride_in, out_ptr + pid_n * size
    for step in tl.static_range(STEPS):
        start = (first + step * C) * BLOCK
        mask = offs < tl.minimum(size - start, BLOCK).to(tl.int32)
        x = tl.load(image_ptr + start + offs, mask=mask, other=0).to(tl.float32)
        y = (x * scale + shift).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + offs, y, mask=mask)


@triton.jit
def planes_kernel(
    images_ptr,  # (N, H, W, 3) uint8, each image contiguous words
    scale_ptr,  # (3,) float32
    shift_ptr,  # (3,) float32
    out_ptr,  # (N, 3, H, W) floating point, contiguous
    quads,  # of an image: groups of four pixels, of three words
    stride_in,  # in words
    BLOCK: tl.constexpr,
):
    """This program computes BLOCK groups of four pixels of one image."""
    pid_n = tl.program_id(0).to(tl.int64)
    words_ptr = images_ptr.to(tl.pointer_type(tl.int32)) + pid_n * stride_in
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < quads
    # Bytes rgbr gbrg brgb.
    w0 = tl.load(words_ptr + offs * 3, mask=mask, other=0)
    w1 = tl.load(words_ptr + offs * 3 + 1, mask=mask, other=0)
    w2 = tl.load(words_ptr + offs * 3 + 2, mask=mask, other=0)
    pixels = tl.program_id(1) * BLOCK * 4 + tl.arange(0, BLOCK * 4)
    inside = pixels < quads * 4
    plane_ptrs = out_ptr + pid_n * quads * 12 + pixels
    for channel in tl.static_range(3):
        if channel == 0:
            x = _four(w0, w0 >> 24, w1 >> 16, w2 >> 8)
        elif channel == 1:
            x = _four(w0 >> 8, w1, w1 >> 24, w2 >> 16)
        else:
            x = _four(w0 >> 16, w1 >> 8, w2, w2 >> 24)
        y = x * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)
        tl.store(plane_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside)
        plane_ptrs += quads * 4


@triton.jit
def _four(a, b, c, d):
    """The lowest bytes of words a, b, c and d, in this order."""
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.numel * 4)
    return (words & 255).to(tl.float32)


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
    offsets = (pixel // W) * stride_ih + (pixel % W) * stride_iw + channel * stride_ic
    x = tl.load(images_ptr + pid_n * stride_in + offsets, mask=mask, other=0).to(tl.float32)
    y = x * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)
    tl.store(out_ptr + pid * size + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def plan_preprocess(images: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> Launch:
    """The launch that fills out (N, C, H, W), contiguous or channels_last."""
    n, height, width, c = images.shape
    pixels = not out.is_contiguous()
    size = height * width * c
    operands = {"images_ptr": images, "scale_ptr": scale, "shift_ptr": shift, "out_ptr": out}
    packed = images[:1].is_contiguous()
    if packed and (pixels or c == 1):
        if images.is_contiguous():
            # Images follow each other: they are one.
            n, size = 1, n * size
        # Fewer steps while there are too few programs.
        most, wanted = _STEP_BYTES // out.element_size(), 8 * device_of(images).processors
        steps = shrunk(most, 1, ceil_div(size, _BLOCK), n, wanted)
        programs = c * ceil_div(size, c * steps * _BLOCK)
        sizes = {"C": c, "size": size, "programs": programs, "stride_in": images.stride(0)}
        return Launch(
            same_order_kernel,
            (programs * n,),
            {**operands, **sizes},
            {"STEPS": steps, "BLOCK": _BLOCK},
            num_warps=_WARPS,
        )
    aligned = images.data_ptr() % 4 == 0 and images.stride(0) % 4 == 0
    if packed and c == 3 and aligned and height * width % 4 == 0:
        quads = height * width // 4
        return Launch(
            planes_kernel,
            (n, ceil_div(quads, _QUADS)),
            {**operands, "quads": quads, "stride_in": images.stride(0) // 4},
            {"BLOCK": _QUADS},
            num_warps=_QUAD_WARPS,
        )
    size = size if pixels else height * width
    return Launch(
        preprocess_kernel,
        (n if pixels else n * c, ceil_div(size, _BLOCK)),
        {
            **operands,
            **{"C": c, "W": width, "size": size},
            **dict(zip(_STRIDES, images.stride(), strict=True)),
        },
        {"CHANNELS_LAST": pixels, "BLOCK": _BLOCK},
        num_warps=_WARPS,
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
