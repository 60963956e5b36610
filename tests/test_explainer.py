"""Maps against float64 autograd on the whole network, targets, and what a caller may give."""

import numpy as np
import pytest
import torch
from torch import nn

from diffcam_fast import Contrast, Explainer
from networks import Overwritten, expected_maps, images, pooled, relative_error, with_mlp

TARGETS = torch.tensor([[3, 0], [1, 4], [2, 2]])


@pytest.mark.parametrize(
    "model", [pooled(), with_mlp(), Overwritten()], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("layer", [None, "earlier"])
@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
@pytest.mark.parametrize("contrast", ["none", "mean", "log_odds", "runner_up"])
def test_maps_equal_float64_autograd(
    model: nn.Module, layer: str | None, method: str, contrast: str
) -> None:
    if layer == "earlier":
        layer = "features.0" if isinstance(model, Overwritten) else "0.0"
    explainer = Explainer(model, layer=layer, method=method, contrast=contrast, relu=False)
    result = explainer(images(), TARGETS)
    expected = expected_maps(model, explainer.layer, images(), TARGETS, contrast, method)
    assert relative_error(result.maps, expected) < 1e-5
    assert (
        relative_error(
            Explainer(model, layer=layer, method=method, contrast=contrast)(images(), TARGETS).maps,
            expected.relu(),
        )
        < 1e-5
    )


def test_common_mode_is_invisible_to_a_contrast_and_takes_grad_cam_over() -> None:
    class CommonMode(nn.Module):
        """Adds one function of A to every logit: softmax, loss and accuracy stay as they were."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = pooled()[0], pooled()[1:]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.features(x)
            logits: torch.Tensor = self.classifier(a) + 50 * a[:, :, 0, 0].square().sum(
                dim=1, keepdim=True
            )
            return logits

    honest, fooled = pooled(), CommonMode().eval()
    moved = {}
    for contrast in ("none", "mean", "log_odds", "runner_up"):
        before = Explainer(honest, method="grad_cam", contrast=contrast)(images()).heatmaps(
            (10, 12)
        )
        after = Explainer(fooled, method="grad_cam", contrast=contrast)(images()).heatmaps((10, 12))
        moved[contrast] = float((before - after).abs().max())
    assert moved.pop("none") > 0.3
    assert max(moved.values()) < 1e-5


def test_completeness_on_a_pooled_head() -> None:
    model = pooled()
    result = Explainer(model, contrast="mean", relu=False)(images(), TARGETS)
    d = Contrast.parse("mean").gradient(result.logits, TARGETS)
    bias = d @ model[2].bias.detach()
    assert torch.allclose(result.maps.sum(dim=(2, 3)), result.scores - bias, atol=1e-5)


def test_the_contrast_of_signed_maps_is_the_contrast_of_the_classes() -> None:
    model, k = with_mlp(), 5
    every = torch.arange(k).expand(3, k)
    singles = Explainer(model, method="grad_cam", relu=False)(images(), every).maps
    contrasted = Explainer(model, relu=False)(images(), TARGETS)
    d = Contrast.parse("log_odds").gradient(contrasted.logits, TARGETS)
    assert torch.allclose(contrasted.maps, torch.einsum("ntk,nkhw->nthw", d, singles), atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (2, [[2], [2], [2]]),
        ([0, 1, 2], [[0], [1], [2]]),
        (torch.tensor([0, 1, 2]), [[0], [1], [2]]),
        ([[0, 3], [1, 3], [2, 3]], [[0, 3], [1, 3], [2, 3]]),
        (torch.tensor(4), [[4], [4], [4]]),
        (np.array([0, 1, 2]), [[0], [1], [2]]),
    ],
)
def test_targets(targets: object, expected: list[list[int]]) -> None:
    result = Explainer(pooled())(images(), targets)  # type: ignore[arg-type]
    assert result.targets.tolist() == expected
    assert result.maps.shape == (3, len(expected[0]), 5, 6)


@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["closed", "backward"])
def test_default_is_the_prediction_and_topk_begins_with_it(model: nn.Module) -> None:
    explainer = Explainer(model)
    default, named, top = (
        explainer(images()),
        explainer(images(), "predicted"),
        explainer(images(), topk=3),
    )
    assert torch.equal(default.targets[:, 0], model(images()).argmax(dim=1))
    assert torch.equal(default.maps, named.maps)
    assert torch.equal(top.targets[:, :1], default.targets)
    assert torch.allclose(top.maps[:, :1], default.maps, atol=1e-6)
    assert (top.logits.gather(1, top.targets).diff(dim=1) <= 0).all()


@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["closed", "backward"])
def test_an_image_gets_the_same_map_alone_or_in_a_batch(model: nn.Module) -> None:
    explainer = Explainer(model)
    together = explainer(images(8), 1).maps
    for i, alone in enumerate(images(8)):
        assert torch.allclose(explainer(alone[None], 1).maps[0], together[i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["closed", "backward"])
def test_no_images(model: nn.Module) -> None:
    result = Explainer(model)(images(0))
    assert result.maps.shape == (0, 1, 5, 6)
    assert result.heatmaps((4, 4)).shape == (0, 1, 4, 4)
    # As an example they tell their size alone.
    shown = Explainer(model, example_inputs=images(0))
    assert torch.equal(shown(images()).maps, Explainer(model)(images()).maps)


@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["closed", "backward"])
def test_nan_stays_with_its_image_and_is_said(model: nn.Module) -> None:
    batch = images()
    batch[1, 0, 3, 3] = torch.nan
    result = Explainer(model, relu=False)(batch, 0)
    assert result.finite[:, 0].tolist() == [True, False, True]
    assert result.heatmaps((10, 12))[1].isnan().all()
    clean = Explainer(model, relu=False)(images(), 0)
    assert torch.allclose(result.maps[[0, 2]], clean.maps[[0, 2]], atol=1e-6)


def test_result_says_what_it_is() -> None:
    result = Explainer(pooled())(images())
    assert (result.method, result.contrast, result.layer) == ("diff_grad_cam", "log_odds", "0")
    assert result.backend == "torch (cpu), closed form"
    arrays = result.to_numpy()
    assert {name: a.shape for name, a in arrays.items()} == {
        "logits": (3, 5), "targets": (3, 1), "scores": (3, 1), "maps": (3, 1, 5, 6)
    }  # fmt: skip
    assert torch.allclose(result.probabilities.sum(dim=1), torch.ones(3))
    assert Explainer(pooled(), temperature=0.5)(images()).contrast == "temperature=0.5"


def test_overlay_of_bytes_and_of_floats_agree() -> None:
    result = Explainer(pooled())(images(), topk=2)
    pictures = torch.randint(0, 256, (3, 20, 24, 3), dtype=torch.uint8)
    from_bytes = result.overlay(pictures)
    assert from_bytes.shape == (3, 2, 20, 24, 3) and from_bytes.dtype.name == "uint8"
    channels_second = pictures.permute(0, 3, 1, 2)
    assert (from_bytes == result.overlay(channels_second)).all()
    assert (from_bytes == result.overlay(channels_second.contiguous().numpy())).all()
    assert (from_bytes == result.overlay(channels_second.float() / 255)).all()
    assert (result.overlay(pictures, alpha=0.0) == pictures.numpy()[:, None]).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda e: e(images()[0]),
            ValueError,
            r"\(N, C, H, W\), got \(3, 10, 12\); add the batch axis",
        ),
        (lambda e: e(images().byte()), TypeError, "must be floating point"),
        (lambda e: e([1, 2]), TypeError, "must be a tensor"),
        (lambda e: e(images(), 5), ValueError, "from 0 to 4, got 5 to 5"),
        (lambda e: e(images(), -1), ValueError, "from 0 to 4, got -1"),
        (lambda e: e(images(), [0, 1]), ValueError, r"N = 3 classes, or \(N, T\)"),
        (
            lambda e: e(images(), torch.zeros(3, 0, dtype=torch.int64)),
            ValueError,
            r"shape \(3, 0\)",
        ),
        (lambda e: e(images(), 0.5), TypeError, "whole numbers"),
        (lambda e: e(images(), "cat"), ValueError, "classes or 'predicted', got 'cat'"),
        (lambda e: e(images(), topk=6), ValueError, "from 1 to the 5 classes, got 6"),
        (lambda e: e(images(), 1, topk=2), ValueError, "not both"),
        (
            lambda e: e(images()).overlay(torch.full((3, 3, 4, 4), 2.0)),
            ValueError,
            r"pictures in .0, 1., got 2 to 2; undo the normalisation first",
        ),
        (
            lambda e: e(images()).overlay(torch.zeros(3, 4, 4, 4, dtype=torch.uint8)),
            ValueError,
            r"uint8 \(N, H, W, 3\) or \(N, 3, H, W\), .*; got uint8 \(3, 4, 4, 4\)",
        ),
        (
            lambda e: e(images()).overlay(torch.zeros(2, 3, 4, 4)),
            ValueError,
            "2 images for 3 explanations",
        ),
        (
            lambda e: Explainer(pooled(), method="grad"),
            ValueError,
            "unknown method 'grad'; there are diff_grad_cam",
        ),
        (lambda e: Explainer(pooled(), contrast="none"), ValueError, "without one it is grad_cam"),
        (lambda e: Explainer(nn.Conv2d(3, 4, 3)), TypeError, "must return logits"),
    ],
)
@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["closed", "backward"])
def test_errors_say_what_came(
    model: nn.Module, call: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(Explainer(model))  # type: ignore[operator]
