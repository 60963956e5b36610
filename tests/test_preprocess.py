"""The preparation agrees with torchvision's, and the region it reports is the one it takes."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffcam_fast.images.preprocess import Preprocess

SIZES = [(256, 256), (500, 375), (375, 500), (301, 199), (224, 224), (97, 1000), (33, 31), (641, 7)]


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def position(width: int, height: int) -> Image.Image:
    """An image that says where it was taken: red rises with x, green with y."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    plane = np.zeros((height, width, 3))
    plane[..., 0], plane[..., 1] = x[None, :], y[:, None]
    return Image.fromarray(np.rint(plane).astype(np.uint8))


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("resize", "crop"), [(256, 224), (232, 224), (97, 64), (64, 64), (75, 63), (93, 64)]
)
def test_agrees_with_torchvision(image_size, interpolation, resize, crop):
    transforms = pytest.importorskip("torchvision.transforms")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, transforms.InterpolationMode(interpolation), antialias=True),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    preprocess = Preprocess(
        size=(crop, crop), crop_pct=crop / resize, interpolation=interpolation, mean=mean, std=std
    )
    image = noise(*image_size)
    ours = preprocess(image)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("image_size", SIZES)
def test_agrees_with_timm_where_height_and_width_differ(image_size):
    transforms_factory = pytest.importorskip("timm.data.transforms_factory")
    theirs = transforms_factory.transforms_imagenet_eval(
        img_size=(96, 160), crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    preprocess = Preprocess(
        size=(96, 160), crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    image = noise(*image_size)
    torch.testing.assert_close(preprocess(image), theirs(image), rtol=0, atol=1e-6)


def test_known_values():
    preprocess = Preprocess(size=(4, 4), crop_pct=1.0, mean=(0.5, 0.0, 0.2), std=(0.5, 1.0, 0.1))
    found = preprocess(Image.new("RGB", (9, 5), (255, 51, 0)))
    expected = torch.tensor([1.0, 0.2, -2.0]).view(3, 1, 1).expand(3, 4, 4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_efficientnet_lite_normalisation():
    preprocess = Preprocess(size=(8, 8), mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    found = preprocess(Image.new("RGB", (20, 20), (0, 127, 255)))
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([-127 / 128, 0.0, 1.0]))


def test_other_modes_are_converted():
    preprocess = Preprocess(size=(8, 8))
    grey = Image.new("L", (20, 20), 90)
    assert torch.equal(preprocess(grey), preprocess(grey.convert("RGB")))
    assert preprocess.view(grey).mode == "RGB"


@pytest.mark.parametrize(
    ("image_size", "box"),
    [
        ((256, 256), (16.0, 16.0, 240.0, 240.0)),
        ((512, 256), (144.0, 16.0, 368.0, 240.0)),
        ((256, 1024), (16.0, 400.0, 240.0, 624.0)),
        ((1024, 1024), (64.0, 64.0, 960.0, 960.0)),
        ((128, 128), (8.0, 8.0, 120.0, 120.0)),
    ],
)
def test_box_of_easy_sizes(image_size, box):
    assert Preprocess(size=(224, 224)).box(image_size) == box


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (96, 64), (63, 63)])
@pytest.mark.parametrize("image_size", [*SIZES, (4000, 3000), (3000, 30)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.6])
def test_the_network_sees_the_box(size, image_size, crop_pct):
    """The positions in the network's input, extrapolated to its edges, are those of the box."""
    width, height = image_size
    preprocess = Preprocess(size=size, crop_pct=crop_pct, mean=(0.0,) * 3, std=(1.0,) * 3)
    left, top, right, bottom = preprocess.box(image_size)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    seen = preprocess(position(width, height)).double()
    columns = (left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]) / width
    rows = (top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]) / height
    # Near the image's edges the filter meets the border, and 8 bits round: one level is 1/255.
    inner = slice(2, -2)
    slack_x, slack_y = (1.2 / 255 + 0.3 / side for side in (width, height))
    assert np.abs(seen[0].mean(0).numpy() - columns)[inner].max() < slack_x
    assert np.abs(seen[1].mean(1).numpy() - rows)[inner].max() < slack_y


@pytest.mark.parametrize("image_size", [*SIZES, (4000, 3000)])
@pytest.mark.parametrize("max_side", [None, 300, 40])
def test_view_is_the_box(image_size, max_side):
    width, height = image_size
    preprocess = Preprocess(size=(64, 96))
    left, top, right, bottom = preprocess.box(image_size)
    view = preprocess.view(position(width, height), max_side)
    assert max_side is None or max(view.size) <= max_side
    if max_side is None:
        assert view.size == (max(1, round(right - left)), max(1, round(bottom - top)))
    values = np.asarray(view)[..., :2].astype(float) / 255
    columns = (left + (np.arange(view.width) + 0.5) * (right - left) / view.width) / width
    rows = (top + (np.arange(view.height) + 0.5) * (bottom - top) / view.height) / height
    slack_x, slack_y = (1.2 / 255 + 0.3 / side for side in (width, height))
    assert np.abs(values[..., 0].mean(0) - columns).max() < slack_x
    assert np.abs(values[..., 1].mean(1) - rows).max() < slack_y


def test_view_of_whole_pixels_is_an_exact_cut():
    image = noise(512, 256)
    view = Preprocess(size=(224, 224)).view(image)
    assert (np.asarray(view) == np.asarray(image)[16:240, 144:368]).all()


@pytest.mark.parametrize("image_size", [(1, 1), (2_000_000, 1), (1, 2_000_000), (3, 200_000)])
def test_extreme_shapes_need_little_memory(image_size):
    preprocess = Preprocess(size=(32, 32))
    image = Image.new("RGB", image_size, (255, 255, 255))
    found = preprocess(image)
    expected = preprocess(Image.new("RGB", (50, 50), (255, 255, 255)))
    torch.testing.assert_close(found, expected)
    assert max(preprocess.view(image, 100).size) <= 100


@pytest.mark.parametrize("image_size", [(97, 1000), (301, 199)])
def test_the_short_way_for_extreme_shapes_sees_the_same(image_size, monkeypatch):
    preprocess = Preprocess(size=(32, 32), mean=(0.0,) * 3, std=(1.0,) * 3)
    image = noise(*image_size)
    whole = preprocess(image)
    monkeypatch.setattr("diffcam_fast.images.preprocess._MAX_RESIZED", 0)
    # The box is in single precision there, so a value may be rounded to the next of 256 levels.
    torch.testing.assert_close(preprocess(image), whole, rtol=0, atol=1.01 / 255)


def test_with_size_keeps_the_rest():
    preprocess = Preprocess(size=(224, 224), crop_pct=0.95, interpolation="bicubic")
    larger = preprocess.with_size((320, 256))
    assert larger == Preprocess(size=(320, 256), crop_pct=0.95, interpolation="bicubic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 4)}, "size is"),
        ({"size": (4, 4), "crop_pct": 0.0}, "crop_pct is 0.0"),
        ({"size": (4, 4), "crop_pct": 1.5}, "crop_pct is 1.5"),
        ({"size": (4, 4), "interpolation": "area"}, "known are bilinear, bicubic"),
        ({"size": (4, 4), "std": (1.0, 0.0, 1.0)}, "std above 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)
