"""Passes over masked images and activations: how many, how large, and of what."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast import Explainer
from diffcam_fast.passes import in_pieces
from networks import images, pooled, relative_error, with_mlp

MASKED = ("recipro_cam", "ablation_cam", "score_cam", "decom_cam")


class Counted(nn.Module):
    """Counts the rows that pass, and the largest pass; of what has no data it counts none."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            self.rows.append(len(x))
        return x


def counted() -> tuple[nn.Module, Counted, Counted]:
    """A network with an MLP as its head, which counts what passes in front of both parts."""
    model = with_mlp()
    before, behind = Counted(), Counted()
    return nn.Sequential(before, model[0], behind, model[1]).eval(), before, behind


@pytest.mark.parametrize("method", MASKED)
def test_the_memory_bounds_a_pass_and_changes_no_map(method: str) -> None:
    model, before, behind = counted()
    wide = Explainer(model, layer="1", method=method, example_inputs=images())
    expected = wide(images(), [[1, 3]] * 3).maps
    narrow = Explainer(model, layer="1", method=method, memory=30_000, example_inputs=images())
    before.rows.clear(), behind.rows.clear()
    found = narrow(images(), [[1, 3]] * 3).maps
    # What the budget is made of: four values of the size of the activation, or of the largest.
    largest = max(3, 30_000 // (4 * 4 * 8 * (30 if method in MASKED[:2] else 120)))
    assert max(behind.rows) <= largest
    assert len(behind.rows) > 3
    assert relative_error(found, expected) < 1e-5


def test_masked_activations_pass_the_head_alone() -> None:
    for method, passes in (("recipro_cam", 3 * 30), ("ablation_cam", 3 * 8)):
        model, before, behind = counted()
        explainer = Explainer(model, layer="1", method=method, example_inputs=images())
        before.rows.clear(), behind.rows.clear()
        explainer(images())
        assert before.rows == [3]
        # The plain pass, and one row to see that the head runs alone.
        assert sum(behind.rows) == passes + 3 + 1


def test_masked_images_pass_once_whatever_the_number_of_targets() -> None:
    for targets in ([[1]] * 3, [[1, 3, 0]] * 3):
        model, before, _ = counted()
        explainer = Explainer(model, layer="1", method="score_cam", example_inputs=images())
        before.rows.clear()
        explainer(images(), targets)
        assert sum(before.rows) == 3 + 3 * 8


def test_dead_channels_cost_no_pass() -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    with torch.no_grad():
        features[0].bias[:5] = -100
    behind = Counted()
    model = nn.Sequential(features, behind, with_mlp()[1]).eval()
    for method in ("score_cam", "ablation_cam"):
        explainer = Explainer(model, layer="0", method=method, example_inputs=images())
        behind.rows.clear()
        explainer(images(), 1)
        assert sum(behind.rows) == 3 + 3 * 3 + (method == "ablation_cam")


class Skipping(nn.Module):
    """Its head reads what comes before the layer too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        logits: Tensor = self.head((stem + self.layer(stem)).mean(dim=(2, 3)))
        return logits


class Looking(Skipping):
    """Looks at its data in front of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 1e9:
            raise RuntimeError("too bright")
        logits: Tensor = self.head(self.layer(self.stem(x)).mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("model", [Skipping(), Looking()], ids=["skipping", "looking"])
def test_where_the_features_cannot_be_left_out_the_whole_network_runs(model: Skipping) -> None:
    x = images()
    stem = model.stem(x)
    a = model.layer(stem).detach()

    def logits(activation: Tensor) -> Tensor:
        rest = 0 if isinstance(model, Looking) else stem
        out: Tensor = model.head((rest + activation).mean(dim=(2, 3)))
        return out.detach()

    expected = torch.zeros(3, 1, *a.shape[2:])
    for i in range(a.shape[2]):
        for j in range(a.shape[3]):
            alone = torch.zeros_like(a)
            alone[:, :, i, j] = a[:, :, i, j]
            expected[:, 0, i, j] = logits(alone).softmax(dim=1)[:, 2]
    got = Explainer(model, layer="layer", method="recipro_cam")(x, 2)
    assert relative_error(got.maps, expected) < 1e-5


def test_the_whole_network_keeps_to_the_memory_too() -> None:
    class Wide(Looking):
        """Its stem makes four times what its layer returns."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, padding=1)
            self.layer = nn.Conv2d(32, 8, 3, padding=1)
            self.eval()

    model = Wide()
    rows: list[int] = []
    model.stem.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    # Four values of 32 x 10 x 12 floats are 61 kB.
    explainer = Explainer(
        model, layer="layer", method="recipro_cam", memory=250_000, example_inputs=images()
    )
    rows.clear()
    explainer(images())
    assert max(rows) == 4


def test_a_bar_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for progress, shown in ((True, True), (False, False), (None, False)):
        Explainer(pooled(), method="score_cam", progress=progress)(images())
        assert ("channels" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    ("count", "row", "memory", "sizes"),
    [
        (10, 4, 16, [4, 4, 2]),
        (65, 1, 64, [33, 32]),
        (3, 100, 10, [1, 1, 1]),
        (0, 1, 1, []),
        (5, 0, 8, [5]),
    ],
)
def test_pieces(count: int, row: int, memory: int, sizes: list[int]) -> None:
    pieces = list(in_pieces(count, row, memory))
    assert [s.stop - s.start for s in pieces] == sizes
    assert [i for s in pieces for i in range(count)[s]] == list(range(count))


@pytest.mark.parametrize("method", MASKED)
def test_the_model_is_left_as_it_was(method: str) -> None:
    model = with_mlp().train()
    model[1][2].weight.requires_grad_(False)
    explainer = Explainer(model, method=method, example_inputs=images())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    explainer(images())
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


Function = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (lambda out: 3.0, TypeError, "must return a tensor, got float"),
        (lambda out: out[None], ValueError, r"\(N,\) or \(N, T\) scores for N = 3"),
        ([lambda o: o[0]] * 2, ValueError, "2 functions for 3 images"),
        ([lambda o: o] * 3, ValueError, "one image must return one number"),
    ],
)
@pytest.mark.parametrize("method", ["grad_cam", "score_cam", "recipro_cam"])
def test_functions_that_do_not_fit_are_refused(
    method: str, targets: Function, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Explainer(with_mlp(), method=method)(images(), targets)
