"""Read one image into 8-bit RGB, with bounds on bytes and pixels checked before decoding."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

MAX_PIXELS = 178_956_970
"""Default limit of pixels: where Pillow itself calls an image a decompression bomb."""

MAX_BYTES = 512 * 2**20
"""Default limit of the file's size in bytes."""

# Only decoders that are needed: others, EPS for one, start programs or read further files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

_TRUNCATED_WORDS = ("truncated", "unpack requires", "unexpected end", "not enough image data")
_UNSUPPORTED_WORDS = ("unsupported", "not supported", "unknown pixel mode", "cannot handle")
_PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 262, 0


class ImageError(ValueError):
    """What cannot be read as an image; the message is the reason, without the path."""


def read_image(
    path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Reads an image file as 8-bit RGB, turned upright by its EXIF orientation.

    Grey becomes three equal channels, transparency is composited on white, CMYK is converted
    without a colour profile, 16-bit values are scaled (65535 becomes 255), and of several frames
    the first counts. Wider ranges (32-bit, float) are taken as 0..1, 0..255 or 0..65535 where
    they fit one of these (float), and are stretched from their minimum to their maximum elsewhere.

    Args:
        path: A JPEG, PNG, WebP, BMP, TIFF or GIF file; the content decides, not the suffix.
        max_pixels: Larger images are refused from their header, before anything is decoded. To go
            above the default for TIFF and WebP, raise Pillow's ``Image.MAX_IMAGE_PIXELS`` too.
        max_bytes: Larger files are refused before they are opened.

    Returns:
        An image of mode ``RGB`` that no longer needs the file.

    Raises:
        ImageError: Whatever is wrong with the file, in a few plain words.
    """
    try:
        _check_file(Path(path), max_bytes)
        with open(path, "rb") as file:
            return _decode(file, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except PermissionError:
        raise ImageError("permission denied") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {_plain(error)}") from error


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """As `read_image`, of a file that is in memory already.

    Args:
        data: What the file holds.
        max_pixels: As `read_image` takes it.
        max_bytes: More are refused.

    Raises:
        ImageError: Whatever is wrong with the data, in a few plain words.
    """
    _check_length(len(data), max_bytes)
    return _decode(io.BytesIO(data), max_pixels)


def image_from_pixels(pixels: np.ndarray[Any, Any], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image that somebody else decoded, as 8-bit RGB; transparency is composited on white.

    Args:
        pixels: uint8 of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        max_pixels: Larger images are refused.

    Returns:
        An image of mode ``RGB``.

    Raises:
        ImageError: Another shape or type, or too many pixels.

    Example:
        >>> image_from_pixels(np.full((2, 3), 7, np.uint8)).getpixel((0, 0))
        (7, 7, 7)
    """
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1)
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))):
        raise ImageError(
            f"pixels are {pixels.dtype} of shape {pixels.shape}, expected uint8 (H, W), (H, W, 3)"
            " or (H, W, 4)"
        )
    height, width = pixels.shape[:2]
    _check_pixels((width, height), max_pixels)
    return _to_rgb(Image.fromarray(pixels.reshape(height, width) if grey else pixels))


def image_from_picture(image: Image.Image) -> Image.Image:
    """As `read_image`, of an image that Pillow opened: 8-bit RGB, upright, transparency on white.

    Args:
        image: Of any mode; it stays as it is.

    Raises:
        ImageError: Its file turns out to be damaged, or its values are not finite.
    """
    try:
        return _upright(_to_rgb(image))
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(f"{image.format or 'PIL'} image", error)) from error


def _check_file(path: Path, max_bytes: int) -> None:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        listed = os.access(path, os.R_OK | os.X_OK)
        raise ImageError("is a directory" if listed else "permission denied")
    # Opening a pipe would wait for its writer for ever.
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")
    _check_length(status.st_size, max_bytes)


def _check_length(length: int, max_bytes: int) -> None:
    if length == 0:
        raise ImageError("empty file")
    if length > max_bytes:
        raise ImageError(
            f"too large: {length / 2**20:.1f} MiB, the limit is {max_bytes / 2**20:.1f} MiB"
        )


def _decode(file: IO[bytes], max_pixels: int) -> Image.Image:
    kind = "image"
    try:
        image = _open(file)
        kind = f"{image.format} image"
        _check_pixels(image.size, max_pixels)
        image.load()
        return _upright(_to_rgb(image))
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("not enough memory to decode it") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: more pixels than Pillow allows ({_plain(error)})") from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, KeyError,
    # TypeError, EOFError, zlib.error and more on damaged data: all of them mean the same here.
    except Exception as error:
        raise ImageError(_reason(kind, error)) from error


def _open(file: IO[bytes]) -> ImageFile.ImageFile:
    """Reads the header with the first decoder that knows it.

    ``Image.open`` is not used: its limit of pixels is one global of the process, and it warns
    through the process-wide warning filters.
    """
    prefix = file.read(16)
    if any(name not in Image.OPEN for name in FORMATS):
        Image.preinit()
        Image.init()
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or accept is None or accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except (OSError, SyntaxError, ValueError, struct.error, LookupError, TypeError) as error:
            raise ImageError(_reason(f"{name} image", error)) from error
    raise ImageError(f"not an image (known kinds: {', '.join(FORMATS)})")


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"has no pixels: {width} x {height}")
    if width * height > max_pixels:
        raise ImageError(
            f"too large: {width} x {height} = {width * height / 1e6:.4g} Mpixel, "
            f"the limit is {max_pixels / 1e6:.4g} Mpixel"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # A damaged EXIF block says nothing against the pixels; every viewer shows such a file. What
    # Pillow raises on one is as varied as the damage.
    except Exception:  # noqa: BLE001
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        rgb = Image.alpha_composite(white, rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return _keep_exif(rgb, image)


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    # Pillow inverts every CMYK JPEG, as Adobe writes them; one without Adobe's marker is upright.
    if image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        upright = Image.merge("CMYK", [band.point(lambda v: 255 - v) for band in image.split()])
        return _keep_exif(upright.convert("RGB"), image)
    return _keep_exif(image.convert("RGB"), image)


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float grey to 8 bits; ``image.convert`` would clip it at 255."""
    values = np.asarray(image)
    if image.mode == "F":
        grey = _scale_wide(values, limits=(1.0, 255.0, 65535.0))
    else:
        grey = _scale_wide(values, limits=(65535.0,))
    if image.mode.startswith("I;16") and _white_is_zero(image):
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, np.uint8(255), grey)
    return _keep_exif(Image.fromarray(grey).convert("RGB"), image)


def _scale_wide(values: np.ndarray[Any, Any], *, limits: Sequence[float]) -> np.ndarray[Any, Any]:
    """Maps ``values`` to uint8 by the first limit that holds them, else from minimum to maximum."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ImageError("holds values that are not finite")
    if low >= 0:
        for limit in limits:
            if high <= limit:
                return np.rint(values * np.float32(255.0 / limit)).astype(np.uint8)
    span = high - low
    scaled = (values.astype(np.float64) - low) * (255.0 / span if span > 0 else 0.0)
    return np.rint(scaled).astype(np.uint8)


def _white_is_zero(image: Image.Image) -> bool:
    tags = getattr(image, "tag_v2", {})
    return bool(tags.get(_PHOTOMETRIC_TAG, 1) == _WHITE_IS_ZERO)


def _keep_exif(image: Image.Image, source: Image.Image) -> Image.Image:
    # Where a conversion goes through an array the EXIF block, and the orientation in it, is lost.
    if "exif" in source.info:
        image.info["exif"] = source.info["exif"]
    return image


def _reason(kind: str, error: Exception) -> str:
    """What a decoder's exception means, as far as its words tell."""
    message = _plain(error)
    if isinstance(error, EOFError | struct.error) or _has(message, _TRUNCATED_WORDS):
        return f"truncated {kind}"
    if _has(message, _UNSUPPORTED_WORDS):
        return f"unsupported {kind}: {message}"
    return f"damaged {kind}: {message}"


def _has(message: str, words: Sequence[str]) -> bool:
    return any(word in message.lower() for word in words)


def _plain(error: BaseException) -> str:
    """The message of ``error`` on one line, at most 160 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = " ".join(str(error).split()) or type(error).__name__
    return message[:160]
