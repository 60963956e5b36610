"""Refinements against loops in float64, and what they promise."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor

from diffcam_fast.refine import ad_cam, attention_maps, ssa, stage_activations
from networks import images, pooled


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ssa_is_a_loop_over_cells() -> None:
    maps, stages = random(2, 3, 3, 4), [random(2, 5, 3, 4, seed=1), random(2, 7, 3, 4, seed=2)]
    expected = torch.zeros(2, 3, 12, dtype=torch.double)
    for n in range(2):
        for stage in stages:
            cells = stage[n].flatten(1).double()
            for j in range(12):
                likeness = torch.cosine_similarity(cells, cells[:, j : j + 1], dim=0).clamp_min(0)
                share = likeness / likeness.sum()
                expected[n] += maps[n].flatten(1)[:, j, None].double() * share / len(stages)
    assert torch.allclose(ssa(maps, stages).flatten(2).double(), expected, atol=1e-5)


def test_ssa_keeps_the_total_and_what_it_cannot_tell_apart() -> None:
    maps = random(2, 2, 4, 4)
    stage = random(2, 6, 8, 8, seed=1)
    refined = ssa(maps, [stage, random(2, 3, 2, 2, seed=2)])
    assert torch.allclose(refined.sum(dim=(2, 3)), maps.sum(dim=(2, 3)), atol=1e-4)
    assert torch.equal(ssa(maps, [torch.full((2, 6, 8, 8), 3.0)]), maps)
    assert torch.equal(ssa(maps, [torch.zeros(2, 6, 8, 8)]), maps)
    # Cells at right angles to each other are an identity.
    assert torch.allclose(ssa(maps, [torch.eye(16).view(1, 16, 4, 4).expand(2, -1, -1, -1)]), maps)


def test_ad_cam_is_a_loop_over_cells() -> None:
    maps, attention = random(2, 3, 2, 3), random(2, 4, 8, 8, seed=1).softmax(dim=-1)
    a = attention.double().mean(dim=1)[:, 2:, 2:]
    expected = maps.double().flatten(2)
    for _ in range(2):
        moved = torch.zeros_like(expected)
        for n in range(2):
            for i in range(6):
                row = torch.stack([a[n, i, j] * (a[n, i] * a[n, j]).sum() for j in range(6)])
                moved[n] += expected[n, :, i, None] * row / row.sum()
        expected = moved
    found = ad_cam(maps, attention, first=2, steps=2)
    assert torch.allclose(found.flatten(2).double(), expected, atol=1e-6)
    assert torch.allclose(found.sum(dim=(2, 3)), maps.sum(dim=(2, 3)), atol=1e-5)


def test_ad_cam_along_an_identity_or_along_nothing_moves_nothing() -> None:
    maps = random(2, 1, 2, 2)
    assert torch.equal(ad_cam(maps, torch.eye(4).expand(2, 4, 4)), maps)
    assert torch.equal(ad_cam(maps, torch.zeros(2, 4, 4)), maps)


def test_nan_stays_with_its_image() -> None:
    maps, stage = random(2, 1, 2, 2), random(2, 3, 2, 2, seed=1)
    attention = random(2, 4, 4, seed=2).softmax(dim=-1)
    broken = maps.clone()
    broken[1, 0, 0, 0] = torch.nan
    for refined in (lambda m: ssa(m, [stage]), lambda m: ad_cam(m, attention)):
        assert torch.equal(refined(broken)[0], refined(maps)[0])
        assert refined(broken)[1].isnan().any()


def test_stage_activations_are_those_of_the_layers() -> None:
    model = pooled().train()
    first, second = stage_activations(model, images(), ["0.0", "0"])
    assert model.training and not model[0]._forward_hooks
    assert torch.allclose(first, model.eval()[0][0](images()))
    assert torch.allclose(second, model[0](images()))


def test_attention_of_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=4
    ).eval()
    x = random(2, 3, 32, 32)
    maps = attention_maps(model, x)
    assert [tuple(m.shape) for m in maps] == [(2, 3, 5, 5)] * 2
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    block = model.blocks[0]
    qkv = block.attn.qkv(block.norm1(tokens)).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    expected = (qkv[0] @ qkv[1].mT / 8**0.5).softmax(dim=-1)
    assert torch.allclose(maps[0], expected, atol=1e-6)


def test_attention_of_torchvision() -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=32
    ).eval()
    x = random(2, 3, 32, 32)
    logits = model(x)
    maps = attention_maps(model, x)
    assert [tuple(m.shape) for m in maps] == [(2, 3, 5, 5)] * 2
    assert torch.equal(model(x), logits)
    tokens = torch.cat([model.class_token.expand(2, -1, -1), model._process_input(x)], dim=1)
    layer = model.encoder.layers[0]
    read = layer.ln_1(tokens + model.encoder.pos_embedding)
    _, expected = layer.self_attention(read, read, read, average_attn_weights=False)
    assert torch.allclose(maps[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ssa(random(2, 2, 2), []), r"maps must be \(N, T, h, w\), got \(2, 2, 2\)"),
        (lambda: ssa(random(2, 1, 2, 2), []), "one stage at least"),
        (lambda: ssa(random(2, 1, 2, 2), [random(3, 1, 2, 2)]), r"with N = 2, got \(3, 1, 2, 2\)"),
        (lambda: ad_cam(random(2, 1, 2, 2), random(2, 3, 3)), "does not hold 2 x 2 cells"),
        (lambda: ad_cam(random(2, 1, 2, 2), random(1, 4, 4)), r"attention \(N, heads, L, L\)"),
        (lambda: ad_cam(random(2, 1, 2, 2), random(2, 4, 4), steps=0), "at least 1, got 0"),
    ],
)
def test_errors_say_what_came(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
