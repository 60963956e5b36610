"""Weights that are fitted on labelled images, for `cam` to take in place of the classifier's."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Batches = Iterable[tuple[Tensor, Tensor]]
"""Features or activations of N images, with labels: (N,) int64, or (N, K) of 0 and 1."""


def fit_broad(batches: Batches, classes: int, *, alpha: float = 50.0) -> Tensor:
    """The weights of BroadCAM (arXiv 2309.03509): a ridge regression of labels on pooled features.

    With X the features, standardised over all images, and Y the multi-hot labels less their mean,
    V = (X^T X + alpha I)^-1 X^T Y and W'_kd = V_dk / std_d, so that W' reads features in their own
    unit. The map of class k is relu(sum_d W'_kd A_d); the offset is dropped, as by the authors. W'
    rests on features and labels alone: what a classifier made of them has no part.

    Deviations from the authors' code: their enhancement nodes are linear in the features and are
    folded into W' in the end; that changes no more than the penalty, from alpha I to
    alpha (I + E E^T)^-1 for nodes X E, and they are left out. Classes are fitted together, where
    theirs are in pairs and an odd last one keeps weights of 0.

    One pass suffices: only counts, means and second moments are kept, D^2 + D K numbers in float64.

    Args:
        batches: features (N, D) with labels, in any cut. The authors' features are mean_ij relu(A)
            of two stages, side by side.
        classes: K, at least 1.
        alpha: the penalty, above 0, beside sums over all images.

    Returns:
        W', (K, D) float64, on the features' device. A feature that varies by no more than the
        rounding of its type has weight 0.

    Raises:
        TypeError: labels are neither int64 indices nor of two axes.
        ValueError: no images, features that are not finite, shapes or labels that do not fit, or
            an alpha that is not above 0.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> fit_broad([(features, torch.tensor([0, 1]))], 2, alpha=2.0)
        tensor([[-0.2500,  0.0000],
                [ 0.2500,  0.0000]], dtype=torch.float64)
    """
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha}")
    moments: _Moments | None = None
    with torch.no_grad():
        for features, labels in batches:
            if features.ndim != 2 or (moments and features.shape[1] != moments.features):
                expected = moments.features if moments else "D"
                raise ValueError(f"features must be (N, {expected}), got {tuple(features.shape)}")
            y = _multi_hot(labels, len(features), classes).to(features.device, torch.double)
            _check_finite(features, "features")
            moments = moments or _Moments(features.shape[1], classes, features.device)
            moments.add(features, y)
        if moments is None or moments.count == 0:
            raise ValueError("no images to fit on")
        return moments.ridge(alpha)


class _Moments:
    """Means of x and y, sums of centred products, ranges: all that a ridge regression needs.

    Batches are merged by their means, after Chan, Golub and LeVeque: sums of plain squares cancel
    where a feature varies little beside its mean.
    """

    def __init__(self, features: int, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double, device=device)

        self.features = features
        self.count = 0
        self._x, self._y = zeros(features), zeros(classes)
        self._xx, self._xy = zeros(features, features), zeros(features, classes)
        self._low, self._high = zeros(features) + math.inf, zeros(features) - math.inf
        self._eps = 0.0

    def add(self, features: Tensor, y: Tensor) -> None:
        if len(features) == 0:
            return
        x, n = features.double(), len(features)
        if features.is_floating_point():
            self._eps = max(self._eps, torch.finfo(features.dtype).eps)
        self._low = torch.minimum(self._low, x.amin(dim=0))
        self._high = torch.maximum(self._high, x.amax(dim=0))
        mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
        step_x, step_y = mean_x - self._x, mean_y - self._y
        x, y = x - mean_x, y - mean_y
        total = self.count + n
        share = self.count * n / total
        self._xx += x.T @ x + share * torch.outer(step_x, step_x)
        self._xy += x.T @ y + share * torch.outer(step_x, step_y)
        self._x += step_x * (n / total)
        self._y += step_y * (n / total)
        self.count = total

    def ridge(self, alpha: float) -> Tensor:
        """(K, D): the weights of standardised features, brought to the features' own unit."""
        # To standardise what varies in its last bits would make a feature of rounding.
        size = torch.maximum(self._low.abs(), self._high.abs())
        dead = self._high - self._low <= 4 * self._eps * size
        scale = (self._xx.diagonal() / self.count).sqrt()
        scale = torch.where(dead, math.inf, scale)
        gram = self._xx / scale[:, None] / scale
        gram.diagonal().add_(alpha)
        weights: Tensor = torch.linalg.solve(gram, self._xy / scale[:, None]) / scale[:, None]
        return weights.T.contiguous()


def fit_re(
    batches: Batches,
    weight: Tensor,
    *,
    epochs: int = 4,
    lr: float = 5e-4,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Tensor:
    """The weights of ReCAM (arXiv 2203.00962, CVPR 2022): the classifier's times those of a second
    one.

    W' = W * V, cell by cell. V (K, C) has no bias and is trained by softmax cross-entropy: of each
    class k that an image shows, the features f_k = mean_ij(M_k A), with M_k = relu(w_k . A) /
    (max_ij + 1e-5), are to be told from all other classes. Softmax pushes apart what a multi-label
    loss lets overlap. An image counts once, whatever number of classes it shows.

    This is a variant: the authors go on training the backbone and W beside V; here both stay as
    they are and V alone is trained, by Adam.

    Args:
        batches: activations (N, C, h, w), what the pooling in front of the classifier reads, with
            labels; iterated once an epoch, so a list or a DataLoader and no generator.
        weight: W, (K, C), of the classifier.
        epochs: passes over the batches, at least 1.
        lr: step size of Adam, above 0.
        seed: of V before training, uniform within C^-1/2 of 0. Same batches and seed, same W'.
        progress: called after each epoch with its number, from 1, and its mean loss in nats.

    Returns:
        W', (K, C), on the device of the weight, float32 or wider.

    Raises:
        TypeError: labels are neither int64 indices nor of two axes.
        ValueError: no images, none that shows a class, batches that can be iterated only once,
            activations that are not finite, shapes or labels that do not fit, epochs below 1, or an
            lr that is not above 0.

    Example:
        >>> import torch
        >>> both, own = torch.eye(4)[0].view(2, 2), torch.eye(4)[3].view(2, 2)
        >>> a = torch.stack([torch.stack([both, own, 0 * own]), torch.stack([both, 0 * own, own])])
        >>> w = torch.tensor([[1.0, 0.6, 0.1], [1.0, 0.1, 0.6]])
        >>> w.argmax(dim=1)  # the channel that both classes share
        tensor([0, 0])
        >>> fit_re([(a, torch.tensor([0, 1]))], w, epochs=300, lr=0.05).argmax(dim=1)
        tensor([1, 2])
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be (K, C), got {tuple(weight.shape)}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be above 0 and finite, got {lr}")
    if epochs > 1 and iter(batches) is batches:
        raise ValueError(
            f"{epochs} epochs need batches that can be iterated as often, got a "
            f"{type(batches).__name__}; give a list or a DataLoader"
        )
    with torch.inference_mode(False), torch.autocast(weight.device.type, enabled=False):
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        second = _uniform(weight, seed).requires_grad_()
        optimiser = torch.optim.Adam([second], lr)
        for epoch in range(1, epochs + 1):
            loss = _epoch(batches, weight, second, optimiser)
            if progress:
                progress(epoch, loss)
        fitted: Tensor = weight * second.detach()
        return fitted


def _uniform(weight: Tensor, seed: int) -> Tensor:
    """As `nn.Linear` starts, but alike on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
    return ((2 * drawn - 1) / math.sqrt(weight.shape[1])).to(weight.device)


def _epoch(
    batches: Batches, weight: Tensor, second: Tensor, optimiser: torch.optim.Optimizer
) -> float:
    """Trains V on all batches, and returns the mean loss of an image."""
    images, labelled, total = 0, 0, 0.0
    for activations, labels in batches:
        images += len(activations)
        features, classes, shares = _masked(activations, labels, weight)
        if len(classes) == 0:
            continue
        with torch.enable_grad():
            losses = F.cross_entropy(features @ second.T, classes, reduction="none")
            loss = (losses * shares).sum()
            showing = round(float(shares.sum()))
            (second.grad,) = torch.autograd.grad(loss / showing, second)
        optimiser.step()
        labelled += showing
        total += float(loss.detach())
    if labelled == 0:
        raise ValueError(
            "no image shows a class"
            if images
            else "no images to fit on; batches are iterated once an epoch"
        )
    return total / labelled


@torch.no_grad()
def _masked(activations: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each class that an image shows: f_k (M, C), k (M,), and its share in the image (M,)."""
    if activations.ndim != 4 or activations.shape[1] != weight.shape[1]:
        raise ValueError(
            f"activations must be (N, {weight.shape[1]}, h, w) for a weight "
            f"{tuple(weight.shape)}, got {tuple(activations.shape)}"
        )
    present = _multi_hot(labels, len(activations), len(weight)).to(weight.device)
    _check_finite(activations, "activations")
    activations = activations.to(weight)
    rows, classes = present.nonzero(as_tuple=True)
    shares = (1 / present.sum(dim=1))[rows].to(weight.dtype)
    seen = activations[rows]
    if len(rows) == 0:
        return seen.flatten(1), classes, shares
    maps = torch.einsum("mc,mchw->mhw", weight[classes], seen).relu()
    maps = maps / (maps.amax(dim=(1, 2), keepdim=True) + 1e-5)
    pooled = torch.einsum("mhw,mchw->mc", maps, seen) / maps[0].numel()
    return pooled, classes, shares


def _multi_hot(labels: Tensor, images: int, classes: int) -> Tensor:
    """Labels as (N, K) bool."""
    if labels.shape == (images, classes):
        if not ((labels == 0) | (labels == 1)).all():
            raise ValueError(f"labels of shape ({images}, {classes}) must be 0 or 1")
        return labels.bool()
    if labels.shape != (images,):
        raise ValueError(
            f"labels must be ({images},) class indices, or ({images}, {classes}) with 1 for each "
            f"class; got {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"class indices must be int64, got {labels.dtype}; use .long()")
    if images and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )
    return F.one_hot(labels, classes).bool()


def _check_finite(tensor: Tensor, name: str) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite; leave out the images where they are not")
