"""The kernels of `pooled`, and what those of other operators take from them: where a cell lies, and
max(x, 0).
"""

import triton
import triton.language as tl


@triton.jit
def pooled_cam_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, 1, C) float32, contiguous
    out_ptr,  # (N, 1, P) float32, contiguous
    C,
    P,
    cells,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program computes `cells` cells, at most BLOCK_P, of the map of one image."""
    # One axis: the others of a grid end at 65,535.
    pid, blocks = tl.program_id(0), tl.cdiv(P, cells)
    pid_n, place = (pid // blocks).to(tl.int64), tl.arange(0, BLOCK_P)
    offs_p, offs_c = pid % blocks * cells + place, tl.arange(0, BLOCK_C)
    mask_p = (place < cells) & (offs_p < P)
    places = cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)
    a_ptrs = a_ptr + pid_n * stride_an + offs_c[:, None] * stride_ac + places[None, :]
    w_ptrs = w_ptr + pid_n * C + offs_c
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        mask_c = start + offs_c < C
        a = tl.load(a_ptrs, mask=mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
        w = tl.load(w_ptrs, mask=mask_c, other=0.0)
        total += w[:, None] * a
        a_ptrs += BLOCK_C * stride_ac
        w_ptrs += BLOCK_C
    maps = tl.sum(total, axis=0)
    if RELU:
        maps = rectified(maps)
    tl.store(out_ptr + pid_n * P + offs_p, maps, mask=mask_p)


@triton.jit
def pooled_cams_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, P) float32, contiguous
    T,
    C,
    P,
    cells,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    PRODUCT: tl.constexpr,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program computes `cells` cells, at most BLOCK_P, of BLOCK_T maps of one image."""
    # Targets are next to each other, then cells.
    pid, blocks_t, blocks_p = tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(P, cells)
    place = tl.arange(0, BLOCK_P)
    offs_t = pid % blocks_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_p = pid // blocks_t % blocks_p * cells + place
    pid_n = (pid // blocks_t // blocks_p).to(tl.int64)
    mask_t, mask_p = offs_t < T, (place < cells) & (offs_p < P)
    a_rows = a_ptr + pid_n * stride_an
    a_rows += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)[:, None]
    w_rows = w_ptr + (pid_n * T + offs_t[None, :]) * C
    # Each warp sums a run of channels of its own, and reads no tile that another warp reads.
    offs_c = tl.arange(0, RUNS)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    a_ptrs = a_rows[None, :, :] + offs_c[:, None, :] * stride_ac
    w_ptrs = w_rows[None, :, :] + offs_c[:, :, None]
    sums = tl.zeros((RUNS, BLOCK_P, BLOCK_T), tl.float32)
    for start in tl.range(0, C, RUNS * BLOCK_C, num_stages=STAGES):
        mask_c = start + offs_c < C
        a = tl.load(a_ptrs, mask=mask_c[:, None, :] & mask_p[None, :, None], other=0.0)
        w = tl.load(w_ptrs, mask=mask_c[:, :, None] & mask_t[None, None, :], other=0.0)
        # Tensor cores cut off what float32 would round. A sum over all channels there would drift;
        # subtracted, the product of a tile cannot be merged into one.
        sums -= PRODUCT(a, -w)
        a_ptrs += RUNS * BLOCK_C * stride_ac
        w_ptrs += RUNS * BLOCK_C
    total = tl.sum(sums, axis=0)
    finite = tl.abs(total) < float("inf")
    if tl.min(tl.min(finite.to(tl.int32), axis=1), axis=0) == 0:
        # Pieces of what is not finite, or times it, need not sum to it: channel by channel.
        exact = tl.zeros((BLOCK_P, BLOCK_T), tl.float32)
        for c in range(0, C):
            a = tl.load(a_rows + c * stride_ac, mask=mask_p[:, None], other=0.0)
            exact += a.to(tl.float32) * tl.load(w_rows + c, mask=mask_t[None, :], other=0.0)
        total = tl.where(finite, total, exact)
    if RELU:
        total = rectified(total)
    out_ptrs = out_ptr + (pid_n * T + offs_t[None, :]) * P + offs_p[:, None]
    tl.store(out_ptrs, total, mask=mask_p[:, None] & mask_t[None, :])


@triton.jit
def pooled_spans_kernel(
    a_ptr,  # (N, C, h, w), any strides
    w_ptr,  # (N, T, C) float32, contiguous
    out_ptr,  # (N, T, spans, P) float32, contiguous
    T,
    C,
    P,
    cells,
    width,
    stride_an,
    stride_ac,
    stride_ah,
    stride_aw,
    FLAT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """This program computes what BLOCK_C channels add to `cells` cells, at most BLOCK_P, of all
    maps of one image.
    """
    pid, blocks = tl.program_id(0), tl.cdiv(P, cells)
    spans = tl.maximum(tl.cdiv(C, BLOCK_C), 1)
    pid_s, pid_n = pid // blocks % spans, (pid // blocks // spans).to(tl.int64)
    place = tl.arange(0, BLOCK_P)
    offs_p, offs_c = pid % blocks * cells + place, pid_s * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_p, mask_c = (place < cells) & (offs_p < P), offs_c < C
    a_ptrs = a_ptr + pid_n * stride_an + offs_c.to(tl.int64)[:, None] * stride_ac
    a_ptrs += cell_offsets(offs_p, width, stride_ah, stride_aw, FLAT)[None, :]
    a = tl.load(a_ptrs, mask=mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
    w_ptrs = w_ptr + pid_n * T * C + offs_c
    w = tl.load(w_ptrs, mask=mask_c, other=0.0)
    out_ptrs = out_ptr + (pid_n * T * spans + pid_s) * P + offs_p
    for _ in range(1, T):
        # The next weights are on their way before these are used.
        w_ptrs += C
        next_w = tl.load(w_ptrs, mask=mask_c, other=0.0)
        tl.store(out_ptrs, _map_of_tile(w, a, RELU), mask=mask_p)
        out_ptrs += spans * P
        w = next_w
    tl.store(out_ptrs, _map_of_tile(w, a, RELU), mask=mask_p)


@triton.jit
def _map_of_tile(w, a, RELU: tl.constexpr):
    maps = tl.sum(w[:, None] * a, axis=0)
    if RELU:
        maps = rectified(maps)
    return maps


@triton.jit
def cell_offsets(offs_p, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Where cell p = i w + j lies; one stride serves where rows follow each other."""
    if FLAT:
        return offs_p.to(tl.int64) * stride_w
    else:
        row, column = offs_p // width, offs_p % width
        return row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def rectified(x):
    """max(x, 0), and NaN where x is."""
    return tl.where(x < 0, 0.0, x)
