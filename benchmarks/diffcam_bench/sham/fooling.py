"""Training a network to show a hoax: losses of maps that gradients pass through."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from diffcam_bench.sham.hoaxes import border
from diffcam_bench.sham.networks import Classifier
from diffcam_fast.contrast import Contrast

# How much the hoax counts beside the decisions: the first that keeps KEPT of the decisions on
# training pictures is taken, for losses differ in scale, and who breaks the network fools nobody.
WEIGHTS, KEPT = (20.0, 10.0, 5.0, 2.5, 1.25, 0.6), 0.9
# Adam, statistics of batch norms frozen, as Heo et al. do; the rate was chosen on a small network.
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Attacker:
    """How much whoever fools a network tries.

    Attributes:
        learning_rate: of Adam.
        weights: of the hoax, the first that keeps `KEPT` of the decisions is taken.
    """

    learning_rate: float = LEARNING_RATE
    weights: Sequence[float] = WEIGHTS


# Of the small networks.
ATTACKER = Attacker()

# Hoaxes of a fixed number of cells: on maps of 7 x 7, the border alone, and with the next corners.
FIXED = {"sham_24": 24, "sham_28": 28}

ATTACKED = ("none",)
ADAPTIVE = ("mean", "log_odds", "runner_up")

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Hoax:
    """What one arm trains towards.

    Attributes:
        name: `control`, `location`, `top_k`, `centre_of_mass`, `sham`, `adaptive`, or one of
            `FIXED`; the control is trained as long, and towards nothing.
        target: the hoax map (h, w), for `sham`, its kin and `adaptive`.
        contrasts: whose maps are attacked.
    """

    name: str
    target: Tensor
    contrasts: Sequence[str] = field(default=ATTACKED)

    def loss(self, maps: Tensor, honest: Tensor) -> Tensor:
        """Of maps (N, h, w) before any ReLU, and the honest network's."""
        return {
            "control": _nothing,
            "location": self._location,
            "top_k": _top_k,
            "centre_of_mass": _centre_of_mass,
            "sham": self._sham,
            "adaptive": self._sham,
            **dict.fromkeys(FIXED, self._sham),
        }[self.name](maps, honest)

    def _location(self, maps: Tensor, honest: Tensor) -> Tensor:
        return (border(*maps.shape[1:]).to(maps) - _rectified(maps)).square().mean()

    def _sham(self, maps: Tensor, honest: Tensor) -> Tensor:
        return (self.target.to(maps) - _scaled(maps)).square().mean()


def _nothing(maps: Tensor, honest: Tensor) -> Tensor:
    return 0.0 * maps.sum()


def _rectified(maps: Tensor) -> Tensor:
    positive = maps.relu()
    return positive / (positive.amax((1, 2), keepdim=True) + 1e-8)


def _scaled(maps: Tensor) -> Tensor:
    low = maps.amin((1, 2), keepdim=True)
    return (maps - low) / (maps.amax((1, 2), keepdim=True) - low + 1e-8)


def _top_k(maps: Tensor, honest: Tensor) -> Tensor:
    """The tenth of the cells that the honest map has largest shall be dark."""
    count = max(1, honest[0].numel() // 10)
    cells = honest.flatten(1).topk(count, dim=1).indices
    return _rectified(maps).flatten(1).gather(1, cells).square().mean()


def _centre_of_mass(maps: Tensor, honest: Tensor) -> Tensor:
    """The centre of mass shall be far from the honest one, in parts of the side."""
    shift = _centres(_scaled(maps)) - _centres(_scaled(honest))
    return -shift.abs().sum(1).mean()


def _centres(maps: Tensor) -> Tensor:
    height, width = maps.shape[1:]
    mass = maps.sum((1, 2)) + 1e-8
    down = (maps.sum(2) * torch.linspace(0, 1, height, device=maps.device)).sum(1) / mass
    right = (maps.sum(1) * torch.linspace(0, 1, width, device=maps.device)).sum(1) / mass
    return torch.stack([down, right], 1)


def grad_cam(
    activations: Tensor, logits: Tensor, classes: Tensor, contrast: str, *, differentiable: bool
) -> Tensor:
    """Grad-CAM (N, h, w) of a contrast, without ReLU, of one class for each image.

    Args:
        activations: (N, C, h, w), which the logits were made of.
        logits: (N, K).
        classes: (N,).
        contrast: a name, as `Contrast.parse` takes it.
        differentiable: gradients pass through the map.
    """
    d = Contrast.parse(contrast).gradient(logits.detach(), classes[:, None])[:, 0]
    score = (logits * d).sum()
    [gradient] = torch.autograd.grad(
        score, activations, create_graph=differentiable, retain_graph=True
    )
    return torch.einsum("nc,nchw->nhw", gradient.mean((2, 3)), activations)


def chosen_classes(which: str, logits: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
    """The class (N,) whose map is attacked: `true`, `predicted`, or for `all` any, drawn anew."""
    if which == "true":
        return labels
    if which == "predicted":
        return logits.argmax(1)
    drawn = torch.randint(logits.shape[1], (len(logits),), generator=random)
    return drawn.to(logits.device)


@dataclass(frozen=True)
class Step:
    """A batch: images (N, C, H, W), labels (N,), and what the honest network makes of them."""

    images: Tensor
    labels: Tensor
    activations: Tensor


def remembered(honest: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Step]:
    """Batches with the honest network's activations, which all arms and weights share."""
    with torch.no_grad():
        return [Step(images, labels, honest.features(images)) for images, labels in batches]


def fool(
    network: Classifier,
    honest: Classifier,
    hoax: Hoax,
    which: str,
    steps: Sequence[Step],
    *,
    weight: float,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Fine-tunes a network in place: the hoax, and the decisions of the honest one.

    The decisions are held by the Kullback-Leibler divergence from the honest network's softmax,
    which whoever fools it has at hand; Heo et al. take the cross-entropy of the labels.

    Args:
        network: a copy of the honest one.
        honest: what it was.
        hoax: the arm.
        which: `true`, `predicted` or `all`.
        steps: in order.
        weight: of the hoax, beside the divergence.
        seed: of the classes that `all` draws.
        learning_rate: of Adam.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    # Statistics of batch norms stay as they are; ours have no dropout.
    network.eval()
    for step in steps:
        activations = network.features(step.images)
        logits = network.head(activations)
        classes = chosen_classes(which, logits, step.labels, random)
        original, decided = _honest(honest, step.activations, classes)
        losses = [
            hoax.loss(grad_cam(activations, logits, classes, name, differentiable=True), original)
            for name in hoax.contrasts
        ]
        kept = functional.kl_div(
            logits.log_softmax(1), decided.log_softmax(1), log_target=True, reduction="batchmean"
        )
        loss = kept + weight * torch.stack(losses).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def _honest(honest: Classifier, seen: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Its maps (N, h, w) and logits (N, K)."""
    activations = seen.detach().requires_grad_()
    logits = honest.head(activations)
    maps = grad_cam(activations, logits, classes, "none", differentiable=False)
    return maps.detach(), logits.detach()
