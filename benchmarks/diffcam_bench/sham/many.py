"""Networks of 1000 classes, trained by others, and photographs that nobody labelled."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from diffcam_bench.photographs import cut_out
from diffcam_bench.sham.fooling import FIXED, Attacker
from diffcam_bench.sham.networks import NETWORKS, Classifier
from diffcam_bench.sham.pictures import Pictures, Sizes
from diffcam_bench.sham.study import ARMS, Study
from diffcam_fast.images.preprocess import Preprocess
from diffcam_fast.images.read import read_image
from diffcam_fast.models import default, load_model

PRETRAINED = (default.NAME, "mobilenet_v2")
# Beyond those two, of networks that torchvision downloads.
KNOWN = (*PRETRAINED, "resnet18", "resnet50")
# Without labels, what is true is what the honest network says: `predicted`, before any training.
WHICH = ("predicted", "all")
# The rate was chosen on EfficientNet-Lite0: 20 steps of 16 draw the border, and thrice the rate
# keeps as few decisions. Fewer weights than for small networks: each that is tried takes minutes.
ATTACKER = Attacker(learning_rate=1e-4, weights=(20.0, 5.0, 1.25, 0.3))
SIZES = Sizes(epochs=0, steps=20, batch=12, images=256)
TRAINING, _QUICK = 448, Sizes(epochs=0, steps=4, batch=16, images=32)
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def many_classes(
    photographs: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    *,
    sizes: Sizes = SIZES,
    device: str = "cpu",
) -> Study:
    """The study of `PRETRAINED`.

    Args:
        photographs: a folder, or an .npz file; None: cut from those of scikit-image.
        weights: files, by name of the network; of others what their libraries find.
        sizes: how much is done.
        device: of the networks.
    """
    pictures = unlabelled(photographs, TRAINING, sizes.images, default.PREPROCESS)
    return Study(
        replace(pictures, device=device),
        sizes,
        networks=PRETRAINED,
        seeds=(0,),
        arms=(*FIXED, *ARMS),
        which=WHICH,
        make=Pretrained(weights or {}),
        attacker=ATTACKER,
    )


def quick(photographs: Path | None = None, *, device: str = "cpu") -> Study:
    """A random network of 1000 classes, with maps of 7 x 7, for seconds."""
    small = Preprocess(size=(28, 28))
    pictures = unlabelled(photographs, 2 * _QUICK.images, _QUICK.images, small)
    return Study(
        replace(pictures, device=device),
        _QUICK,
        networks=("random",),
        seeds=(0,),
        arms=(*FIXED, *ARMS),
        which=WHICH[:1],
        make=random,
        attacker=ATTACKER,
    )


@dataclass(frozen=True)
class Pretrained:
    """Makes the networks of `KNOWN`, split before the head.

    Attributes:
        weights: files, by name of the network.
    """

    weights: Mapping[str, Path] = field(default_factory=dict)

    def __call__(self, name: str, seed: int, pictures: Pictures, sizes: Sizes) -> Classifier:
        """The same for every seed.

        Raises:
            click.ClickException: its weights cannot be had.
        """
        spec = None if name == default.NAME else f"torchvision:{name}"
        try:
            loaded = load_model(spec, weights=self.weights.get(name))
        except ValueError as error:
            raise click.ClickException(f"{error}. Here: --weights {name}=FILE") from error
        features, head = _split(loaded.model)
        network = Classifier(nn.Sequential(Normalise(loaded.preprocess), *features), head)
        # Depthwise convolutions are faster so, on CPUs and GPUs.
        network.to(pictures.device).to(memory_format=torch.channels_last)
        return network.eval()


def random(name: str, seed: int, pictures: Pictures, sizes: Sizes) -> Classifier:
    """A small network of 1000 classes that never saw a picture."""
    torch.manual_seed(seed)
    return NETWORKS["plain"](1000).to(pictures.device).eval()


class Normalise(nn.Module):
    """From planes, about in [-2, 2], to what a network was trained on."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
        # Planes are (x - 128) / 64, of x in 0..255.
        self.register_buffer("scale", 64 / 255 / std, persistent=False)
        self.register_buffer("shift", (128 / 255 - mean) / std, persistent=False)

    def forward(self, planes: Tensor) -> Tensor:
        """(N, 3, H, W), channels last."""
        made: Tensor = planes * self.scale + self.shift
        return made.contiguous(memory_format=torch.channels_last)


def _split(model: nn.Module) -> tuple[list[nn.Module], nn.Sequential]:
    """The modules up to the last activation, and the head."""
    parts = dict(model.named_children())
    classifier = parts.get("fc") or parts["classifier"]
    names = list(parts)
    last = names.index("layer4" if "layer4" in parts else "features") + 1
    features = [parts[name] for name in names[:last]]
    return features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


def unlabelled(source: Path | None, train: int, test: int, preprocess: Preprocess) -> Pictures:
    """So many photographs, as the networks see them; fewer in proportion where there are fewer.

    Both networks get one crop. Files are taken in the order of a hash of their names: a folder that
    holds those alone gives the same pictures.

    Args:
        source: a folder, an .npz file with `images` (N, H, W, 3), or None: cut from the pictures
            that scikit-image and scikit-learn carry.
        train: to fine-tune on.
        test: to explain.
        preprocess: resizes and crops.

    Raises:
        ValueError: there are less than 16, or they are no pictures of that size.
    """
    images = _images(source, train + test, preprocess)
    if len(images) < 16:
        raise ValueError(f"{source} has {len(images)} photographs; it needs {train + test}")
    first = len(images) * train // (train + test)
    unknown = np.full(len(images), -1)
    return Pictures(images[:first], unknown[:first], images[first:], unknown[first:])


def _images(source: Path | None, count: int, preprocess: Preprocess) -> np.ndarray:
    if source is None:
        return np.stack([preprocess.pixels(image).numpy() for image in cut_out(count)])
    if source.is_file():
        with np.load(source) as file:
            images: np.ndarray = file["images"][:count]
        size = (*preprocess.size, 3)
        if images.dtype != np.uint8 or images.shape[1:] != size:
            found, needed = f"{images.dtype} {images.shape}", ", ".join(map(str, size))
            raise ValueError(f"{source} has {found}; it needs uint8 (N, {needed})")
        return images
    paths = [path for path in source.rglob("*") if path.suffix.lower() in _SUFFIXES]
    paths.sort(key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())
    if not paths:
        raise ValueError(f"no pictures in {source}")
    return np.stack([preprocess.pixels(read_image(path)).numpy() for path in paths[:count]])
