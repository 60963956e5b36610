"""Class activation maps with other weights than the classifier's, fitted on labelled images."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

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
        """W' (K, C) float32 at the layer of a network.

        Raises:
            ValueError: no images, or labels that do not fit.
        """

    def _activations(self, activations: Tensor) -> Tensor:
        return activations.relu()


@dataclass(frozen=True)
class BroadCAM(FittedCAM):
    """W' from a ridge regression of the labels on the pooled activations (arXiv 2309.03509).

    The features are mean_ij relu(A), standardised; the targets are multi-hot. Only moments are
    kept, in float64, so that a training set of any size passes once. The authors' enhancement nodes
    are linear in the features, and would change the penalty alone: they are left out. The result
    depends on labels and features, not on what the classifier learned behind the layer.

    Attributes:
        alpha: the ridge penalty, at least 0.
    """

    alpha: float = 50.0

    def fit(self, network: Network, batches: Batches, progress: bool | None) -> Tensor:
        """As `FittedCAM.fit`."""
        moments: _Moments | None = None
        for split, labels in _passes(network, batches, progress):
            [activations] = split.activations
            with plain_float32(activations):
                x = self._activations(activations).double().mean(dim=(2, 3))
                y = _multi_hot(labels.to(x.device), split.logits)
                moments = moments or _Moments(x.shape[1], y.shape[1], x.device)
                moments.add(x, y)
        if moments is None:
            raise ValueError("no images to fit on")
        return moments.ridge(self.alpha).float()


class _Moments:
    """Sums of x, y, x^2 and x y; all that a ridge regression needs."""

    def __init__(self, features: int, classes: int, device: torch.device) -> None:
        self._count = 0
        self._x = torch.zeros(features, dtype=torch.double, device=device)
        self._y = torch.zeros(classes, dtype=torch.double, device=device)
        self._xx = torch.zeros(features, features, dtype=torch.double, device=device)
        self._xy = torch.zeros(features, classes, dtype=torch.double, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        self._count += len(x)
        self._x += x.sum(dim=0)
        self._y += y.sum(dim=0)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def ridge(self, alpha: float) -> Tensor:
        """(K, C): the weights of standardised features, brought back to the features' own unit."""
        mean_x, mean_y = self._x / self._count, self._y / self._count
        covariance = self._xx / self._count - torch.outer(mean_x, mean_x)
        scale = covariance.diagonal().clamp_min(0).sqrt()
        # A feature that never varies tells nothing; what is left of it here is rounding.
        dead = scale <= 1e-7 * mean_x.abs() + torch.finfo(torch.double).tiny
        safe = torch.where(dead, 1.0, scale)
        gram = self._count * covariance / torch.outer(safe, safe)
        cross = (self._xy - torch.outer(self._x, mean_y)) / safe[:, None]
        gram[dead, :] = gram[:, dead] = 0
        cross[dead] = 0
        gram.diagonal().add_(alpha + dead.double())
        found: Tensor = torch.linalg.solve(gram, cross) / safe[:, None]
        return found.T.contiguous()


@dataclass(frozen=True)
class ReCAM(FittedCAM):
    """W' = W V, cell by cell the classifier's weights times those of a second classifier (arXiv
    2203.00962).

    V (K, C), without a bias, is trained with softmax cross-entropy on f_k = mean_ij(M_k A) of each
    class k that an image shows, M_k = relu(w_k . A) over its maximum: the softmax pushes apart what
    a multi-label loss lets overlap. Here the network stays as it is, and V alone is trained, by
    Adam; the authors train both.

    Attributes:
        epochs: passes over the images; they must be iterable as often.
        rate: step size of Adam.
        seed: of V before training.
    """

    epochs: int = 4
    rate: float = 5e-4
    seed: int = 0

    needs_pooled_head = True

    def fit(self, network: Network, batches: Batches, progress: bool | None) -> Tensor:
        """As `FittedCAM.fit`."""
        weight = network.head_weight()
        assert weight is not None
        weight = weight.float()
        reach = weight.shape[1] ** -0.5
        second = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed))
        second = ((2 * second - 1) * reach).to(weight.device).requires_grad_()
        optimiser = torch.optim.Adam([second], self.rate)
        for epoch in range(self.epochs):
            seen = 0
            for split, labels in _passes(network, batches, progress):
                [activations] = split.activations
                with plain_float32(activations):
                    present = _multi_hot(labels.to(weight.device), split.logits)
                    rows, classes = present.nonzero(as_tuple=True)
                    features = _of_classes(activations[rows].float(), weight[classes])
                    shares = (1 / present.sum(dim=1))[rows].float()
                seen += len(labels)
                if len(rows) == 0:
                    continue
                with torch.inference_mode(False), torch.enable_grad():
                    losses = F.cross_entropy(features @ second.T, classes, reduction="none")
                    loss = (losses * shares).sum() / shares.sum()
                    (second.grad,) = torch.autograd.grad(loss, second)
                    optimiser.step()
            if seen == 0:
                raise ValueError(
                    "no images to fit on"
                    if epoch == 0
                    else f"the images could not be iterated more than {epoch} times; give a list "
                    "or a DataLoader"
                )
        found: Tensor = weight * second.detach()
        return found


def _of_classes(activations: Tensor, rows: Tensor) -> Tensor:
    """f (M, C) = mean_ij(M A) of A (M, C, h, w), each with the weights (M, C) of a class."""
    maps = torch.einsum("mc,mchw->mhw", rows, activations).relu()
    maps = maps / (maps.amax(dim=(1, 2), keepdim=True) + 1e-5)
    return (maps[:, None] * activations).mean(dim=(2, 3))


def _passes(
    network: Network, batches: Batches, progress: bool | None
) -> Iterable[tuple[Split, Tensor]]:
    weight = next((p for p in network.model.parameters() if p.is_floating_point()), None)
    disable = None if progress is None else not progress
    for images, labels in tqdm(batches, desc="fit", unit="batch", leave=False, disable=disable):
        if weight is not None:
            images = images.to(device=weight.device, dtype=weight.dtype)
        yield network.forward(images.detach()), torch.as_tensor(labels)


def _multi_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels as (N, K) float64."""
    n, k = logits.shape
    if labels.shape == (n, k):
        return labels.double()
    if labels.shape != (n,) or labels.dtype.is_floating_point:
        raise ValueError(
            f"labels must be N = {n} class indices, or ({n}, {k}) with 1 for each class; got "
            f"{labels.dtype} {tuple(labels.shape)}"
        )
    low, high = (int(labels.min()), int(labels.max())) if n else (0, 0)
    if not 0 <= low <= high < k:
        raise ValueError(f"labels must be from 0 to {k - 1}, got {low} to {high}")
    return F.one_hot(labels.long(), k).double()
