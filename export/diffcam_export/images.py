"""Which axes of a model's image input are height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def channels_last(shape: Sequence[object]) -> bool:
    """Whether an input of these four sizes is (N, H, W, C), as TensorFlow has it.

    Args:
        shape: of the input; a size that is free is anything but a number.

    Example:
        >>> channels_last(["N", 224, 224, 3]), channels_last(["N", 3, "H", "W"])
        (True, False)
    """
    # Three channels or one stand last and not first in models that TensorFlow made.
    return shape[3] in (1, 3) and shape[1] not in (1, 3)


def image_axes(images: ir.Value) -> tuple[int, int, int]:
    """The axes of channels, height and width of an input; (N, C, H, W) where nothing is known."""
    shape = list(images.shape or ())
    last = len(shape) == 4 and channels_last(shape)
    return (3, 1, 2) if last else (1, 2, 3)
