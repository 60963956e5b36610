"""Colours equal matplotlib's; blends and pairs hold the values that arithmetic says."""

import matplotlib
import numpy as np
import pytest
from PIL import Image

from diffcam_fast.images.colour import blend, colour_map, side_by_side


@pytest.mark.parametrize("cmap", ["turbo", "viridis", "jet", "gray", "tab10"])
def test_colours_are_matplotlibs(cmap):
    values = np.concatenate(
        [np.linspace(0, 1, 1001), np.arange(257) / 256, np.nextafter([0.5, 1.0], 0)]
    ).astype(np.float32)
    expected = matplotlib.colormaps[cmap](values, bytes=True)[:, :3]
    # matplotlib spreads a map of fewer colours (tab10) by its own size.
    table = matplotlib.colormaps[cmap]
    if table.N == 256:
        assert (colour_map(values[None], cmap)[0] == expected).all()
    else:
        ends = colour_map(np.array([[0.0, 1.0]]), cmap)[0]
        assert (ends == expected[[0, 1000]]).all()


def test_nan_and_values_outside():
    found = colour_map(np.array([[np.nan, -3.0, 7.0, np.inf, -np.inf]]), "gray")
    assert found[0, :, 0].tolist() == [128, 0, 255, 255, 0]


def test_leading_axes():
    values = np.random.default_rng(0).random((2, 3, 4, 5))
    found = colour_map(values)
    assert found.shape == (2, 3, 4, 5, 3)
    assert (found[1, 2] == colour_map(values[1, 2])).all()


def test_unknown_map():
    with pytest.raises(ValueError, match="'rainbows' is unknown; use one of matplotlib's"):
        colour_map(np.zeros((1, 1)), "rainbows")


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_blend_is_the_weighted_mean(alpha):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 1, 6, 5, 3), dtype=np.uint8)
    heatmaps = rng.random((2, 3, 6, 5))
    found = blend(images, heatmaps, alpha=alpha, cmap="turbo")
    expected = (1 - alpha) * images + alpha * colour_map(heatmaps).astype(float)
    assert found.shape == (2, 3, 6, 5, 3)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= (0 if alpha in (0, 1) else 1.0)


def test_blend_keeps_black_and_white():
    white = np.full((2, 2, 3), 255, dtype=np.uint8)
    assert (blend(white, np.ones((2, 2)), alpha=0.3, cmap="gray") == 255).all()
    assert (blend(white * 0, np.zeros((2, 2)), alpha=0.3, cmap="gray") == 0).all()


@pytest.mark.parametrize(
    ("images", "heatmaps", "alpha", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5)), 0.5, ValueError, "same H and W"),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4)), 0.5, ValueError, "same H and W"),
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4)), 0.5, TypeError, "float32"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), 1.5, ValueError, "alpha is 1.5"),
    ],
)
def test_blend_refuses(images, heatmaps, alpha, error, message):
    with pytest.raises(error, match=message):
        blend(images, heatmaps, alpha=alpha)


def test_side_by_side():
    left = Image.new("RGB", (4, 6), (255, 0, 0))
    right = Image.new("RGB", (5, 6), (0, 255, 0))
    both = np.asarray(side_by_side(left, right))
    assert both.shape == (6, 9, 3)
    assert (both[:, :4] == (255, 0, 0)).all()
    assert (both[:, 4:] == (0, 255, 0)).all()


def test_side_by_side_takes_the_height_of_the_first():
    left = Image.new("RGB", (4, 6), (255, 0, 0))
    right = Image.new("RGB", (10, 12), (0, 255, 0))
    both = np.asarray(side_by_side(left, right))
    assert both.shape == (6, 9, 3)
    assert (both[:, 4:] == (0, 255, 0)).all()
