"""Contrasts against their limits, their gradients, and the places where floating point gives
way."""

import math

import pytest
import torch

from diffcam_fast.contrast import Contrast, contrast_score
from diffcam_kernels import ops, reference

LOGITS = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
TARGETS = torch.tensor([[0], [3], [6], [2]])


def q_at(
    temperature: float, logits: torch.Tensor = LOGITS, targets: torch.Tensor = TARGETS
) -> torch.Tensor:
    return reference.contrast_weights(logits, targets, temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-310, 1e-30, 0.3, 1.0, 3.0, 1e6, 1e300, math.inf])
def test_weights_sum_to_one_and_leave_the_target_out(temperature: float) -> None:
    q = q_at(temperature)
    assert torch.allclose(q.sum(dim=2), torch.ones(4, 1, dtype=torch.float64), atol=1e-12)
    assert (q.gather(2, TARGETS[:, :, None]) == 0).all()


def test_high_temperature_tends_to_the_mean() -> None:
    assert (q_at(1e6) - q_at(math.inf)).abs().max() < 2e-6


def test_low_temperature_tends_to_the_runner_up() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.5, 1.0]], dtype=torch.float64)
    target = torch.tensor([[0]])
    difference = q_at(0.03, logits, target) - q_at(0.0, logits, target)
    assert difference.abs().max() <= 2 * math.exp(-1.5 / 0.03)


def test_log_odds_gradient_by_autograd_of_the_log_odds() -> None:
    logits = LOGITS.clone().requires_grad_()
    p = logits.softmax(dim=1).gather(1, TARGETS)
    (p / (1 - p)).log().sum().backward()
    d = Contrast.parse("log_odds").gradient(LOGITS, TARGETS)
    assert torch.allclose(d[:, 0], logits.grad, atol=1e-10)


def test_score_is_differentiable_with_gradient_d() -> None:
    logits = LOGITS.clone().requires_grad_()
    contrast_score(logits, TARGETS, "mean").sum().backward()
    assert torch.allclose(logits.grad, Contrast.parse("mean").gradient(LOGITS, TARGETS)[:, 0])


def test_two_classes_make_all_contrasts_equal() -> None:
    logits = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    targets = torch.tensor([[0, 1], [1, 0]])
    first, *others = (
        Contrast.parse(n).gradient(logits, targets) for n in ("mean", "log_odds", "runner_up")
    )
    assert all(torch.allclose(first, other) for other in others)


@pytest.mark.parametrize("margin", [17.0, 20.0, 40.0, 300.0])
def test_saturated_probabilities_keep_the_contrast(margin: float) -> None:
    logits = torch.tensor([[margin, 0.0, math.log(3.0)]])
    d = Contrast.parse("log_odds").gradient(logits, torch.tensor([[0]]))
    assert torch.allclose(d, torch.tensor([[[1.0, -0.25, -0.75]]]), atol=1e-6)


def test_a_common_shift_changes_nothing() -> None:
    for name in ("mean", "log_odds", "runner_up"):
        contrast = Contrast.parse(name)
        shifted = LOGITS + 1000
        assert torch.allclose(
            contrast.gradient(shifted, TARGETS), contrast.gradient(LOGITS, TARGETS), atol=1e-9
        )
        assert torch.allclose(
            contrast_score(shifted, TARGETS, name), contrast_score(LOGITS, TARGETS, name), atol=1e-9
        )


def test_ties_take_the_lowest_class() -> None:
    d = Contrast.parse("runner_up").gradient(
        torch.tensor([[0.0, 2.0, 2.0, 2.0]]), torch.tensor([[1]])
    )
    assert d.tolist() == [[[0.0, 1.0, -1.0, 0.0]]]


@pytest.mark.parametrize("name", ["mean", "log_odds", "runner_up"])
def test_a_logit_of_minus_infinity_takes_no_part(name: str) -> None:
    logits, targets = torch.tensor([[1.0, -math.inf, 0.0, 2.0]]), torch.tensor([[0]])
    without = torch.tensor([[1.0, 0.0, 2.0]])
    d = Contrast.parse(name).gradient(logits, targets)
    assert d[0, 0, 1] == 0
    assert torch.allclose(d[..., [0, 2, 3]], Contrast.parse(name).gradient(without, targets))
    assert torch.allclose(
        contrast_score(logits, targets, name), contrast_score(without, targets, name)
    )


@pytest.mark.parametrize("name", ["mean", "log_odds", "runner_up"])
def test_nan_logits_stay_visible(name: str) -> None:
    logits = torch.tensor([[1.0, math.nan, 0.0], [1.0, 2.0, 3.0]])
    d = Contrast.parse(name).gradient(logits, torch.tensor([[0], [0]]))
    assert d[0].isnan().any() and d[1].isfinite().all()


def test_reference_classes() -> None:
    targets = torch.tensor([[0, 3]] * 4)
    d = Contrast.parse("mean", reference=[1, 6]).gradient(LOGITS, targets)
    assert d[0, 0].tolist() == [1, -0.5, 0, 0, 0, 0, -0.5]
    assert d[2, 1].tolist() == [0, -0.5, 0, 1, 0, 0, -0.5]


def test_given_weights() -> None:
    weights = torch.tensor([0.0, 0.25, 0.75])
    d = Contrast(weights=weights).gradient(torch.zeros(2, 3), torch.tensor([[0], [0]]))
    assert torch.equal(d, torch.tensor([1.0, -0.25, -0.75]).expand(2, 1, 3))


def test_half_precision_logits_are_contrasted_in_float32() -> None:
    d = Contrast.parse("log_odds").gradient(LOGITS.bfloat16(), TARGETS)
    assert d.dtype == torch.float32
    assert torch.allclose(
        d.double(),
        Contrast.parse("log_odds").gradient(LOGITS.bfloat16().double(), TARGETS),
        atol=1e-6,
    )


def test_names() -> None:
    assert Contrast().name == "log_odds"
    assert Contrast(0.5).name == "temperature=0.5"
    assert Contrast(math.inf, reference=(4, 2)).name == "mean against 4,2"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Contrast(-1.0), "temperature must be 0 .* got -1.0"),
        (lambda: Contrast(math.nan), "temperature must be 0 .* got nan"),
        (lambda: Contrast.parse("loud"), "unknown contrast 'loud'; there are mean, log_odds"),
        (lambda: Contrast.parse("mean", temperature=2.0), "only log_odds takes another"),
        (lambda: Contrast(reference=(1, 1)), "name each class once"),
        (lambda: Contrast(reference=()), "one at least"),
        (lambda: Contrast(reference=(0,)).gradient(LOGITS, TARGETS), "itself among the reference"),
        (lambda: Contrast(reference=(9,)).gradient(LOGITS, TARGETS), "leaves the classes 0 to 6"),
        (
            lambda: Contrast(weights=torch.full((7,), 1 / 7)).gradient(LOGITS, TARGETS),
            "must be 0 at the target",
        ),
        (lambda: Contrast(weights=torch.zeros(7)).gradient(LOGITS, TARGETS), "must sum to 1"),
        (
            lambda: Contrast(weights=torch.zeros(3)).gradient(LOGITS, TARGETS),
            "must be .7,. or .4, 7.",
        ),
        (
            lambda: Contrast().gradient(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64)),
            "at least two classes",
        ),
        (lambda: ops.contrast_gradient(LOGITS, TARGETS.int(), 1.0), "targets must be .N, T. int64"),
        (lambda: ops.contrast_gradient(LOGITS[0], TARGETS, 1.0), "logits must be .N, K."),
    ],
)
def test_errors_say_what_came(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
