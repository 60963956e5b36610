"""JPEG files to stream, cut from the photographs that scikit-image and scikit-learn carry."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from diffcam_bench.rows import optional

_SKIMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
_SKLEARN = ("china.jpg", "flower.jpg")


@cache
def originals() -> tuple[Image.Image, ...]:
    """The photographs, RGB.

    Raises:
        click.ClickException: the packages are not installed.
    """
    skimage = Path(str(optional("skimage", distribution="scikit-image").__file__)).parent / "data"
    sklearn = Path(str(optional("sklearn.datasets", distribution="scikit-learn").__file__)).parent
    paths = [skimage / name for name in _SKIMAGE] + [sklearn / "images" / n for n in _SKLEARN]
    return tuple(Image.open(path).convert("RGB") for path in paths)


def cut_out(
    count: int, *, seed: int = 0, size: tuple[int, int] = (500, 375)
) -> Sequence[Image.Image]:
    """So many pictures of a size (width, height), no two alike: random parts of the photographs,
    some of them mirrored.
    """
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        picture = originals()[random.integers(len(originals()))]
        share = random.uniform(0.5, 1.0)
        scale = share * min(picture.width / size[0], picture.height / size[1])
        width, height = scale * size[0], scale * size[1]
        left = random.uniform(0, picture.width - width)
        top = random.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        part = picture.resize(size, Image.Resampling.BICUBIC, box=box)
        flip = random.random() < 0.5
        made.append(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part)
    return made


def write_jpegs(folder: Path, count: int, **options: int) -> list[Path]:
    """Writes them as JPEG files of quality 90; returns their paths."""
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for path, picture in zip(paths, cut_out(count, **options), strict=True):  # type: ignore[arg-type]
        picture.save(path, quality=90)
    return paths
