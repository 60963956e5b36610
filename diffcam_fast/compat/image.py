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
    colormap: str = "jet",
    image_weight: float = 0.5,
) -> np.ndarray:
    """A heatmap blended over a picture, brightened until its largest value is white.

    Args:
        img: (H, W, 3) float in [0, 1].
        mask: heatmap (H, W) in [0, 1].
        use_rgb: the picture is RGB; otherwise the colours are written as BGR, as by OpenCV.
        colormap: name of a matplotlib colour map, in place of OpenCV's number; of `jet` theirs and
            matplotlib's differ by 34 of 255 at most.
        image_weight: of the picture, in [0, 1].

    Returns:
        uint8 (H, W, 3).

    Raises:
        ValueError: the picture leaves [0, 1], or the weight does.
    """
    if np.max(img) > 1:
        raise ValueError(f"the picture must be float in [0, 1], got up to {np.max(img):.3g}")
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight must be in [0, 1], got {image_weight}")
    levels = np.uint8(255 * np.asarray(mask))
    colours = np.asarray(matplotlib.colormaps[colormap](levels), np.float32)[..., :3]
    if not use_rgb:
        colours = colours[..., ::-1]
    blended = (1 - image_weight) * colours + image_weight * img
    return np.asarray(255 * (blended / np.max(blended))).astype(np.uint8)


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
    blended = alpha * np.asarray(img.convert("RGB")) + (1 - alpha) * colours
    return Image.fromarray(blended.astype(np.uint8))
