"""Finding the layer and reading the head, on networks that are built to be awkward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from diffcam_fast import AnalysisError, Explainer
from diffcam_fast.analysis import analyse
from diffcam_fast.analysis.trace import trace
from networks import (
    Overwritten,
    expected_maps,
    images,
    pooled,
    relative_error,
    with_mlp,
)


class Functional(nn.Module):
    """Everything behind the last convolution is written with functions, and the convolution has an
    odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(3, 4, 3)
        self.conv = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fc(x).flatten(2).mean(dim=2), self.conv)


class ConvolutionFirst(nn.Module):
    """1x1 convolution, then pooling: the same linear head in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
        self.classify = nn.Sequential(
            nn.Dropout(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.body(x))
        return logits


class Bypassed(nn.Module):
    """The head reads an early activation beside the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 4, 3)
        self.late = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        both = torch.cat([early.mean(dim=(2, 3)), self.late(early).mean(dim=(2, 3))], dim=1)
        logits: Tensor = self.head(both)
        return logits


class Gated(nn.Module):
    """Squeeze-and-excitation in front of the pooling, and one ReLU module that serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)
        self.gate = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.norm(x * torch.sigmoid(self.gate(x.mean(dim=(2, 3), keepdim=True))))
        logits: Tensor = self.head(self.relu(x).mean(dim=(2, 3)))
        return logits


class ChannelsLast(nn.Module):
    """Tokens on a grid, (N, h, w, C), as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 6, 2, 2), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.patches(x).permute(0, 2, 3, 1)).mean(dim=(1, 2)))
        return logits


CASES = [
    (pooled(), "0", (8, 5, 6), "2.weight", ""),
    (with_mlp(), "0", (8, 5, 6), None, "tanh"),
    (Overwritten(), "features", (8, 10, 12), None, "relu is neither"),
    (Functional(), "fc", (4, 8, 10), "conv", ""),
    (ConvolutionFirst(), "body", (6, 8, 10), "classify.1.weight", ""),
    (Gated(), "norm", (4, 8, 10), None, "relu"),
    (ChannelsLast(), "norm", (6, 5, 6), "head.weight", ""),
]


@pytest.mark.parametrize(
    ("model", "layer", "shape", "weight", "why_not"), CASES, ids=lambda v: type(v).__name__
)
def test_layer_and_head(
    model: nn.Module, layer: str, shape: tuple[int, int, int], weight: str | None, why_not: str
) -> None:
    found = analyse(model.eval(), images(2))
    assert (found.layer, found.shape, found.weight) == (layer, shape, weight)
    assert found.closed_form == (weight is not None)
    assert why_not in found.reason
    assert model.get_submodule(found.layer) is not model


def test_names_play_no_part() -> None:
    plain = analyse(pooled(), images(2))
    wrapped = nn.Module()
    wrapped.add_module("loss_sigmoid_relu", pooled())
    wrapped.forward = lambda x: {"aux": x, "logits": wrapped.loss_sigmoid_relu(x)}  # type: ignore[method-assign]
    found = analyse(wrapped, images(2))
    assert found.layer == f"loss_sigmoid_relu.{plain.layer}"
    assert found.closed_form


def test_a_path_around_the_layer_is_no_closed_form() -> None:
    model = Bypassed().eval()
    found = analyse(model, images(2), layer="late")
    assert not found.closed_form
    assert "does not pass through the layer" in found.reason
    assert analyse(model, images(2)).layer == "early"


def test_a_scaled_head_is_affine_but_not_its_weight() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.net(x)  # type: ignore[no-any-return]

    found = analyse(Scaled(), images(2))
    assert not found.closed_form
    assert "is not d W / (h w)" in found.reason


def test_a_window_that_is_smaller_than_the_map_is_no_global_pool() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    assert analyse(model, torch.randn(2, 3, 7, 7)).closed_form
    # At 10 x 10 the window of 7 x 7 leaves a border out, and its gradient is 0 there.
    assert not analyse(model, torch.randn(2, 3, 10, 10), layer="0").closed_form
    explainer = Explainer(
        model, layer="0", method="grad_cam", relu=False, example_inputs=torch.randn(2, 3, 7, 7)
    )
    assert "closed form" in explainer(torch.randn(1, 3, 7, 7), 0).backend
    assert "backward" in explainer(torch.randn(1, 3, 10, 10), 0).backend


def test_probabilities_are_recognised() -> None:
    model = nn.Sequential(pooled(), nn.Softmax(dim=1)).eval()
    found = analyse(model, images(2))
    assert found.probabilities
    inside = Explainer(pooled(), relu=False)(images())
    outside = Explainer(model, relu=False, example_inputs=images())(images())
    assert torch.allclose(outside.maps, inside.maps, atol=1e-6)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def test_shuffled_channels_can_be_named() -> None:
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 6, 3), nn.ReLU(), Shuffle(), nn.Conv2d(6, 6, 3), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    explainer = Explainer(model, layer="2", relu=False, example_inputs=images())
    assert explainer.inspect().shape == (6, 8, 10)
    result = explainer(images())
    assert relative_error(result.maps, expected_maps(model, "2", images(), result.targets)) < 1e-5


def test_unknown_layer_suggests_close_names() -> None:
    with pytest.raises(
        AnalysisError, match=r"no layer 'feature'; did you mean features.*Candidates: features"
    ):
        Explainer(Overwritten(), layer="feature")
    with pytest.raises(AnalysisError, match=r"no layer 'xyz'\. Candidates: features"):
        Explainer(Overwritten(), layer="xyz")


def test_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(AnalysisError, match="'relu' runs 2 times in one forward pass"):
        Explainer(Gated(), layer="relu")


def test_layer_without_cells_is_refused() -> None:
    with pytest.raises(AnalysisError, match=r"'head' returns .*, not a spatial activation"):
        Explainer(Gated(), layer="head")


def test_no_spatial_layer_lists_what_there_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(AnalysisError, match=r"no layer found.*no candidates"):
        Explainer(model, example_inputs=torch.randn(1, 3, 8, 8))


class Branches(nn.Module):
    """Two branches over the images, and the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Conv2d(3, 8, 3), *(nn.Softplus() for _ in range(9))) for _ in range(2)
        )
        self.head = nn.Linear(19, 5)

    def forward(self, x: Tensor) -> Tensor:
        values = [value.mean(dim=(2, 3)) for value in (self.left(x), self.right(x), x)]
        logits: Tensor = self.head(torch.cat(values, dim=1))
        return logits


def test_of_branches_the_ends_are_listed_and_can_be_named() -> None:
    model, targets = Branches().eval(), torch.tensor([[3, 0]] * 3)
    note = r"\(8, 8, 10\) \(part of the data passes by it\)"
    with pytest.raises(
        AnalysisError, match=rf"no layer found.*Candidates: right {note}, left {note}, right"
    ):
        Explainer(model, example_inputs=images())
    for layer in ("left", "right"):
        result = Explainer(model, layer=layer, relu=False)(images(), targets)
        expected = expected_maps(model, layer, images(), targets)
        assert relative_error(result.maps, expected) < 1e-5


def test_module_of_another_model_is_refused() -> None:
    with pytest.raises(AnalysisError, match="a Conv2d, is no module inside"):
        Explainer(pooled(), layer=nn.Conv2d(3, 3, 1))


def test_a_model_of_one_size_takes_the_layer_from_the_first_call() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 19 * 19, 3)
    ).eval()
    explainer = Explainer(model)
    with pytest.raises(AnalysisError, match="not known before the first call"):
        _ = explainer.layer
    assert explainer(torch.randn(1, 3, 21, 21)).maps.shape == (1, 1, 19, 19)
    assert explainer.layer == "1"


def test_every_value_of_a_trace_is_made_before_it_is_read() -> None:
    flow = trace(Gated().eval(), images(2))
    assert all(parent < node.index for node in flow.nodes.values() for parent in node.parents)
    assert flow.calls["relu"] == 2
    assert flow.classes == 3


def test_images_need_not_have_the_channels_of_the_first_convolution() -> None:
    model = nn.Sequential(
        nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.ReLU(), pooled(3, 4)[1], nn.Linear(4, 3)
    )
    assert Explainer(model.eval()).layer == "2"


def test_tokens_are_not_explained_at_their_embedding() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.blocks, self.head = nn.TransformerEncoder(layer, 4), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.blocks(self.embed(x).flatten(2).mT).mean(dim=1))
            return logits

    found = Explainer(Tokens().eval()).inspect()
    assert (found.layer, found.shape) == ("blocks", (8, 56, 56))
    assert found.closed_form
    assert any(c.name == "embed" and "most of the network" in c.note for c in found.candidates)
    assert Explainer(Tokens().eval(), layer="embed").layer == "embed"


@pytest.mark.parametrize("gap", [1.0, 60.0, 400.0])
@pytest.mark.parametrize("tail", [nn.Identity(), nn.Unflatten(1, (5, 1, 1))])
def test_a_saturated_softmax_has_the_maps_of_its_logits(gap: float, tail: nn.Module) -> None:
    def network() -> nn.Sequential:
        model = pooled()
        with torch.no_grad():
            model[2].bias.copy_(torch.arange(5.0) * gap)
        return model

    targets = torch.tensor([[0, 4]] * 3)
    logits = Explainer(network(), relu=False)(images(), targets)
    softmax = nn.Sequential(network(), nn.Softmax(dim=1), tail)
    result = Explainer(softmax, relu=False, example_inputs=images())(images(), targets)
    assert torch.allclose(result.maps, logits.maps, atol=1e-6)
    assert torch.allclose(result.logits, logits.logits, atol=1e-5)


@pytest.mark.parametrize("gap", [1.0, 400.0])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: {"logits": a, "aux": b},
        lambda a, b: {"aux": b, "logits": a.detach()[:, :, None, None]},
        lambda a, b: (a.double().reshape(-1, 5), b[:, None]),
    ],
)
def test_the_softmax_of_the_head_that_is_explained(
    gap: float, wrap: Callable[[Tensor, Tensor], object]
) -> None:
    class TwoHeads(nn.Module):
        """Both heads saturate at the same class, so that their probabilities are equal."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.first, self.second = pooled()[:2], pooled()[2], nn.Linear(8, 5)
            with torch.no_grad():
                for head in (self.first, self.second):
                    head.bias.copy_(torch.arange(5.0) * gap)

        def forward(self, x: Tensor) -> object:
            a = self.features(x)
            return wrap(self.first(a).softmax(dim=1), nn.functional.softmax(self.second(a), dim=1))

    model = TwoHeads().eval()
    result = Explainer(model, relu=False, example_inputs=images())(images(), 4)
    alone = nn.Sequential(*model.features, model.first)
    expected = expected_maps(alone, "0", images(), torch.full((3, 1), 4))
    assert result.layer == "features.0"
    assert relative_error(result.maps, expected) < 1e-5
    assert torch.allclose(result.logits.float(), alone(images()), atol=1e-5)


@pytest.mark.parametrize("gap", [1.0, 60.0])
@pytest.mark.parametrize(
    "softmax",
    [
        lambda z: z.t().softmax(dim=0).t(),
        lambda z: z[:, :, None, None].softmax(dim=1)[:, :, 0, 0],
        lambda z: torch.stack([z * 0, z], dim=1).softmax(dim=2)[:, 1],
    ],
    ids=["transposed", "pixel", "row"],
)
def test_a_softmax_whose_result_is_rearranged(
    gap: float, softmax: Callable[[Tensor], Tensor]
) -> None:
    class Rearranged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = pooled()
            with torch.no_grad():
                self.network[2].bias.copy_(torch.arange(5.0) * gap / 4)

        def forward(self, x: Tensor) -> Tensor:
            return softmax(self.network(x))

    model = Rearranged().eval()
    result = Explainer(model, relu=False, example_inputs=images())(images(), 4)
    expected = expected_maps(model.network, "0", images(), torch.full((3, 1), 4))
    assert relative_error(result.maps, expected) < 1e-4
    logits = model.network(images())
    assert torch.allclose(result.probabilities, logits.softmax(dim=1), atol=1e-5)


def test_a_softmax_out_of_sight_has_the_maps_of_its_logarithm() -> None:
    model = nn.Sequential(pooled(), nn.Softmin(dim=1)).eval()
    assert analyse(model, images(2)).probabilities
    result = Explainer(model, relu=False, example_inputs=images())(images(), 1)
    negated = pooled()
    with torch.no_grad():
        negated[2].weight.neg_()
        negated[2].bias.neg_()
    expected = expected_maps(negated, "0", images(), torch.full((3, 1), 1))
    assert relative_error(result.maps, expected) < 1e-5


def test_a_branch_that_overwrites_the_activation_late() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.body(x)
            logits: Tensor = self.head(a.mean(dim=(2, 3)))
            a.zero_()
            return logits

    explainer = Explainer(Late().eval(), relu=False)
    assert "zero (" not in explainer.inspect().reason
    assert "overwrites the activation" in explainer.inspect().reason
    assert explainer(images(), 0).maps.abs().max() > 0


class Metric(nn.Module):
    """Scores the pooled features against prototypes W (K, C), none of which a matrix product reads
    as they are."""

    def __init__(self, score: Callable[[Tensor, Tensor], Tensor], classes: int = 5) -> None:
        super().__init__()
        self.features, self.pool = pooled()[:2]
        self.prototypes = nn.Parameter(torch.randn(classes, 8))
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.pool(self.features(x)), self.prototypes)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, w: functional.linear(functional.normalize(a), functional.normalize(w)),
    "cosine_similarity": lambda a, w: functional.cosine_similarity(a[:, None], w, dim=2),
    "distance": lambda a, w: -torch.cdist(a, w),
    "squares": lambda a, w: -(a[:, None] - w).square().sum(dim=2),
    "sum": lambda a, w: (a[:, None] * w).sum(dim=2),
}


@pytest.mark.parametrize("score", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("classes", [5, 60])
def test_a_head_that_compares_with_prototypes(
    score: Callable[[Tensor, Tensor], Tensor], classes: int
) -> None:
    model, targets = Metric(score, classes).eval(), torch.tensor([[3, 0]] * 3)
    result = Explainer(model, relu=False)(images(), targets)
    assert result.layer == "features"
    assert relative_error(result.maps, expected_maps(model, "features", images(), targets)) < 1e-5


def test_as_many_classes_as_channels_behind_a_cosine() -> None:
    model, targets = Metric(METRICS["cosine"], 8).eval(), torch.tensor([[3, 0]] * 3)
    result = Explainer(model, relu=False)(images(), targets)
    assert result.layer == "features"
    assert relative_error(result.maps, expected_maps(model, "features", images(), targets)) < 1e-5


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm])
@pytest.mark.parametrize("classes", [5, 8])
def test_a_weight_that_is_computed_on_the_way(
    parametrize: Callable[[nn.Module], nn.Module], classes: int
) -> None:
    linear = parametrize(nn.Linear(8, classes, bias=False))
    model, targets = nn.Sequential(*pooled()[:2], linear).eval(), torch.tensor([[3, 0]] * 3)
    result = Explainer(model, relu=False)(images(), targets)
    assert result.layer == "0"
    assert relative_error(result.maps, expected_maps(model, "0", images(), targets)) < 1e-5


def test_a_map_of_class_scores_is_no_layer() -> None:
    model = nn.Sequential(pooled()[0], nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = analyse(model.eval(), images(2))
    assert found.layer == "0"
    assert "map of class scores" in found.candidates[0].note
