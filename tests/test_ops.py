"""The custom operators: registered rightly, defined in float64, strict about what they take."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffcam_kernels import ops, reference

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


CALLS = [
    (ops.contrast_gradient, (random(3, 5), torch.tensor([[0, 1], [2, 3], [4, 0]]), 1.0)),
    (ops.contrast_gradient, (random(3, 5), torch.tensor([[0], [2], [4]]), None, None, None)),
    (ops.channel_weights, (random(3, 2, 5), random(5, 4), 49)),
    (ops.pooled_cam, (random(3, 4, 7, 7), random(3, 2, 4), True)),
    (ops.pooled_cam, (random(3, 4, 13, 9, dtype=torch.bfloat16), random(3, 2, 4), False)),
    (ops.gradient_cam, (random(2, 5, 3, 4), random(2, 3, 5, 3, 4), "hires_cam", True)),
    (ops.heatmap, (random(2, 3, 7, 5), 20, 31)),
]


@pytest.mark.parametrize(("op", "args"), CALLS, ids=lambda value: getattr(value, "_name", ""))
def test_opcheck(op: object, args: tuple[object, ...]) -> None:
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pooled_cam_accumulates_in_float32(n: int, dtype: torch.dtype, channels_last: bool) -> None:
    a, w = random(n, 37, 13, 9, dtype=dtype), random(n, 2, 37)
    a = a.to(memory_format=torch.channels_last) if channels_last else a
    maps = ops.pooled_cam(a, w, False)
    expected = (w.double()[..., None, None] * a.double()[:, None]).sum(dim=2)
    assert maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(maps.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("n", [0, 2])
def test_gradient_cam_against_loops(reduction: str, n: int) -> None:
    a, g = random(n, 6, 4, 3, dtype=torch.float64), random(n, 2, 6, 4, 3, dtype=torch.float64)
    maps = ops.gradient_cam(a, g, reduction, False)
    expected = torch.zeros(n, 2, 4, 3, dtype=torch.float64)
    for i in range(n):
        for t in range(2):
            for k in range(6):
                weight = g[i, t, k].mean() if reduction == "grad_cam" else g[i, t, k]
                expected[i, t] += weight * a[i, k]
    assert torch.allclose(maps, expected, atol=1e-12)
    assert torch.equal(ops.gradient_cam(a, g, reduction, True), maps.relu())


def test_heatmap_is_min_max_then_bilinear() -> None:
    maps = random(2, 2, 7, 5)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    expected = F.interpolate(
        (maps - low) / (high - low), size=(30, 40), mode="bilinear", align_corners=False
    )
    assert torch.allclose(ops.heatmap(maps, 30, 40), expected, atol=1e-6)


def test_degenerate_heatmaps() -> None:
    maps = torch.stack(
        [torch.zeros(2, 3), torch.full((2, 3), -7.25), torch.tensor([[0, 1, 2], [3, math.nan, 5]])]
    )
    result = ops.heatmap(maps[None], 4, 4)[0]
    assert (result[0] == 0).all() and (result[1] == 0).all()
    assert result[2].isnan().all()
    assert ops.heatmap(torch.zeros(0, 2, 3, 3), 4, 5).shape == (0, 2, 4, 5)
    single = ops.heatmap(torch.ones(1, 1, 1, 1), 3, 3)
    assert torch.equal(single, torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_heatmap_does_not_depend_on_the_scale(scale: float) -> None:
    maps = random(1, 1, 7, 7).abs() + 0.1
    assert torch.allclose(ops.heatmap(maps * scale, 14, 14), ops.heatmap(maps, 14, 14), atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.pooled_cam(random(2, 3, 4, 4), random(2, 1, 5), True),
            r"A \(N, C, h, w\) and w \(N, T, C\)",
        ),
        (
            lambda: ops.gradient_cam(random(2, 3, 4, 4), random(2, 3, 4, 4), "grad_cam", True),
            r"G \(N, T, C, h, w\)",
        ),
        (
            lambda: ops.gradient_cam(random(1, 3, 4, 4), random(1, 1, 3, 4, 4), "x", True),
            "there are grad_cam, hires",
        ),
        (
            lambda: ops.channel_weights(random(2, 1, 4), random(5, 3), 9),
            r"d \(N, T, K\) and W \(K, C\)",
        ),
        (lambda: ops.channel_weights(random(2, 1, 5), random(5, 3), 0), "cells must be positive"),
        (lambda: ops.heatmap(random(2, 3, 4), 5, 5), r"maps must be \(N, T, h, w\)"),
        (lambda: ops.heatmap(random(2, 3, 4, 4), 0, 5), "size must be positive"),
    ],
)
def test_errors_say_what_came(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
