"""A network trained on the labels alone, what fools it, and what every method then shows."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffcam_bench.rows import machine, provenance
from diffcam_bench.sham.fooling import ADAPTIVE, ATTACKED, KEPT, WEIGHTS, Hoax, fool
from diffcam_bench.sham.grid import grid
from diffcam_bench.sham.hoaxes import entropy, hoax, similarities
from diffcam_bench.sham.networks import NETWORKS, Classifier
from diffcam_bench.sham.pictures import Pictures, Sizes, batches, planes
from diffcam_fast import Explainer

CLEAN, CONTROL = "clean", "control"
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
        network = NETWORKS[name](pictures.classes).to(pictures.device)
        _train(network, pictures, sizes, seed)
        images = planes(pictures.test[: sizes.images], pictures.device)
        labels = torch.from_numpy(pictures.test_labels[: sizes.images]).long().to(images.device)
        with torch.no_grad():
            classes = network(images).argmax(1)
        maps = {look: _explained(network, images, classes, *look) for look in LOOKS}
        honest = maps["grad_cam", "none"]
        nats = float(entropy(honest[honest.sum((1, 2)) > 0]).mean())
        target = hoax(honest.shape[1], honest.shape[2], nats)
        return cls(network, seed, pictures, sizes, images, labels, classes, target, maps)

    def fooled(self, arm: str, attacked: str) -> tuple[Classifier, float]:
        """The network of an arm, and the weight of its hoax; the honest one itself for `clean`."""
        if arm == CLEAN:
            return self.network, 0.0
        made = Hoax(arm, self.target, ADAPTIVE if arm == "adaptive" else ATTACKED)
        # Other shuffles than those of the honest training.
        shuffled = batches(self.pictures, self.sizes, seed=self.seed + 1000)
        steps = list(itertools.islice(shuffled, self.sizes.steps))
        for weight in (0.0,) if arm == CONTROL else WEIGHTS:
            network = copy.deepcopy(self.network)
            which = attacked or "predicted"
            fool(network, self.network, made, which, steps, weight=weight, seed=self.seed)
            if self._kept(network) >= KEPT:
                break
        return network, weight

    @property
    def _machine(self) -> dict[str, str]:
        on_gpu = self.images.is_cuda
        return {"machine": f"{torch.cuda.get_device_name()}, {machine()}"} if on_gpu else {}

    def _kept(self, network: Classifier) -> float:
        """The share of training pictures that are decided as before."""
        images = planes(self.pictures.train[: self.sizes.images], self.pictures.device)
        with torch.no_grad():
            return _share(network(images).argmax(1), self.network(images).argmax(1))

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
            yield row | provenance(threads=torch.get_num_threads()) | self._machine


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
    return torch.cat(made).cpu()


def _share(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())


def _train(network: Classifier, pictures: Pictures, sizes: Sizes, seed: int) -> None:
    steps = max(1, sizes.epochs * -(-len(pictures.train) // sizes.batch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    network.train()
    for images, labels in itertools.islice(batches(pictures, sizes, seed), steps):
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    network.eval()
