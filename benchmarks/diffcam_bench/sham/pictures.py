"""Pictures, as batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffcam_bench.rows import optional
from diffcam_export.cache import digest_of_images


@dataclass(frozen=True)
class Pictures:
    """Pictures: uint8 (N, H, W, 3), and labels (N,); and where networks see them.

    Labels of -1 are unknown.
    """

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    device: str = "cpu"

    @classmethod
    def read(cls, path: Path) -> "Pictures":
        """From an .npz file with `train_images`, `train_labels`, `test_images`, `test_labels`.

        Raises:
            ValueError: it has not all of them.
        """
        with np.load(path) as file:
            names = ("train_images", "train_labels", "test_images", "test_labels")
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(f"{path} has no {', '.join(missing)}; it needs {', '.join(names)}")
            return cls(*(file[name] for name in names))

    @classmethod
    def cifar10(cls) -> "Pictures":
        """All of it, which torchvision downloads to `~/.cache/diffcam` once.

        Raises:
            RuntimeError: it cannot be had.
        """
        datasets = optional("torchvision.datasets", distribution="torchvision")
        folder = Path.home() / ".cache" / "diffcam" / "cifar10"
        parts = [datasets.CIFAR10(folder, train=train, download=True) for train in (True, False)]
        train, test = ((part.data, np.array(part.targets)) for part in parts)
        return cls(*train, *test)

    @property
    def digest(self) -> str:
        """Tells the pictures from any others."""
        parts = (self.train, self.test)
        return digest_of_images(torch.from_numpy(np.concatenate(parts)))[:12]

    @property
    def labelled(self) -> bool:
        """Whether anybody knows what is on them."""
        return bool(self.train_labels.min() >= 0)

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        epochs: of the honest network, over all training pictures; 0 where it is trained already.
        steps: of the fine-tuning, each a batch.
        batch: pictures in a batch.
        images: test pictures whose maps are compared.
    """

    epochs: int = 8
    steps: int = 250
    batch: int = 64
    images: int = 512

    def __str__(self) -> str:
        epochs = f"{self.epochs} epochs, " if self.epochs else ""
        return f"{epochs}{self.steps} steps of {self.batch}, {self.images} images"


def planes(pictures: np.ndarray, device: str) -> Tensor:
    """(N, 3, H, W), about in [-2, 2]."""
    return _scaled(torch.from_numpy(pictures).to(device))


def _scaled(pictures: Tensor) -> Tensor:
    return pictures.permute(0, 3, 1, 2).float().div(64).sub(2).contiguous()


def batches(pictures: Pictures, sizes: Sizes, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: shuffled, half of them mirrored."""
    random = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(pictures.train).to(pictures.device)
    labels = torch.from_numpy(pictures.train_labels).long().to(images.device)
    while True:
        order = torch.randperm(len(images), generator=random)
        for part in torch.split(order, sizes.batch):
            # Drawn on the host, the same on every device.
            mirrored = (torch.rand(len(part), generator=random) < 0.5).to(images.device)
            batch = _scaled(images[part.to(images.device)])
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            yield batch, labels[part.to(images.device)]
