"""Matrix products on the tensor cores as good as float32's, where the second operand is float32.

What is not finite in an operand makes sums that are not finite, but not always the right ones: the
pieces of infinity are infinity and NaN.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _product_float32(a, w):
    return tl.dot(a, w, input_precision="tf32x3")


@triton.jit
def _product_float16(a, w):
    """Two pieces of 11 bits; the largest of a column is brought near 1 by a power of two."""
    largest = tl.max(tl.abs(w), axis=1)[:, None, :].to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(largest, 1), 253)
    scaled = w * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    high = scaled.to(tl.float16)
    low = ((scaled - high.to(tl.float32)) * 2048).to(tl.float16)
    sums = tl.dot(a, high, tl.dot(a, low) * (1 / 2048))
    return sums * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _product_tf32(a, w):
    """Two pieces of 11 bits, for what has no more of them, bfloat16 for one."""
    high = (w.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    wide = a.to(tl.float32)
    small = tl.dot(wide, w - high, input_precision="tf32")
    return tl.dot(wide, high, small, input_precision="tf32")


PRODUCTS = {
    torch.float32: _product_float32,
    torch.float16: _product_float16,
    torch.bfloat16: _product_tf32,
}
"""dtype of A -> the products a (B, M, K) w (B, K, N), w float32, as float32."""
