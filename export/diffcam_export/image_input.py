"""How an explained file takes images."""

from dataclasses import dataclass

import onnxruntime as ort
import torch
from torch import Tensor

from diffcam_export.images import channels_last

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}


@dataclass(frozen=True)
class ImageInput:
    """The images as an explained file takes them.

    Attributes:
        name: of the graph's input.
        dtype: of its elements; uint8 where preprocessing is baked in.
        batch: the only batch size, or None.
        size: height and width in pixels, each None where any will do.
        channels: C, or None where the file does not say.
        channels_last: it is (N, H, W, C), as TensorFlow has it.
    """

    name: str
    dtype: torch.dtype
    batch: int | None
    size: tuple[int | None, int | None]
    channels: int | None
    channels_last: bool

    @classmethod
    def of(cls, session: ort.InferenceSession, name: str, *, path: object) -> "ImageInput":
        """The input of this name.

        Args:
            session: of the file.
            name: of its image input.
            path: of the file, for messages.

        Raises:
            ValueError: there is none, or it holds no images.
        """
        value = next((v for v in session.get_inputs() if v.name == name), None)
        if value is None or len(value.shape) != 4 or value.type not in _DTYPES:
            what = "is missing" if value is None else f"is {value.type} {value.shape}"
            raise ValueError(
                f"the input {name!r} of {path} {what}; expected images (N, C, H, W) of "
                f"{', '.join(_DTYPES)}"
            )
        batch, *rest = (size if isinstance(size, int) else None for size in value.shape)
        last = channels_last(value.shape)
        height, width, channels = rest if last else (rest[1], rest[2], rest[0])
        return cls(
            name=value.name,
            dtype=_DTYPES[value.type],
            batch=batch,
            size=(height, width),
            channels=channels,
            channels_last=last,
        )

    def arranged(self, images: Tensor) -> Tensor:
        """Images with their axes as the file has them.

        Args:
            images: uint8 (N, H, W, 3) as they are; else (N, C, H, W), or (N, H, W, C) where the
                file takes those and only these channels fit.
        """
        if not self.channels_last or self.dtype == torch.uint8:
            return images
        as_it_is = images.shape[3] == self.channels and images.shape[1] != self.channels
        return images if as_it_is else images.permute(0, 2, 3, 1)

    def sides(self, images: Tensor) -> tuple[int, int, int]:
        """Height, width and channels of images that are arranged as the file has them."""
        if self.channels_last:
            height, width, channels = images.shape[1:]
        else:
            channels, height, width = images.shape[1:]
        return height, width, channels
