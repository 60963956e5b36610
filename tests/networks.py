"""Small networks that the tests explain, and the float64 answer that they are held against."""

import copy

import torch
from torch import Tensor, nn

from diffcam_fast.contrast import Contrast
from diffcam_kernels.reference import REDUCTIONS


def pooled(classes: int = 5, channels: int = 8) -> nn.Sequential:
    """A network with a pooled linear head."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, channels, 3, padding=1),
        nn.ReLU(),
    )
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5))
    return nn.Sequential(features, pool, nn.Linear(channels, classes)).eval()


def with_mlp(classes: int = 5) -> nn.Sequential:
    """A network whose head has a hidden layer, so that its gradient differs from cell to cell."""
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2)
    )
    head = nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, classes)
    )
    return nn.Sequential(features, head).eval()


class Overwritten(nn.Module):
    """An in-place ReLU overwrites what the features return, as in DenseNet."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.classifier = nn.Linear(8, classes)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.relu(self.features(images), inplace=True)
        pooled: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return pooled


def images(n: int = 3, size: int = 10) -> Tensor:
    """(n, 3, size, size + 2), not square on purpose."""
    return torch.randn(n, 3, size, size + 2, generator=torch.Generator().manual_seed(1))


def expected_maps(
    model: nn.Module,
    layer: str,
    inputs: Tensor,
    targets: Tensor,
    contrast: str | Contrast = "log_odds",
    reduction: str = "grad_cam",
) -> Tensor:
    """The signed maps (N, T, h, w) by float64 autograd on the whole network, target by target."""
    exact = copy.deepcopy(model).double().eval()
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = exact.get_submodule(layer).register_forward_hook(keep)
    logits = exact(inputs.double())
    handle.remove()
    d = Contrast.parse(contrast).gradient(logits.detach(), targets)
    maps = []
    for t in range(targets.shape[1]):
        (g,) = torch.autograd.grad((d[:, t] * logits).sum(), kept[0], retain_graph=True)
        maps.append(REDUCTIONS[reduction](kept[0], g[:, None]))
    return torch.cat(maps, dim=1).detach()


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; NaN anywhere makes it NaN."""
    return float((value.double() - expected.double()).abs().max() / expected.abs().max())
