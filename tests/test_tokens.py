"""Networks of tokens: the grid, the layer, and maps against float64 autograd."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from diffcam_export import export_onnx
from diffcam_fast import AnalysisError, Explainer, Layout
from diffcam_fast.analysis import analyse
from diffcam_fast.analysis.positions import Positions
from diffcam_fast.analysis.tokens import read_grid
from diffcam_fast.cli.main import main
from diffcam_fast.contrast import Contrast
from tests.networks import images, relative_error

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

SMALL: dict[str, Any] = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}
TARGETS = torch.tensor([[1, 7], [3, 2]])


def from_timm(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10, **options)
    return model.eval()


def from_torchvision() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(64, 16, 3, 3, 48, 96, num_classes=10).eval()


def pooled_vit() -> nn.Module:
    return from_timm("vit_tiny_patch16_224", global_pool="avg", fc_norm=False, **SMALL)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], str, Layout]] = {}


def _network(
    name: str,
    layer: str,
    grid: tuple[int, int],
    first: int,
    *,
    size: tuple[int, int] = (64, 64),
    make: Callable[[], nn.Module] | None = None,
    **options: Any,
) -> None:
    made = make or (lambda: from_timm(name, **options))
    NETWORKS[f"{name}-{first}-{size[1]}"] = (made, size, layer, Layout(2, grid, first))


VIT = "vit_tiny_patch16_224"
_network(VIT, "blocks.2.norm1", (4, 4), 1, **SMALL)
_network(VIT, "blocks.2.norm1", (4, 6), 1, size=(64, 96), **{**SMALL, "img_size": (64, 96)})
_network(VIT, "norm", (4, 4), 0, class_token=False, global_pool="avg", fc_norm=False, **SMALL)
_network(
    "vit_one_block",
    "blocks.0.norm1",
    (4, 4),
    1,
    make=lambda: from_timm(VIT, **SMALL | {"depth": 1}),
)
_network(
    "vit_map",
    "norm",
    (4, 4),
    0,
    make=lambda: from_timm(VIT, class_token=False, global_pool="map", **SMALL),
)
_network(
    "vit_small_patch14_reg4_dinov2",
    "blocks.2.norm1",
    (4, 4),
    5,
    size=(56, 56),
    **SMALL | {"img_size": 56},
)
_network("deit3_small_patch16_224", "blocks.2.norm1", (4, 4), 1, **SMALL)
_network("deit_tiny_distilled_patch16_224", "blocks.2.norm1", (4, 4), 2, **SMALL)
_network("beit_base_patch16_224", "norm", (4, 4), 1, **SMALL)
_network("cait_xxs24_224", "blocks", (4, 4), 0, **SMALL | {"depth": 5})
_network("eva02_tiny_patch14_224", "norm", (4, 4), 1, size=(56, 56), **SMALL | {"img_size": 56})
_network("vit_tiny_patch16_dinov3_qkvb", "norm", (4, 4), 5, **SMALL)
_network("xcit_nano_12_p16_224", "cls_attn_blocks.1.norm1", (4, 4), 1, **SMALL)
_network("levit_128s", "stages", (2, 2), 0, size=(128, 128), img_size=128)
_network("pit_ti_224", "transformers.2.blocks.3.norm1", (4, 4), 1, size=(128, 128), img_size=128)
_network("mixer_s16_224", "norm", (4, 4), 0, img_size=64)
_network("torchvision", "encoder.layers.encoder_layer_2.ln_1", (4, 4), 1, make=from_torchvision)


def expected_maps(model: nn.Module, layer: str, inputs: Tensor, layout: Layout) -> Tensor:
    """The signed DiffGradCAM maps (N, T, h, w) by float64 autograd on the whole network."""
    exact = copy.deepcopy(model).double().eval()
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output)
        return output.clone()

    handle = exact.get_submodule(layer).register_forward_hook(keep)
    logits = exact(inputs.double().requires_grad_())
    handle.remove()
    d = Contrast.parse("log_odds").gradient(logits.detach(), TARGETS)
    assert layout.grid is not None
    h, w = layout.grid
    maps = []
    for t in range(TARGETS.shape[1]):
        (g,) = torch.autograd.grad((d[:, t] * logits).sum(), kept[0], retain_graph=True)
        grid = slice(layout.first, layout.first + h * w)
        weights = g[:, grid].mean(dim=1, keepdim=True)
        maps.append((weights * kept[0][:, grid]).sum(dim=2).reshape(-1, h, w))
    return torch.stack(maps, dim=1).detach()


@pytest.mark.filterwarnings("ignore:Overwriting")
@pytest.mark.parametrize("name", NETWORKS)
def test_grid_layer_and_maps(name: str) -> None:
    make, size, layer, layout = NETWORKS[name]
    model = make()
    inputs = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    found = analyse(model, inputs)
    assert (found.layer, found.layout, found.shape[1:]) == (layer, layout, layout.grid)
    # Some classifiers start at 0, which must not hide what reaches the logits.
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2 and not weight.any():
                weight.normal_()
    explainer = Explainer(model, relu=False, example_inputs=inputs)
    assert explainer.layer == layer
    expected = expected_maps(model, layer, inputs, layout)
    assert expected.abs().max() > 0
    assert relative_error(explainer(inputs, TARGETS).maps, expected) < 1e-5


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "maxvit_pico_rw_256"])
def test_transformers_with_spatial_layers_stay_spatial(name: str) -> None:
    small = {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 1, 1)}
    size = 64 if "swin" in name else 256
    model = from_timm(name, **(small if "swin" in name else {}))
    found = analyse(model, torch.randn(2, 3, size, size))
    assert found.layer == "norm"
    assert found.layout == Layout(3 if "swin" in name else 1)
    assert found.closed_form


def test_what_is_added_to_all_logits_changes_no_map() -> None:
    model, inputs = pooled_vit(), images(2, 64)[..., :64]
    before = Explainer(model, relu=False, example_inputs=inputs)(inputs, TARGETS).maps
    with torch.no_grad():
        model.head.weight += torch.randn(48)
        model.head.bias += 3
    after = Explainer(model, relu=False, example_inputs=inputs)(inputs, TARGETS).maps
    assert relative_error(after, before) < 1e-4


@pytest.mark.parametrize(
    "name", [n for n in NETWORKS if n.startswith(("vit", "deit", "beit", "torchv"))]
)
def test_without_attention_a_cell_sees_its_patch_alone(name: str) -> None:
    """With attention switched off every token is made of one patch of the image: the cell's."""
    make, size, layer, layout = NETWORKS[name]
    model = make().double()
    attention = [m for m in model.modules() if hasattr(m, "proj") and hasattr(m, "num_heads")]
    attention += [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert attention
    with torch.no_grad():
        for module in attention:
            for weight in getattr(
                module, "out_proj", None or getattr(module, "proj", None)
            ).parameters():
                weight.zero_()
    inputs = torch.randn(1, 3, *size, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(lambda m, a, o: kept.append(o))
    model(inputs)
    cells = layout.cells(kept[0])
    h, w = cells.shape[2:]
    for i, j in [(0, 0), (1, 2), (h - 1, w - 1), (2, 0)]:
        (g,) = torch.autograd.grad(cells[..., i, j].square().sum(), inputs, retain_graph=True)
        seen = g.abs().sum(dim=(0, 1)).reshape(h, size[0] // h, w, size[1] // w).amax(dim=(1, 3))
        assert seen[i, j] > 0
        seen[i, j] = 0
        assert float(seen.max()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hiera_tiny_224", "mvitv2_tiny"])
def test_what_pooled_tokens_see_lies_as_they_do(name: str) -> None:
    """Hiera sorts its tokens into units, and both pool them; the grid is in order again."""
    model, inputs = from_timm(name), torch.randn(1, 3, 224, 224, requires_grad=True)
    found = analyse(model, inputs.detach().repeat(2, 1, 1, 1))
    kept: list[Tensor] = []
    model.get_submodule(found.layer).register_forward_hook(lambda m, a, o: kept.append(o))
    model(inputs)
    cells = found.layout.cells(kept[0])[0].square().sum(dim=0)
    h, w = cells.shape
    seen = []
    for cell in cells.flatten():
        (g,) = torch.autograd.grad(cell, inputs, retain_graph=True)
        part = g.abs().sum(dim=(0, 1)).reshape(h, 224 // h, w, 224 // w).sum(dim=(1, 3)).flatten()
        seen.append(part / part.sum())
    # More than the others see of it: attention with random weights is nearly even.
    more = (torch.stack(seen) / torch.stack(seen).mean(dim=0) - 1).relu()
    places = torch.cartesian_prod(torch.arange(float(h)), torch.arange(float(w)))
    centres = more @ places / more.sum(dim=1, keepdim=True)
    for axis in (0, 1):
        assert torch.corrcoef(torch.stack([centres[:, axis], places[:, axis]]))[0, 1] > 0.98


class Patches(nn.Module):
    """Tokens of 2 x 3 patches and what is done to their order; class k reads token k alone."""

    def __init__(
        self, order: Callable[[Tensor, Tensor], Tensor], reads: int = 0, pixels: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(48, 5) if pixels else nn.Conv2d(3, 5, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, 2, 5))
        self.norm, self.value = nn.LayerNorm(5), nn.Linear(5, 1)
        self.order, self.reads, self.pixels = order, reads, pixels

    def forward(self, x: Tensor) -> Tensor:
        if self.pixels:
            n = len(x)
            x = x.view(n, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, 6, 48)
            tokens = self.embed(x)
        else:
            tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.order(tokens, self.prefix.expand(len(x), -1, -1)))
        read = tokens[:, self.reads : self.reads + 6]
        logits: Tensor = self.value(read.tanh()).flatten(1)
        return logits


def before(x: Tensor, prefix: Tensor) -> Tensor:
    return torch.cat([prefix, x], dim=1)


def behind(x: Tensor, prefix: Tensor) -> Tensor:
    return torch.cat([x, prefix], dim=1)


def around(x: Tensor, prefix: Tensor) -> Tensor:
    return torch.cat([prefix[:, :1], x, prefix[:, 1:]], dim=1)


def in_a_buffer(x: Tensor, prefix: Tensor) -> Tensor:
    made = x.new_zeros(len(x), 8, 5)
    made[:, :2] = prefix
    made[:, 2:] = x
    return made


def sorted_twice(x: Tensor, prefix: Tensor) -> Tensor:
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    there = (x[:, order] * 2).roll(1, dims=1)
    return before(there.roll(-1, dims=1)[:, order.argsort()], prefix)


KEPT = [(before, 2), (behind, 0), (around, 1), (in_a_buffer, 2), (sorted_twice, 2)]


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(("order", "first"), KEPT)
def test_a_class_that_reads_one_patch_lights_its_cell(
    order: Callable[[Tensor, Tensor], Tensor], first: int, pixels: bool
) -> None:
    model = Patches(order, first, pixels).eval()
    inputs = torch.randn(2, 3, 8, 12)
    explainer = Explainer(
        model, layer="norm", method="hires_cam", relu=False, example_inputs=inputs
    )
    assert explainer.inspect().layout == Layout(2, (2, 3), first)
    result = explainer(inputs, [range(6)] * 2)
    for k in range(6):
        maps = result.maps[:, k].flatten(1)
        assert (maps != 0).nonzero()[:, 1].tolist() == [k, k]
        # Class k is patch k: without the others its logit is the same.
        alone = torch.zeros_like(inputs)
        i, j = 4 * (k // 3), 4 * (k % 3)
        alone[..., i : i + 4, j : j + 4] = inputs[..., i : i + 4, j : j + 4]
        torch.testing.assert_close(model(alone)[:, k], result.logits[:, k])


def by_columns(x: Tensor, prefix: Tensor) -> Tensor:
    return before(x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2), prefix)


def mirrored(x: Tensor, prefix: Tensor) -> Tensor:
    return before(x.unflatten(1, (2, 3)).flip(2).flatten(1, 2), prefix)


def rolled(x: Tensor, prefix: Tensor) -> Tensor:
    return before(x.roll(1, dims=1), prefix)


def pruned(x: Tensor, prefix: Tensor) -> Tensor:
    kept = x.norm(dim=2).topk(4, dim=1).indices
    return torch.cat([prefix, prefix, x.gather(1, kept[..., None].expand(-1, -1, 5))], dim=1)


def cropped(x: Tensor, prefix: Tensor) -> Tensor:
    return torch.cat([prefix, prefix[:, :1], x[:, :3], prefix], dim=1)


def divided(x: Tensor, prefix: Tensor) -> Tensor:
    return torch.cat([x[:, :3], prefix, x[:, 3:]], dim=1)


def mixed(x: Tensor, prefix: Tensor) -> Tensor:
    return before((x.mT @ torch.eye(6).roll(1, 0)).mT, prefix)


def of_two_places(x: Tensor, prefix: Tensor) -> Tensor:
    return before(torch.cat([x[..., :2], x.roll(1, dims=1)[..., 2:]], dim=2), prefix)


REFUSED = [
    (by_columns, "row by row"),
    (mirrored, "row by row"),
    (rolled, "row by row"),
    (pruned, "same place|row by row"),
    (cropped, "cover the image"),
    (divided, "others stand between"),
    (mixed, "cannot be followed"),
    (of_two_places, "same place"),
]


@pytest.mark.parametrize(("order", "reason"), REFUSED)
def test_tokens_out_of_order_are_refused(
    order: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    model = Patches(order, 2).eval()
    inputs = torch.randn(2, 3, 8, 12)
    with pytest.raises(AnalysisError, match=rf"(?s)norm.*({reason}).*layout=Layout"):
        Explainer(model, layer="norm", example_inputs=inputs)
    told = Explainer(model, layer="norm", layout=Layout(2, (2, 3), 2), example_inputs=inputs)
    assert told(inputs).maps.shape == (2, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("crossvit_tiny_240", 240, "all of the data passes through"),
        ("tnt_s_legacy_patch16_224", 224, "ends in tokens"),
        ("coat_tiny", 224, "no layer near the logits has all of the data"),
    ],
)
def test_networks_of_two_streams_are_refused(name: str, size: int, reason: str) -> None:
    with pytest.raises(AnalysisError, match=reason):
        analyse(from_timm(name), torch.randn(2, 3, size, size))


def test_layers_where_the_class_token_alone_is_read_are_listed_with_that() -> None:
    found = analyse(from_timm(VIT, **SMALL), torch.randn(2, 3, 64, 64))
    notes = {candidate.name: candidate.note for candidate in found.candidates}
    assert "a token beside its grid" in notes["norm"] and "a token beside" in notes["blocks"]
    assert notes["blocks.2.norm1"] == notes["blocks.1"] == ""
    assert "most of the network" in notes["patch_embed.proj"]


def test_a_layout_that_does_not_fit_is_refused() -> None:
    model, inputs = from_timm(VIT, **SMALL), torch.randn(2, 3, 64, 64)
    with pytest.raises(AnalysisError, match=r"takes 1 \+ 5 x 4 = 21 tokens, and there are 17"):
        Explainer(model, layer="blocks.1", layout=Layout(2, (5, 4), 1), example_inputs=inputs)
    with pytest.raises(AnalysisError, match="is for outputs of 4 axes"):
        Explainer(model, layer="blocks.1", layout=Layout(1), example_inputs=inputs)
    with pytest.raises(AnalysisError, match="there are 17"):
        Explainer(model, layout=Layout(2, (5, 4), 1), example_inputs=inputs)
    with pytest.raises(ValueError, match="first -1"):
        Layout(2, (4, 4), -1)
    told = Explainer(model, layout=Layout(2, (4, 4), 1), example_inputs=inputs)
    assert torch.equal(told(inputs).maps, Explainer(model, example_inputs=inputs)(inputs).maps)


def test_a_mean_over_the_class_token_too_is_no_closed_form() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.norm = nn.Conv2d(3, 5, 4, 4), nn.LayerNorm(5)
            self.cls = nn.Parameter(torch.randn(1, 1, 5))
            self.head = nn.Linear(5, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).mT
            x = self.norm(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))
            logits: Tensor = self.head(x.mean(dim=1))
            return logits

    model, inputs = Both().eval(), torch.randn(2, 3, 8, 12)
    explainer = Explainer(model, layer="norm", relu=False, example_inputs=inputs)
    # The mean is over seven tokens, and the gradient is no d W / 6.
    assert not explainer.inspect().closed_form
    expected = expected_maps(model, "norm", inputs, Layout(2, (2, 3), 1))
    assert relative_error(explainer(inputs, TARGETS).maps, expected) < 1e-5


@pytest.mark.parametrize("make", [lambda: from_timm(VIT, **SMALL), pooled_vit])
def test_recipro_cam_leaves_the_class_token_as_it_is(make: Callable[[], nn.Module]) -> None:
    model, inputs = make(), torch.randn(2, 3, 64, 64)
    explainer = Explainer(model, method="recipro_cam", example_inputs=inputs)
    maps = explainer(inputs, 3).maps.flatten(2)
    layer = model.get_submodule(explainer.layer)
    for cell in (0, 6, 15):

        def alone(module: nn.Module, args: object, output: Tensor, cell: int = cell) -> Tensor:
            changed = output.clone()
            changed[:, 1:] = 0
            changed[:, 1 + cell] = output[:, 1 + cell]
            return changed

        handle = layer.register_forward_hook(alone)
        expected = model(inputs).softmax(dim=1)[:, 3]
        handle.remove()
        torch.testing.assert_close(maps[:, 0, cell], expected, rtol=1e-4, atol=1e-6)


def test_ablation_cam_leaves_the_class_token_as_it_is() -> None:
    model, inputs = from_timm(VIT, **SMALL), torch.randn(1, 3, 64, 64)
    explainer = Explainer(model, method="ablation_cam", relu=False, example_inputs=inputs)
    kept: list[Tensor] = []

    def without(channel: int) -> Tensor:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            kept.append(output)
            changed = output.clone()
            changed[:, 1:, channel] = 0
            return changed

        handle = model.get_submodule(explainer.layer).register_forward_hook(hook)
        score: Tensor = model(inputs)[0, 3]
        handle.remove()
        return score

    with torch.no_grad():
        lost = torch.stack([model(inputs)[0, 3] - without(k) for k in range(48)])
    expected = (kept[0][0, 1:] @ lost).view(4, 4)
    assert relative_error(explainer(inputs, 3).maps[0, 0], expected) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = from_timm(VIT, **SMALL).to(dtype)
    found = analyse(model, torch.randn(2, 3, 64, 64).to(dtype))
    assert (found.layer, found.layout) == ("blocks.2.norm1", Layout(2, (4, 4), 1))


def test_a_saturated_softmax_hides_no_tokens() -> None:
    model = from_timm(VIT, **SMALL)
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(10.0) * 400)
    found = analyse(nn.Sequential(model, nn.Softmax(1)), torch.randn(2, 3, 64, 64))
    assert (found.layer, found.probabilities) == ("0.blocks.2.norm1", True)


def test_another_default_dtype() -> None:
    model, inputs = from_timm(VIT, **SMALL).double(), torch.randn(2, 3, 64, 64).double()
    torch.set_default_dtype(torch.float64)
    try:
        assert analyse(model, inputs).layout == Layout(2, (4, 4), 1)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_analysis_leaves_the_model_as_it_was() -> None:
    model = from_torchvision().train()
    before = copy.deepcopy(model.state_dict())
    analyse(model, torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_tokens_are_not_exported(tmp_path: Path) -> None:
    model, inputs = from_timm(VIT, **SMALL), torch.randn(2, 3, 64, 64)
    with pytest.raises(
        ValueError, match=r"'blocks\.2\.norm1' returns tokens, and an exported file"
    ):
        export_onnx(model, tmp_path / "vit.onnx", example_inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_inspect_says_where_the_grid_is() -> None:
    done = CliRunner().invoke(main, ["inspect", "timm:vit_tiny_patch16_224"])
    assert done.exit_code == 0, done.output
    assert "tokens      1 before a grid of 14 x 14" in done.output


def grid(h: int, w: int) -> Tensor:
    rows, columns = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w
    return torch.complex(rows[:, None].expand(h, w), columns.expand(h, w)).flatten()


OPERATIONS: list[tuple[Callable[[Tensor], Tensor], Tensor | None]] = [
    (lambda x: x.flatten(2).mT, grid(4, 6)),
    (lambda x: nn.functional.avg_pool2d(x, 2).flatten(2).mT, grid(2, 3)),
    (lambda x: nn.functional.conv2d(x, torch.ones(2, 3, 2, 2), stride=2).flatten(2).mT, grid(2, 3)),
    (
        lambda x: (
            nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), torch.ones(1, 3, 3, 3))
            .flatten(2)
            .mT
        ),
        grid(4, 6),
    ),
    (lambda x: nn.functional.interpolate(x, scale_factor=2).flatten(2).mT, grid(8, 12)),
    (
        lambda x: nn.functional.hardswish(nn.functional.pad(x, (1, 0))[..., 1:]).flatten(2).mT,
        grid(4, 6),
    ),
    (lambda x: nn.functional.unfold(x, 2, stride=2).mT @ torch.ones(12, 5), grid(2, 3)),
    (lambda x: (x + x.mean(dim=(2, 3), keepdim=True)).flatten(2).mT, grid(4, 6)),
    (lambda x: (x.flatten(2).mT @ x.flatten(2)).softmax(2) @ x.flatten(2).mT, grid(4, 6)),
    (lambda x: nn.functional.scaled_dot_product_attention(*[x.flatten(2).mT] * 3), grid(4, 6)),
    (lambda x: (x[:, :, 1:3] * x.amax()).flatten(2).mT, None),
    (lambda x: x.flatten(2).mT.cumsum(1), None),
    (lambda x: torch.ones(24, 24) @ x.flatten(2).mT, None),
    (lambda x: x.mean(dim=(2, 3)).expand(4, 2, 3), None),
]


@pytest.mark.parametrize("index", range(len(OPERATIONS)))
def test_positions_of_operators(index: int) -> None:
    operation, expected = OPERATIONS[index]
    inputs = torch.rand(2, 3, 4, 6)
    with Positions(inputs) as positions:
        value = operation(inputs)
    found = positions.of(value)
    if expected is None:
        assert isinstance(read_grid(found), str)
        return
    assert found is not None and found.shape == value.shape
    torch.testing.assert_close(found, expected[None, :, None].expand_as(found))
