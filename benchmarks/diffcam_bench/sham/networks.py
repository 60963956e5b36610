"""Small networks for pictures of 32 x 32, trained in a minute on two cores."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _convolution(read: int, made: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(read, made, 3, stride, 1, bias=False), nn.BatchNorm2d(made), nn.ReLU()
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.second(self.first(x))))


class Classifier(nn.Module):
    """Features (N, C, 8, 8) and a head."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of pictures (N, 3, 32, 32)."""
        made: Tensor = self.head(self.features(x))
        return made


def residual(classes: int) -> Classifier:
    """Two residual stages behind a stem; the head pools and is linear."""
    features = nn.Sequential(
        _convolution(3, 32, 2), _Residual(32), _convolution(32, 64, 2), _Residual(64)
    )
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Classifier(features, nn.Sequential(*pool, nn.Linear(64, classes)))


def plain(classes: int) -> Classifier:
    """A stack of convolutions, as VGG's; the head has a hidden layer over 2 x 2 pooled cells."""
    features = nn.Sequential(
        _convolution(3, 32, 2), _convolution(32, 48), _convolution(48, 64, 2), _convolution(64, 64)
    )
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    hidden = [nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes)]
    return Classifier(features, nn.Sequential(*pool, *hidden))


NETWORKS: dict[str, Callable[[int], Classifier]] = {"residual": residual, "plain": plain}
