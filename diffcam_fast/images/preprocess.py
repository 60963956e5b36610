"""From a photograph to the network's input, and back to the region that the network saw."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

# A resized image of more pixels than this is not made as a whole, only the crop of it: a strip of
# 1 x 100 million pixels would need gigabytes. Up to there torchvision's two steps are followed.
_MAX_RESIZED = 2**25


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side, crop the centre, normalise: what classifiers were trained with.

    Equal to torchvision's ``Resize`` + ``CenterCrop`` + ``ToTensor`` + ``Normalize`` on PIL images
    (antialiased), where the short side is resized to ``floor(size / crop_pct)``.

    Attributes:
        size: Height and width of the network's input in pixels.
        crop_pct: Side of the crop over side of the resized image, in (0, 1].
        interpolation: Filter of the resize.
        mean: Per channel, subtracted from values in 0..1.
        std: Per channel, divides afterwards.

    Example:
        >>> from PIL import Image
        >>> preprocess = Preprocess(size=(224, 224))
        >>> preprocess(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
        >>> preprocess.box((512, 256))
        (144.0, 16.0, 368.0, 240.0)
    """

    size: tuple[int, int]
    crop_pct: float = 0.875
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size is {self.size}; give (height, width), both at least 1")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; give a number in (0, 1]")
        if self.interpolation not in _RESAMPLING:
            known = ", ".join(_RESAMPLING)
            raise ValueError(f"interpolation is {self.interpolation!r}; known are {known}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean is {self.mean} and std is {self.std}; give 3 numbers each, std above 0"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """Prepares one image.

        Args:
            image: Of any size; a mode other than RGB is converted.

        Returns:
            Tensor (3, H, W), float32, normalised.
        """
        import torch

        values = self.pixels(image).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
        mean = torch.tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        return values.sub_(mean).div_(std)

    def pixels(self, image: Image.Image) -> Tensor:
        """The crop of one image that the network sees, before it is normalised.

        Args:
            image: Of any size; a mode other than RGB is converted.

        Returns:
            Tensor (H, W, 3), uint8.
        """
        import torch

        image = image if image.mode == "RGB" else image.convert("RGB")
        return torch.from_numpy(np.array(self._resize_and_crop(image)))

    def box(self, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The region that the network sees.

        Args:
            image_size: Width and height of the image, as ``image.size`` gives them.

        Returns:
            ``(left, top, right, bottom)`` in pixels of the image; fractions of a pixel occur.
        """
        width, height = image_size
        full_width, full_height = self._resized(width, height)
        left, top = self._corner(full_width, full_height)
        scale_x, scale_y = width / full_width, height / full_height
        return (
            left * scale_x,
            top * scale_y,
            min((left + self.size[1]) * scale_x, float(width)),
            min((top + self.size[0]) * scale_y, float(height)),
        )

    def view(self, image: Image.Image, max_side: int | None = None) -> Image.Image:
        """Cuts out the region that the network sees, in the image's own resolution.

        Args:
            image: The image as read.
            max_side: The result is made smaller where its longer side exceeds this.

        Returns:
            An RGB image with :meth:`box` as its frame; on it a heatmap of the network's input fits.
        """
        image = image if image.mode == "RGB" else image.convert("RGB")
        box = self.box(image.size)
        width, height = box[2] - box[0], box[3] - box[1]
        shrink = 1.0 if max_side is None else min(1.0, max_side / max(width, height))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        if size == (width, height) and box[0].is_integer() and box[1].is_integer():
            return image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
        return image.resize(size, Image.Resampling.BICUBIC, box=box)

    def with_size(self, size: tuple[int, int]) -> Preprocess:
        """The same preparation for another input size ``(height, width)``."""
        return dataclasses.replace(self, size=size)

    def _resize_and_crop(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        resampling = _RESAMPLING[self.interpolation]
        full_width, full_height = self._resized(*image.size)
        if full_width * full_height > _MAX_RESIZED:
            return image.resize((width, height), resampling, box=self.box(image.size))
        left, top = self._corner(full_width, full_height)
        resized = image.resize((full_width, full_height), resampling)
        return resized.crop((left, top, left + width, top + height))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the resized image, rounded as torchvision (square) or timm do."""
        # 1e-6: a crop_pct of 224 / 232 must give 232 again, not 231.
        target_h, target_w = (math.floor(side / self.crop_pct + 1e-6) for side in self.size)
        if target_h == target_w:
            if width <= height:
                return target_w, int(target_w * height / width)
            return int(target_h * width / height), target_h
        ratio = min(height / target_h, width / target_w)
        return max(round(width / ratio), self.size[1]), max(round(height / ratio), self.size[0])

    def _corner(self, full_width: int, full_height: int) -> tuple[int, int]:
        """Left and top of the centre crop; ``round`` as in torchvision's ``center_crop``."""
        height, width = self.size
        return round((full_width - width) / 2.0), round((full_height - height) / 2.0)


class AsItIs(Preprocess):
    """For a file that resizes and normalises itself: the whole picture, uint8 (H, W, 3)."""

    def __call__(self, image: Image.Image) -> Tensor:
        """The pixels of one image."""
        return self.pixels(image)

    def pixels(self, image: Image.Image) -> Tensor:
        """The pixels of one image."""
        import torch

        return torch.from_numpy(np.array(image.convert("RGB")))
