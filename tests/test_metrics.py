"""The metrics, by hand and by their properties; `test_metrics_peers.py` has other libraries."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import Explainer
from diffcam_fast.metrics import (
    adcc,
    average_drop,
    box_masks,
    cascade,
    coherency,
    complexity,
    confidence,
    deletion,
    energy_pointing,
    explain_with,
    impute,
    increase_in_confidence,
    insertion,
    masked,
    perturbation_curve,
    pointing_game,
    rank_correlation,
    road,
)
from metric_cases import TARGETS, N, confident, noise, permutations, values
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


def first_pixel(images: Tensor) -> Tensor:
    """Scores of two classes: the first pixel, and what it lacks to 1."""
    first = images[:, 0, 0, 0]
    return torch.stack([first, 1 - first], dim=1)


def test_drop_and_increase_by_hand() -> None:
    images = torch.full((3, 1, 2, 2), 0.8)
    images[2, 0, 0, 0] = 0.0
    maps = torch.zeros(3, 2, 2)
    maps[:, 0, 0] = torch.tensor([0.25, 1.0, 1.0])
    seen = masked(first_pixel, images, maps, torch.tensor([0, 0, 0]), output=values)
    assert seen.before.tolist() == pytest.approx([0.8, 0.8, 0.0])
    assert seen.after.tolist() == pytest.approx([0.2, 0.8, 0.0])
    # of no confidence nothing is lost
    assert seen.drop.tolist() == pytest.approx([0.75, 0.0, 0.0])
    assert seen.increase.tolist() == [0, 0, 0]
    # the other class gains what the first loses; a gain is no negative drop
    targets = torch.tensor([1, 1, 1])
    assert average_drop(first_pixel, images, maps, targets, output=values).tolist() == [0, 0, 0]
    rises = increase_in_confidence(first_pixel, images, maps, targets, output=values)
    assert rises.tolist() == [1, 0, 0]


def test_the_confidence_is_the_targets_and_not_the_best_one(
    model: nn.Module, pictures: Tensor
) -> None:
    expected = model(pictures).softmax(dim=1)[torch.arange(N), TARGETS]
    torch.testing.assert_close(confidence(model, pictures, TARGETS), expected.detach())


def test_complexity_and_adcc_by_hand() -> None:
    maps = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [0, 0]]])
    assert complexity(maps).tolist() == [0, 1, 0.25]
    parts = [(0.9, 0.3, 0.2), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0)]
    coh, compl, drop = torch.tensor(parts, dtype=torch.float64).T
    expected = [statistics.harmonic_mean([a, 1 - b, 1 - c]) for a, b, c in parts]
    per_image = adcc(coh, compl, drop)
    assert per_image.tolist() == pytest.approx(expected, rel=1e-12)
    # the harmonic mean is concave: that of the means is no less than the mean of them
    assert adcc(coh.mean(), compl.mean(), drop.mean()) > per_image.mean()
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    for dead in ((zero, zero, zero), (one, one, zero), (one, zero, one)):
        assert adcc(*dead) == 0


def test_coherency_of_a_constant_map_is_zero_and_of_an_opposite_one_too() -> None:
    ramp = torch.linspace(0, 1, 9).view(1, 3, 3)
    images, target = torch.ones(1, 3, 3, 3), torch.tensor([0])

    def of(first: Tensor, second: Tensor) -> float:
        return float(coherency(lambda x, c: second, images, first, target))

    assert of(ramp, ramp) == pytest.approx(1)
    assert of(ramp, 1 - ramp) == pytest.approx(0, abs=1e-7)
    assert of(ramp, torch.zeros_like(ramp)) == 0
    assert of(torch.full_like(ramp, 0.1), ramp) == 0


def test_coherency_explains_the_masked_image(
    model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    explain = explain_with(Explainer(model, example_inputs=pictures), batch_size=3)
    maps = explain(pictures, TARGETS)
    again = explain(pictures * maps[:, None], TARGETS)
    pairs = zip(maps.flatten(1), again.flatten(1), strict=True)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    found = coherency(explain, pictures, maps, TARGETS)
    assert found.tolist() == pytest.approx([(r + 1) / 2 for r in expected], abs=1e-6)
    assert found.max() - found.min() > 1e-3


def test_curves_by_hand() -> None:
    # The score is the share of the image that is there, weighed 8, 4, 2, 1.
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15
    images = torch.ones(2, 1, 1, 4)

    def model(x: Tensor) -> Tensor:
        return (x[:, 0, 0] * weights).sum(dim=1, keepdim=True)

    best_and_worst = torch.tensor([[[1.0, 0.6, 0.3, 0.0]], [[0.0, 0.3, 0.6, 1.0]]])
    target = torch.tensor([0, 0])
    options: dict[str, Any] = {"step": 1, "output": values}
    curve = perturbation_curve(model, images, best_and_worst, target, kind="deletion", **options)
    assert (15 * curve).tolist() == [
        pytest.approx([15, 7, 3, 1, 0], abs=1e-5),
        pytest.approx([15, 14, 12, 8, 0], abs=1e-5),
    ]
    areas = deletion(model, images, best_and_worst, target, **options)
    assert areas.tolist() == pytest.approx([18.5 / 60, 41.5 / 60])
    # onto black, insertion is deletion of the reversed order
    zeros = {**options, "baseline": torch.zeros_like}
    inserted = insertion(model, images, best_and_worst, target, **zeros)
    assert inserted.tolist() == pytest.approx([41.5 / 60, 18.5 / 60])
    # three pixels a step: 0, 3 and all; the shorter last step weighs as much
    wide = deletion(model, images, best_and_worst, target, step=3, output=values)
    assert wide.tolist() == pytest.approx([(15 + 1 * 2 + 0) / 60, (15 + 8 * 2 + 0) / 60])


def test_equal_pixels_go_from_the_top_left_on() -> None:
    image, flat = torch.arange(1.0, 5).view(1, 1, 2, 2), torch.zeros(1, 2, 2)
    curve = perturbation_curve(
        lambda x: x.sum((2, 3)), image, flat, torch.tensor([0]),
        kind="deletion", step=1, output=values,
    )  # fmt: skip
    assert curve.tolist() == [[10, 9, 7, 4, 0]]


def test_pointing_by_hand() -> None:
    maps = torch.zeros(4, 40, 40)
    maps[0, 20, 20] = maps[1, 20, 20] = maps[2, 0, 0] = 1.0
    boxes = [[34, 20, 40, 21], [35, 20, 40, 21], [5, 5, 9, 9], [0, 0, 9, 9]]
    masks = box_masks(torch.tensor(boxes), (40, 40))
    # 14 pixels away is inside the open disc, 15 is not; a constant map points nowhere
    assert pointing_game(maps, masks).tolist() == [1, 0, 1, 0]
    assert pointing_game(maps, masks, tolerance=0).tolist() == [0, 0, 0, 0]
    assert pointing_game(maps, masks | (maps == 1), tolerance=0).tolist() == [1, 1, 1, 0]
    spread = torch.zeros(2, 2, 4)
    spread[0, 0] = torch.tensor([0.5, 1.0, 0.5, 0.0])
    # x runs along the last axis: the left half of the upper row holds 1.5 of 2
    left = box_masks(torch.tensor([[0, 0, 2, 2], [0, 0, 2, 2]]), (2, 4))
    assert energy_pointing(spread, left).tolist() == [0.75, 0]


def test_imputed_pixels_are_the_means_of_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 9, 7, generator=generator, dtype=torch.float64)
    keep = torch.rand(9, 7, generator=generator) < 0.3
    filled = impute(image, keep)
    assert torch.equal(filled[:, keep], image[:, keep])
    kernel = torch.tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]], dtype=torch.float64) / 12
    weigh = torch.nn.functional.conv2d
    around = weigh(filled[:, None], kernel[None, None], padding=1)[:, 0]
    inside = weigh(torch.ones(1, 1, 9, 7, dtype=torch.float64), kernel[None, None], padding=1)[0]
    error = (filled - around / inside)[:, ~keep].abs().max()
    assert error < 1e-12
    assert torch.equal(impute(image, torch.ones_like(keep)), image)
    assert torch.equal(impute(image, torch.zeros_like(keep)), torch.zeros_like(image))


def test_road_is_seeded_and_an_image_is_the_same_in_any_batch(
    model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    options: dict[str, Any] = {"noise": 0.5, "percentiles": (30, 60)}
    found = road(model, pictures, heatmaps, TARGETS, seed=1, **options)
    again = road(model, pictures, heatmaps, TARGETS, seed=1, batch_size=3, **options)
    other = road(model, pictures, heatmaps, TARGETS, seed=2, **options)
    torch.testing.assert_close(again, found, atol=1e-6, rtol=0)
    alone = road(model, pictures[2:3], heatmaps[2:3], TARGETS[2:3], seed=1, **options)
    torch.testing.assert_close(alone, found[2:3], atol=1e-6, rtol=0)
    assert (other - found).abs().max() > 1e-4


def test_road_tells_a_good_map_from_its_opposite(pictures: Tensor) -> None:
    # Half of each map is 0: by a threshold MoRF would remove all of it.
    bright = torch.zeros(N, 3, 16, 16)
    bright[:, :, :8, :8] = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(4)) + 1

    def scores(x: Tensor) -> Tensor:
        return x[:, :, :8, :8].mean((1, 2, 3))[:, None]

    maps = (bright.mean(dim=1) / 2).clamp(0, 1)
    target = torch.zeros(N, dtype=torch.int64)
    good = road(scores, bright, maps, target, output=values)
    assert (good > 0.05).all()
    bad = road(scores, bright, 1 - maps, target, output=values)
    assert (bad < -0.05).all()


Metric = Callable[..., Tensor]
METRICS: dict[str, Metric] = {
    "average_drop": average_drop,
    "increase_in_confidence": increase_in_confidence,
    "insertion": lambda *a, **k: insertion(*a, step=64, **k),
    "deletion": lambda *a, **k: deletion(*a, step=64, **k),
    "road": lambda *a, **k: road(*a, percentiles=(50,), **k),
}


@pytest.mark.parametrize("name", [*METRICS])
def test_batches_change_nothing_and_the_model_stays_as_it_is(
    name: str, model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    metric = METRICS[name]
    whole = metric(model, pictures, heatmaps, TARGETS, batch_size=1000)
    model.train()
    try:
        split = metric(model, pictures, heatmaps, TARGETS, batch_size=3)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=0)
    assert whole.shape == (N,) and not whole.requires_grad
    none = metric(model, pictures[:0], heatmaps[:0], TARGETS[:0])
    assert none.shape == (0,)


@pytest.mark.parametrize("name", [*METRICS])
def test_a_map_that_is_not_known_gives_a_value_that_is_not_known(
    name: str, model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    broken = heatmaps.clone()
    broken[1, 3, 3] = torch.nan
    found = METRICS[name](model, pictures, broken, TARGETS)
    assert found.isnan().tolist() == [False, True, False, False]
    assert pointing_game(broken, heatmaps > 0.5).isnan().tolist() == [False, True, False, False]
    assert energy_pointing(broken, heatmaps > 0.5).isnan().tolist() == [False, True, False, False]
    assert rank_correlation(broken, heatmaps).isnan().tolist() == [False, True, False, False]
    found = coherency(lambda x, c: heatmaps, pictures, broken, TARGETS)
    assert found.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 16)}, "images must be"),
        ({"heatmaps": torch.zeros(4, 1, 16, 18)}, r"floating point \(N, H, W\)"),
        ({"heatmaps": torch.zeros(4, 8, 18)}, r"must be \(4, 16, 18\)"),
        ({"heatmaps": torch.full((4, 16, 18), 1.5)}, r"in \[0, 1\]"),
        ({"targets": TARGETS.float()}, "int64"),
        ({"targets": TARGETS + 1}, "from 0 to 4"),
        ({"step": 0}, "at least 1 pixel"),
        ({"output": lambda scores: scores[0]}, r"scores must be \(12, K\)"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], message: str, model: nn.Module, pictures: Tensor, heatmaps: Tensor
) -> None:
    given = {"images": pictures, "heatmaps": heatmaps, "targets": TARGETS, **change}
    with pytest.raises(ValueError, match=message):
        deletion(model, **given)


def test_other_refusals(model: nn.Module, pictures: Tensor, heatmaps: Tensor) -> None:
    with pytest.raises(ValueError, match="percentiles"):
        road(model, pictures, heatmaps, TARGETS, percentiles=(0, 50))
    with pytest.raises(ValueError, match="masks must be bool"):
        energy_pointing(heatmaps, heatmaps)
    with pytest.raises(ValueError, match="tolerance"):
        pointing_game(heatmaps, heatmaps > 0.5, tolerance=-1)
    with pytest.raises(ValueError, match="boxes"):
        box_masks(torch.zeros(4), (2, 2))
    with pytest.raises(ValueError, match="explain returned"):
        coherency(lambda x, c: heatmaps[:1], pictures, heatmaps, TARGETS)


def test_cascade_resets_from_the_head_down_and_leaves_the_model_alone(pictures: Tensor) -> None:
    model = pooled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    seen = {name: net(pictures).detach() for name, net in cascade(model, seed=3)}
    assert torch.equal(torch.get_rng_state(), state)
    assert [*seen] == ["2", "0.3", "0.0"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = {name: net(pictures).detach() for name, net in cascade(model, seed=3)}
    assert all(torch.equal(seen[name], again[name]) for name in seen)
    changed = [
        {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
        for _, net in cascade(model, seed=3)
    ]
    assert changed == [
        {"2.weight", "2.bias"},
        {"2.weight", "2.bias", "0.3.weight", "0.3.bias"},
        set(before),
    ]
