"""Several layers, several views, and networks that return something else than logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from diffcam_fast import Augment, Explainer
from diffcam_fast.fusion import fuse
from diffcam_fast.layout import Layout
from networks import images, pooled, relative_error, with_mlp

LAYERS = ["0.1", "0"]


def unit(maps: Tensor, size: tuple[int, int]) -> Tensor:
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    scaled = (maps - low) / torch.where(high == low, 1.0, high - low)
    return F.interpolate(scaled, size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("method", ["diff_grad_cam", "layer_cam", "eigen_cam", "recipro_cam"])
@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["pooled", "mlp"])
def test_maps_of_layers_are_fused(model: nn.Module, method: str, how: str) -> None:
    several = Explainer(model, layer=LAYERS, method=method, fuse=how)  # type: ignore[arg-type]
    result = several(images(), [[1, 2]] * 3)
    singles = [Explainer(model, layer=n, method=method)(images(), [[1, 2]] * 3) for n in LAYERS]
    size = (10, 12)
    parts = torch.stack([unit(single.maps, size) for single in singles])
    expected = parts.mean(dim=0) if how == "mean" else parts.amax(dim=0)
    assert relative_error(result.maps, expected) < 1e-4
    assert result.layer == several.layer == "0.1, 0"
    backwards = Explainer(model, layer=LAYERS[::-1], method=method, fuse=how)  # type: ignore[arg-type]
    assert torch.allclose(backwards(images(), [[1, 2]] * 3).maps, result.maps, atol=1e-5)


def test_several_layers_take_one_forward_pass() -> None:
    model = with_mlp()
    passes: list[int] = []
    model[0][0].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    for method, count in (("diff_grad_cam", 1), ("eigen_cam", 1), ("recipro_cam", 2)):
        explainer = Explainer(model, layer=LAYERS, method=method)
        passes.clear()
        explainer(images())
        assert sum(n == 3 for n in passes) == count


def test_an_activation_that_is_overwritten_between_two_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()
    model(images())
    result = Explainer(model, layer=["0", "2"], relu=False, example_inputs=images())(images(), 1)
    for number, name in enumerate(["0", "2"]):
        one = Explainer(model, layer=name, relu=False, example_inputs=images())(images(), 1)
        assert number == 1 or float(one.maps.min()) < 0
        assert bool(one.finite.all())
    assert bool(result.finite.all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": []}, "one at least"),
        ({"layer": ["0", "0"]}, "each layer once"),
        ({"fuse": "sum"}, "fuse must be 'mean' or 'max', got 'sum'"),
        ({"memory": 0}, "positive number of bytes, got 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explainer(pooled(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'sum'"):
        fuse([torch.zeros(1, 1, 2, 2)], "sum")  # type: ignore[arg-type]


def test_views_are_averaged_where_they_belong() -> None:
    model = pooled()
    plain = Explainer(model, relu=False)
    explainer = Explainer(
        model, relu=False, augment=Augment(flip=True, scales=(1, 1.5), factors=(1, 0.9))
    )
    x = images()
    result, classes = explainer(x), plain(x).targets
    expected = []
    for size in ((10, 12), (15, 18)):
        scaled = x if size == (10, 12) else F.interpolate(x, size, mode="bilinear")
        for view, flipped in ((scaled, False), (scaled.flip(3), True)):
            for factor in (1, 0.9):
                maps = plain(view * factor, classes).maps
                maps = maps.flip(3) if flipped else maps
                expected.append(F.interpolate(maps, (5, 6), mode="bilinear", align_corners=False))
    assert relative_error(result.maps, torch.stack(expected).mean(dim=0)) < 1e-5
    assert torch.equal(result.targets, classes)
    assert torch.equal(result.logits, plain(x).logits)


def test_mirrored_images_have_mirrored_maps_under_flips() -> None:
    explainer = Explainer(with_mlp(), augment=Augment())
    straight, mirrored = explainer(images(), 2).maps, explainer(images().flip(3), 2).maps
    assert torch.allclose(straight, mirrored.flip(3), atol=1e-6)
    assert not torch.allclose(Explainer(with_mlp())(images(), 2).maps, straight, atol=1e-4)


def test_bad_views_are_refused() -> None:
    for options in ({"scales": ()}, {"scales": (0,)}, {"factors": (-1.0,)}):
        with pytest.raises(ValueError, match="must be positive numbers, one at least"):
            Augment(**options)  # type: ignore[arg-type]


class Segmentation(nn.Module):
    """Returns class scores of each pixel in a dictionary, as torchvision's networks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )
        self.eval()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        small = self.classifier(self.features(x))
        return {"out": F.interpolate(small, x.shape[2:], mode="bilinear")}


def pixels(output: dict[str, Tensor]) -> Tensor:
    return output["out"].mean(dim=(2, 3))


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "recipro_cam", "score_cam"])
def test_segmentation_by_a_function_of_its_output(method: str) -> None:
    model = Segmentation()
    explainer = Explainer(model, layer="features", method=method, output=pixels, relu=False)
    region = torch.zeros(10, 12)
    region[2:5, 3:8] = 1

    def score(output: dict[str, Tensor]) -> Tensor:
        return (output["out"][:, 1] * region).sum(dim=(1, 2))

    result = explainer(images(), score)
    a = copy.deepcopy(model).double().features(images().double()).detach().requires_grad_()
    out = F.interpolate(copy.deepcopy(model).double().classifier(a), (10, 12), mode="bilinear")
    expected = (out[:, 1] * region.double()).sum(dim=(1, 2))
    assert torch.allclose(result.scores[:, 0].double(), expected, atol=1e-5)
    if method in ("grad_cam", "hires_cam"):
        (g,) = torch.autograd.grad(expected.sum(), a)
        weights = g.mean(dim=(2, 3), keepdim=True) if method == "grad_cam" else g
        assert relative_error(result.maps[:, 0], (weights * a).sum(dim=1)) < 1e-5
        # Cells far from the region have no part in it.
        if method == "hires_cam":
            assert (result.maps[:, :, 4:] == 0).all() and (result.maps[:, :, 1:3] != 0).any()
    # The classes of the mean over all pixels take a contrast too.
    assert Explainer(model, layer="features", output=pixels)(images()).contrast == "log_odds"


def test_a_segmentation_network_of_torchvision() -> None:
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights_backbone=None, num_classes=4
    )
    explainer = Explainer(
        model, method="grad_cam", output=pixels, example_inputs=torch.randn(1, 3, 64, 64)
    )
    result = explainer(torch.randn(2, 3, 64, 64), lambda out: out["out"][:, 2].sum(dim=(1, 2)))
    assert min(result.maps.shape[2:]) > 1 and bool(result.finite.all())


def test_many_labels_are_functions_or_single_logits() -> None:
    model = with_mlp()
    sigmoid = Explainer(model, method="grad_cam", relu=False)
    both = sigmoid(images(), lambda out: out[:, [1, 3]].sigmoid())
    logits = sigmoid(images(), [[1, 3]] * 3)
    slope = logits.scores.sigmoid() * (1 - logits.scores.sigmoid())
    assert relative_error(both.maps, logits.maps * slope[:, :, None, None]) < 1e-4


def test_layouts() -> None:
    tokens = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    layout = Layout(channel_axis=2, grid=(2, 3), first=1)
    cells = layout.cells(tokens)
    assert cells.shape == (2, 3, 2, 3) and float(cells[1, 2, 1, 0]) == float(tokens[1, 4, 2])
    changed = layout.with_cells(tokens, -cells)
    assert torch.equal(changed[:, 0], tokens[:, 0]) and torch.equal(changed[:, 1:], -tokens[:, 1:])
    last = Layout(channel_axis=3)
    nhwc = torch.randn(2, 4, 5, 3)
    assert torch.equal(last.with_cells(nhwc, last.cells(nhwc)), nhwc)
    for axis, grid in ((2, None), (1, (2, 2))):
        with pytest.raises(ValueError, match="in axis 1 or 3 of four, or in axis 2 of tokens"):
            Layout(channel_axis=axis, grid=grid)
