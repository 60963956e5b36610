"""Refinements against loops in float64, and what they promise."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from diffcam_fast.refine import ad_cam, attention_maps, ssa, stage_activations


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(*shape: int, seed: int = 1) -> Tensor:
    return random(*shape, shape[-1], seed=seed).softmax(dim=-1)


def given_away(rows: Tensor, maps: Tensor) -> Tensor:
    """Maps (T, P) after each cell i gave the shares rows[i] of what it has, in float64."""
    moved = torch.zeros_like(maps, dtype=torch.double)
    for i, row in enumerate(rows):
        moved += maps[:, i, None].double() * row / row.sum()
    return moved


def test_ssa_is_a_loop_over_cells() -> None:
    maps, stages = random(2, 3, 3, 4), [random(2, 5, 3, 4, seed=1), random(2, 7, 8, 5, seed=2)]
    expected = torch.zeros(2, 3, 12, dtype=torch.double)
    for n in range(2):
        for stage in stages:
            cells = F.interpolate(stage[n : n + 1].double(), (3, 4), mode="bilinear")[0].flatten(1)
            rows = [
                F.cosine_similarity(cells[:, i : i + 1], cells, dim=0).relu() for i in range(12)
            ]
            expected[n] += given_away(torch.stack(rows), maps[n].flatten(1)) / len(stages)
    assert torch.allclose(ssa(maps, stages).flatten(2).double(), expected, atol=1e-6)


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (2, 1), (1, 3)])
def test_ad_cam_is_a_loop_over_cells(first: int, steps: int) -> None:
    maps, heads = random(2, 3, 2, 3), attention(2, 4, first + 6)
    for n in range(2):
        a = heads[n].double().mean(dim=0)[first:, first:]
        rows = torch.stack(
            [torch.stack([a[i, j] * (a[i] * a[j]).sum() for j in range(6)]) for i in range(6)]
        )
        expected = maps[n].flatten(1).double()
        for _ in range(steps):
            expected = given_away(rows, expected)
        found = ad_cam(maps, heads, first=first, steps=steps)[n].flatten(1)
        assert torch.allclose(found.double(), expected, atol=1e-6)


def test_heads_are_averaged() -> None:
    maps, heads = random(2, 1, 2, 2), attention(2, 3, 4)
    assert torch.equal(ad_cam(maps, heads), ad_cam(maps, heads.mean(dim=1)))


def refinements() -> list[Any]:
    stages = [random(3, 6, 9, 9, seed=1), random(3, 4, 2, 2, seed=2).relu()]
    tokens = attention(3, 2, 36)
    return [
        pytest.param(lambda m, n=slice(None): ssa(m, [s[n] for s in stages]), id="ssa"),
        pytest.param(lambda m, n=slice(None): ad_cam(m, tokens[n], steps=2), id="ad_cam"),
    ]


@pytest.mark.parametrize("refine", refinements())
def test_totals_stay(refine: Callable[..., Tensor]) -> None:
    maps = random(3, 2, 6, 6)
    refined = refine(maps)
    assert not torch.allclose(refined, maps, atol=0.1)
    assert torch.allclose(refined.sum(dim=(2, 3)), maps.sum(dim=(2, 3)), atol=1e-4)


@pytest.mark.parametrize("refine", refinements())
def test_nan_stays_with_its_image(refine: Callable[..., Tensor]) -> None:
    maps = random(3, 2, 6, 6)
    broken = maps.clone()
    broken[1, 0, 2, 2] = torch.nan
    found, expected = refine(broken), refine(maps)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert found[1, 0].isnan().all() and torch.equal(found[1, 1], expected[1, 1])


def test_nan_in_what_guides_is_not_hidden() -> None:
    maps, stage, tokens = random(2, 1, 2, 2), random(2, 3, 2, 2, seed=1), attention(2, 4)
    stage[1, 0, 0, 0] = tokens[1, 0, 0] = torch.nan
    for refined in (ssa(maps, [stage]), ad_cam(maps, tokens)):
        assert refined[0].isfinite().all() and refined[1].isnan().any()


@pytest.mark.parametrize("refine", refinements())
def test_an_image_does_not_depend_on_its_batch(refine: Callable[..., Tensor]) -> None:
    maps = random(3, 2, 6, 6)
    for n in range(3):
        alone = refine(maps[n : n + 1], slice(n, n + 1))[0]
        assert torch.allclose(alone, refine(maps)[n], atol=1e-6)


@pytest.mark.parametrize("refine", refinements())
def test_autocast_and_half_precision_give_float32(refine: Callable[..., Tensor]) -> None:
    maps = random(3, 2, 6, 6)
    expected = refine(maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(refine(maps), expected)
    assert refine(maps.half()).dtype == torch.float32
    assert torch.allclose(refine(maps.half()), refine(maps.half().float()))


def test_an_identity_moves_nothing() -> None:
    maps = random(2, 3, 4, 4)
    apart = torch.eye(16).view(1, 16, 4, 4).expand(2, -1, -1, -1)
    assert torch.equal(ssa(maps, [apart, 3 * apart]), maps)
    assert torch.equal(ad_cam(maps, torch.eye(16).expand(2, 5, 16, 16), steps=3), maps)


@pytest.mark.parametrize("cells", [(7, 7), (4, 5), (28, 28), (1, 1)])
@pytest.mark.parametrize("grid", [(7, 7), (13, 9)])
def test_constant_stages_move_nothing(cells: tuple[int, int], grid: tuple[int, int]) -> None:
    # Interpolation rounds 0.1 differently from cell to cell.
    maps, values = random(2, 1, *grid), torch.tensor([0.1, 0.37, -0.7])[:, None, None]
    assert torch.equal(ssa(maps, [values.expand(2, 3, *cells)]), maps)


def test_constant_attention_moves_nothing() -> None:
    maps = random(2, 1, 7, 7)
    noise = 1 + 1e-7 * random(2, 4, 49, 49)
    assert torch.equal(ad_cam(maps, noise / 49), maps)
    assert torch.equal(ad_cam(maps, torch.zeros(2, 49, 49)), maps)


def test_constants_are_decided_image_by_image() -> None:
    maps, stage, tokens = random(2, 1, 2, 2), random(2, 3, 2, 2, seed=1), attention(2, 4)
    stage[0], tokens[0] = 0.3, 0.25
    for refined in (ssa(maps, [stage]), ad_cam(maps, tokens)):
        assert torch.equal(refined[0], maps[0]) and not torch.equal(refined[1], maps[1])


def test_a_cell_that_is_like_none_keeps_what_it_has() -> None:
    maps, stage, tokens = random(1, 1, 2, 2), random(1, 3, 2, 2, seed=1), attention(1, 4)
    stage[0, :, 0, 1] = 0
    tokens[0, 1] = tokens[0, :, 1] = 0
    for refined in (ssa(maps, [stage]), ad_cam(maps, tokens)):
        assert refined[0, 0, 0, 1] == maps[0, 0, 0, 1]
        assert refined.sum() == pytest.approx(float(maps.sum()), abs=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_the_scale_of_what_guides_does_not_matter(scale: float) -> None:
    maps, stage, tokens = random(1, 1, 3, 3), random(1, 4, 3, 3, seed=1), attention(1, 9)
    assert torch.allclose(ssa(maps, [stage * scale]), ssa(maps, [stage]), atol=1e-5)
    assert torch.allclose(ad_cam(maps, tokens * scale), ad_cam(maps, tokens), atol=1e-5)


def test_no_images_and_no_targets() -> None:
    assert ssa(torch.zeros(0, 2, 3, 3), [torch.zeros(0, 4, 3, 3)]).shape == (0, 2, 3, 3)
    assert ad_cam(torch.zeros(2, 0, 3, 3), torch.zeros(2, 9, 9)).shape == (2, 0, 3, 3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(block, nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


def test_stage_activations_are_what_the_layers_return() -> None:
    model, x = network().train(), random(2, 3, 8, 8)
    second, first = stage_activations(model, x, ["2", "0.1"])
    assert model.training and model[1].training and not model[0][1]._forward_hooks
    assert (model[0][1].running_mean == 0).all()
    model.eval()
    with torch.no_grad():
        # A copy: the ReLU behind it works in place.
        expected = model[0][1](model[0][0](x))
        assert torch.allclose(first, expected) and float(first.min()) < 0
        assert torch.allclose(second, model(x))
    first.add_(1)
    assert not first.requires_grad


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 4}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **size, **options)
    return model.eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_of_timm(fused: bool, qk_norm: bool) -> None:
    model, x = tiny(qk_norm=qk_norm), random(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = fused
    maps = attention_maps(model.train(), x)
    assert model.training
    model.eval()
    assert [tuple(m.shape) for m in maps] == [(2, 3, 5, 5)] * 2
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for found, block in zip(maps, model.blocks, strict=True):
            qkv = block.attn.qkv(block.norm1(tokens)).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
            q, k = block.attn.q_norm(qkv[0]), block.attn.k_norm(qkv[1])
            expected = (q @ k.mT / 8**0.5).softmax(dim=-1)
            assert torch.allclose(found, expected, atol=1e-6)
            assert torch.allclose(found.sum(dim=-1), torch.ones(()))
            tokens = block(tokens)
    refined = ad_cam(random(2, 1, 2, 2), maps[-1], first=1)
    assert refined.shape == (2, 1, 2, 2) and not refined.requires_grad
    maps[0].mul_(2)


def test_attention_of_torchvision() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=32
    ).eval()
    x = random(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        maps = attention_maps(model, x)
        assert torch.equal(model(x), logits)
        assert [tuple(m.shape) for m in maps] == [(2, 3, 5, 5)] * 2
        tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], dim=1)
        tokens = tokens + model.encoder.pos_embedding
        for found, layer in zip(maps, model.encoder.layers, strict=True):
            read = layer.ln_1(tokens)
            q, k, _ = F.linear(
                read, layer.self_attention.in_proj_weight, layer.self_attention.in_proj_bias
            ).chunk(3, dim=-1)
            q, k = (t.view(2, 5, 3, 8).transpose(1, 2) for t in (q, k))
            assert torch.allclose(found, (q @ k.mT / 8**0.5).softmax(dim=-1), atol=1e-6)
            tokens = layer(tokens)


def test_attention_in_windows() -> None:
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer(
        [4, 4], 12, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=3
    )
    maps = attention_maps(model, random(2, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(2 * 4, 2, 16, 16)] * 2


class Attending(nn.Module):
    """Calls attention as it is told to, and keeps what went in and came out."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        value = x[:, -self.options.pop("keys", x.shape[1]) :]
        output = F.scaled_dot_product_attention(x, value, value, **self.options)
        self.calls.append((value, output))
        return output


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 3.0},
        {"is_causal": True},
        {"attn_mask": random(2, 1, 5, 5, seed=3)},
        {"attn_mask": torch.eye(5, dtype=torch.bool) | (random(5, 5, seed=4) > 0)},
        {"keys": 2, "enable_gqa": True},
    ],
)
def test_weights_are_those_that_make_the_output(options: dict[str, Any]) -> None:
    model = Attending(**options)
    [found] = attention_maps(model, random(2, 4, 5, 8))
    [(value, output)] = model.calls
    assert found.shape == (2, 4, 5, 5)
    value = value.repeat_interleave(4 // value.shape[1], dim=1)
    assert torch.allclose(found @ value, output, atol=1e-5)


class Pooling(nn.Module):
    """One learned token reads all others, behind a self-attention of either kind."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.need_weights = need_weights
        self.own, self.pool = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, weights = self.own(x, x, x, need_weights=self.need_weights)
        assert (weights is None) != self.need_weights
        assert weights is None or weights.shape == (3, 5, 5)
        return self.pool(x[:, :1], x, x)[0][:, 0]


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_between_unlike_numbers_of_tokens_is_left_out(need_weights: bool) -> None:
    model, x = Pooling(need_weights), random(3, 5, 8)
    [found] = attention_maps(model, x)
    _, expected = model.own(x, x, x, average_attn_weights=False)
    assert torch.allclose(found, expected, atol=1e-6)


def test_attention_of_an_encoder_that_has_a_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), random(3, 5, 8)
    maps = attention_maps(model, x)
    _, expected = model.layers[0].self_attn(x, x, x, average_attn_weights=False)
    assert [tuple(m.shape) for m in maps] == [(3, 2, 5, 5)] * 2
    assert torch.allclose(maps[0], expected, atol=1e-6)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused, self.pair = nn.ReLU(), nn.ReLU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.pair((x, x))
        return self.shared(self.shared(x))


def test_a_layer_must_run_once_and_return_a_tensor() -> None:
    for layer, error, message in [
        ("shared", RuntimeError, "ran 2 times"),
        ("unused", RuntimeError, "ran not at all"),
        ("pair", TypeError, "returns tuple, not a tensor"),
        ("layer9", ValueError, "no layer 'layer9'"),
    ]:
        with pytest.raises(error, match=message):
            stage_activations(Twice(), random(1, 3), [layer])


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(RuntimeError, match="saw no attention in Sequential"):
        attention_maps(network(), random(1, 3, 8, 8))


M = random(2, 1, 2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ssa(random(2, 2, 2), []), r"maps must be \(N, T, h, w\), got \(2, 2, 2\)"),
        (lambda: ssa(M, []), "at least one stage"),
        (lambda: ssa(M, [random(3, 1, 2, 2)]), r"with N = 2, got \(3, 1, 2, 2\)"),
        (lambda: ssa(M, [random(2, 1, 2)]), r"with N = 2, got \(2, 1, 2\)"),
        (lambda: ad_cam(random(2, 2, 2), attention(2, 4)), r"got \(2, 2, 2\) and \(2, 4, 4\)"),
        (lambda: ad_cam(M, attention(1, 4)), r"same N, got \(2, 1, 2, 2\) and \(1, 4, 4\)"),
        (lambda: ad_cam(M, random(2, 4, 5)), r"must be square, got \(2, 4, 5\)"),
        (lambda: ad_cam(M, attention(2, 5)), r"5 tokens are not 0 and 2 x 2 .* take first=1"),
        (lambda: ad_cam(M, attention(2, 5), first=2), "take first=1"),
        (lambda: ad_cam(M, attention(2, 3)), "take attention of another layer"),
        (lambda: ad_cam(M, attention(2, 4), steps=0), "at least 1, got 0"),
    ],
)
def test_errors_say_what_came(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
