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

from diffcam_fast import compat
from diffcam_fast.compat import captum as our_captum
from diffcam_fast.compat import image as our_image
from diffcam_fast.compat import quantus
from diffcam_fast.compat import torchcam as our_torchcam
from diffcam_fast.compat.grad_cam import layout_of
from diffcam_fast.layout import Layout
from networks import images as small_images
from networks import pooled

SAME_FORMULA = ("GradCAM", "HiResCAM", "XGradCAM", "LayerCAM")
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
    # Untrained networks have maps of a small range, the rest of sums that cancel: float32 is off
    # there, theirs as well as ours, and in float64 both agree.
    exact, again = both(
        cls, copy.deepcopy(network(name)).double(), [layer_of(name)], photos().double(), given
    )
    assert np.abs(again - exact).max() < 2 * EPS
    # A sum of signed activations may be near 0, and XGrad-CAM divides by it: no float32 is right.
    if (cls, name) != ("XGradCAM", "mobilenet_v3_small"):
        assert np.abs(found - exact).max() < 2 * np.abs(expected - exact).max() + EPS


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
    else:
        # The map of what speaks against the class.
        assert np.abs(found - expected).max() > 0.5


def test_ablation_of_signed_activations_is_to_zero_and_theirs_to_minus_ten_million() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 9), nn.Tanh(),
        nn.Linear(9, 4),
    ).eval()  # fmt: skip
    targets = [their_targets.ClassifierOutputTarget(1)] * 3
    expected, found = both("AblationCAM", model, ["0"], small_images(), targets)
    assert np.abs(found - expected).max() > 0.1


def test_grad_cam_plus_plus_is_renormalised_and_theirs_is_not() -> None:
    for layer, least, most in (("layer4", 1e-3, 0.5), ("layer3", 1e-3, 0.6)):
        expected, found = both("GradCAMPlusPlus", network("resnet18"), [layer], photos(), None)
        assert least < np.abs(found - expected).max() < most
        assert np.corrcoef(found.flat, expected.flat)[0, 1] > 0.8


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
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU())
    model = nn.Sequential(features, nn.Conv2d(8, 4, 3, padding=1), nn.Upsample(scale_factor=2))
    mask = np.zeros((10, 12), np.float32)
    mask[2:5, 3:8] = 1
    theirs = [their_targets.SemanticSegmentationTarget(1, mask)] * 3
    expected, found = both("GradCAM", model.eval(), ["0"], small_images(), theirs)
    assert np.abs(found - expected).max() < EPS
    with compat.GradCAM(model, [model[0]]) as cam:
        ours = cam(small_images(), [compat.SemanticSegmentationTarget(1, mask)] * 3)
    assert np.array_equal(ours, found)


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


@pytest.fixture
def photograph() -> np.ndarray:
    return np.random.default_rng(0).random((20, 24, 3), dtype=np.float32)


def test_pictures_of_pytorch_grad_cam(photograph: np.ndarray) -> None:
    mask = np.linspace(0, 1, 480, dtype=np.float32).reshape(20, 24)
    for use_rgb in (False, True):
        expected = pytorch_grad_cam.utils.image.show_cam_on_image(photograph, mask, use_rgb)
        found = compat.show_cam_on_image(photograph, mask, use_rgb)
        assert found.dtype == np.uint8
        # OpenCV's jet and matplotlib's differ by 34 of 255 at most, and weigh a half here.
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 17
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
    model, x = network("resnet18"), photos()
    [_, expected] = extracted(torchcam.methods, "GradCAMpp", copy.deepcopy(model), x)
    [_, found] = extracted(our_torchcam, "GradCAMpp", model, x)
    # On this head theirs is sum_k relu(alpha)^3 A_k, ours LayerCAM.
    [_, layer] = extracted(our_torchcam, "LayerCAM", model, x)
    assert float((found - layer).abs().max()) < 1e-5
    assert float((found - expected).abs().max()) > 1e-2


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
    extractor.remove_hooks()
    assert not model._forward_pre_hooks


def test_fused_cams() -> None:
    maps = [torch.rand(2, 3, 4), torch.rand(2, 6, 8)]
    expected = torchcam.methods.GradCAM.fuse_cams([m.clone() for m in maps])
    assert torch.allclose(our_torchcam.GradCAM.fuse_cams(maps), expected, atol=1e-6)


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


def test_explain_func_of_quantus() -> None:
    model, x = pooled(), small_images()
    found = quantus.explain_func(model, x.numpy(), np.array([1, 2, 3]), device="cpu")
    assert found.shape == (3, 1, 10, 12) and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1


def explained(model: nn.Module, x: Tensor, **options: Any) -> np.ndarray:
    with compat.GradCAM(model, [model[0]]) as cam:  # type: ignore[index]
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
        assert cam(small_images(), 2).shape == (3, 10, 12)
        assert np.array_equal(cam(small_images(), [2] * 3), cam(small_images(), torch.tensor(2)))
        assert cam.outputs is not None and torch.equal(cam.outputs, pooled()(small_images()))
    with pytest.raises(ValueError, match="must be a list of modules or names"):
        compat.GradCAM(pooled(), pooled()[0])
    with pytest.raises(AttributeError, match="has no attribute 'FullGrad'"):
        compat.FullGrad  # noqa: B018 - the access is the test


def test_diff_grad_cam_is_there_too() -> None:
    with compat.DiffGradCAM(pooled(), ["0"]) as cam:
        contrasted = cam(small_images(), 2)
    assert np.abs(contrasted - explained(pooled(), small_images())).max() > 0.05
