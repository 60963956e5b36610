"""What each operator must at least move and compute, as a function of its shapes.

Bytes count every operand once and every result once: what no implementation can save. FLOP count a
multiplication and an addition as two, an exponential as one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The work of one call.

    Attributes:
        bytes: over the device's memory.
        flops: floating-point operations.
    """

    bytes: int
    flops: int

    def floor_seconds(self, bandwidth: float, rate: float = float("inf")) -> float:
        """The least time it can take.

        Args:
            bandwidth: of the memory, in bytes a second.
            rate: of the arithmetic, in FLOP a second.
        """
        return max(self.bytes / bandwidth, self.flops / rate)


# Results that are always float32, targets that are always int64.
_RESULT, _TARGET = 4, 8


def contrast_gradient(n: int, t: int, k: int, itemsize: int) -> Cost:
    """Logits (N, K) to d (N, T, K), targets and scores."""
    return Cost(n * k * itemsize + n * t * (k * _RESULT + _TARGET + _RESULT), 8 * n * t * k)


def contrast_channel_weights(n: int, t: int, k: int, c: int, itemsize: int) -> Cost:
    """Logits (N, K) and W (K, C) to w (N, T, C), targets and scores.

    All targets of an image contrast with all other classes, and so share its product with W.
    """
    read = (n * k + k * c) * itemsize
    return Cost(read + n * t * (c * _RESULT + _TARGET + _RESULT), _shared_flops(n, t, k, c))


def _shared_flops(n: int, t: int, k: int, c: int) -> int:
    """The exponentials of an image, their product with W, and what each target has to correct."""
    return 8 * n * k + 2 * n * k * c + 2 * n * t * t * c


def pooled_cam(n: int, t: int, c: int, p: int, itemsize: int) -> Cost:
    """A (N, C, P) and w (N, T, C) to maps (N, T, P)."""
    return Cost(n * c * p * itemsize + n * t * (c + p) * _RESULT, 2 * n * t * c * p)


def head_cam(n: int, t: int, c: int, p: int, k: int, itemsize: int) -> Cost:
    """A (N, C, P) and W (K, C) to maps (N, T, P), logits, targets and scores.

    Targets share a product as in `contrast_channel_weights`.
    """
    read = (n * c * p + k * c + k) * itemsize
    written = n * k * _RESULT + n * t * (p * _RESULT + _TARGET + _RESULT)
    weights = 2 * n * k * c + _shared_flops(n, t, k, c)
    return Cost(read + written, n * c * p + weights + 2 * n * t * c * p)


_GRADIENT_FLOPS = {"layer_cam": 3, "hires_cam": 2, "grad_cam": 4, "xgrad_cam": 6, "grad_cam_pp": 10}


def gradient_cam(n: int, t: int, c: int, p: int, itemsize: int, reduction: str) -> Cost:
    """A (N, C, P) and G (N, T, C, P) to maps (N, T, P)."""
    moved = (n * c * p + n * t * c * p) * itemsize + n * t * p * _RESULT
    return Cost(moved, _GRADIENT_FLOPS[reduction] * n * t * c * p)


def eigen_cam(n: int, c: int, p: int, itemsize: int) -> Cost:
    """A (N, C, P) to maps (N, P), by the Gram matrix of the smaller side and up to 24 squarings."""
    side = min(c, p)
    return Cost(n * c * p * itemsize + n * p * _RESULT, 2 * n * c * p * side + 48 * n * side**3)


def heatmap(n: int, t: int, p: int, height: int, width: int, itemsize: int) -> Cost:
    """Maps (N, T, P) to heatmaps (N, T, H, W) of some item size."""
    return Cost(n * t * (p * _RESULT + height * width * itemsize), 20 * n * t * height * width)


def overlay(n: int, t: int, p: int, height: int, width: int) -> Cost:
    """Maps (N, T, P) and images (N, H, W, 3) to overlays (N, T, H, W, 3)."""
    pixels = height * width
    return Cost(n * t * p * _RESULT + (n + n * t) * pixels * 3, 30 * n * t * pixels)


def preprocess(n: int, channels: int, height: int, width: int, itemsize: int) -> Cost:
    """Pictures (N, H, W, C) uint8 to (N, C, H, W) of some item size."""
    values = n * channels * height * width
    return Cost(values * (1 + itemsize), 2 * values)
