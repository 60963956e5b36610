"""Class activation maps with other weights than the classifier's, fitted on labelled images."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from tqdm import tqdm

from diffcam_fast.fitting import fit_broad, fit_re
from diffcam_fast.methods.activation import ClassActivationMap
from diffcam_fast.network import Network, plain_float32
from diffcam_fast.split import Split

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (N, C, H, W), normalised, with labels: (N,) int64, or (N, K) with 1 for each class."""


@dataclass(frozen=True)
class FittedCAM(ClassActivationMap):
    """M = sum_k (d W')_k relu(A_k), W' (K, C) fitted."""

    needs_pooled_head = False
    needs_fit = True

    @abstractmethod
    def fit(self, network: Network, batches: Batches, progress: bool | None) -> Tensor:
        """W' (K, C) at the layer of a network.

        Raises:
            ValueError: no images, or labels that do not fit.
        """

    def _activations(self, activations: Tensor) -> Tensor:
        return activations.relu()


@dataclass(frozen=True)
class BroadCAM(FittedCAM):
    """W' from a ridge regression of the labels on mean_ij relu(A); see
    `diffcam_fast.fitting.fit_broad`.

    Attributes:
        alpha: the ridge penalty, above 0.
    """

    alpha: float = 50.0

    def fit(self, network: Network, batches: Batches, progress: bool | None) -> Tensor:
        """As `FittedCAM.fit`."""
        passes = iter(_Passes(network, batches, progress))
        first = next(passes, None)
        if first is None:
            raise ValueError("no images to fit on")
        pooled = (
            (self._activations(split.activations[0]).float().mean(dim=(2, 3)), labels)
            for split, labels in chain([first], passes)
        )
        return fit_broad(pooled, first[0].logits.shape[1], alpha=self.alpha).float()


@dataclass(frozen=True)
class ReCAM(FittedCAM):
    """W' = W V, V trained on class-masked features; see `diffcam_fast.fitting.fit_re`.

    Attributes:
        epochs: passes over the images, which must be iterable as often.
        lr: step size of Adam.
        seed: of V before training.
    """

    epochs: int = 4
    lr: float = 5e-4
    seed: int = 0

    needs_pooled_head = True

    def fit(self, network: Network, batches: Batches, progress: bool | None) -> Tensor:
        """As `FittedCAM.fit`."""
        weight = network.head_weight()
        assert weight is not None
        passes = _Activations(_Passes(network, batches, progress))
        return fit_re(passes, weight.float(), epochs=self.epochs, lr=self.lr, seed=self.seed)


@dataclass(frozen=True)
class _Passes:
    """The network on each batch of images, with their labels."""

    network: Network
    batches: Batches
    progress: bool | None

    def __iter__(self) -> Iterator[tuple[Split, Tensor]]:
        weight = next((p for p in self.network.model.parameters() if p.is_floating_point()), None)
        disable = None if self.progress is None else not self.progress
        for images, labels in tqdm(
            self.batches, desc="fit", unit="batch", leave=False, disable=disable
        ):
            if weight is not None:
                images = images.to(device=weight.device, dtype=weight.dtype)
            yield self.network.forward(images.detach()), torch.as_tensor(labels)


@dataclass(frozen=True)
class _Activations:
    """The activations of each batch, with the labels, as often as it is iterated."""

    passes: _Passes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for split, labels in self.passes:
            [activations] = split.activations
            with plain_float32(activations):
                plain = activations.float()
            yield plain, labels
