"""The study: honest networks, arms that fool them, and what every method then shows."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffcam_bench.rows import Row, optional, provenance, read_rows, write_rows
from diffcam_bench.sham.fooling import ADAPTIVE, ATTACKED, Hoax, fool
from diffcam_bench.sham.grid import grid
from diffcam_bench.sham.hoaxes import SIMILARITIES, entropy, hoax, similarities
from diffcam_bench.sham.networks import NETWORKS, Classifier
from diffcam_fast import Explainer

CLEAN, CONTROL = "clean", "control"
ARMS = ("location", "top_k", "centre_of_mass", "sham", "adaptive")
WHICH = ("true", "predicted", "all")
# What is looked at: a method and its contrast.
LOOKS = (
    ("grad_cam", "none"),
    ("diff_grad_cam", "mean"),
    ("diff_grad_cam", "log_odds"),
    ("diff_grad_cam", "runner_up"),
    ("grad_cam_pp", "none"),
    ("diff_grad_cam_pp", "log_odds"),
    ("xgrad_cam", "none"),
    ("xgrad_cam", "log_odds"),
    ("layer_cam", "none"),
    ("layer_cam", "log_odds"),
    ("hires_cam", "none"),
    ("hires_cam", "log_odds"),
    ("eigen_cam", "none"),
)
_RESAMPLES, _DRAWN = 1000, 6
_KEY = ("network", "seed", "arm", "attacked", "sizes")


@dataclass(frozen=True)
class Pictures:
    """Pictures of few classes: uint8 (N, H, W, 3), and labels (N,)."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray

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
    def classes(self) -> int:
        """How many there are."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        epochs: of the honest network, over all training pictures.
        steps: of the fine-tuning, each a batch.
        batch: pictures in a batch.
        images: test pictures whose maps are compared.
    """

    epochs: int = 8
    steps: int = 250
    batch: int = 64
    images: int = 512

    def __str__(self) -> str:
        return f"{self.epochs} epochs, {self.steps} steps of {self.batch}, {self.images} images"


@dataclass(frozen=True)
class Study:
    """The arms that are asked for.

    Attributes:
        pictures: to train on and to explain.
        sizes: how much is done.
        networks: names of `NETWORKS`.
        seeds: each an honest network and all its arms.
        arms: of `ARMS`.
        which: whose map is attacked, of `WHICH`.
    """

    pictures: Pictures
    sizes: Sizes = Sizes()
    networks: Sequence[str] = tuple(NETWORKS)
    seeds: Sequence[int] = (0, 1, 2)
    arms: Sequence[str] = ARMS
    which: Sequence[str] = WHICH

    @property
    def total(self) -> int:
        """How many arms run, those of all networks and seeds together."""
        return len(self.networks) * len(self.seeds) * len(list(self._arms()))

    def run(
        self,
        path: Path | None,
        folder: Path | None = None,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Row]:
        """All rows; those that the file has are not made again, and each arm is kept as it ends.

        Args:
            path: the CSV file of the rows, or None.
            folder: where a picture of each arm goes, or None.
            progress: called after each arm with their number so far.
        """
        rows: list[Row] = list(read_rows(path)) if path is not None else []
        done = 0
        for name, seed in itertools.product(self.networks, self.seeds):
            honest: Honest | None = None
            for arm, attacked in self._arms():
                key = (name, str(seed), arm, attacked, str(self.sizes))
                if not any(tuple(str(row[k]) for k in _KEY) == key for row in rows):
                    honest = honest or Honest.train(name, seed, self.pictures, self.sizes)
                    start = dict(zip(_KEY, key, strict=True))
                    network = honest.fooled(arm, attacked)
                    rows += [start | row for row in honest.rows(network)]
                    if folder is not None:
                        title = "-".join(filter(None, (name, str(seed), arm, attacked)))
                        honest.draw(network, folder / f"{title}.png")
                    if path is not None:
                        write_rows(path, rows)
                done += 1
                progress(done)
        return rows

    def _arms(self) -> Iterator[tuple[str, str]]:
        yield CLEAN, ""
        # What training on, towards nothing, changes by itself.
        yield CONTROL, ""
        yield from itertools.product(self.arms, self.which)


@dataclass(frozen=True)
class Honest:
    """A network trained on the labels alone, and its maps."""

    network: Classifier
    seed: int
    pictures: Pictures
    sizes: Sizes
    images: Tensor
    labels: Tensor
    classes: Tensor
    target: Tensor
    maps: dict[tuple[str, str], Tensor]

    @classmethod
    def train(cls, name: str, seed: int, pictures: Pictures, sizes: Sizes) -> "Honest":
        """Trains it; the hoax has the entropy of its maps."""
        torch.manual_seed(seed)
        network = NETWORKS[name](pictures.classes)
        _train(network, pictures, sizes, seed)
        images = _planes(pictures.test[: sizes.images])
        labels = torch.from_numpy(pictures.test_labels[: sizes.images]).long()
        with torch.no_grad():
            classes = network(images).argmax(1)
        maps = {look: _explained(network, images, classes, *look) for look in LOOKS}
        honest = maps["grad_cam", "none"]
        nats = float(entropy(honest[honest.sum((1, 2)) > 0]).mean())
        target = hoax(honest.shape[1], honest.shape[2], nats)
        return cls(network, seed, pictures, sizes, images, labels, classes, target, maps)

    def fooled(self, arm: str, attacked: str) -> Classifier:
        """The network of an arm; the honest one itself for `clean`."""
        if arm == CLEAN:
            return self.network
        network = copy.deepcopy(self.network)
        made = Hoax(arm, self.target, ADAPTIVE if arm == "adaptive" else ATTACKED)
        # Other shuffles than those of the honest training.
        batches = _batches(self.pictures, self.sizes, seed=self.seed + 1000)
        steps = list(itertools.islice(batches, self.sizes.steps))
        fool(network, self.network, made, attacked or "predicted", steps, seed=self.seed)
        return network

    def draw(self, network: Classifier, path: Path) -> None:
        """A grid: pictures, and the maps of the honest and of this network."""
        shown = self.pictures.test[:_DRAWN]
        images, classes = self.images[:_DRAWN], self.classes[:_DRAWN]
        columns: dict[str, np.ndarray] = {"picture": shown}
        for look in LOOKS[:4]:
            title = "Grad-CAM" if look[1] == "none" else f"Diff, {look[1]}"
            columns[f"{title}\nhonest"] = self.maps[look][:_DRAWN].numpy()
            fooled = _explained(network, images, classes, *look)
            columns[f"{title}\nfooled"] = fooled.numpy()
        grid(columns, path)

    def rows(self, network: Classifier) -> Iterator[dict[str, object]]:
        """One for each method and contrast, of the classes that the honest network chose."""
        with torch.no_grad():
            chosen = network(self.images).argmax(1)
        grad = _explained(network, self.images, self.classes, "grad_cam", "none")
        for look in LOOKS:
            maps = _explained(network, self.images, self.classes, *look)
            hidden = similarities(maps, self.target.expand_as(maps))["pearson"]
            row: dict[str, object] = {
                "method": look[0],
                "contrast": look[1],
                "accuracy": f"{_share(chosen, self.labels):.4f}",
                "honest_accuracy": f"{_share(self.classes, self.labels):.4f}",
                "decisions_kept": f"{_share(chosen, self.classes):.4f}",
            }
            measured = similarities(maps, self.maps[look])
            measured["hoax"] = hidden
            measured["entropy"] = entropy(maps).numpy()
            measured["grad_cam"] = similarities(maps, grad)["pearson"]
            for name, values in measured.items():
                row |= _interval(name, values, self.seed)
            row["hoax_cells"] = int(self.target.sum())
            row["images"] = len(maps)
            yield row | provenance(threads=torch.get_num_threads())


MEASURES = (*SIMILARITIES, "hoax", "entropy", "grad_cam")


def _interval(name: str, values: np.ndarray, seed: int) -> dict[str, str]:
    """Mean and 95 % bootstrap interval over the images."""
    random = np.random.default_rng(seed)
    means = values[random.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        name: f"{values.mean():.4f}",
        f"{name}_low": f"{low:.4f}",
        f"{name}_high": f"{high:.4f}",
    }


def _explained(
    network: Classifier, images: Tensor, classes: Tensor, method: str, contrast: str
) -> Tensor:
    """Maps (N, h, w) of our engine."""
    explainer = Explainer(
        network, layer="features", method=method, contrast=contrast, example_inputs=images[:2]
    )
    made = []
    for first in range(0, len(images), 256):
        part = slice(first, first + 256)
        # Eigen-CAM has no target.
        targets = None if method == "eigen_cam" else classes[part, None]
        made.append(explainer(images[part], targets).maps[:, 0].detach())
    return torch.cat(made)


def _share(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())


def _planes(pictures: np.ndarray) -> Tensor:
    """(N, 3, H, W), about in [-2, 2]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(64).sub(2).contiguous()


def _batches(pictures: Pictures, sizes: Sizes, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: shuffled, half of them mirrored."""
    random = torch.Generator().manual_seed(seed)
    images = _planes(pictures.train)
    labels = torch.from_numpy(pictures.train_labels).long()
    while True:
        order = torch.randperm(len(images), generator=random)
        for part in torch.split(order, sizes.batch):
            batch = images[part]
            mirrored = torch.rand(len(batch), generator=random) < 0.5
            batch = torch.where(mirrored[:, None, None, None], batch.flip(3), batch)
            yield batch, labels[part]


def _train(network: Classifier, pictures: Pictures, sizes: Sizes, seed: int) -> None:
    steps = max(1, sizes.epochs * -(-len(pictures.train) // sizes.batch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    network.train()
    for images, labels in itertools.islice(_batches(pictures, sizes, seed), steps):
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    network.eval()
