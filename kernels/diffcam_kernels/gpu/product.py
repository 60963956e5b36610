"""The product of a few float32 rows and a matrix in its own precision, with float32 results.

    out[r, e] = sum_d x[r, d] M[d, e] + shift[e]

M is W or its transpose: the largest operand of a head, so it is read once and never cast as a
whole. By its dtype and the number of rows:

- as few rows as `FEW_ROWS` says: `rows_product_kernel`. A program owns a block of columns, or a
  share of the sum too where columns alone are too few programs; shares are added afterwards.
- half precision, more rows: each row is scaled by a power of two and split into pieces of M's
  dtype, whose sum is the row up to float32's own precision. The library multiplies all pieces in
  one product with a float32 result, a long sum in chunks, and the results are added.
- float32, more rows: the library's product.

Bytes: M once, the rows for each block of columns, the result once. FLOP: 2 R D E.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffcam_kernels.gpu.launch import Launch, ceil_div, device_of, power_of_two

# Each row has an accumulator for each element of a tile: more rows are faster in the library.
FEW_ROWS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 1}
# Elements of a tile over 128 threads.
_TILE = 2048
# Programs for each processor: a program waits for its tile, and others load meanwhile.
_PROGRAMS = 8
# Pieces that hold the 24 bits of float32, or 22: float16 has 11 each, bfloat16 8.
_PIECES = {torch.float16: 2, torch.bfloat16: 3}
# A long sum is faster in chunks, and rounded less. The library reads rows fast that begin at a
# multiple of 16 bytes, so that chunks do, too.
_CHUNK, _ALIGNED = 6144, 8
_SPLIT_BLOCK, _JOIN_BLOCK = 2048, 1024


@triton.jit
def rows_product_kernel(
    x_ptr,  # (R, D) float32, contiguous
    m_ptr,  # (D, E) M, any strides
    shift_ptr,  # (E,) or None: 0
    out_ptr,  # (shares, R, E) float32, contiguous
    R,
    D,
    E,
    share,
    stride_md,
    stride_me,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """This program computes BLOCK_E columns of all rows, over one share of the sum."""
    pid, blocks = tl.program_id(0), tl.cdiv(E, BLOCK_E)
    offs_e, pid_s = pid % blocks * BLOCK_E + tl.arange(0, BLOCK_E), pid // blocks
    offs_r, offs_d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    mask_r, mask_e = offs_r < R, offs_e < E
    columns = m_ptr + offs_e[None, :].to(tl.int64) * stride_me
    total = tl.zeros((BLOCK_R, BLOCK_D, BLOCK_E), tl.float32)
    for start in tl.range(0, share, BLOCK_D, loop_unroll_factor=UNROLL):
        at = pid_s * share + start + offs_d
        mask_d = at < D
        m = tl.load(
            columns + at[:, None].to(tl.int64) * stride_md,
            mask=mask_d[:, None] & mask_e[None, :],
            other=0.0,
        )
        x_ptrs = x_ptr + offs_r[:, None].to(tl.int64) * D + at[None, :]
        x = tl.load(x_ptrs, mask=mask_r[:, None] & mask_d[None, :], other=0.0)
        total += x[:, :, None] * m.to(tl.float32)[None, :, :]
    out = tl.sum(total, axis=1)
    if shift_ptr is not None:
        out += tl.load(shift_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (pid_s * R + offs_r[:, None]).to(tl.int64) * E + offs_e[None, :]
    tl.store(out_ptrs, out, mask=mask_r[:, None] & mask_e[None, :])


@triton.jit
def split_kernel(
    x_ptr,  # (R, D) float32, contiguous
    pieces_ptr,  # (PIECES, R, D) half precision
    unscale_ptr,  # (R,) float32
    R,
    D,
    stride_pr,
    PIECES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """This program splits one row, scaled so that its largest value is between 2^14 and 2^15."""
    pid, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    largest = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        x = tl.load(x_ptr + pid * D + start + offs_d, mask=start + offs_d < D, other=0.0)
        # Infinity stays infinity under any scale, and NaN compares with nothing.
        largest = tl.maximum(largest, tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0))
    exponent = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.minimum(tl.maximum(14 - exponent, -126), 126)
    scale = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    tl.store(unscale_ptr + pid, ((127 - shift) << 23).to(tl.float32, bitcast=True))
    for start in range(0, D, BLOCK_D):
        mask_d = start + offs_d < D
        rest = tl.load(x_ptr + pid * D + start + offs_d, mask=mask_d, other=0.0) * scale
        for number in tl.static_range(PIECES):
            piece = rest.to(pieces_ptr.dtype.element_ty)
            pieces_row = pieces_ptr + (number * R + pid) * stride_pr
            tl.store(pieces_row + start + offs_d, piece, mask=mask_d)
            # Nothing is left of infinity, rather than inf - inf.
            left = rest - piece.to(tl.float32)
            rest = tl.where(tl.abs(rest) == float("inf"), 0.0, left)


@triton.jit
def join_kernel(
    y_ptr,  # (PARTS, R, E) float32, contiguous
    unscale_ptr,  # (R,) float32, or None: 1
    shift_ptr,  # (E,) or None: 0
    out_ptr,  # (R, E) float32, contiguous
    R,
    E,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """This program adds the parts of BLOCK_E columns of one row."""
    pid, blocks = tl.program_id(0), tl.cdiv(E, BLOCK_E)
    offs_e, pid_r = pid % blocks * BLOCK_E + tl.arange(0, BLOCK_E), (pid // blocks).to(tl.int64)
    mask_e = offs_e < E
    total = joined(y_ptr, unscale_ptr, pid_r, offs_e, mask_e, R, E, PARTS)
    if shift_ptr is not None:
        total += tl.load(shift_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    tl.store(out_ptr + pid_r * E + offs_e, total, mask=mask_e)


@triton.jit
def joined(y_ptr, unscale_ptr, pid_r, offs_e, mask_e, R, E, PARTS: tl.constexpr):
    """The sum of the parts of some columns of one row."""
    total = tl.zeros(offs_e.shape, tl.float32)
    # Of pieces, the smallest, which is the last one, first.
    for number in range(PARTS):
        y_row = y_ptr + ((PARTS - 1 - number) * R + pid_r) * E
        total += tl.load(y_row + offs_e, mask=mask_e, other=0.0)
    if unscale_ptr is not None:
        total *= tl.load(unscale_ptr + pid_r)
    return total


@dataclass(frozen=True)
class Parts:
    """A product as a sum that is yet to be added: out[r] = unscale[r] * sum_s y[s, r].

    Attributes:
        y: (S, R, E) float32.
        unscale: (R,) float32; None: 1.
    """

    y: Tensor
    unscale: Tensor | None = None


def multiply(x: Tensor, matrix: Tensor) -> Parts:
    """The product of x (R, D) float32, contiguous, and M (D, E), in parts."""
    r, d = x.shape
    if r <= FEW_ROWS.get(matrix.dtype, 0):
        y = x.new_empty((shares_of(matrix), r, matrix.shape[1]))
        plan_rows_product(x, matrix, None, y).run()
        return Parts(y)
    if matrix.dtype not in _PIECES:
        return Parts(torch.mm(x, matrix.to(torch.float32))[None])
    pieces, chunks = _PIECES[matrix.dtype], max(1, ceil_div(d, _CHUNK))
    length = ceil_div(d, chunks * _ALIGNED) * _ALIGNED
    split = x.new_empty((pieces, r, chunks * length), dtype=matrix.dtype)[:, :, :d]
    unscale = x.new_empty(r)
    plan_split(x, split, unscale).run()
    y = x.new_empty((chunks, pieces * r, matrix.shape[1]))
    for number in range(chunks):
        terms = slice(number * length, (number + 1) * length)
        _half_product(split.flatten(0, 1)[:, terms], matrix[terms], y[number])
    return Parts(y.view(chunks * pieces, r, matrix.shape[1]), unscale)


def fill_product(x: Tensor, matrix: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """Fills out (R, E), contiguous, from x (R, D) float32, contiguous, and M (D, E)."""
    few = len(x) <= FEW_ROWS.get(matrix.dtype, 0)
    if few and shares_of(matrix) == 1:
        plan_rows_product(x, matrix, shift, out[None]).run()
    elif few or matrix.dtype in _PIECES or shift is None:
        plan_join(multiply(x, matrix), shift, out).run()
    else:
        torch.addmm(shift.to(torch.float32), x, matrix.to(torch.float32), out=out)


def shares_of(matrix: Tensor) -> int:
    """Into how many shares a sum of few rows is split: as many as keep the device busy.

    Never where the sum runs along memory: a column is then a program's own run.
    """
    d, e = matrix.shape
    if _sums_along_memory(matrix):
        return 1
    block_d, block_e = _tile(matrix)
    wanted = _PROGRAMS * device_of(matrix).processors // max(1, ceil_div(e, block_e))
    # A share of fewer than four tiles is not worth another term of the last sum.
    return max(1, min(wanted, d // (4 * block_d)))


def _tile(matrix: Tensor) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_E): the axis that lies closest in memory takes 256 bytes or more of it."""
    d, e = (power_of_two(size) for size in matrix.shape)
    if not _sums_along_memory(matrix):
        block_e = min(e, 128)
        return min(_TILE // block_e, d), block_e
    # Every program reads all rows: the more columns it has for them the better, as long as there
    # are programs enough.
    many = matrix.shape[1] * 512 >= 4 * device_of(matrix).processors * _TILE
    block_d = min(d, 512 if many else 1024)
    return block_d, min(_TILE // block_d, e)


def _sums_along_memory(matrix: Tensor) -> bool:
    return matrix.stride(0) <= matrix.stride(1)


def plan_rows_product(x: Tensor, matrix: Tensor, shift: Tensor | None, out: Tensor) -> Launch:
    """The launch that fills out (shares, R, E) from x (R, D) and M (D, E)."""
    (r, d), e = x.shape, matrix.shape[1]
    block_r = power_of_two(r)
    block_d, block_e = _tile(matrix)
    return Launch(
        rows_product_kernel,
        (ceil_div(e, block_e) * len(out),),
        {
            **{"x_ptr": x, "m_ptr": matrix, "shift_ptr": shift, "out_ptr": out},
            **{"R": r, "D": d, "E": e, "share": ceil_div(ceil_div(d, block_d), len(out)) * block_d},
            **{"stride_md": matrix.stride(0), "stride_me": matrix.stride(1)},
        },
        {
            **{"BLOCK_R": block_r, "BLOCK_D": block_d, "BLOCK_E": block_e},
            # With few accumulators there is room for more loads in flight.
            "UNROLL": max(1, 4 // block_r),
        },
    )


def plan_split(x: Tensor, pieces: Tensor, unscale: Tensor) -> Launch:
    """The launch that fills pieces (pieces, R, D) and what undoes their scale, (R,)."""
    r, d = x.shape
    return Launch(
        split_kernel,
        (r,),
        {
            **{"x_ptr": x, "pieces_ptr": pieces, "unscale_ptr": unscale},
            **{"R": r, "D": d, "stride_pr": pieces.stride(1)},
        },
        {"PIECES": len(pieces), "BLOCK_D": min(_SPLIT_BLOCK, power_of_two(d))},
    )


def plan_join(parts: Parts, shift: Tensor | None, out: Tensor) -> Launch:
    """The launch that fills out (R, E)."""
    r, e = out.shape
    block_e = min(_JOIN_BLOCK, power_of_two(e))
    return Launch(
        join_kernel,
        (r * ceil_div(e, block_e),),
        {
            **{"y_ptr": parts.y, "unscale_ptr": parts.unscale, "shift_ptr": shift},
            **{"out_ptr": out, "R": r, "E": e},
        },
        {"PARTS": len(parts.y), "BLOCK_E": block_e},
    )


def _half_product(x: Tensor, matrix: Tensor, out: Tensor) -> None:
    """The float32 product of half-precision operands; PyTorch has it on CUDA only."""
    if x.device.type == "cuda":
        torch.mm(x, matrix, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.to(torch.float32), matrix.to(torch.float32), out=out)
