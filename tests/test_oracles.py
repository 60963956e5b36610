"""What must hold between methods, whatever their code: identities, linearity, invariances, finite
differences.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import Contrast, Explainer
from diffcam_fast.inspections import Inspections
from diffcam_fast.network import Network
from diffcam_fast.running import pick_logits
from networks import images, pooled, relative_error, with_mlp

TARGETS = torch.tensor([[3, 0], [1, 4], [2, 2]])
CELLS = 30


def signed(model: nn.Module, method: str, contrast: str = "mean") -> Tensor:
    explainer = Explainer(model, method=method, contrast=contrast, relu=False)
    return explainer(images(), TARGETS).maps


@pytest.mark.parametrize("contrast", ["none", "mean", "log_odds", "runner_up"])
def test_on_a_pooled_linear_head_the_methods_are_one(contrast: str) -> None:
    cam = signed(pooled(), "cam", contrast)
    for method in ("grad_cam", "hires_cam", "xgrad_cam"):
        assert relative_error(CELLS * signed(pooled(), method, contrast), cam) < 1e-5
    layer, plus_plus = (signed(pooled(), m, contrast) for m in ("layer_cam", "grad_cam_pp"))
    assert relative_error(plus_plus, layer) < 1e-5
    # Recipro-CAM by values is the same map and a constant, where the contrast is linear.
    if contrast in ("mean",):
        recipro = signed(pooled(), "recipro_cam", contrast)
        constant = (recipro - signed(pooled(), "grad_cam", contrast)).flatten(2)
        assert float((constant - constant.mean(dim=2, keepdim=True)).abs().max()) < 1e-5


def test_ablation_of_a_linear_score_is_the_weights_and_the_means() -> None:
    model = pooled()
    weight = model[2].weight.detach()
    a = model[0](images()).detach()
    expected = torch.einsum("ntc,nc,nchw->nthw", weight[TARGETS], a.mean(dim=(2, 3)), a)
    assert relative_error(signed(model, "ablation_cam", "none"), expected) < 1e-5


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam", "xgrad_cam"])
def test_signed_maps_are_linear_in_the_score(method: str) -> None:
    model = with_mlp()
    every = torch.arange(5).expand(3, 5)
    explainer = Explainer(model, method=method, relu=False)
    singles = explainer(images(), every)
    for contrast in ("mean", "log_odds", "runner_up"):
        d = Contrast.parse(contrast).gradient(singles.logits, TARGETS)
        expected = torch.einsum("ntk,nkhw->nthw", d, singles.maps)
        assert relative_error(signed(model, method, contrast), expected) < 1e-5


def test_xgrad_cam_and_hires_cam_have_one_sum() -> None:
    xgrad, hires = (signed(with_mlp(), m).sum(dim=(2, 3)) for m in ("xgrad_cam", "hires_cam"))
    assert torch.allclose(xgrad, hires, rtol=1e-4, atol=1e-6)


def test_layer_cam_is_hires_cam_where_no_gradient_is_negative() -> None:
    model = pooled()
    with torch.no_grad():
        model[2].weight.abs_()
    model = nn.Sequential(model[0], nn.Softplus(), model[1], model[2]).eval()
    layer, hires = (
        Explainer(model, layer="0", method=m, contrast="none")(images(), TARGETS).maps
        for m in ("layer_cam", "hires_cam")
    )
    assert relative_error(layer, hires) < 1e-6


@pytest.mark.parametrize("contrast", ["none", "mean", "runner_up"])
def test_hires_cam_of_a_bias_free_relu_head_sums_to_the_score(contrast: str) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    hidden = nn.Linear(8 * 30, 16, bias=False)
    head = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(16, 5, bias=False))
    explainer = Explainer(
        nn.Sequential(features, head).eval(),
        method="hires_cam",
        contrast=contrast,
        relu=False,
        example_inputs=images(),
    )
    result = explainer(images(), TARGETS)
    assert torch.allclose(result.maps.sum(dim=(2, 3)), result.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("contrast", ["none", "mean", "log_odds", "runner_up"])
def test_gradients_are_finite_differences(contrast: str) -> None:
    model = with_mlp().double()
    inspections = Inspections(model, None, output=pick_logits, layout=None, examples=None)
    x = images().double()
    network = Network(model, inspections.at(x), pick_logits)
    parsed = Contrast.parse(contrast)
    split = network.head_gradients(
        x, lambda logits, _: (logits, parsed.gradient(logits.detach(), TARGETS))
    )
    [a], [g] = split.activations, split.gradients
    step = 1e-5
    for c, i, j in ((0, 0, 0), (3, 2, 4), (7, 4, 5)):
        moved = []
        for sign in (1, -1):
            changed = a.clone()
            changed[:, c, i, j] += sign * step
            moved.append(parsed.value(model[1](changed), TARGETS))
        found = (moved[0] - moved[1]) / (2 * step)
        assert torch.allclose(found.detach(), g[:, :, c, i, j], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("reference", [None, (0, 4)])
def test_the_value_of_a_contrast_has_its_gradient(
    temperature: float, reference: tuple[int, ...] | None
) -> None:
    contrast = Contrast(temperature, reference)
    z = torch.randn(4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1], [2], [3], [1]])
    differentiated = torch.autograd.functional.jacobian(
        lambda z: _value(z, targets, temperature, reference).sum(), z
    )
    assert torch.allclose(contrast.gradient(z, targets)[:, 0], differentiated, atol=1e-8)
    expected = _value(z, targets, temperature, reference)
    assert torch.allclose(contrast.value(z, targets)[:, 0], expected, atol=1e-8)
    shifted = contrast.value(z + 1e3, targets)[:, 0]
    assert torch.allclose(shifted, expected, atol=1e-8)


def _value(
    z: Tensor, targets: Tensor, temperature: float, reference: tuple[int, ...] | None
) -> Tensor:
    """z_c - T (LSE_j(z_j / T) - log J), by the letter."""
    rows = []
    for row, target in zip(z, targets[:, 0].tolist(), strict=True):
        others = row[[k for k in (reference or range(5)) if k != target]]
        if temperature == 0:
            rows.append(row[target] - others.max())
        elif math.isinf(temperature):
            rows.append(row[target] - others.mean())
        else:
            lse = (others / temperature).logsumexp(dim=0) - math.log(len(others))
            rows.append(row[target] - temperature * lse)
    return torch.stack(rows)


def test_the_three_scores_of_a_softmax_give_one_map_and_log_odds_survive_saturation() -> None:
    model = with_mlp()
    c = 3

    def maps(function: object) -> Tensor:
        explainer = Explainer(model, method="hires_cam", relu=False)
        return explainer(images(), function).heatmaps((10, 12))  # type: ignore[arg-type]

    probability = maps(lambda out: out.softmax(dim=1)[:, c])
    log_probability = maps(lambda out: out.log_softmax(dim=1)[:, c])
    contrast = Explainer(model, method="hires_cam", contrast="log_odds", relu=False)
    log_odds = contrast(images(), c).heatmaps((10, 12))
    assert torch.allclose(probability, log_odds, atol=1e-4)
    assert torch.allclose(log_probability, log_odds, atol=1e-4)
    saturated = copy.deepcopy(model)
    with torch.no_grad():
        saturated[1][4].bias[c] += 120
    gone = Explainer(saturated, method="hires_cam", relu=False)
    assert (gone(images(), lambda out: out.softmax(dim=1)[:, c]).maps == 0).all()
    kept = Explainer(saturated, method="hires_cam", contrast="log_odds", relu=False)
    assert torch.allclose(kept(images(), c).heatmaps((10, 12)), log_odds, atol=1e-4)


def test_two_classes_have_one_contrast() -> None:
    model = pooled(classes=2)
    maps = [
        Explainer(model, contrast=contrast)(images(), 1).maps
        for contrast in ("mean", "log_odds", "runner_up")
    ]
    assert torch.allclose(maps[0], maps[1]) and torch.allclose(maps[0], maps[2])


def test_score_cam_sees_no_constant_added_to_all_scores_and_no_order_of_channels() -> None:
    model = with_mlp()
    explainer = Explainer(model, method="score_cam")
    plain = explainer(images(), lambda out: out[:, 1]).maps
    shifted = explainer(images(), lambda out: out[:, 1] + 7).maps
    assert relative_error(shifted, plain) < 1e-4
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    turned = copy.deepcopy(pooled())
    with torch.no_grad():
        turned[0][3].weight.copy_(turned[0][3].weight[order])
        turned[0][3].bias.copy_(turned[0][3].bias[order])
        turned[2].weight.copy_(turned[2].weight[:, order])
    straight = Explainer(pooled(), method="score_cam")(images(), 2).maps
    assert relative_error(Explainer(turned, method="score_cam")(images(), 2).maps, straight) < 1e-5
