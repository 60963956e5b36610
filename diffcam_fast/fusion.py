"""Several maps into one: of several layers, or of several views of an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcam_kernels import ops

Fuse = Literal["mean", "max"]


def fuse(maps: Sequence[Tensor], how: Fuse) -> Tensor:
    """The mean or the largest of the maps of several layers, cell by cell.

    Layers differ in scale, so each map is brought to [0, 1] by its own minimum and maximum first,
    then to the size of the largest by bilinear interpolation.

    Args:
        maps: of each layer (N, T, h, w).
        how: `mean`, as pytorch-grad-cam has it, or `max`, as torch-cam.

    Returns:
        (N, T, h, w) in [0, 1], NaN where a map has it.

    Raises:
        ValueError: `how` is neither.
    """
    if how not in ("mean", "max"):
        raise ValueError(f"fuse must be 'mean' or 'max', got {how!r}")
    size = max((m.shape[2:] for m in maps), key=lambda shape: shape[0] * shape[1])
    resized = torch.stack([ops.heatmap(m, *size) for m in maps])
    return resized.mean(dim=0) if how == "mean" else resized.amax(dim=0)


@dataclass(frozen=True)
class Augment:
    """Views of each image whose maps are averaged: test-time augmentation.

    The classes that are explained are those of the image itself.

    Attributes:
        flip: mirror each view too.
        scales: by which height and width are multiplied; the model must take such sizes.
        factors: by which the pixel values are multiplied, as the `aug_smooth` of pytorch-grad-cam
            does with 0.9, 1 and 1.1.

    Raises:
        ValueError: no scale or factor, or one that is not positive.
    """

    flip: bool = True
    scales: tuple[float, ...] = (1.0,)
    factors: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("scales", "factors"):
            given = tuple(float(value) for value in getattr(self, name))
            if not given or not all(0 < value < float("inf") for value in given):
                raise ValueError(f"{name} must be positive numbers, one at least; got {given}")
            object.__setattr__(self, name, given)

    def views(self, images: Tensor) -> list[tuple[Tensor, bool]]:
        """The views of images (N, C, H, W), and whether they are mirrored; the first is the images
        themselves where that is one of them.
        """
        made: list[tuple[Tensor, bool]] = []
        for scale in sorted(self.scales, key=lambda s: s != 1):
            size = [max(1, round(side * scale)) for side in images.shape[2:]]
            scaled = images
            if scale != 1:
                scaled = F.interpolate(images, size, mode="bilinear", antialias=scale < 1)
            for mirrored in (False, True) if self.flip else (False,):
                view = scaled.flip(3) if mirrored else scaled
                for factor in self.factors:
                    made.append((view if factor == 1 else view * factor, mirrored))
        return made

    def averaged(self, images: Tensor, explain: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean of the maps (N, T, h, w) that `explain` makes of the views, in their place."""
        total: list[Tensor] = []
        for view, mirrored in self.views(images):
            maps = explain(view)
            maps = maps.flip(3) if mirrored else maps
            if total and maps.shape != total[0].shape:
                maps = F.interpolate(maps, total[0].shape[2:], mode="bilinear", align_corners=False)
            total.append(maps)
        return torch.stack(total).mean(dim=0)
