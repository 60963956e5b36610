"""Methods whose weights are fitted, through the explainer."""

import copy

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from diffcam_fast import Explainer
from diffcam_fast.methods import METHODS, BroadCAM, FittedCAM
from networks import images, pooled, relative_error, with_mlp


def labelled(n: int = 30, k: int = 5) -> tuple[Tensor, Tensor]:
    return images(n), torch.arange(n) % k


def batches(size: int, n: int = 30) -> list[tuple[Tensor, Tensor]]:
    x, y = labelled(n)
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("model", [pooled(), with_mlp()], ids=["pooled", "mlp"])
def test_broad_cam_is_the_ridge_regression_of_scikit_learn(model: nn.Module) -> None:
    explainer = Explainer(model, method="broad_cam").fit(batches(7))
    x, y = labelled()
    a = copy.deepcopy(model).double()[0](x.double()).relu()
    features = a.mean(dim=(2, 3)).detach().numpy()
    scale = features.std(axis=0)
    ridge = Ridge(alpha=50.0).fit((features - features.mean(axis=0)) / scale, np.eye(5)[y])
    assert relative_error(explainer.fitted[0], torch.tensor(ridge.coef_ / scale)) < 1e-5
    weights = torch.tensor(ridge.coef_ / scale)
    expected = torch.einsum("c,nchw->nhw", weights[2], a).relu()[:, None]
    assert relative_error(explainer(x, 2).maps, expected) < 1e-4


def test_the_cut_into_batches_does_not_matter_and_classes_may_be_many_hot() -> None:
    one, many = (Explainer(pooled(), method="broad_cam").fit(batches(n)) for n in (30, 4))
    assert relative_error(many.fitted[0], one.fitted[0]) < 1e-5
    hot = [(x, nn.functional.one_hot(y, 5)) for x, y in batches(10)]
    assert (
        relative_error(Explainer(pooled(), method="broad_cam").fit(hot).fitted[0], one.fitted[0])
        < 1e-5
    )


def test_a_channel_that_never_varies_gets_no_weight() -> None:
    model = pooled()
    with torch.no_grad():
        model[0][3].weight[[1, 4]] = 0
        model[0][3].bias[[1, 4]] = torch.tensor([0.7, -1.0])
    weights = Explainer(model, method="broad_cam").fit(batches(10)).fitted[0]
    assert (weights[:, [1, 4]] == 0).all()
    assert (weights[:, [0, 2]] != 0).all() and bool(weights.isfinite().all())


def test_re_cam_weighs_the_classifier_with_a_second_one() -> None:
    model = pooled()
    first, again = (Explainer(model, method="re_cam").fit(batches(10)) for _ in (0, 1))
    assert torch.equal(first.fitted[0], again.fitted[0])
    x, _ = labelled()
    a = model[0](x).detach()
    expected = torch.einsum("c,nchw->nhw", first.fitted[0][3], a).relu()[:, None]
    assert relative_error(first(x, 3).maps, expected) < 1e-5


def test_re_cam_learns_what_tells_classes_apart() -> None:
    # Channel 0 is in both classes, 1 and 2 in one each; W takes channel 0 for both.
    features = nn.Conv2d(3, 3, 1, bias=False)
    classifier = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        features.weight.copy_(torch.eye(3)[:, :, None, None])
        classifier.weight.copy_(torch.tensor([[1.0, 0.6, 0.0], [1.0, 0.0, 0.6]]))
    model = nn.Sequential(features, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    x = torch.zeros(2, 3, 4, 4)
    x[:, 0, 0, 0] = 1
    x[0, 1, 3, 3] = x[1, 2, 3, 3] = 1
    method = METHODS["re_cam"]
    assert isinstance(method, FittedCAM)
    plain = Explainer(model, method="cam", layer="1", example_inputs=x)(x, [0, 1]).heatmaps((4, 4))
    tuned = type(method)("re_cam", "none", "", epochs=300, lr=0.05)
    explainer = Explainer(model, method=tuned, layer="1", example_inputs=x)
    found = explainer.fit([(x, torch.tensor([0, 1]))])(x, [0, 1]).heatmaps((4, 4))
    assert (plain[:, 0, 0, 0] == 1).all() and (plain[:, 0, 3, 3] < 0.7).all()
    assert (found[:, 0, 3, 3] == 1).all() and (found[:, 0, 0, 0] < 0.5).all()


def test_what_was_fitted_can_be_kept() -> None:
    fitted = Explainer(pooled(), method="broad_cam").fit(batches(10))
    again = Explainer(pooled(), method="broad_cam")
    again.fitted = fitted.fitted
    assert torch.equal(again(images(), 1).maps, fitted(images(), 1).maps)


def test_other_penalties() -> None:
    stiff = BroadCAM("broad_cam", "none", "arXiv 2309.03509", alpha=1e9)
    weights = Explainer(pooled(), method=stiff).fit(batches(10)).fitted[0]
    plain = Explainer(pooled(), method="broad_cam").fit(batches(10)).fitted[0]
    assert float(weights.abs().max()) < 1e-4 * float(plain.abs().max())


def fit(method: str, given: object, model: nn.Module | None = None) -> object:
    return Explainer(model or pooled(), method=method).fit(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Explainer(pooled(), method="broad_cam")(images()), "has to be fitted: call fit"),
        (lambda: fit("diff_grad_cam", batches(10)), "diff_grad_cam is not fitted"),
        (lambda: fit("broad_cam", []), "no images to fit on"),
        (lambda: fit("re_cam", []), "no images to fit on"),
        (lambda: fit("re_cam", iter(batches(10))), "iterated once an epoch"),
        (lambda: fit("broad_cam", [(images(), torch.tensor([0, 1, 5]))]), "must be from 0 to 4"),
        (
            lambda: fit("broad_cam", [(images(), torch.tensor([0, 1]))]),
            r"\(3,\) class indices, or \(3, 5\)",
        ),
        (lambda: fit("re_cam", batches(10), with_mlp()), "pooled linear head only"),
        (
            lambda: Explainer(pooled(), method="cam")(images(), lambda out: out[:, 0]),
            "a function has no weights",
        ),
    ],
)
def test_errors_say_what_to_do(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
