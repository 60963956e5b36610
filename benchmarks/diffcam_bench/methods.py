"""`diffcam bench methods`: what an explanation costs over a plain forward pass, beside its peers.

Every library explains the same classes of the same batch at the same layer, and ends with maps of
the images' size. Each has a copy of the network of its own, for the sake of hooks that stay on and
of gradients that are written.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffcam_bench.measure import Timing, alternate
from diffcam_bench.rows import optional, provenance
from diffcam_bench.zoo import build, size_of
from diffcam_fast import Explainer

BASELINE = "plain forward"
# The rounding of float32, and of two bilinear interpolations, on maps in [0, 1].
TOLERANCE = 5e-6


@dataclass(frozen=True)
class Comparison:
    """One run of the benchmark.

    Attributes:
        model: `timm:NAME` or `torchvision:NAME`, random weights.
        layer: the target layer.
        head: how ours explains it.
        batch_size: N.
        size: (H, W) in pixels.
        timings: one for each library, and the plain forward.
        differences: library -> largest difference of its Grad-CAM maps in [0, 1] from ours.
        source: where the numbers come from, see `diffcam_bench.rows.provenance`.
    """

    model: str
    layer: str
    head: str
    batch_size: int
    size: tuple[int, int]
    timings: tuple[Timing, ...]
    differences: Mapping[str, float]
    source: Mapping[str, object]

    def rows(self) -> list[dict[str, object]]:
        """One row for each candidate."""
        return [
            {
                "model": self.model,
                "layer": self.layer,
                "head": self.head,
                "batch_size": self.batch_size,
                "size": f"{self.size[0]} x {self.size[1]}",
                **{key: rounded(value) for key, value in asdict(timing).items()},
                "difference": rounded(self.differences.get(timing.name, "")),
                **self.source,
            }
            for timing in self.timings
        ]

    def table(self) -> str:
        """The table for a README, in Markdown."""
        name = self.model.partition(":")[2]
        lines = [
            f"| {name}, batch {self.batch_size}, {self.source['threads']} threads "
            "| over a plain forward | p20 - p80 | ms |",
            "| --- | ---: | ---: | ---: |",
        ]
        for t in self.timings:
            spread = f"{t.ratio_p20:.2f} - {t.ratio_p80:.2f}"
            lines.append(f"| {t.name} | {t.ratio:.2f} | {spread} | {t.median_ms:.0f} |")
        return "\n".join(lines)


class ParityError(click.ClickException):
    """Two libraries disagree about the maps; speeds of different things are not compared."""


def compare(
    model: str,
    *,
    batch_size: int,
    rounds: int,
    threads: int,
    progress: Callable[[int], object] = lambda done: None,
) -> Comparison:
    """Checks that all libraries give the same Grad-CAM maps, then times them in turn.

    Raises:
        ParityError: they do not; nothing was timed.
    """
    torch.set_num_threads(threads)
    network = build(model)
    size = size_of(model, network)
    images = torch.randn(batch_size, 3, *size, generator=torch.Generator().manual_seed(1))
    ours = Explainer(copy.deepcopy(network), method="grad_cam", example_inputs=images)
    targets = predicted(network, images)
    peers = {
        "pytorch-grad-cam": _pytorch_grad_cam(copy.deepcopy(network), ours.layer),
        "torch-cam": _torch_cam(copy.deepcopy(network), ours.layer),
        "captum": _captum(copy.deepcopy(network), ours.layer),
    }
    differences = _check_parity(ours, peers, images, targets)
    diff = Explainer(copy.deepcopy(network), example_inputs=images)

    def plain() -> Tensor:
        with torch.inference_mode():
            return network(images)  # type: ignore[no-any-return]

    cases: dict[str, Callable[[], object]] = {
        BASELINE: plain,
        "diffcam-fast, DiffGradCAM": lambda: diff(images, targets).heatmaps(size),
        "diffcam-fast, GradCAM": lambda: ours(images, targets).heatmaps(size),
    }
    for name, peer in peers.items():
        cases[f"{name}, GradCAM"] = lambda peer=peer: peer(images, targets)  # type: ignore[misc]
    timings = alternate(cases, baseline=BASELINE, rounds=rounds, progress=progress)
    return Comparison(
        model=model,
        layer=ours.layer,
        head="closed form" if ours.inspect().closed_form else "backward",
        batch_size=batch_size,
        size=size,
        timings=tuple(timings),
        differences={f"{name}, GradCAM": error for name, error in differences.items()},
        source=provenance("torchvision", "timm", "grad-cam", "torchcam", "captum", threads=threads),
    )


Peer = Callable[[Tensor, list[int]], Tensor]


def predicted(network: nn.Module, images: Tensor) -> list[int]:
    """The class of the largest logit of each image."""
    with torch.inference_mode():
        return [int(c) for c in network(images).argmax(dim=1)]


def _check_parity(
    ours: Explainer, peers: Mapping[str, Peer], images: Tensor, targets: list[int]
) -> dict[str, float]:
    size = (images.shape[2], images.shape[3])
    heatmaps = ours(images, targets).heatmaps(size)[:, 0]
    if heatmaps.amax() == 0:
        raise ParityError("all maps are constant; they would agree whatever was computed")
    # pytorch-grad-cam normalises once more after the interpolation.
    expected = {"pytorch-grad-cam": min_max(heatmaps)}
    differences = {
        name: float((peer(images, targets) - expected.get(name, heatmaps)).abs().max())
        for name, peer in peers.items()
    }
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise ParityError(
                f"{name}'s Grad-CAM maps differ from ours by {difference:.1e}, more than "
                f"{TOLERANCE:.0e}; no speed is compared"
            )
    return differences


def min_max(maps: Tensor) -> Tensor:
    """Maps (N, h, w) by their minima and maxima to [0, 1]."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low)


def upsampled(maps: Tensor, images: Tensor) -> Tensor:
    """Maps (N, h, w) at the size of images (N, C, H, W)."""
    return interpolate(maps[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[
        :, 0
    ]


def _pytorch_grad_cam(network: nn.Module, layer: str) -> Peer:
    library = optional("pytorch_grad_cam", distribution="grad-cam")
    classes = optional("pytorch_grad_cam.utils.model_targets", distribution="grad-cam")
    cam = library.GradCAM(network, [network.get_submodule(layer)])

    def explain(images: Tensor, targets: list[int]) -> Tensor:
        return torch.from_numpy(cam(images, [classes.ClassifierOutputTarget(c) for c in targets]))

    return explain


def _torch_cam(network: nn.Module, layer: str) -> Peer:
    extractor = optional("torchcam.methods", distribution="torchcam").GradCAM(network, layer)

    def explain(images: Tensor, targets: list[int]) -> Tensor:
        scores = network(images)
        [maps] = extractor(targets, scores)
        return upsampled(maps, images)

    return explain


def _captum(network: nn.Module, layer: str) -> Peer:
    target = network.get_submodule(layer)
    attribution = optional("captum.attr", distribution="captum").LayerGradCam(network, target)

    def explain(images: Tensor, targets: list[int]) -> Tensor:
        maps = attribution.attribute(images, target=targets, relu_attributions=True)[:, 0].detach()
        return upsampled(min_max(maps), images)

    return explain


def rounded(value: object) -> object:
    """A number as a row has it."""
    return f"{value:.4g}" if isinstance(value, float) else value
