"""Every method against its definition, written out in float64, on a pooled linear head and on
another one.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast import Contrast, Explainer
from diffcam_fast.methods import METHODS, GradientMethod
from networks import expected_maps, images, pooled, relative_error, with_mlp

TARGETS = torch.tensor([[3, 0], [1, 4], [2, 2]])
CONTRASTS = ("none", "mean", "log_odds", "runner_up")
UNFITTED = [name for name, method in METHODS.items() if not method.needs_fit]
ON_ANY_HEAD = [name for name in UNFITTED if not METHODS[name].needs_pooled_head]
PLAIN = [m for m in METHODS.values() if type(m) is GradientMethod]
NETWORKS = pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["pooled", "mlp"])


def agree(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Relative to the largest magnitude; maps may be all 0."""
    return float((value - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Exact:
    """A network in float64, cut behind its features."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).double().eval()
        assert isinstance(self.model, nn.Sequential)
        self.features, self.head = self.model[0], self.model[1:]
        self.x = images().double()
        self.a = self.features(self.x).detach()

    def value(self, logits: Tensor, targets: Tensor, contrast: str) -> Tensor:
        """F (M, T): the log-odds and its limits, without the constant of `Contrast.value`."""
        z = logits.detach()
        others = (
            z[:, None].repeat(1, targets.shape[1], 1).scatter(2, targets[..., None], -torch.inf)
        )
        chosen = z.gather(1, targets)
        if contrast == "none":
            return chosen
        if contrast == "mean":
            k = z.shape[1]
            return chosen - (z.sum(dim=1, keepdim=True) - chosen) / (k - 1)
        if contrast == "runner_up":
            return chosen - others.amax(dim=2)
        return chosen - others.logsumexp(dim=2) + torch.tensor(z.shape[1] - 1.0).log()


@pytest.mark.parametrize(
    ("method", "contrast"),
    [(m, c) for m in PLAIN for c in CONTRASTS if c != "none" or not m.needs_contrast],
    ids=lambda value: getattr(value, "name", value),
)
@NETWORKS
def test_gradient_methods(model: nn.Module, method: GradientMethod, contrast: str) -> None:
    explainer = Explainer(model, method=method.name, contrast=contrast, relu=False)
    expected = expected_maps(model, explainer.layer, images(), TARGETS, contrast, method.reduction)
    result = explainer(images(), TARGETS)
    assert relative_error(result.maps, expected) < 2e-5
    form = "closed form" if isinstance(model[2] if len(model) > 2 else None, nn.Linear) else "back"
    assert form in result.backend


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_cam(contrast: str) -> None:
    exact = Exact(pooled())
    weight = exact.head[1].weight.detach()
    logits = exact.head(exact.a).detach()
    d = Contrast.parse(contrast).gradient(logits, TARGETS)
    expected = torch.einsum("ntk,kc,nchw->nthw", d, weight, exact.a)
    got = Explainer(pooled(), method="cam", contrast=contrast, relu=False)(images(), TARGETS)
    assert relative_error(got.maps, expected) < 1e-5


def test_cam_is_refused_behind_another_head() -> None:
    with pytest.raises(ValueError, match="pooled linear head only; behind layer '0' there is"):
        Explainer(with_mlp(), method="cam")(images())


@NETWORKS
def test_eigen_cam(model: nn.Module) -> None:
    exact = Exact(model)
    result = Explainer(model, method="eigen_cam", relu=False)(images(), TARGETS)
    for image, a in enumerate(exact.a):
        x = a.flatten(1).T
        u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
        m = u[:, 0] * s[0]
        m = m * m[m.abs().argmax()].sign()
        for t in (0, 1):
            assert relative_error(result.maps[image, t].flatten(), m) < 1e-5


@pytest.mark.parametrize("contrast", ["none", "log_odds"])
@NETWORKS
def test_eigen_grad_cam(model: nn.Module, contrast: str) -> None:
    explainer = Explainer(model, method="eigen_grad_cam", contrast=contrast, relu=False)
    exact, result = Exact(model), explainer(images(), TARGETS)
    a = exact.a.clone().requires_grad_()
    logits = exact.head(a)
    d = Contrast.parse(contrast).gradient(logits.detach(), TARGETS)
    for t in (0, 1):
        (g,) = torch.autograd.grad((logits * d[:, t]).sum(), a, retain_graph=True)
        for image, product in enumerate((g * exact.a).flatten(2)):
            x = product.T - product.T.mean(dim=0)
            u, s, _ = torch.linalg.svd(x, full_matrices=False)
            m = u[:, 0] * s[0]
            m = m * m[m.abs().argmax()].sign()
            assert relative_error(result.maps[image, t].flatten(), m) < 1e-4


@pytest.mark.parametrize("contrast", CONTRASTS)
@NETWORKS
def test_recipro_cam_is_a_loop_over_cells(model: nn.Module, contrast: str) -> None:
    exact = Exact(model)
    h, w = exact.a.shape[2:]
    expected = torch.zeros(3, 2, h, w, dtype=torch.double)
    for i in range(h):
        for j in range(w):
            alone = torch.zeros_like(exact.a)
            alone[:, :, i, j] = exact.a[:, :, i, j]
            logits = exact.head(alone).detach()
            if contrast == "none":
                expected[:, :, i, j] = logits.softmax(dim=1).gather(1, TARGETS)
            else:
                expected[:, :, i, j] = exact.value(logits, TARGETS, contrast)
    got = Explainer(model, method="recipro_cam", contrast=contrast)(images(), TARGETS)
    assert relative_error(got.maps, expected) < 1e-5
    assert ("closed form" in got.backend) == isinstance(model[-1], nn.Linear)


@pytest.mark.parametrize("contrast", CONTRASTS)
@NETWORKS
def test_ablation_cam_is_a_loop_over_channels(model: nn.Module, contrast: str) -> None:
    exact = Exact(model)
    whole = exact.value(exact.head(exact.a), TARGETS, contrast)
    lost = []
    for k in range(exact.a.shape[1]):
        without = exact.a.clone()
        without[:, k] = 0
        lost.append(whole - exact.value(exact.head(without), TARGETS, contrast))
    expected = torch.einsum("cnt,nchw->nthw", torch.stack(lost), exact.a)
    got = Explainer(model, method="ablation_cam", contrast=contrast, relu=False)(images(), TARGETS)
    assert relative_error(got.maps, expected) < 1e-5
    assert ("closed form" in got.backend) == isinstance(model[-1], nn.Linear)


@pytest.mark.parametrize("contrast", CONTRASTS)
@NETWORKS
def test_score_cam_is_a_loop_over_channels(model: nn.Module, contrast: str) -> None:
    exact = Exact(model)
    scores = []
    for k in range(exact.a.shape[1]):
        up = F.interpolate(
            exact.a[:, k : k + 1], exact.x.shape[2:], mode="bilinear", align_corners=True
        )
        low, high = up.amin(dim=(2, 3), keepdim=True), up.amax(dim=(2, 3), keepdim=True)
        logits = exact.model(exact.x * (up - low) / (high - low))
        scores.append(exact.value(logits, TARGETS, contrast))
    weights = torch.stack(scores).softmax(dim=0)
    expected = torch.einsum("cnt,nchw->nthw", weights, exact.a)
    got = Explainer(model, method="score_cam", contrast=contrast, relu=False)(images(), TARGETS)
    assert relative_error(got.maps, expected) < 1e-5


@pytest.mark.parametrize("contrast", ["none", "mean"])
@NETWORKS
def test_decom_cam_is_its_recipe(model: nn.Module, contrast: str) -> None:
    exact = Exact(model)
    a = exact.a.clone().requires_grad_()
    logits = exact.head(a)
    d = Contrast.parse(contrast).gradient(logits.detach(), TARGETS)
    n, c, h, w = exact.a.shape
    offsets = torch.arange(-9, 10, dtype=torch.double)
    expected = torch.zeros(n, 2, h, w, dtype=torch.double)
    for t in (0, 1):
        (g,) = torch.autograd.grad((logits * d[:, t]).sum(), a, retain_graph=True)
        for image in range(n):
            x = exact.x[image : image + 1]
            blurred = x
            for axis, side in ((2, 10), (3, 12)):
                reach = side - 1
                offsets = torch.arange(-reach, reach + 1, dtype=torch.double)
                kernel = (-(offsets**2) / 200).exp()
                kernel = (kernel / kernel.sum()).view((-1, 1) if axis == 2 else (1, -1))
                pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
                filters = kernel.expand(3, 1, *kernel.shape)
                blurred = F.conv2d(F.pad(blurred, pad, mode="reflect"), filters, groups=3)
            weighted = (g[image].mean(dim=(1, 2))[:, None] * exact.a[image].flatten(1)).T
            u, s, _ = torch.linalg.svd(weighted - weighted.mean(dim=0), full_matrices=False)
            values, parts = [], []
            for i in range(min(10, c, h * w)):
                part = u[:, i] * s[i]
                part = (part * part[part.abs().argmax()].sign()).relu().view(1, 1, h, w)
                up = F.interpolate(part, x.shape[2:], mode="bicubic", align_corners=False)
                mask = (up - up.min()) / (up.max() - up.min())
                out = exact.model(torch.maximum(x * mask, blurred * (1 - mask)))
                score = float(exact.value(out, TARGETS[image : image + 1, t : t + 1], contrast))
                values.append(score if score >= 1e-3 else 0.0)
                parts.append(part[0, 0])
            best = max(values) or 1.0
            expected[image, t] = sum(v / best * p for v, p in zip(values, parts, strict=True))
    got = Explainer(model, method="decom_cam", contrast=contrast, relu=False)(images(), TARGETS)
    assert relative_error(got.maps, expected) < 1e-3


@pytest.mark.parametrize("method", ON_ANY_HEAD)
@NETWORKS
def test_what_is_common_to_all_logits_is_invisible_to_a_contrast(
    model: nn.Module, method: str
) -> None:
    class CommonMode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = exact[0], exact[1:]

        def forward(self, x: Tensor) -> Tensor:
            a = self.features(x)
            shift = 5 * a[:, :, :2, :2].square().mean(dim=(1, 2, 3))
            logits: Tensor = self.head(a) + shift[:, None]
            return logits

    # In float64: a difference of large logits has few digits left in float32.
    exact = copy.deepcopy(model).double()
    fooled = CommonMode().eval()

    def moved(method: str, contrast: str) -> float:
        honest = Explainer(exact, method=method, contrast=contrast)(images(), TARGETS)
        hijacked = Explainer(fooled, layer="features", method=method, contrast=contrast)
        heatmaps = hijacked(images(), TARGETS).heatmaps((10, 12))
        return float((honest.heatmaps((10, 12)) - heatmaps).abs().max())

    for contrast in ("mean", "log_odds", "runner_up"):
        assert moved(method, contrast) < 1e-5, contrast
    # A probability sees no more than a contrast does, the other single scores do.
    if method not in ("eigen_cam", "recipro_cam"):
        assert moved(method.removeprefix("diff_"), "none") > 0.01


@pytest.mark.parametrize("method", UNFITTED)
def test_an_image_gets_the_same_map_alone_and_in_a_batch_and_nan_stays_with_its_image(
    method: str,
) -> None:
    explainer = Explainer(pooled(), method=method, relu=False)
    clean = explainer(images(), 1).maps
    for i, alone in enumerate(images()):
        assert agree(explainer(alone[None], 1).maps[0], clean[i], 1e-4)
    broken = images()
    broken[1, :, 3, 3] = torch.nan
    result = explainer(broken, 1)
    assert result.finite[:, 0].tolist() == [True, False, True]
    assert agree(result.maps[[0, 2]], clean[[0, 2]], 1e-4)


@pytest.mark.parametrize(
    ("model", "method"),
    [(pooled(), m) for m in UNFITTED] + [(with_mlp(), m) for m in ON_ANY_HEAD],
    ids=lambda value: value if isinstance(value, str) else type(value[-1]).__name__,
)
def test_no_images_and_half_precision(model: nn.Module, method: str) -> None:
    explainer = Explainer(model, method=method)
    assert explainer(images(0)).maps.shape == (0, 1, 5, 6)
    half = Explainer(copy.deepcopy(model).bfloat16(), method=method)(images(), TARGETS)
    assert half.maps.dtype == torch.float32 and bool(half.finite.all())


@pytest.mark.parametrize("method", UNFITTED)
def test_constant_activations_give_no_nan(method: str) -> None:
    model = pooled()
    with torch.no_grad():
        model[0][3].weight.zero_()
        model[0][3].bias.fill_(1.0)
    result = Explainer(model, method=method)(images(), 1)
    assert bool(result.finite.all())
    assert (result.heatmaps((10, 12)) == 0).all()


@pytest.mark.parametrize("method", ON_ANY_HEAD)
@NETWORKS
def test_a_function_of_the_output_is_explained_as_the_class_that_it_picks(
    model: nn.Module, method: str
) -> None:
    # Without a contrast Recipro-CAM looks at probabilities.
    softmax = method == "recipro_cam"
    plain = method.removeprefix("diff_")
    function = Explainer(model, method=method)(
        images(), lambda out: (out.softmax(dim=1) if softmax else out)[:, [2, 4]]
    )
    named = Explainer(model, method=plain, contrast="none")(images(), [[2, 4]] * 3)
    assert agree(function.maps, named.maps, 1e-4)
    assert (function.targets == -1).all() and function.contrast == "none"
    each = Explainer(model, method=method)(
        images(), [lambda o, k=k: (o.softmax(dim=0) if softmax else o)[k] for k in (3, 1, 2)]
    )
    named = Explainer(model, method=plain, contrast="none")(images(), [3, 1, 2])
    assert agree(each.maps, named.maps, 1e-4)
