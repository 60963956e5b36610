"""The interfaces of other libraries beside the libraries themselves."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import captum.attr
import numpy as np
import pytest
import pytorch_grad_cam
import pytorch_grad_cam.utils.image
import pytorch_grad_cam.utils.model_targets as their_targets
import torch
import torchcam.methods
import torchcam.utils
import torchvision
from PIL import Image
from torch import Tensor, nn

from diffcam_fast import Explainer, compat
from diffcam_fast.compat import captum as our_captum
from diffcam_fast.compat import image as our_image
from diffcam_fast.compat import quantus
from diffcam_fast.compat import torchcam as our_torchcam
from diffcam_fast.compat.asked import layout_of
from diffcam_fast.layout import Layout
from networks import Overwritten, pooled, with_mlp
from networks import images as small_images

SAME_FORMULA = ("GradCAM", "GradCAMElementWise", "HiResCAM", "XGradCAM", "LayerCAM")
EPS = 5e-6
"""float32 on both sides, after two divisions by a range."""


@functools.cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=7)
    # Statistics of batch norm that are not those of a fresh network.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def layer_of(name: str) -> str:
    return {
        "resnet18": "layer4",
        "mobilenet_v2": "features.18",
        "vgg11": "features.19",
        "mobilenet_v3_small": "features.12",
        "densenet121": "features.denseblock4",
    }[name]


def photos(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 96, 64, generator=torch.Generator().manual_seed(1))


def both(
    cls: str, model: nn.Module, layers: list[str], x: Tensor, targets: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Heatmaps of pytorch-grad-cam and of ours."""
    theirs = copy.deepcopy(model)
    modules = [theirs.get_submodule(layer) for layer in layers]
    with getattr(pytorch_grad_cam, cls)(model=theirs, target_layers=modules) as cam:
        expected = cam(input_tensor=x, targets=targets, **options)
    ours = [model.get_submodule(layer) for layer in layers]
    with getattr(compat, cls)(model=model, target_layers=ours) as cam:
        return expected, cam(input_tensor=x, targets=targets, **options)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
@pytest.mark.parametrize("cls", SAME_FORMULA)
def test_methods_of_one_formula(cls: str, name: str) -> None:
    # The prediction in one of the networks, classes in the others.
    given = (
        None if name == "resnet18" else [their_targets.ClassifierOutputTarget(k) for k in (3, 5)]
    )
    expected, found = both(cls, network(name), [layer_of(name)], photos(), given)
    assert found.shape == expected.shape == (2, 96, 64)
    assert found.dtype == expected.dtype == np.float32
    assert expected.max() > 0.99
    # The untrained MobileNets have maps of a small range, the rest of sums that cancel: float32 is
    # off there, on one processor more than on another, theirs as well as ours. In float64 both
    # agree, but for maps that are float32; a sum of positive terms alone has its range on top of a
    # large offset.
    exact, again = both(
        cls, copy.deepcopy(network(name)).double(), [layer_of(name)], photos().double(), given
    )
    assert np.abs(again - exact).max() < (4 if cls == "GradCAMElementWise" else 2) * EPS
    if name == "resnet18":
        assert np.abs(found - expected).max() < (4 if cls == "GradCAMElementWise" else 1) * EPS


@pytest.mark.parametrize("cls", SAME_FORMULA)
def test_several_layers(cls: str) -> None:
    expected, found = both(cls, network("resnet18"), ["layer3", "layer4"], photos(), None)
    assert np.abs(found - expected).max() < EPS


@pytest.mark.parametrize("cls", ["GradCAM", "LayerCAM"])
def test_aug_smooth(cls: str) -> None:
    targets = [their_targets.ClassifierOutputTarget(k) for k in (3, 5)]
    options = {"aug_smooth": True}
    expected, found = both(cls, network("resnet18"), ["layer3"], photos(), targets, **options)
    assert np.abs(found - expected).max() < EPS


@pytest.mark.parametrize("cls", ["EigenCAM", "EigenGradCAM"])
def test_principal_components_are_theirs_or_have_the_other_sign(cls: str) -> None:
    model, layer = network("resnet18"), "layer3"
    expected, found = both(cls, model, [layer], photos(6), None)
    errors = np.abs(found - expected).max(axis=(1, 2))
    # Their sign is LAPACK's; ours makes the cell of the largest magnitude positive.
    turned = errors > 1e-3
    assert not turned.all()
    assert errors[~turned].max() < 1e-4
    for image in np.flatnonzero(turned):
        assert (np.minimum(found[image], expected[image]) < 0.5).all()


@pytest.mark.parametrize("cls", ["GradCAM", "HiResCAM", "LayerCAM", "XGradCAM", "ScoreCAM"])
def test_eigen_smooth(cls: str) -> None:
    model, x = pooled(), small_images()
    targets = [their_targets.ClassifierOutputTarget(k) for k in (3, 1, 0)]
    expected, found = both(cls, model, ["0"], x, targets, eigen_smooth=True)
    errors = np.abs(found - expected).max(axis=(1, 2))
    assert not (errors > 1e-3).all()
    assert errors[errors <= 1e-3].max() < 1e-4
    for image in np.flatnonzero(errors > 1e-3):
        assert (np.minimum(found[image], expected[image]) < 0.5).all()


def test_score_cam() -> None:
    model, x = pooled(), small_images()
    targets = [their_targets.ClassifierOutputTarget(k) for k in (3, 1, 0)]
    expected, found = both("ScoreCAM", model, ["0"], x, targets)
    assert np.abs(found - expected).max() < 1e-5


def scaled(maps: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """What pytorch-grad-cam makes of the map (N, h, w) of a single layer."""
    for resized in (True, False):
        maps = maps.relu() - maps.relu().amin(dim=(1, 2), keepdim=True)
        maps = maps / (maps.amax(dim=(1, 2), keepdim=True) + 1e-7)
        if resized:
            maps = nn.functional.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
    return maps.numpy()


def differentiated(
    model: nn.Module, layer: str, x: Tensor, cls: list[int]
) -> tuple[Tensor, Tensor]:
    """A and G (N, C, h, w) in float64, of a layer that nothing overwrites."""
    model, taken = copy.deepcopy(model).double(), []

    def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        taken.append(output.clone().detach().requires_grad_())
        return taken[0].clone()

    model.get_submodule(layer).register_forward_hook(take)
    score = model(x.double()).gather(1, torch.tensor(cls)[:, None]).sum()
    return taken[0].detach(), torch.autograd.grad(score, taken[0])[0]


@pytest.mark.parametrize("positive", [True, False])
def test_ablation_cam_divides_by_the_score_and_turns_where_that_is_negative(
    positive: bool,
) -> None:
    model, x = copy.deepcopy(pooled()), small_images()
    with torch.no_grad():
        model[2].bias += 5.0 if positive else -5.0
    targets = [their_targets.ClassifierOutputTarget(k) for k in (3, 1, 0)]
    expected, found = both("AblationCAM", model, ["0"], x, targets)
    if positive:
        assert np.abs(found - expected).max() < 1e-4
        return
    # Theirs is the map of what speaks against the class, and nearly nothing of ours is left.
    signed = Explainer(model, layer="0", method="ablation_cam", relu=False)(x, [3, 1, 0]).maps
    assert np.abs(scaled(-signed[:, 0], x.shape[2:]) - expected).max() < 1e-4
    assert np.abs(scaled(signed[:, 0], x.shape[2:]) - found).max() < 1e-5
    assert np.abs(found - expected).max() > 0.9


def test_ablation_of_signed_activations_is_to_zero_and_theirs_to_minus_ten_million() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 9), nn.Tanh(),
        nn.Linear(9, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[5].bias[1] += 3
    x = small_images()
    targets = [their_targets.ClassifierOutputTarget(1)] * 3
    expected, found = both("AblationCAM", model, ["0"], x, targets)

    def by_hand(value: float) -> np.ndarray:
        with torch.no_grad():
            a = model[0](x)
            whole = model[1:](a)[:, 1]
            assert (whole > 0).all()
            total = torch.zeros(len(a), *a.shape[2:])
            for k in range(a.shape[1]):
                without = a.clone()
                without[:, k] = value
                total += (whole - model[1:](without)[:, 1])[:, None, None] * a[:, k]
        return scaled(total, x.shape[2:])

    assert np.abs(by_hand(-1e7) - expected).max() < 1e-4
    assert np.abs(by_hand(0) - found).max() < 1e-4
    assert np.abs(found - expected).max() > 0.2


@pytest.mark.parametrize(
    ("name", "layer", "by_eps", "by_norm", "together"),
    [
        ("resnet18", "layer4", 0.027, 0.015, 0.024),
        ("resnet18", "layer3", 0.013, 0.081, 0.086),
        ("mobilenet_v2", "features.18", 0.182, 0.003, 0.182),
        ("densenet121", "features.denseblock4", 0.011, 0.193, 0.183),
        ("vgg11", "features.19", 0.007, 0.082, 0.084),
    ],
)
def test_grad_cam_plus_plus_is_renormalised_and_theirs_is_not_and_has_a_large_eps(
    name: str, layer: str, by_eps: float, by_norm: float, together: float
) -> None:
    # Squares of small gradients: in float64, so that what is left is the definitions.
    model, x = copy.deepcopy(network(name)).double(), photos().double()
    expected, found = both("GradCAMPlusPlus", model, [layer], x, None)
    a, g = differentiated(model, layer, x, model(x).argmax(dim=1).tolist())

    def by_hand(eps: float, normed: bool) -> np.ndarray:
        below = 2 * g**2 + a.sum(dim=(2, 3), keepdim=True) * g**3 + eps
        alpha = torch.where(g == 0, 0.0, g**2 / below)
        positive = torch.where(g > 0, alpha, 0.0)
        total = positive.sum(dim=(2, 3), keepdim=True)
        weights = (positive * g).sum(dim=(2, 3), keepdim=True)
        if normed:
            weights = weights / torch.where(total == 0, 1.0, total)
        return scaled((weights * a).sum(dim=1), x.shape[2:])

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one - other).max())

    theirs, exact, ours = by_hand(1e-6, False), by_hand(1e-30, False), by_hand(1e-30, True)
    assert apart(expected, theirs) < 1e-4
    assert apart(found, ours) < 1e-4
    for size, difference in (
        (by_eps, apart(theirs, exact)),
        (by_norm, apart(exact, ours)),
        (together, apart(expected, found)),
    ):
        assert 0.7 * size < difference < size + 1e-3


def test_an_activation_that_is_overwritten_is_explained_as_the_layer_returned_it() -> None:
    model, x = Overwritten(), small_images()
    targets = [their_targets.ClassifierOutputTarget(1)] * 3
    expected, found = both("GradCAM", model, ["features"], x, targets)
    # Captum clones too. On the CPU pytorch-grad-cam has the activation after the in-place ReLU and
    # the gradient before it.
    cloned = captum.attr.LayerGradCam(model, model.features).attribute(x, target=1).detach()
    assert np.abs(scaled(cloned[:, 0], x.shape[2:]) - found).max() < 2 * EPS
    a, g = differentiated(model, "features", x, [1, 1, 1])
    mixed = (g.mean(dim=(2, 3), keepdim=True) * a.relu()).sum(dim=1)
    assert np.abs(scaled(mixed, x.shape[2:]) - expected).max() < 2 * EPS
    assert 0.5 < np.abs(found - expected).max() < 0.6


def test_a_model_that_returns_probabilities() -> None:
    model, x = nn.Sequential(*pooled(), nn.Softmax(dim=1)).eval(), small_images()
    for targets in (None, [their_targets.ClassifierOutputTarget(1)] * 3):
        for cls in ("GradCAM", "ScoreCAM"):
            expected, found = both(cls, model, ["0"], x, targets)
            assert np.abs(found - expected).max() < 1e-5
    ours = [compat.ClassifierOutputTarget(1)] * 3
    with compat.GradCAM(model, ["0"]) as cam, compat.GradCAM(pooled(), ["0"]) as plain:
        assert np.abs(cam(x, ours) - both("GradCAM", model, ["0"], x, ours)[0]).max() < 1e-5
        # The probability of a class is no logit of it.
        assert np.abs(cam(x, ours) - plain(x, ours)).max() > 0.5
        with pytest.raises(ValueError, match="from 0 to 4, got 5"):
            cam(x, 5)
    with compat.DiffGradCAM(model, ["0"]) as one, compat.DiffGradCAM(pooled(), ["0"]) as other:
        assert np.abs(one(x, ours) - other(x, ours)).max() < 1e-5


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (compat.ClassifierOutputTarget(2), their_targets.ClassifierOutputTarget(2)),
        (compat.ClassifierOutputSoftmaxTarget(2), their_targets.ClassifierOutputSoftmaxTarget(2)),
        (compat.ClassifierOutputReST(2), their_targets.ClassifierOutputReST(2)),
        (
            compat.FinerWeightedTarget(2, [0, 4], 0.7),
            their_targets.FinerWeightedTarget(2, [0, 4], 0.7),
        ),
    ],
    ids=lambda t: type(t).__name__,
)
def test_targets(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(logits), theirs(logits), atol=1e-6)
    assert torch.allclose(ours(logits[0]), theirs(logits[0]), atol=1e-6)
    model, x = network("resnet18"), photos()
    [expected, _] = both("GradCAM", model, ["layer4"], x, [theirs, theirs])
    [_, found] = both("GradCAM", model, ["layer4"], x, [ours, ours])
    assert np.abs(found - expected).max() < 2e-5


def test_a_binary_classifier_with_one_logit() -> None:
    model = nn.Sequential(*list(pooled())[:2], nn.Linear(8, 1)).eval()
    for category in (0, 1):
        targets = [their_targets.BinaryClassifierOutputTarget(category)] * 3
        expected, found = both("GradCAM", model, ["0"], small_images(), targets)
        ours = [compat.BinaryClassifierOutputTarget(category)] * 3
        with compat.GradCAM(model, [model[0]]) as cam:
            assert np.array_equal(cam(small_images(), ours), found)
        assert np.abs(found - expected).max() < EPS


def test_segmentation() -> None:
    model = segmentation()
    mask = np.zeros((10, 12), np.float32)
    mask[2:5, 3:8] = 1
    theirs = [their_targets.SemanticSegmentationTarget(1, mask)] * 3
    expected, found = both("GradCAM", model, ["0"], small_images(), theirs)
    assert np.abs(found - expected).max() < EPS
    with compat.GradCAM(model, [model[0]]) as cam:
        ours = cam(small_images(), [compat.SemanticSegmentationTarget(1, mask)] * 3)
    assert np.array_equal(ours, found)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"out": self.model(images), "aux": self.model(images)}

    with compat.GradCAM(Named(), ["model.1"]) as cam, pytest.raises(ValueError, match="2 times"):
        cam(small_images())


def test_reshape_transforms() -> None:
    def grid(tokens: Tensor, height: int = 2, width: int = 3) -> Tensor:
        cells = tokens[:, 1:].reshape(len(tokens), height, width, tokens.shape[2])
        return cells.transpose(2, 3).transpose(1, 2)

    assert layout_of(grid, (1, 7, 5)) == Layout(2, (2, 3), 1)
    assert layout_of(lambda x: x.permute(0, 3, 1, 2), (1, 4, 5, 6)) == Layout(3)
    assert layout_of(lambda x: x, (1, 4, 5, 6)) == Layout(1)
    for other in (lambda x: x[:, 1:].mT[:, :, None].flip(1), lambda x: grid(x).flip(2)):
        with pytest.raises(ValueError, match="neither a grid of tokens, row by row"):
            layout_of(other, (1, 7, 5))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=7,
    )  # fmt: skip
    nn.init.normal_(model.heads[0].weight)
    return model.eval()


@pytest.mark.parametrize("cls", [*SAME_FORMULA, "ScoreCAM"])
def test_tokens_with_a_reshape_transform_and_without(cls: str) -> None:
    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].reshape(len(tokens), 4, 4, 16).transpose(2, 3).transpose(1, 2)

    model, x = transformer(), photos()[:, :, :32, :32]
    layers = [f"encoder.layers.encoder_layer_{i}.ln_1" for i in (1, 2)]
    theirs = copy.deepcopy(model)
    modules = [theirs.get_submodule(layer) for layer in layers]
    targets = [their_targets.ClassifierOutputTarget(k) for k in (3, 5)]
    with getattr(pytorch_grad_cam, cls)(theirs, modules, reshape_transform=grid) as cam:
        expected = cam(x, targets)
    for reshape_transform in (grid, None):
        with getattr(compat, cls)(model, layers, reshape_transform) as cam:
            assert np.abs(cam(x, targets) - expected).max() < 2 * EPS


def test_channels_last_with_a_reshape_transform_and_without() -> None:
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4],
        num_classes=7,
    ).eval()  # fmt: skip
    x, layer = photos()[:, :, :32, :48], model.features[3][0].norm1
    theirs = copy.deepcopy(model)
    layers = [theirs.features[3][0].norm1]
    with pytorch_grad_cam.GradCAM(theirs, layers, lambda t: t.permute(0, 3, 1, 2)) as cam:
        expected = cam(x, None)
    for reshape_transform in (lambda t: t.permute(0, 3, 1, 2), None):
        with compat.GradCAM(model, [layer], reshape_transform) as ours:
            assert np.abs(ours(x) - expected).max() < EPS
    with torchcam.methods.GradCAM(
        theirs, layers[0], reshape_transform=lambda t: t.permute(0, 3, 1, 2)
    ) as extractor:
        [maps] = extractor([3, 5], theirs(x))
    with our_torchcam.GradCAM(
        model, layer, reshape_transform=lambda t: t.permute(0, 3, 1, 2)
    ) as our_extractor:
        [found] = our_extractor([3, 5], model(x))
    assert float((found - maps).abs().max()) < EPS
    with pytest.raises(ValueError, match="target layers that are modules of the model"):
        compat.GradCAM(model, [nn.ReLU()], lambda t: t)(x)
    with pytest.raises(ValueError, match="give the target_layer too"):
        our_torchcam.GradCAM(model, reshape_transform=lambda t: t)


@pytest.fixture
def photograph() -> np.ndarray:
    return np.random.default_rng(0).random((20, 24, 3), dtype=np.float32)


def test_pictures_of_pytorch_grad_cam(photograph: np.ndarray) -> None:
    mask = np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)
    for use_rgb in (False, True):
        expected = pytorch_grad_cam.utils.image.show_cam_on_image(photograph, mask, use_rgb)
        found = compat.show_cam_on_image(photograph, mask, use_rgb)
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    for number, largest in ((2, 1), (9, 12), (10, 15), (11, 26), (16, 1), (20, 1)):
        expected = pytorch_grad_cam.utils.image.show_cam_on_image(photograph, mask, True, number)
        found = compat.show_cam_on_image(photograph, mask, use_rgb=True, colormap=number)
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= largest
    with pytest.raises(ValueError, match="does not have OpenCV's colour map 12; give one of 0"):
        compat.show_cam_on_image(photograph, mask, colormap=12)
    expected_input = pytorch_grad_cam.utils.image.preprocess_image(photograph)
    assert torch.allclose(compat.preprocess_image(photograph), expected_input)
    with pytest.raises(ValueError, match="got up to 255"):
        compat.show_cam_on_image(np.full((2, 2, 3), 255.0), mask[:2, :2])
    with pytest.raises(ValueError, match=r"image_weight must be in \[0, 1\], got 2"):
        compat.show_cam_on_image(photograph, mask, image_weight=2)


def test_pictures_of_torch_cam(photograph: np.ndarray) -> None:
    picture = Image.fromarray(np.uint8(255 * photograph))
    mask = Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), mode="F")
    expected = torchcam.utils.overlay_mask(picture, mask)
    found = our_image.overlay_mask(picture, mask)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    for mode in ("L", "P", "HSV"):
        expected = torchcam.utils.overlay_mask(picture.convert(mode), mask)
        found = our_image.overlay_mask(picture.convert(mode), mask)
        assert np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        our_image.overlay_mask(picture, mask, alpha=2)
    with pytest.raises(TypeError, match=r"PIL\.Image, got ndarray and Image"):
        our_image.overlay_mask(photograph, mask)  # type: ignore[arg-type]


def extracted(module: Any, cls: str, model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    with getattr(module, cls)(model, ["layer3", "layer4"]) as extractor:
        scores = model(x)
        return [m.detach() for m in extractor([3, 5], scores, **options)]


@pytest.mark.parametrize("cls", ["GradCAM", "XGradCAM", "LayerCAM"])
@pytest.mark.parametrize("normalized", [True, False])
def test_extractors_of_torch_cam(cls: str, normalized: bool) -> None:
    model, x = network("resnet18"), photos()
    expected = extracted(torchcam.methods, cls, copy.deepcopy(model), x, normalized=normalized)
    found = extracted(our_torchcam, cls, model, x, normalized=normalized)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) < EPS * max(1.0, float(theirs.abs().max()))


def test_cam_of_torch_cam() -> None:
    model, x = network("resnet18"), photos()
    theirs = copy.deepcopy(model)
    with torchcam.methods.CAM(theirs, "layer4", fc_layer="fc") as extractor:
        theirs(x)
        [expected] = extractor([3, 5], normalized=False)
    with our_torchcam.CAM(model, "layer4", fc_layer="fc") as ours:
        model(x)
        [found] = ours([3, 5], normalized=False)
    assert torch.allclose(found, expected.detach(), atol=1e-5)


def test_grad_cam_plus_plus_of_torch_cam_loses_a_division() -> None:
    model, x = copy.deepcopy(network("resnet18")).double(), photos().double()
    [_, expected] = extracted(torchcam.methods, "GradCAMpp", copy.deepcopy(model), x)
    [_, found] = extracted(our_torchcam, "GradCAMpp", model, x)
    # On this head theirs is sum_k relu(W_ck)^3 A_k, ours LayerCAM, sum_k relu(W_ck) A_k.
    [_, layer] = extracted(our_torchcam, "LayerCAM", model, x)
    assert float((found - layer).abs().max()) < 1e-5
    a, _ = differentiated(model, "layer4", x, [3, 5])
    weights = model.fc.weight.detach().double()[[3, 5], :, None, None].relu()
    # The gradient is W_ck / cells, and their eps of 1e-8 is seen on maps as small as these.
    cubed = (weights**3 * a).sum(dim=1) / (a.shape[2] * a.shape[3]) ** 2
    cubed -= cubed.amin(dim=(1, 2), keepdim=True)
    cubed /= cubed.amax(dim=(1, 2), keepdim=True) + 1e-8
    assert float((expected - cubed).abs().max()) < 1e-5
    assert 0.2 < float((found - expected).abs().max()) < 0.3


def test_score_cam_of_torch_cam_masks_before_it_enlarges() -> None:
    model, x = pooled(), small_images()
    theirs = copy.deepcopy(model)
    with torchcam.methods.ScoreCAM(theirs, "0") as extractor:
        [expected] = extractor([3, 1, 0], theirs(x))
    with our_torchcam.ScoreCAM(model, "0") as our_extractor:
        [found] = our_extractor([3, 1, 0], model(x))
    assert 5e-4 < float((found - expected).abs().max()) < 5e-3


def test_an_extractor_and_its_hooks() -> None:
    model, x = pooled(), small_images()
    extractor = our_torchcam.GradCAM(model)
    with pytest.raises(RuntimeError, match="run the model on images first"):
        extractor(1)
    extractor.disable_hooks()
    model(x)
    with pytest.raises(RuntimeError, match="run the model on images first"):
        extractor(1)
    extractor.enable_hooks()
    scores = model(x)
    [one], [other] = extractor(1, scores), extractor(2, scores)
    assert not torch.equal(one, other)
    [by_function] = extractor(targets=lambda output: output[1])
    assert torch.allclose(by_function, one, atol=1e-5)
    for wrong, message in (
        ({}, "either class_idx or targets"),
        ({"class_idx": 1, "targets": len}, "either class_idx or targets"),
        ({"class_idx": [1, 2]}, "2 targets for 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            extractor(**wrong)
    with pytest.raises(TypeError, match="targets must be a function"):
        extractor(targets=[1, 2, 3])  # type: ignore[list-item]
    extractor.remove_hooks()
    assert not model._forward_pre_hooks


def test_an_extractor_of_a_compiled_model() -> None:
    x = small_images()
    [expected] = extracted_at("0", pooled(), x)
    compiled = torch.compile(pooled(), backend="eager")
    compiled(x)
    [found] = extracted_at("0", compiled, x)
    assert torch.equal(found, expected)


def test_an_extractor_of_functions_of_a_segmentation() -> None:
    model, x = segmentation(), small_images()
    theirs = copy.deepcopy(model)
    targets = [lambda o: o[1, 2:5].sum(), lambda o: o[0].sum(), lambda o: o[3, 1, 1]]
    with torchcam.methods.GradCAM(theirs, "0") as extractor:
        [expected] = extractor(scores=theirs(x), targets=targets)
    with our_torchcam.GradCAM(model, "0") as our_extractor:
        [found] = our_extractor(scores=model(x), targets=targets)
    assert float((found - expected).abs().max()) < EPS


def extracted_at(layer: str, model: nn.Module, x: Tensor) -> list[Tensor]:
    with our_torchcam.GradCAM(model, layer) as extractor, torch.inference_mode():
        return extractor(1, model(x))


def segmentation() -> nn.Module:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(
        features, nn.Conv2d(8, 4, 3, padding=1), nn.Upsample(scale_factor=2)
    ).eval()


def test_fused_cams() -> None:
    maps = [torch.rand(2, 3, 4), torch.rand(2, 6, 8)]
    for cls in ("GradCAM", "LayerCAM"):
        theirs, ours = getattr(torchcam.methods, cls), getattr(our_torchcam, cls)
        for size in (None, (5, 9)):
            expected = theirs.fuse_cams([m.clone() for m in maps], size)
            assert torch.allclose(ours.fuse_cams(maps, size), expected, atol=1e-6)
    with pytest.raises(ValueError, match="one layer at least"):
        our_torchcam.GradCAM.fuse_cams([])


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "densenet121"])
def test_layer_grad_cam_of_captum(name: str) -> None:
    model, x = network(name), photos()
    layer = layer_of(name)
    theirs = captum.attr.LayerGradCam(model, model.get_submodule(layer))
    expected = theirs.attribute(x, target=torch.tensor([3, 5])).detach()
    found = our_captum.LayerGradCam(model, layer).attribute(x, target=torch.tensor([3, 5]))
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    clipped = our_captum.LayerGradCam(model, layer).attribute(x, 3, relu_attributions=True)
    assert float(clipped.min()) >= 0
    resized = our_captum.LayerAttribution.interpolate(found, (96, 64))
    assert torch.equal(resized, captum.attr.LayerAttribution.interpolate(found, (96, 64)))


def captum_maps(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    theirs = captum.attr.LayerGradCam(model, model.get_submodule("0")).attribute(x, **options)
    return theirs.detach(), our_captum.LayerGradCam(model, "0").attribute(x, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 2},
        {"target": [3, 1, 0]},
        {"target": torch.tensor([2])},
        {"target": 2, "attr_dim_summation": False},
        {"target": 2, "attr_dim_summation": False, "relu_attributions": True},
    ],
    ids=str,
)
def test_arguments_of_captum(options: dict[str, Any]) -> None:
    expected, found = captum_maps(with_mlp(), small_images(), **options)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("target", [(1, 2, 2), [(1, 2, 2), (0, 3, 1), (3, 0, 0)]], ids=str)
def test_places_of_captum(target: Any) -> None:
    expected, found = captum_maps(segmentation(), small_images(), target=target)
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_one_score_an_image_and_what_is_not_taken_of_captum() -> None:
    model = nn.Sequential(*list(pooled())[:2], nn.Linear(8, 1), nn.Flatten(0)).eval()
    expected, found = captum_maps(model, small_images())
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    ours = our_captum.LayerGradCam(pooled(), "0")
    with pytest.raises(ValueError, match="attribute_to_layer_input: not taken here"):
        ours.attribute(small_images(), 1, attribute_to_layer_input=True)
    with pytest.raises(TypeError, match=r"one tensor .*, got tuple"):
        ours.attribute((small_images(), small_images()), 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forward_func must be a module, got function"):
        our_captum.LayerGradCam(lambda x: x, "0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one that takes gradients, got 'score_cam'"):
        our_captum.LayerGradCam(pooled(), "0", method="score_cam")
    with pytest.raises(ValueError, match="2 targets for 3 images"):
        ours.attribute(small_images(), [1, 2])


def test_explain_func_of_quantus() -> None:
    model, x = pooled(), small_images()
    found = quantus.explain_func(model, x.numpy(), np.array([1, 2, 3]), device="cpu")
    assert found.shape == (3, 1, 10, 12) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1


def explained(model: nn.Module, x: Tensor, **options: Any) -> np.ndarray:
    with compat.GradCAM(model, [model.get_submodule("0")]) as cam:
        return cam(x, [compat.ClassifierOutputTarget(1)] * len(x), **options)


def test_situations_that_other_libraries_fail_in() -> None:
    plain = explained(pooled(), small_images())
    frozen = copy.deepcopy(pooled()).requires_grad_(False)
    assert np.array_equal(explained(frozen, small_images()), plain)
    with torch.no_grad():
        assert np.array_equal(explained(pooled(), small_images()), plain)
    model = pooled()
    with torch.inference_mode():
        assert np.array_equal(explained(model, small_images()), plain)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = explained(copy.deepcopy(pooled()).to(dtype), small_images())
        assert half.dtype == np.float32 and np.abs(half - plain).max() < tolerance
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.abs(explained(pooled(), small_images()) - plain).max() < 0.1
    compiled = torch.compile(pooled(), backend="eager")
    compiled(small_images())
    assert np.array_equal(explained(compiled, small_images()), plain)
    training = copy.deepcopy(pooled()).train()
    training[2].weight.grad = torch.ones_like(training[2].weight)
    assert np.array_equal(explained(training, small_images()), plain)
    assert training.training and (training[2].weight.grad == 1).all()
    assert all(p.grad is None for p in training[0].parameters())


def test_nothing_is_hidden() -> None:
    x = small_images()
    x[1, 0, 2, 2] = torch.nan
    heatmaps = explained(pooled(), x)
    assert np.isnan(heatmaps[1]).all() and np.isfinite(heatmaps[[0, 2]]).all()
    constant = copy.deepcopy(pooled())
    nn.init.zeros_(constant[0][3].weight)
    assert (explained(constant, small_images()) == 0).all()
    with compat.GradCAM(pooled(), ["0"]) as cam:
        for targets, message in (
            ([compat.ClassifierOutputTarget(1)], "1 targets for 3 images"),
            ([compat.ClassifierOutputTarget(9)] * 3, "from 0 to 4, got 9"),
            ([1, 2], "2 targets for 3 images"),
            (5, "from 0 to 4, got 5"),
        ):
            with pytest.raises(ValueError, match=message):
                cam(small_images(), targets)
        with pytest.raises(ValueError, match="one target an image, got 2"):
            cam(small_images(), torch.zeros(3, 2, dtype=torch.int64))
        assert cam(small_images()[:0]).shape == (0, 10, 12)
        assert cam(small_images(), 2).shape == (3, 10, 12)
        mixed = cam(small_images(), [2, compat.ClassifierOutputTarget(2), lambda o: o[2]])
        assert np.abs(mixed - cam(small_images(), 2)).max() < EPS
        assert np.array_equal(cam(small_images(), [2] * 3), cam(small_images(), torch.tensor(2)))
        assert cam.outputs is not None and torch.equal(cam.outputs, pooled()(small_images()))
    with pytest.raises(ValueError, match="must be a list of modules or names"):
        compat.GradCAM(pooled(), pooled()[0])
    with pytest.raises(AttributeError, match="has no attribute 'FullGrad'"):
        compat.FullGrad  # noqa: B018 - the access is the test
    with pytest.raises(ValueError, match="every channel is set to 0"):
        compat.AblationCAM(pooled(), ["0"], ratio_channels_to_ablate=0.5)


def test_an_error_inside_with_is_not_swallowed_and_the_hooks_are_gone() -> None:
    model = pooled()
    with (
        pytest.raises(ValueError, match="from 0 to 4, got 9"),
        compat.GradCAM(model, ["0"]) as cam,
    ):
        cam(small_images(), [compat.ClassifierOutputTarget(9)] * 3)
    with (
        pytest.raises(ValueError, match="from 0 to 4, got 9"),
        our_torchcam.GradCAM(model, "0") as extractor,
    ):
        extractor(9, model(small_images()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # Theirs swallows it.
    with pytorch_grad_cam.GradCAM(copy.deepcopy(model), [model[0]]) as theirs:
        theirs(small_images(), [their_targets.ClassifierOutputTarget(9)] * 3)


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            x = self.relu(self.conv(self.relu(self.conv(images))))
            logits: Tensor = self.fc(x.mean(dim=(2, 3)))
            return logits

    with pytest.raises(ValueError, match="runs 2 times in one forward pass"):
        compat.GradCAM(Twice(), ["relu"])(small_images(), 1)


def test_diff_grad_cam_is_there_too() -> None:
    with compat.DiffGradCAM(pooled(), ["0"]) as cam:
        contrasted = cam(small_images(), 2)
    assert np.abs(contrasted - explained(pooled(), small_images())).max() > 0.05
