"""Pictures as pytorch-grad-cam and torch-cam make them, without OpenCV."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.colors import Colormap
from PIL import Image
from torch import Tensor


def show_cam_on_image(
    img: np.ndarray,
    mask: np.ndarray,
    use_rgb: bool = False,
    colormap: str | int = "jet",
    image_weight: float = 0.5,
) -> np.ndarray:
    """A heatmap blended over a picture, brightened until its largest value is white.

    Args:
        img: (H, W, 3) float in [0, 1].
        mask: heatmap (H, W) in [0, 1].
        use_rgb: the picture is RGB; otherwise the colours are written as BGR, as by OpenCV.
        colormap: OpenCV's number of a colour map, or the name of one of matplotlib. `jet` is
            OpenCV's, to 1 of 255, from which matplotlib's own is 34 of 255 away at most; of
            numbers, `hsv` (9) is 24 away, `pink` (10) 30, `hot` (11) 51, the others 1.
        image_weight: of the picture, in [0, 1].

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the picture leaves [0, 1], or the weight does, or a number of a colour map that
            matplotlib does not have.
    """
    if np.max(img) > 1:
        raise ValueError(f"the picture must be float in [0, 1], got up to {np.max(img):.3g}")
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight must be in [0, 1], got {image_weight}")
    colours = _colours((255 * np.asarray(mask)).astype(np.uint8), colormap)
    if not use_rgb:
        colours = colours[..., ::-1]
    blended = (1 - image_weight) * colours + image_weight * img
    return np.asarray(255 * (blended / np.max(blended))).astype(np.uint8)


# OpenCV's number of a colour map -> its name in matplotlib, where both have it.
_OPENCV = {
    0: "autumn",
    1: "bone",
    2: "jet",
    3: "winter",
    6: "summer",
    7: "spring",
    8: "cool",
    9: "hsv",
    10: "pink",
    11: "hot",
    13: "magma",
    14: "inferno",
    15: "plasma",
    16: "viridis",
    17: "cividis",
    20: "turbo",
}


def _colours(levels: np.ndarray, colormap: str | int) -> np.ndarray:
    """RGB (H, W, 3) float32 in [0, 1] of levels (H, W) uint8."""
    name = _OPENCV.get(colormap) if isinstance(colormap, int) else colormap
    if name is None:
        raise ValueError(
            f"matplotlib does not have OpenCV's colour map {colormap}; give one of "
            f"{', '.join(f'{number} ({name})' for number, name in _OPENCV.items())}, or a name"
        )
    if name == "jet":
        # OpenCV's is MATLAB's, whose ramps and plateaus are all of one length.
        ramps = np.abs(4 * levels.astype(np.float32)[..., None] / 255 - np.array([3, 2, 1]))
        colours: np.ndarray = np.clip(1.5 - ramps, 0, 1).astype(np.float32)
        return colours
    return np.asarray(matplotlib.colormaps[name](levels), np.float32)[..., :3]


def preprocess_image(
    img: np.ndarray, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5)
) -> Tensor:
    """A picture (H, W, 3), uint8 or float in [0, 1], normalised, as (1, 3, H, W).

    The defaults are those of pytorch-grad-cam, not the statistics of ImageNet.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(img.transpose(2, 0, 1)))
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
    shift, scale = (torch.tensor(list(v), dtype=pixels.dtype)[:, None, None] for v in (mean, std))
    return ((pixels - shift) / scale)[None]


def overlay_mask(
    img: Image.Image,
    mask: Image.Image,
    colormap: str | Colormap = "jet",
    alpha: float = 0.7,
) -> Image.Image:
    """A heatmap blended over a picture, as torch-cam does: resized bicubically and squared first.

    Args:
        img: the picture, grey or RGB.
        mask: heatmap in [0, 1], of mode F.
        colormap: a matplotlib colour map, or its name.
        alpha: the weight of the picture, in [0, 1).

    Raises:
        TypeError: no pictures.
        ValueError: an alpha out of range.
    """
    if not isinstance(img, Image.Image) or not isinstance(mask, Image.Image):
        raise TypeError(
            "img and mask arguments need to be PIL.Image, got "
            f"{type(img).__name__} and {type(mask).__name__}"
        )
    if not isinstance(alpha, float) or not 0 <= alpha < 1:
        raise ValueError(
            f"alpha argument is expected to be of type float between 0 and 1, got {alpha!r}"
        )
    if len(img.getbands()) not in (1, 3):
        raise ValueError(f"img argument needs to be a grayscale or RGB image, got {img.mode}")
    resized = np.asarray(mask.resize(img.size, resample=Image.Resampling.BICUBIC))
    colours = matplotlib.colormaps.get_cmap(colormap)(resized**2, bytes=True)[:, :, :3]
    # Of a palette or another colour space torch-cam takes the numbers as they are.
    bands = np.asarray(img)
    picture = bands if bands.ndim == 3 else bands[..., None].repeat(3, axis=-1)
    blended = alpha * picture + (1 - alpha) * colours
    return Image.fromarray(blended.astype(np.uint8))
