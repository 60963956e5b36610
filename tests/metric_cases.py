"""A network, pictures and heatmaps that the tests of the metrics share."""

import torch
from torch import Tensor, nn

from networks import pooled

N, SIZE = 4, (16, 18)


def confident() -> nn.Module:
    """Its confidences differ: a network with random weights says 1 / K of everything."""
    net = pooled()
    with torch.no_grad():
        net[2].weight *= 40
    return net


def noise() -> Tensor:
    """Pictures (N, 3, H, W)."""
    return torch.randn(N, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def permutations() -> Tensor:
    """No two pixels of a map are equal, and each map spans [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    orders = [torch.randperm(SIZE[0] * SIZE[1], generator=generator) for _ in range(N)]
    return (torch.stack(orders).float() / (SIZE[0] * SIZE[1] - 1)).view(N, *SIZE)


TARGETS = torch.tensor([0, 1, 2, 4])


def values(score: Tensor) -> Tensor:
    """An `output` that takes the model's tensor as it is."""
    return score
