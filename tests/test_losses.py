"""The loss that is made of maps, against its formula, and what it promises of constant maps."""

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.losses import cam_alignment_loss


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_loops(a: Tensor, weight: Tensor, labels: Tensor) -> float:
    total = 0.0
    for n in range(len(a)):
        both = a[n].sum(dim=0), (weight[labels[n], :, None, None] * a[n]).sum(dim=0)
        caam, cam = ((m - m.min()) / (m.max() - m.min()) for m in both)
        total += float((caam - cam).abs().mean()) / len(a)
    return total


@pytest.mark.parametrize("shape", [(3, 4, 7, 7), (2, 5, 13, 9), (1, 1, 2, 1)])
def test_it_is_its_formula(shape: tuple[int, ...]) -> None:
    a, weight = random(*shape, dtype=torch.double), random(6, shape[1], seed=1, dtype=torch.double)
    labels = torch.arange(shape[0]) + 2
    expected = by_loops(a, weight, labels)
    assert float(cam_alignment_loss(a, weight, labels)) == pytest.approx(expected, abs=1e-12)
    single = cam_alignment_loss(a.float(), weight.float(), labels)
    assert float(single) == pytest.approx(expected, abs=1e-5)


def test_a_class_that_weighs_all_channels_alike_is_aligned() -> None:
    a = random(4, 3, 5, 6, dtype=torch.double)
    weight = torch.tensor([[2.5, 2.5, 2.5], [1.0, 0.0, -1.0]], dtype=torch.double)
    assert float(cam_alignment_loss(a, weight, torch.zeros(4, dtype=torch.int64))) < 1e-14
    assert float(cam_alignment_loss(a, weight, torch.tensor([1, 0, 0, 0]))) > 0.01


def test_the_gradient_is_that_of_finite_differences() -> None:
    a = random(2, 3, 3, 4, dtype=torch.double).requires_grad_()
    weight = random(4, 3, seed=1, dtype=torch.double).requires_grad_()
    labels = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(lambda a, w: cam_alignment_loss(a, w, labels), (a, weight))


def test_a_detached_weight_has_no_gradient_and_the_features_keep_theirs() -> None:
    a = random(2, 3, 3, 4).requires_grad_()
    weight = random(4, 3, seed=1).requires_grad_()
    losses = [
        cam_alignment_loss(a, weight, torch.tensor([1, 3]), detach_weight=d) for d in (True, False)
    ]
    assert torch.autograd.grad(losses[0], weight, retain_graph=True, allow_unused=True)[0] is None
    first, second = (torch.autograd.grad(loss, a)[0] for loss in losses)
    assert torch.equal(first, second) and bool((first != 0).any())


@pytest.mark.parametrize("channels", [3, 17, 513])
@pytest.mark.parametrize("cells", [(7, 7), (13, 9), (1, 1)])
def test_constant_maps_have_no_loss_and_no_gradient(channels: int, cells: tuple[int, int]) -> None:
    # Sums over channels differ in their last bits between cells: noise is no map.
    a = random(2, channels, 1, 1).expand(-1, -1, *cells).clone().requires_grad_()
    weight = random(4, channels, seed=1).requires_grad_()
    loss = cam_alignment_loss(a, weight, torch.tensor([1, 2]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert a.grad is not None and (a.grad == 0).all()
    assert weight.grad is not None and (weight.grad == 0).all()


def test_channels_that_cancel_make_a_constant_map() -> None:
    x = random(1, 1, 7, 7)
    a = torch.cat([x, 1 - x], dim=1).requires_grad_()
    loss = cam_alignment_loss(a, torch.ones(1, 2), torch.tensor([0]))
    loss.backward()
    assert float(loss.detach()) == 0 and a.grad is not None and (a.grad == 0).all()


def test_one_constant_map_leaves_the_other_its_gradient() -> None:
    a = random(1, 2, 3, 3, dtype=torch.double)
    a[:, 1] = 0.3
    weight = torch.tensor([[0.0, 1.0]], dtype=torch.double)
    a.requires_grad_()
    loss = cam_alignment_loss(a, weight, torch.tensor([0]))
    loss.backward()
    caam = a.detach().sum(dim=1)
    unit = (caam - caam.min()) / (caam.max() - caam.min())
    assert float(loss.detach()) == pytest.approx(float(unit.mean()))
    assert a.grad is not None and a.grad.isfinite().all() and bool((a.grad != 0).any())


def test_half_precision_and_autocast_do_not_round_the_maps() -> None:
    a, weight, labels = random(2, 8, 5, 5), random(3, 8, seed=1), torch.tensor([0, 2])
    half = a.bfloat16().requires_grad_()
    loss = cam_alignment_loss(half, weight, labels)
    assert torch.equal(loss, cam_alignment_loss(half.float(), weight, labels))
    loss.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    plain = cam_alignment_loss(a, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cam_alignment_loss(a, weight, labels), plain)


def test_no_images_have_no_loss_and_nan_is_not_hidden() -> None:
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = cam_alignment_loss(empty, random(2, 3), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    broken = random(2, 3, 4, 4)
    broken[1, 0, 0, 0] = torch.nan
    assert cam_alignment_loss(broken, random(2, 3), torch.tensor([0, 1])).isnan()


def test_training_with_the_loss_lowers_it() -> None:
    torch.manual_seed(0)
    features, classifier = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 3)
    images, labels = random(12, 3, 8, 8), torch.arange(12) % 3

    def trained(share: float) -> float:
        torch.manual_seed(1)
        features.reset_parameters()
        classifier.reset_parameters()
        optimiser = torch.optim.Adam([*features.parameters(), *classifier.parameters()], 1e-2)
        for _ in range(40):
            a = features(images).relu()
            loss = nn.functional.cross_entropy(classifier(a.mean(dim=(2, 3))), labels)
            loss = loss + share * cam_alignment_loss(a, classifier.weight, labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        a = features(images).relu().detach()
        return float(cam_alignment_loss(a, classifier.weight.detach(), labels))

    assert trained(3.0) < 0.5 * trained(0.0)


ONE = torch.tensor([0])


@pytest.mark.parametrize(
    ("a", "weight", "labels", "error", "message"),
    [
        (torch.zeros(1, 3, 2), torch.zeros(2, 3), ONE, ValueError, r"got \(1, 3, 2\) and \(2, 3\)"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(2, 4), ONE, ValueError, r"and \(2, 4\)"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(3), ONE, ValueError, r"and \(3,\)"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(2, 3), ONE[None], ValueError, r"got \(1, 1\)"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(2, 3), ONE + 2, ValueError, "0 to 1, got 2 to 2"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(2, 3), ONE - 1, ValueError, "got -1 to -1"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(2, 3), ONE.float(), TypeError, "torch.float32"),
        (torch.zeros(1, 3, 2, 2), torch.zeros(2, 3), ONE == 0, TypeError, "torch.bool"),
    ],
)
def test_what_it_refuses(
    a: Tensor, weight: Tensor, labels: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cam_alignment_loss(a, weight, labels)
