"""Fitted weights against scikit-learn, autograd and what they promise."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from diffcam_fast.fitting import fit_broad, fit_re


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.double) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pooled(n: int = 60, d: int = 7) -> Tensor:
    return random(n, d) * torch.logspace(-3, 3, d) + random(d, seed=1)


def many_hot(n: int, k: int) -> Tensor:
    return (random(n, k, seed=2) > 0.5).long()


def by_scikit_learn(features: Tensor, targets: Tensor, alpha: float) -> Tensor:
    scaler = StandardScaler().fit(features.numpy())
    ridge = Ridge(alpha=alpha, solver="cholesky")
    ridge.fit(scaler.transform(features.numpy()), targets.double().numpy())
    coefficients = np.asarray(ridge.coef_).reshape(targets.shape[1], -1)
    return torch.from_numpy(coefficients / scaler.scale_)


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference in a weight, relative to the largest weight of its feature."""
    return float(((found - expected).abs().amax(dim=0) / expected.abs().amax(dim=0)).max())


@pytest.mark.parametrize("classes", [1, 4, 5])
@pytest.mark.parametrize("alpha", [1e-3, 50.0, 1e5])
def test_broad_is_the_ridge_regression_of_scikit_learn(classes: int, alpha: float) -> None:
    x, y = pooled(), many_hot(60, classes)
    found = fit_broad(zip(x.split(13), y.split(13), strict=True), classes, alpha=alpha)
    assert found.shape == (classes, 7) and found.dtype == torch.double
    assert off(found, by_scikit_learn(x, y, alpha)) < 1e-8


def test_broad_has_more_features_than_images() -> None:
    x, y = random(9, 30), torch.arange(9) % 3
    assert off(fit_broad([(x, y)], 3), by_scikit_learn(x, F.one_hot(y), 50.0)) < 1e-8


def test_broad_takes_indices_and_many_hot_labels() -> None:
    x, y = pooled(), torch.arange(60) % 5
    expected = fit_broad([(x, y)], 6)
    assert torch.equal(fit_broad([(x, F.one_hot(y, 6))], 6), expected)
    assert torch.equal(fit_broad([(x, F.one_hot(y, 6).bool())], 6), expected)
    assert (expected[5] == 0).all()


@pytest.mark.parametrize("size", [1, 7, 59])
def test_the_cut_into_batches_does_not_matter(size: int) -> None:
    x, y = pooled(), torch.arange(60) % 5
    whole = fit_broad([(x, y), (x[:0], y[:0])], 5)
    assert off(fit_broad(zip(x.split(size), y.split(size), strict=True), 5), whole) < 1e-11


def test_features_far_from_0_keep_their_digits() -> None:
    x, y = random(60, 4), torch.arange(60) % 3
    x[30:] += 1
    cut = [(x[n : n + 7] + 1e6, y[n : n + 7]) for n in range(0, 60, 7)]
    assert off(fit_broad(cut, 3), fit_broad([(x, y)], 3)) < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_a_feature_that_does_not_vary_has_no_weight(dtype: torch.dtype) -> None:
    x, y = random(60, 5).to(dtype), torch.arange(60) % 3
    x[:, 1], x[:, 3], x[:, 4] = 0.0, 0.1, 0.1
    x[::2, 4] += torch.finfo(dtype).eps / 16
    found = fit_broad(zip(x.split(7), y.split(7), strict=True), 3)
    assert (found[:, [1, 3, 4]] == 0).all() and (found[:, [0, 2]] != 0).all()
    assert off(found[:, [0, 2]], fit_broad([(x[:, [0, 2]], y)], 3)) < 1e-11


def test_linear_enhancement_nodes_change_the_penalty_alone() -> None:
    x, y = random(60, 4), many_hot(60, 3).double()
    x = (x - x.mean(dim=0)) / x.std(dim=0, correction=0)
    nodes = random(4, 6, seed=3)
    both = torch.cat([x, x @ nodes], dim=1)
    eye = torch.eye
    parts = torch.linalg.solve(both.T @ both + 50 * eye(10), both.T @ (y - y.mean(dim=0)))
    folded = parts[:4] + nodes @ parts[4:]
    penalty = 50 * torch.linalg.inv(eye(4) + nodes @ nodes.T)
    expected = torch.linalg.solve(x.T @ x + penalty, x.T @ (y - y.mean(dim=0)))
    assert torch.allclose(folded, expected, atol=1e-12)


def test_broad_in_any_mode_of_the_caller() -> None:
    x, y = pooled().float().requires_grad_(), torch.arange(60) % 5
    expected = fit_broad([(x, y)], 5)
    assert not expected.requires_grad
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fit_broad([(x, y)], 5), expected)


# Channel 0 shows at cell 0 in both classes; channels 1 and 2 at cell 3, each in one class.
WEIGHT = torch.tensor([[1.0, 0.6, 0.1], [1.0, 0.1, 0.6]])


def toy() -> tuple[Tensor, Tensor]:
    a = torch.zeros(2, 3, 2, 2)
    a[:, 0, 0, 0] = a[0, 1, 1, 1] = a[1, 2, 1, 1] = 1
    return a, torch.tensor([0, 1])


def share_of_last_cell(weight: Tensor, a: Tensor, labels: Tensor) -> Tensor:
    maps = torch.einsum("nc,nchw->nhw", weight[labels], a).relu().flatten(1)
    return maps[:, 3] / maps.sum(dim=1)


def test_re_learns_what_tells_classes_apart() -> None:
    a, labels = toy()
    losses: list[tuple[int, float]] = []
    options: dict[str, Any] = {"epochs": 300, "lr": 0.05}
    found = fit_re([(a, labels)], WEIGHT, **options, progress=lambda *now: losses.append(now))
    assert [epoch for epoch, _ in losses] == list(range(1, 301))
    assert losses[-1][1] < 0.1 * losses[0][1]
    assert (share_of_last_cell(WEIGHT, a, labels) < 0.4).all()
    assert (share_of_last_cell(found, a, labels) > 0.9).all()


def second_classifier(seed: int, shape: tuple[int, int]) -> Tensor:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1) / shape[1] ** 0.5


def test_re_is_adam_on_its_formula() -> None:
    a, weight = random(5, 4, 3, 2, dtype=torch.float32), random(3, 4, seed=1, dtype=torch.float32)
    hot = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1]])
    second = second_classifier(9, (3, 4)).requires_grad_()
    optimiser = torch.optim.Adam([second], 0.01)
    expected: list[float] = []
    for _ in range(3):
        sums = []
        for rows in ([0, 1, 2], [3, 4]):
            of_images = []
            for n in [n for n in rows if n != 1]:
                losses = []
                for k in hot[n].nonzero().flatten():
                    m = (weight[k, :, None, None] * a[n]).sum(dim=0).relu()
                    f = (m / (m.max() + 1e-5) * a[n]).mean(dim=(1, 2))
                    losses.append(-(second @ f).log_softmax(dim=0)[k])
                of_images.append(torch.stack(losses).mean())
            optimiser.zero_grad()
            torch.stack(of_images).mean().backward()
            optimiser.step()
            sums += [float(loss.detach()) for loss in of_images]
        expected.append(float(np.mean(sums)))
    means: list[float] = []
    found = fit_re(
        [(a[:3], hot[:3]), (a[3:], hot[3:])],
        weight,
        epochs=3,
        lr=0.01,
        seed=9,
        progress=lambda epoch, loss: means.append(loss),
    )
    assert torch.allclose(found, weight * second.detach(), atol=1e-6)
    assert means == pytest.approx(expected, abs=1e-6)


def test_re_is_the_product_of_two_classifiers() -> None:
    # Steps too small to count leave the second classifier as it was drawn.
    a, labels = toy()
    found = fit_re([(a, labels)], WEIGHT, epochs=1, lr=1e-12, seed=3)
    assert torch.allclose(found, WEIGHT * second_classifier(3, (2, 3)))
    weight = WEIGHT.clone()
    weight[0, 1] = 0
    assert fit_re([(a, labels)], weight, lr=0.1)[0, 1] == 0
    # A class without evidence for it has features of 0, and teaches nothing.
    untold = fit_re([(a, labels)], -WEIGHT, lr=0.1, seed=3)
    assert torch.allclose(untold, -WEIGHT * second_classifier(3, (2, 3)))


def test_re_is_repeatable_and_its_seed_counts() -> None:
    a, labels = toy()
    found = [fit_re([(a, labels)], WEIGHT, seed=seed) for seed in (1, 1, 2)]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    fit_re([(a, labels)], WEIGHT)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_re_in_any_mode_of_the_caller() -> None:
    a, labels = toy()
    expected = fit_re([(a, labels)], WEIGHT, lr=0.1)
    parameter = torch.nn.Parameter(WEIGHT.clone())
    assert torch.equal(fit_re([(a.requires_grad_(), labels)], parameter, lr=0.1), expected)
    assert not expected.requires_grad and parameter.grad is None and a.grad is None
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = toy()
        assert torch.equal(fit_re([inside], WEIGHT.clone(), lr=0.1), expected)
    with torch.no_grad():
        assert torch.equal(fit_re([toy()], WEIGHT, lr=0.1), expected)
    half = fit_re([(a.bfloat16(), labels)], WEIGHT.bfloat16())
    assert half.dtype == torch.float32


class Spent:
    """Has one pass in it, though it looks like a list."""

    def __init__(self) -> None:
        self.batches = [toy()]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.batches:
            yield self.batches.pop()


X, Y = pooled(4, 3), torch.tensor([0, 1, 2, 0])
A = random(4, 3, 2, 2, dtype=torch.float32)
W = random(3, 3, dtype=torch.float32)
NAN = torch.tensor(torch.nan)


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "no images to fit on"),
        ([(X[:0], Y[:0])], {}, ValueError, "no images to fit on"),
        ([(X, Y)], {"classes": 0}, ValueError, "at least 1, got 0"),
        ([(X, Y)], {"alpha": 0.0}, ValueError, "above 0 and finite, got 0.0"),
        ([(X, Y)], {"alpha": float("nan")}, ValueError, "got nan"),
        ([(X, Y + 1)], {}, ValueError, "from 0 to 2, got 1 to 3"),
        ([(X, Y - 1)], {}, ValueError, "got -1 to 1"),
        ([(X, Y.float())], {}, TypeError, "int64, got torch.float32"),
        ([(X, Y[:3])], {}, ValueError, r"\(4,\) class indices, or \(4, 3\) .* got \(3,\)"),
        ([(X, 2 * F.one_hot(Y))], {}, ValueError, r"\(4, 3\) must be 0 or 1"),
        ([(X[None], Y)], {}, ValueError, r"\(N, D\), got \(1, 4, 3\)"),
        ([(X, Y), (X[:, :2], Y)], {}, ValueError, r"\(N, 3\), got \(4, 2\)"),
        ([(X * NAN, Y)], {}, ValueError, "features must be finite"),
    ],
)
def test_what_broad_refuses(
    batches: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit_broad(batches, **{"classes": 3, **options})


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "no images to fit on"),
        ([(A, F.one_hot(Y) * 0)], {}, ValueError, "no image shows a class"),
        ([(A, Y)], {"epochs": 0}, ValueError, "at least 1, got 0"),
        ([(A, Y)], {"lr": 0.0}, ValueError, "lr must be above 0 and finite, got 0.0"),
        ([(A, Y + 1)], {}, ValueError, "from 0 to 2, got 1 to 3"),
        ([(A, Y.int())], {}, TypeError, "int64, got torch.int32"),
        ([(A[:, :2], Y)], {}, ValueError, r"\(N, 3, h, w\) .* got \(4, 2, 2, 2\)"),
        ([(A, Y)], {"weight": W[0]}, ValueError, r"\(K, C\), got \(3,\)"),
        ([(A * NAN, Y)], {}, ValueError, "activations must be finite"),
        (iter([(A, Y)]), {}, ValueError, "4 epochs need batches .* got a list_iterator"),
        (Spent(), {"weight": WEIGHT}, ValueError, "iterated once an epoch"),
    ],
)
def test_what_re_refuses(batches: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_re(batches, **{"weight": W, **options})


def test_one_epoch_takes_a_generator() -> None:
    assert torch.equal(fit_re(iter([(A, Y)]), W, epochs=1), fit_re([(A, Y)], W, epochs=1))
