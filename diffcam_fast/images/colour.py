"""Colour heatmaps and put them on, or beside, the image."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

MID_GREY = 128
"""What stands for a value that is not a number, as in `diffcam_kernels.reference`."""


def colour_map(heatmap: ArrayLike, cmap: str = "turbo") -> NDArray[np.uint8]:
    """Colours a heatmap.

    Args:
        heatmap: Floats (..., H, W) in [0, 1]; values outside are clamped.
        cmap: Name of a matplotlib colour map.

    Returns:
        RGB (..., H, W, 3), the very bytes that matplotlib gives; NaN becomes mid grey.

    Raises:
        ValueError: No colour map has that name.

    Example:
        >>> colour_map([[0.0, 1.0]], "gray").tolist()
        [[[0, 0, 0], [255, 255, 255]]]
    """
    values = np.asarray(heatmap, dtype=np.float32)
    missing = np.isnan(values)
    # 256 bins of equal width, as matplotlib: 1.0 itself belongs to the last.
    index = np.clip(np.where(missing, 0, values) * 256, 0, 255).astype(np.uint8)
    colours: NDArray[np.uint8] = colour_table(cmap)[index]
    colours[missing] = MID_GREY
    return colours


def blend(
    images: ArrayLike, heatmaps: ArrayLike, *, alpha: float = 0.5, cmap: str = "turbo"
) -> NDArray[np.uint8]:
    """Lays coloured heatmaps over images.

    Args:
        images: uint8 (..., H, W, 3).
        heatmaps: Floats (..., H, W) in [0, 1]; leading axes broadcast against those of ``images``.
        alpha: Share of the heatmap, 0 (image only) to 1 (colours only).
        cmap: Name of a matplotlib colour map.

    Returns:
        uint8 (..., H, W, 3).

    Raises:
        ValueError: ``alpha`` is outside [0, 1], sizes differ, or the colour map is unknown.
        TypeError: ``images`` is not uint8.
    """
    pixels, heat = np.asarray(images), np.asarray(heatmaps)
    whole = alpha_share(alpha)
    if pixels.dtype != np.uint8:
        raise TypeError(f"images are {pixels.dtype}; give uint8 values from 0 to 255")
    if pixels.ndim < 3 or pixels.shape[-1] != 3 or pixels.shape[-3:-1] != heat.shape[-2:]:
        raise ValueError(
            f"images are {pixels.shape} and heatmaps {heat.shape}; "
            "give images (..., H, W, 3) and heatmaps (..., H, W) of the same H and W"
        )
    # In integers of 1/256: exact, and a quarter of the memory that floats would take.
    share = np.uint32(whole)
    mixed: NDArray[np.uint32] = pixels * (np.uint32(256) - share) + colour_map(heat, cmap) * share
    return ((mixed + 128) >> 8).astype(np.uint8)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Puts two images of any size beside each other, the second at the height of the first."""
    if right.height != left.height:
        width = max(1, round(right.width * left.height / right.height))
        right = right.resize((width, left.height), Image.Resampling.BICUBIC)
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def alpha_share(alpha: float) -> int:
    """The weight of the colours in 256ths, 0 to 256.

    Raises:
        ValueError: ``alpha`` is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give a number from 0 (image) to 1 (heatmap)")
    return round(alpha * 256)


@lru_cache(maxsize=16)
def colour_table(cmap: str) -> NDArray[np.uint8]:
    """The 256 colours of a colour map, uint8 (256, 3), not to be written.

    Raises:
        ValueError: No colour map has that name.
    """
    # Imported here: matplotlib takes long, and only pictures need it.
    import matplotlib

    if cmap not in matplotlib.colormaps:
        raise ValueError(
            f"colour map {cmap!r} is unknown; "
            "use one of matplotlib's, such as turbo, viridis, inferno, jet or gray"
        )
    table: Any = matplotlib.colormaps[cmap](np.linspace(0.0, 1.0, 256), bytes=True)
    colours = np.array(table[:, :3], dtype=np.uint8)
    colours.flags.writeable = False
    return colours
