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
def _product_half(a, w):
    """Two pieces of 11 bits, for what has no more of them.

    Pieces in float16 would have to be scaled, which takes longer than it saves.
    """
    high = (w.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    wide = a.to(tl.float32)
    small = tl.dot(wide, w - high, input_precision="tf32")
    return tl.dot(wide, high, small, input_precision="tf32")


PRODUCTS = {
    torch.float32: _product_float32,
    torch.float16: _product_half,
    torch.bfloat16: _product_half,
}
"""dtype of A -> the products a (B, M, K) w (B, K, N), w float32, as float32."""
