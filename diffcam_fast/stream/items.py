"""From whatever a source yields to images: what one is called, and how its pixels are had."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffcam_fast.images.read import decode_image, image_from_picture, read_image

if TYPE_CHECKING:
    from diffcam_fast.images.preprocess import Preprocess

# Under these names datasets keep their images: Hugging Face, WebDataset, video readers.
_IMAGE_KEYS = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "bmp", "data", "bytes")
_NAME_KEYS = ("__key__", "path", "file_name", "id", "pts")


class Flush:
    """What a source yields when it has nothing for the moment: see `FLUSH`."""

    def __repr__(self) -> str:
        return "FLUSH"


FLUSH = Flush()
"""A source that waits for images to come yields this, so that those before are explained now."""


@dataclass(frozen=True)
class Pixels:
    """An image as a stream holds it.

    Attributes:
        values: float (C, H, W), as the network takes it; or uint8 (H, W, 3), a picture that is
            normalised on the network's device, or in an ONNX file.
        picture: the region that the network sees, for people; None where it was not asked for, or
            where the image came as the network takes it.
    """

    values: Tensor
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        key: what the caller knows it by.
        load: reads and prepares it; raises whatever is wrong with it.
    """

    key: Any
    load: Callable[[], Pixels]


@dataclass(frozen=True)
class Preparation:
    """How pictures become what the network takes.

    Attributes:
        preprocess: from a picture to the network's input; None: everything is prepared already.
        raw: leave the normalisation to the network's device.
        picture: longest side of the picture for people, in pixels; None: it is not wanted.
    """

    preprocess: Preprocess | None = None
    raw: bool = False
    picture: int | None = None

    def of(self, image: Image.Image) -> Pixels:
        """Prepares a picture."""
        assert self.preprocess is not None
        values = self.preprocess.pixels(image) if self.raw else self.preprocess(image)
        side = self.picture
        return Pixels(values, None if side is None else self.preprocess.view(image, side))

    def of_file(self, path: str | os.PathLike[str]) -> Pixels:
        """Reads and prepares a file."""
        return self.of(read_image(path))

    def of_bytes(self, data: bytes) -> Pixels:
        """Decodes and prepares the content of a file."""
        return self.of(decode_image(data))


@dataclass(frozen=True)
class _Broken:
    """A sample that its dataset raised at."""

    error: Exception

    def load(self) -> Pixels:
        raise self.error


def samples(source: Any) -> Iterator[Any]:
    """The samples of a source, one after another.

    A dataset of PyTorch that is read by index ends with its length, and goes on behind a sample
    that it raises at; an iterator that raised is over.
    """
    if hasattr(source, "__iter__"):
        yield from source
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        for index in range(len(source)):
            try:
                sample = source[index]
            except Exception as error:  # noqa: BLE001 - one strange sample must not stop the others
                sample = _Broken(error)
            yield sample
    else:
        raise TypeError(
            f"a source must be iterable, or a dataset with a length; got {type(source).__name__}"
        )


def images_of(sample: Any, preparation: Preparation, index: int) -> Iterator[Item | Flush]:
    """The images in one sample.

    Args:
        sample: a path; bytes of an image file; a picture, PIL or uint8 (H, W, 3), (H, W) or a
            tensor (3, H, W); a prepared image, float (C, H, W); a batch of either, with one axis
            more; or one of them in a tuple beside its label, or in a mapping under one of the usual
            names.
        preparation: for pictures.
        index: of the first of its images in the source; the key, where the sample has no other.

    Raises:
        TypeError: it is nothing of the kind.
        ValueError: a mapping without an image, an array of another shape, or a picture where
            nothing tells how it is prepared.
    """
    if isinstance(sample, Flush):
        yield sample
        return
    if isinstance(sample, _Broken):
        yield Item(index, sample.load)
        return
    image, key = _image_and_key(sample, index)
    if isinstance(image, list):
        for offset, one in enumerate(image):
            name = key[offset] if isinstance(key, list) else index + offset
            yield from images_of((one,), preparation, name)
        return
    if isinstance(image, np.ndarray):
        # PyTorch takes no strides below 0, and warns of arrays that are not to be written.
        image = np.ascontiguousarray(image)
        image = torch.from_numpy(image if image.flags.writeable else image.copy())
    if isinstance(image, Tensor) and image.ndim == 4:
        for offset, one in enumerate(image):
            yield _item(one, index + offset if key == index else (key, offset), preparation)
    else:
        yield _item(image, key, preparation)


def _image_and_key(sample: Any, index: int) -> tuple[Any, Any]:
    if isinstance(sample, Mapping):
        if (
            sample.get("bytes") is None
            and isinstance(sample.get("path"), str)
            and "bytes" in sample
        ):
            # As Hugging Face has an image that it did not read.
            return sample["path"], sample["path"]
        name = next((key for key in _IMAGE_KEYS if sample.get(key) is not None), None)
        if name is None:
            raise ValueError(
                f"a sample has {', '.join(map(str, sample))}, and no image under one of "
                f"{', '.join(_IMAGE_KEYS)}; map it to the image itself, or to (image, label)"
            )
        key = next((sample[key] for key in _NAME_KEYS if sample.get(key) is not None), index)
        if isinstance(sample[name], list):
            # A batch, as Hugging Face makes them.
            return sample[name], key if isinstance(key, list) else index
        image, inner = _image_and_key(sample[name], index)
        return image, key if inner == index else inner
    if isinstance(sample, list) and len(sample) > 1 and _are_images(sample):
        return sample, index
    if isinstance(sample, tuple | list):
        if not sample:
            raise ValueError("a sample is empty; give the image, or (image, label)")
        return _image_and_key(sample[0], index)
    if isinstance(sample, str | os.PathLike):
        return sample, sample
    return sample, index


def _are_images(sample: list[Any]) -> bool:
    """Whether a list is a batch: an image and its label are two kinds of things."""
    return all(isinstance(one, Image.Image) for one in sample) or all(
        isinstance(one, bytes) for one in sample
    )


def _item(image: Any, key: Any, preparation: Preparation) -> Item:
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3:
            raise ValueError(
                f"a prepared image must be (C, H, W), or (N, C, H, W), got {tuple(image.shape)}"
            )
        return Item(key, lambda: Pixels(image.detach()))
    load = _loader(image, preparation)
    if preparation.preprocess is None:
        raise ValueError(
            f"{_named(image)} is no prepared image, float (C, H, W), and nothing tells how it "
            "becomes one; give preprocess="
        )
    return Item(key, load)


def _loader(image: Any, preparation: Preparation) -> Callable[[], Pixels]:
    if isinstance(image, str | os.PathLike):
        return lambda: preparation.of_file(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return lambda: preparation.of_bytes(bytes(image))
    if isinstance(image, Image.Image):
        # As the file that it may have been read from: upright, on white, 8 bits.
        return lambda: preparation.of(image_from_picture(image))
    if isinstance(image, Tensor) and image.dtype == torch.uint8:
        array = _picture(image)
        return lambda: preparation.of(Image.fromarray(array))
    raise TypeError(
        f"{_named(image)} is no image; a source may hold paths, bytes of image files, PIL images, "
        "uint8 arrays (H, W, 3), float tensors (C, H, W), batches of them, tuples that begin with "
        "one, or mappings that name one"
    )


def _picture(image: Tensor) -> np.ndarray[Any, Any]:
    """uint8 (H, W, 3) or (H, W) of a picture with its channels first or last."""
    shape: Sequence[int] = tuple(image.shape)
    if image.ndim == 3 and shape[2] not in (1, 3) and shape[0] in (1, 3):
        image = image.permute(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
        raise ValueError(f"a picture must be uint8 (H, W, 3), (3, H, W) or (H, W), got {shape}")
    array: np.ndarray[Any, Any] = image.cpu().numpy()
    return array


def _named(image: Any) -> str:
    if isinstance(image, Tensor):
        return f"a tensor {image.dtype} {tuple(image.shape)}"
    return f"{type(image).__name__} {str(image)[:60]!r}"
