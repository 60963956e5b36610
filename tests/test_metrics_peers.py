"""The metrics beside those of other libraries.

Where another library computes something else the test says what, and corrects for exactly that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import Explainer
from diffcam_fast.metrics import (
    blurred,
    cascade,
    coherency,
    complexity,
    deletion,
    energy_pointing,
    explain_with,
    impute,
    insertion,
    masked,
    pearson,
    perturbation_curve,
    pointing_game,
    rank_correlation,
    road,
)
from metric_cases import SIZE, TARGETS, N, confident, noise, permutations, values
from networks import pooled


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return confident()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return noise()


@pytest.fixture(scope="module")
def heatmaps() -> Tensor:
    return permutations()


Metric = Callable[..., Tensor]


class TheirExtractor:
    """What torch-cam's metrics ask of an extractor, with maps of ours."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *args: object, **options: object) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> nullcontext[None]:
        return nullcontext()


def softmax_of_logits(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def test_drop_and_increase_beside_torch_cam(
    model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    theirs = pytest.importorskip("torchcam.metrics").ClassificationMetric(
        TheirExtractor(model, heatmaps), softmax_of_logits
    )
    theirs.update(pictures, TARGETS.tolist())
    seen = masked(model, pictures, heatmaps, TARGETS)
    # They add 1e-7 to what they divide by.
    shrunk = seen.drop * seen.before / (seen.before + 1e-7)
    assert theirs.summary()["avg_drop"] == pytest.approx(float(shrunk.mean()), abs=1e-6)
    assert theirs.summary()["conf_increase"] == pytest.approx(float(seen.increase.mean()))
    # neither is trivial here
    assert 0 < seen.increase.mean() < 1 and seen.drop.max() > 0.1


@pytest.mark.parametrize("steps", [8, 7])
def test_curves_beside_torch_cam(
    steps: int, model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    theirs = pytest.importorskip("torchcam.metrics").DeletionInsertionMetric(
        TheirExtractor(model, heatmaps), softmax_of_logits, steps=steps, batch_size=5
    )
    theirs.update(pictures, TARGETS.tolist())
    pixels = SIZE[0] * SIZE[1]
    step = -(-pixels // steps)
    kinds: tuple[tuple[Literal["deletion", "insertion"], Metric], ...]
    kinds = (("deletion", deletion), ("insertion", insertion))
    for kind, metric in kinds:
        # Both baselines of theirs are zeros.
        curve = perturbation_curve(
            model,
            pictures,
            heatmaps,
            TARGETS,
            kind=kind,
            step=step,
            baseline=torch.zeros_like,
        )
        fractions = torch.tensor([*range(0, pixels, step), pixels]) / pixels
        expected = theirs.summary()[f"{kind}_auc"]
        # They weigh the shorter last step by its width.
        assert float(torch.trapezoid(curve, fractions).mean()) == pytest.approx(expected, abs=1e-6)
        ours = metric(model, pictures, heatmaps, TARGETS, step=step, baseline=torch.zeros_like)
        if pixels % step == 0:
            assert float(ours.mean()) == pytest.approx(expected, abs=1e-6)
        else:
            assert abs(float(ours.mean()) - expected) > 1e-6


def their_targets() -> list[Any]:
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    return [targets.ClassifierOutputSoftmaxTarget(int(c)) for c in TARGETS]


def test_drop_and_increase_beside_pytorch_grad_cam(
    model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.cam_mult_image")
    given = (pictures, heatmaps.numpy(), their_targets(), model)
    seen = masked(model, pictures, heatmaps, TARGETS)
    # Theirs is not divided by the confidence.
    drop = theirs.DropInConfidence()(*given)
    np.testing.assert_allclose(drop, (seen.drop * seen.before).numpy(), atol=1e-6)
    increase = theirs.IncreaseInConfidence()(*given)
    np.testing.assert_array_equal(increase, seen.increase.numpy())


def test_coherency_and_complexity_beside_pytorch_grad_cam(
    model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.arcc")
    np.testing.assert_allclose(
        theirs.Complexity()(heatmaps.numpy()), complexity(heatmaps).numpy(), atol=1e-6
    )
    explain = explain_with(Explainer(model, example_inputs=pictures))

    def base(input_tensor: Tensor, targets: object) -> np.ndarray:
        return explain(input_tensor, TARGETS).numpy()

    expected = theirs.Coherency()(pictures, heatmaps.numpy(), None, model, base)
    ours = coherency(explain, pictures, heatmaps, TARGETS)
    # They add 1e-8 to the product of two standard deviations near 0.3.
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_imputation_beside_pytorch_grad_cam(pictures: Tensor, heatmaps: Tensor) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road").NoisyLinearImputer(noise=0)
    for image, heatmap in zip(pictures, heatmaps, strict=True):
        keep = heatmap < 0.3
        torch.testing.assert_close(
            impute(image, keep), theirs(image, keep.float()), atol=1e-5, rtol=0
        )


def test_road_beside_pytorch_grad_cam(
    model: nn.Module, pictures: Tensor, heatmaps: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road")
    # Their noise has no seed of its own.
    monkeypatch.setattr(theirs.torch, "randn_like", torch.zeros_like)
    given = (heatmaps.numpy(), their_targets(), model)
    expected = theirs.ROADCombined()(pictures, *given)
    ours = road(model, pictures, heatmaps, TARGETS, noise=0)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-6)
    assert np.ptp(expected) > 0.01


def test_road_keeps_its_share_of_a_map_of_zeros_where_a_threshold_keeps_nothing() -> None:
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road")
    kept: list[int] = []

    def imputer(image: Tensor, keep: Tensor) -> Tensor:
        kept.append(int(keep.sum()))
        return image

    sparse = torch.zeros(10, 10)
    sparse[:2] = torch.linspace(0.1, 1, 20).view(2, 10)
    theirs.RemoveMostRelevantFirst(50, imputer)(torch.zeros(3, 10, 10), sparse)
    assert kept == [0]
    # The share of 1s that is left of an image: half of it by rank, though 80 % of the map is 0.

    def share(x: Tensor) -> Tensor:
        return (x == 1).float().mean((1, 2, 3))[:, None]

    image, target = torch.ones(1, 3, 10, 10), torch.tensor([0])
    image[:, :, :, ::2] = 2
    # MoRF keeps 50 of the 80 zeros, LeRF the 20 others and 30 zeros: as many 1s in each.
    found = road(share, image, sparse[None], target, percentiles=(50,), output=values)
    assert float(found) == pytest.approx(0, abs=1e-6)


def test_blur_beside_the_kernel_of_rise() -> None:
    filters = pytest.importorskip("scipy.ndimage")
    dot = np.zeros((11, 11))
    dot[5, 5] = 1
    kernel = torch.from_numpy(filters.gaussian_filter(dot, 5))
    image = torch.zeros(1, 2, 21, 21, dtype=torch.float64)
    image[0, 1, 10, 10] = 1
    spot = blurred(image)
    assert torch.equal(spot[0, 0], torch.zeros(21, 21, dtype=torch.float64))
    torch.testing.assert_close(spot[0, 1, 5:16, 5:16], kernel, atol=1e-12, rtol=0)
    assert spot[0, 1].sum() == pytest.approx(1)


def test_correlations_beside_scipy(heatmaps: Tensor) -> None:
    stats = pytest.importorskip("scipy.stats")
    # with many equal pixels
    coarse = (heatmaps * 5).round() / 5
    other = coarse.roll(1, dims=0)
    found = rank_correlation(coarse, other).tolist()
    flat = coarse.flatten(1).double(), other.flatten(1).double()
    expected = [stats.spearmanr(a, b)[0] for a, b in zip(*flat, strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)
    linear = [stats.pearsonr(a, b)[0] for a, b in zip(*flat, strict=True)]
    assert pearson(coarse, other).tolist() == pytest.approx(linear, abs=1e-6)
    for coefficient in (pearson, rank_correlation):
        assert coefficient(coarse, torch.zeros_like(coarse)).tolist() == [0] * N


def test_pointing_beside_quantus(model: nn.Module, pictures: Tensor, heatmaps: Tensor) -> None:
    quantus = pytest.importorskip("quantus", reason="its opencv-python is a second cv2")
    masks = heatmaps.roll(1, dims=2) > 0.5
    options = {"disable_warnings": True, "display_progressbar": False}
    given = {
        "model": model,
        "x_batch": pictures.numpy(),
        "y_batch": TARGETS.numpy(),
        "a_batch": heatmaps[:, None].numpy(),
        "s_batch": masks[:, None].numpy(),
        "device": "cpu",
    }
    plain = {"abs": False, "normalise": False, **options}
    hits = quantus.PointingGame(**plain)(**given)
    assert pointing_game(heatmaps, masks, tolerance=0).tolist() == hits
    mass = quantus.RelevanceMassAccuracy(**plain)(**given)
    assert energy_pointing(heatmaps, masks).tolist() == pytest.approx(mass, abs=1e-6)


def test_deletion_beside_quantus(heatmaps: Tensor) -> None:
    quantus = pytest.importorskip("quantus", reason="its opencv-python is a second cv2")
    torch.manual_seed(0)
    # Quantus flips channels one by one: with one channel its pixels are ours.
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)
    ).eval()
    images = torch.randn(N, 1, *SIZE, generator=torch.Generator().manual_seed(5))
    theirs = quantus.PixelFlipping(
        features_in_step=36, perturb_baseline="black", abs=False, normalise=False,
        disable_warnings=True, display_progressbar=False,
    )(
        model=net, x_batch=images.numpy(), y_batch=TARGETS.numpy(),
        a_batch=heatmaps[:, None].numpy(), softmax=True, device="cpu",
    )  # fmt: skip
    curve = perturbation_curve(net, images, heatmaps, TARGETS, kind="deletion", step=36)
    # Their curve begins after the first step.
    found = np.stack([np.asarray(row).reshape(-1) for row in theirs])
    black = images.flatten(1).amin(dim=1)
    ours = perturbation_curve(
        net, images, heatmaps, TARGETS, kind="deletion", step=36,
        # Their black is the least value of the image, not the mean colour.
        baseline=lambda x: black.view(-1, 1, 1, 1).expand_as(x),
    )  # fmt: skip
    np.testing.assert_allclose(found, ours[:, 1:].numpy(), atol=1e-6)
    assert not np.allclose(found, curve[:, 1:].numpy(), atol=1e-3)


def test_randomisation_beside_quantus(pictures: Tensor) -> None:
    quantus = pytest.importorskip("quantus", reason="its opencv-python is a second cv2")
    wrapped = quantus.helpers.model.pytorch_model.PyTorchModel(pooled(), channel_first=True)
    theirs = [name for name, _ in wrapped.get_random_layer_generator(order="top_down", seed=1)]
    ours = [name for name, _ in cascade(pooled())]
    assert [name for name in theirs if name != "original"] == ours
