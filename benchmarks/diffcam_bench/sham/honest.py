"""A network trained on the labels alone, what fools it, and what every method then shows."""

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffcam_bench.rows import machine, provenance
from diffcam_bench.sham.fooling import (
    ADAPTIVE,
    ATTACKED,
    ATTACKER,
    FIXED,
    KEPT,
    Attacker,
    Hoax,
    Step,
    fool,
    remembered,
)
from diffcam_bench.sham.grid import grid
from diffcam_bench.sham.hoaxes import correlation, entropy, hoax, similarities
from diffcam_bench.sham.looks import LOOKS, activations, explained
from diffcam_bench.sham.networks import Classifier
from diffcam_bench.sham.pictures import Pictures, Sizes, batches, planes
from diffcam_bench.sham.training import trained

CLEAN, CONTROL = "clean", "control"
_RESAMPLES, _DRAWN = 1000, 6


@dataclass(frozen=True)
class Honest:
    """A network as it decides before anybody fools it, and its maps.

    Attributes:
        network: in evaluation mode.
        seed: of the pictures' order, and of the classes that are drawn.
        pictures: to train on and to explain.
        sizes: how much is done.
        attacker: who fools it.
        images: test pictures (N, 3, H, W).
        classes: (N,), what it decides.
        target: the hoax (h, w) of the entropy of its maps.
        maps: of each look, of the decided classes.
    """

    network: Classifier
    seed: int
    pictures: Pictures
    sizes: Sizes
    attacker: Attacker
    images: Tensor
    classes: Tensor
    target: Tensor
    maps: dict[tuple[str, str], Tensor]

    @classmethod
    def train(cls, name: str, seed: int, pictures: Pictures, sizes: Sizes) -> "Honest":
        """A small network, trained on the labels."""
        return cls.of(trained(name, seed, pictures, sizes), seed, pictures, sizes)

    @classmethod
    def of(
        cls,
        network: Classifier,
        seed: int,
        pictures: Pictures,
        sizes: Sizes,
        attacker: Attacker = ATTACKER,
    ) -> "Honest":
        """A network that is trained already; the hoax has the entropy of its maps."""
        images = planes(pictures.test[: sizes.images], pictures.device)
        seen = activations(network, images)
        classes = _decided(network, seen)
        maps = {look: explained(network, seen, classes, *look) for look in LOOKS}
        honest = maps["grad_cam", "none"]
        nats = float(entropy(honest[honest.sum((1, 2)) > 0]).mean())
        target = hoax(honest.shape[1], honest.shape[2], nats)
        return cls(network, seed, pictures, sizes, attacker, images, classes, target, maps)

    def target_of(self, arm: str) -> Tensor:
        """The hoax (h, w) that an arm is compared with, and `sham` and its kin are trained to."""
        if arm not in FIXED:
            return self.target
        return hoax(self.target.shape[0], self.target.shape[1], math.log(FIXED[arm]))

    def fooled(self, arm: str, attacked: str) -> tuple[Classifier, float]:
        """The network of an arm, and the weight of its hoax; the honest one itself for `clean`."""
        if arm == CLEAN:
            return self.network, 0.0
        made = Hoax(arm, self.target_of(arm), ADAPTIVE if arm == "adaptive" else ATTACKED)
        for weight in (0.0,) if arm == CONTROL else self.attacker.weights:
            network = copy.deepcopy(self.network)
            fool(
                network,
                self.network,
                made,
                attacked or "predicted",
                self._steps,
                weight=weight,
                seed=self.seed,
                learning_rate=self.attacker.learning_rate,
            )
            if self._kept(network) >= KEPT:
                break
        return network, weight

    @cached_property
    def _steps(self) -> list[Step]:
        # Other shuffles than those of the honest training.
        shuffled = batches(self.pictures, self.sizes, seed=self.seed + 1000)
        return remembered(self.network, itertools.islice(shuffled, self.sizes.steps))

    @cached_property
    def _trained_on(self) -> tuple[Tensor, Tensor]:
        """Training pictures, and what is decided on them."""
        images = planes(self.pictures.train[: self.sizes.images], self.pictures.device)
        return images, _decided(self.network, activations(self.network, images))

    def _kept(self, network: Classifier) -> float:
        """The share of training pictures that are decided as before."""
        images, before = self._trained_on
        return _share(_decided(network, activations(network, images)), before)

    @property
    def _machine(self) -> dict[str, str]:
        on_gpu = self.images.is_cuda
        return {"machine": f"{torch.cuda.get_device_name()}, {machine()}"} if on_gpu else {}

    def draw(self, network: Classifier, path: Path) -> None:
        """A grid: pictures, and the maps of the honest and of this network."""
        shown = self.pictures.test[:_DRAWN]
        seen, classes = activations(network, self.images[:_DRAWN]), self.classes[:_DRAWN]
        columns: dict[str, np.ndarray] = {"picture": shown}
        for look in LOOKS[:4]:
            title = "Grad-CAM" if look[1] == "none" else f"Diff, {look[1]}"
            columns[f"{title}\nhonest"] = self.maps[look][:_DRAWN].numpy()
            columns[f"{title}\nfooled"] = explained(network, seen, classes, *look).numpy()
        grid(columns, path)

    def rows(self, network: Classifier, arm: str = CLEAN) -> Iterator[dict[str, object]]:
        """One for each method and contrast, of the classes that the honest network chose."""
        seen, target = activations(network, self.images), self.target_of(arm)
        shares = self._shares(_decided(network, seen))
        grad = explained(network, seen, self.classes, "grad_cam", "none")
        for look in LOOKS:
            maps = explained(network, seen, self.classes, *look)
            row: dict[str, object] = {"method": look[0], "contrast": look[1], **shares}
            measured = similarities(maps, self.maps[look])
            measured["hoax"] = correlation(maps, target.expand_as(maps))
            measured["entropy"] = entropy(maps).numpy()
            measured["grad_cam"] = correlation(maps, grad)
            for name, values in measured.items():
                row |= _interval(name, values, self.seed)
            row["hoax_cells"] = int(target.sum())
            row["images"] = len(maps)
            yield row | provenance(threads=torch.get_num_threads()) | self._machine

    def _shares(self, chosen: Tensor) -> dict[str, str]:
        """Right decisions, empty where nobody knows, and those that are as before."""
        truth = self.pictures.test_labels[: self.sizes.images]
        labels = torch.from_numpy(truth).long().to(chosen.device)
        right = [f"{_share(one, labels):.4f}" for one in (chosen, self.classes)]
        accuracy, honest = right if self.pictures.labelled else ("", "")
        return {
            "accuracy": accuracy,
            "honest_accuracy": honest,
            "decisions_kept": f"{_share(chosen, self.classes):.4f}",
        }


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


def _decided(network: Classifier, seen: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network.head(seen)
    return logits.argmax(1)


def _share(one: Tensor, other: Tensor) -> float:
    return float((one == other).double().mean())
