"""The sum of the maps of spans of channels, in order: the second launch of the operators for maps.

Where programs that own a map each would be too few, or hold too much, each owns a span of channels
and writes a map of its own. No atomics: the order of the sum is that of the channels.

Bytes: the maps of spans once, the maps once.
"""

import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div, power_of_two


@triton.jit
def sum_spans_kernel(
    parts_ptr,  # (maps, S, P) float32, contiguous
    out_ptr,  # (maps, P) float32, contiguous
    S,
    P,
    RELU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program adds the spans of BLOCK_P cells of one map."""
    pid, blocks = tl.program_id(0), tl.cdiv(P, BLOCK_P)
    row = (pid // blocks).to(tl.int64)
    offs_p = pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    total = tl.zeros((BLOCK_S, BLOCK_P), tl.float32)
    for start in range(0, S, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < S)[:, None] & mask_p[None, :]
        rows = parts_ptr + (row * S + offs_s[:, None]) * P
        total += tl.load(rows + offs_p[None, :], mask=mask, other=0.0)
    maps = tl.sum(total, axis=0)
    if RELU:
        # NaN stays.
        maps = tl.where(maps < 0, 0.0, maps)
    tl.store(out_ptr + row * P + offs_p, maps, mask=mask_p)


def plan_sum_spans(parts: Tensor, maps: Tensor, relu: bool) -> Launch:
    """The launch that fills maps (N, T, h, w) with the sums of parts (N, T, spans, h, w)."""
    n, t, spans, height, width = parts.shape
    p = height * width
    block_p = min(power_of_two(p), 64)
    return Launch(
        sum_spans_kernel,
        (n * t * ceil_div(p, block_p),),
        {"parts_ptr": parts, "out_ptr": maps, "S": spans, "P": p},
        {"RELU": relu, "BLOCK_S": min(power_of_two(spans), 32), "BLOCK_P": block_p},
    )
