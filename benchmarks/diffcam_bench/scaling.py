"""`diffcam bench scaling`: the cost over a plain forward pass, as targets, layers and images grow.

Every point takes turns with a plain forward pass on the same images. Nothing is timed before the
first of its maps was held against that of one target alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from diffcam_bench.cams import SAME
from diffcam_bench.engine import settle
from diffcam_bench.measure import Timing, alternate
from diffcam_bench.methods import BASELINE, ParityError, rounded
from diffcam_bench.rows import provenance
from diffcam_bench.zoo import build
from diffcam_fast import Explainer

TARGETS, LAYERS, SIZES = "targets", "layer", "image size"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        targets: numbers of targets T, at the last layer.
        layers: target layers; those that a network does not have are left out.
        sizes: sides of the images, in pixels.
        side: that of the other two series.
    """

    targets: tuple[int, ...] = (1, 2, 5, 10, 50)
    layers: tuple[str, ...] = ("layer4", "layer3", "layer2", "layer1")
    sizes: tuple[int, ...] = (160, 224, 320, 448)
    side: int = 224


QUICK = Plan(targets=(1, 5), layers=("layer4", "layer3"), sizes=(64, 96), side=64)


@dataclass(frozen=True)
class Point:
    """One way to explain a batch.

    Attributes:
        series: `targets`, `layer` or `image size`.
        value: of it.
        layer: the target layer; None: the one that is found.
        targets: T, the best classes.
        side: of the images.
    """

    series: str
    value: str
    layer: str | None
    targets: int
    side: int


@dataclass(frozen=True)
class Measured:
    """A point, and how long it took beside a plain forward pass."""

    point: Point
    layer: str
    backend: str
    timing: Timing


def points(plan: Plan, network: nn.Module) -> list[Point]:
    """All points of a plan, series by series."""
    names = {name for name, _ in network.named_modules()}
    return [
        *(Point(TARGETS, str(t), None, t, plan.side) for t in plan.targets),
        *(Point(LAYERS, name, name, 1, plan.side) for name in plan.layers if name in names),
        *(Point(SIZES, str(side), None, 1, side) for side in plan.sizes),
    ]


def measure(
    network: nn.Module,
    plan: Plan,
    *,
    batch_size: int,
    rounds: int,
    device: str,
    progress: Callable[[int], object] = lambda done: None,
) -> Iterator[Measured]:
    """Measures all points; those of one image size take turns with one forward pass.

    Args:
        network: in evaluation mode, on the device.
        plan: what to measure.
        batch_size: N.
        rounds: timed rounds.
        device: as PyTorch names it.
        progress: called with the number of points that are done.

    Raises:
        ParityError: a map is not finite, or not that of one target alone; its size is not timed.
    """
    every, done = points(plan, network), 0
    for side in dict.fromkeys(one.side for one in every):
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch_size, 3, side, side, generator=generator).to(device)
        settle(network, images)
        mine = [one for one in every if one.side == side]
        yield from _alternated(network, images, mine, rounds)
        done += len(mine)
        progress(done)


def _alternated(
    network: nn.Module, images: Tensor, every: Sequence[Point], rounds: int
) -> Iterator[Measured]:
    explainers = {
        layer: Explainer(network, layer=layer, example_inputs=images)
        for layer in dict.fromkeys(one.layer for one in every)
    }
    made = {f"{one.series} {one.value}": (one, explainers[one.layer]) for one in every}
    backends = {name: _checked(explainer, images, one) for name, (one, explainer) in made.items()}
    cases: dict[str, Callable[[], object]] = {
        name: lambda one=one, explainer=explainer: _waited(  # type: ignore[misc]
            explainer(images, topk=one.targets).maps
        )
        for name, (one, explainer) in made.items()
    }

    def plain() -> None:
        with torch.inference_mode():
            _waited(network(images))

    timings = alternate({BASELINE: plain, **cases}, baseline=BASELINE, rounds=rounds, warmup=1)
    for timing in timings[1:]:
        one, explainer = made[timing.name]
        yield Measured(one, explainer.layer, backends[timing.name], timing)


def _checked(explainer: Explainer, images: Tensor, point: Point) -> str:
    """How the maps come about."""
    one, several = explainer(images), explainer(images, topk=point.targets)
    off = (several.maps[:, :1] - one.maps).abs().max() / one.maps.abs().max()
    if not float(off) <= SAME:
        raise ParityError(
            f"{point.series} {point.value}: the map of the best class is off by {float(off):.1e} "
            f"beside {point.targets - 1} others; nothing is timed"
        )
    return several.backend


def _waited(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def rows(
    found: Sequence[Measured], *, model: str, batch_size: int, device: str, threads: int
) -> list[dict[str, object]]:
    """One row for each point; `ratio` is its time over that of a plain forward pass."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    source = provenance("torchvision", "timm", threads=threads)
    return [
        {
            "model": model,
            "batch_size": batch_size,
            "series": one.point.series,
            "value": one.point.value,
            "layer": one.layer,
            "targets": one.point.targets,
            "size": f"{one.point.side} x {one.point.side}",
            "head": one.backend.partition(", ")[2],
            **{k: rounded(v) for k, v in asdict(one.timing).items() if k != "name"},
            "device": device,
            "gpu": gpu,
            **source,
        }
        for one in found
    ]


def prepared(model: str, device: str) -> nn.Module:
    """A network with random weights on a device."""
    return build(model).to(device)
