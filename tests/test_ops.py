"""The custom operators: registered rightly, defined in float64, strict about what they take."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffcam_kernels import ops, reference, settings
from diffcam_kernels.ops.checks import require_one_device

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR).to(dtype)


PICTURES = torch.randint(256, (1, 16, 17, 3), generator=GENERATOR, dtype=torch.uint8)

CALLS = [
    (ops.contrast_gradient, (random(3, 5), torch.tensor([[0, 1], [2, 3], [4, 0]]), 1.0)),
    (ops.contrast_gradient, (random(3, 5), None, None, None, None)),
    (ops.contrast_channel_weights, (random(3, 5), random(5, 4), 49, None, 1.0)),
    (ops.head_cam, (random(3, 4, 7, 5), random(5, 4), random(5), None, 1.0, True)),
    (ops.head_cam, (random(1, 4, 2, 2), random(5, 4), None, torch.tensor([[0, 1]]), 0.0, False)),
    (ops.pooled_cam, (random(3, 4, 7, 7), random(3, 2, 4), True)),
    (ops.pooled_cam, (random(3, 4, 13, 9, dtype=torch.bfloat16), random(3, 2, 4), False)),
    (ops.gradient_cam, (random(2, 5, 3, 4), random(2, 3, 5, 3, 4), "hires_cam", True)),
    (ops.eigen_cam, (random(2, 5, 3, 4), True)),
    (ops.heatmap, (random(2, 3, 7, 5), 20, 31)),
    (ops.heatmap, (random(2, 3, 7, 5), 20, 31, torch.uint8)),
    (ops.heatmap, (random(2, 3, 7, 5).to(memory_format=torch.channels_last), 20, 31)),
    (ops.contrast_gradient, (random(3, 5), torch.tensor([[0, 1, 4], [2, 3, 0]]).T, 1.0)),
    (ops.overlay, (random(1, 2, 3, 3), PICTURES, PICTURES[0, :16, :16].reshape(256, 3), 100)),
    (ops.preprocess, (PICTURES, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], torch.float16, True)),
    (ops.preprocess, (PICTURES, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], torch.float32, False)),
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


def by_loops(reduction: str, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The contribution of one channel (h, w) to the map, written out cell by cell."""
    if reduction == "hires_cam":
        return g * a
    if reduction == "layer_cam":
        return g.clamp(min=0) * a
    if reduction == "grad_cam":
        return g.mean() * a
    if reduction == "xgrad_cam":
        return (g * a).sum() / a.sum() * a
    # The authors' Grad-CAM++: alpha as published, renormalised over the cells with G > 0.
    alpha = g**2 / (2 * g**2 + a.sum() * g**3)
    return (alpha * g.clamp(min=0)).sum() / alpha[g > 0].sum() * a


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("n", [0, 2])
def test_gradient_cam_against_loops(reduction: str, n: int) -> None:
    a, g = random(n, 6, 4, 3, dtype=torch.float64), random(n, 2, 6, 4, 3, dtype=torch.float64)
    maps = ops.gradient_cam(a, g, reduction, False)
    expected = torch.zeros(n, 2, 4, 3, dtype=torch.float64)
    for i in range(n):
        for t in range(2):
            for k in range(6):
                expected[i, t] += by_loops(reduction, a[i, k], g[i, t, k])
    assert torch.allclose(maps, expected, atol=1e-9)
    assert torch.equal(ops.gradient_cam(a, g, reduction, True), maps.relu())


def test_degenerate_gradients_give_zeros() -> None:
    a = random(1, 3, 4, 4).relu()
    for reduction in reference.REDUCTIONS:
        for pair in [(a, torch.zeros(1, 1, 3, 4, 4)), (a * 0, random(1, 1, 3, 4, 4))]:
            assert (ops.gradient_cam(*pair, reduction, False) == 0).all(), reduction
    # Gradients far below 1e-19, whose squares float32 does not hold.
    g = random(1, 1, 3, 4, 4).abs()
    large, small = (ops.gradient_cam(a, g * s, "grad_cam_pp", False) / s for s in (1e-9, 1e-25))
    assert torch.allclose(large, small, rtol=1e-5)


def test_channels_that_sum_to_zero_have_no_xgrad_weight() -> None:
    a = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
    assert (ops.gradient_cam(a, torch.ones(1, 1, 1, 1, 2), "xgrad_cam", False) == 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 40, 3, 3), (2, 4, 9, 9)])
@pytest.mark.parametrize("center", [True, False])
def test_eigen_cam_is_the_leading_eigenvector(shape: tuple[int, ...], center: bool) -> None:
    a = random(*shape, dtype=torch.float64)
    maps = ops.eigen_cam(a, center).flatten(1)
    x = a.flatten(2).mT
    x = x - x.mean(dim=1, keepdim=True) if center else x
    values = torch.linalg.eigvalsh(x @ x.mT)[:, -1:]
    assert torch.allclose((x @ x.mT @ maps[..., None])[..., 0], values * maps, atol=1e-8)
    assert torch.allclose(maps.square().sum(dim=1, keepdim=True), values)
    assert (maps.gather(1, maps.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_eigen_cam_of_nothing_and_of_nan() -> None:
    a = torch.zeros(2, 4, 3, 3)
    a[1, 2, 0, 1] = math.nan
    maps = ops.eigen_cam(a, True)
    assert (maps[0] == 0).all() and maps[1].isnan().all()


def test_head_cam_is_complete() -> None:
    a, w, b = (random(*s, dtype=torch.float64) for s in [(3, 6, 4, 5), (7, 6), (7,)])
    maps, logits, targets, scores = ops.head_cam(a, w, b, None, math.inf, False)
    assert torch.allclose(logits, a.mean(dim=(2, 3)) @ w.T + b)
    assert torch.equal(targets[:, 0], logits.argmax(dim=1))
    # The cells sum to the score without the biases' share.
    shift = b[targets] - (b.sum() - b[targets]) / 6
    assert torch.allclose(maps.sum(dim=(2, 3)), scores - shift)


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
            "there are grad_cam, grad_cam_pp, xgrad",
        ),
        (
            lambda: ops.contrast_channel_weights(random(2, 4), random(5, 3), 9, None, 1.0),
            r"weight must be \(K, C\) with K = 4",
        ),
        (
            lambda: ops.contrast_channel_weights(random(2, 5), random(5, 3), 0, None, 1.0),
            "cells must be positive",
        ),
        (
            lambda: ops.contrast_gradient(random(2, 5), torch.zeros(3, 1).long(), 1.0),
            "targets must be .* N = 2",
        ),
        (lambda: ops.contrast_gradient(random(2, 5), None, -1.0), "temperature must be 0"),
        (lambda: ops.contrast_gradient(random(2, 5).long(), None, 1.0), "floating point"),
        (lambda: ops.contrast_gradient(random(2, 1), None, 1.0), "at least two classes"),
        (
            lambda: require_one_device(logits=random(2), targets=torch.empty(2, device="meta")),
            "on one device, got logits on cpu, targets on meta",
        ),
        (
            lambda: ops.head_cam(random(2, 3, 4, 4), random(5, 4), None, None, 1.0, True),
            r"A \(N, C, h, w\) and W \(K, C\)",
        ),
        (
            lambda: ops.head_cam(random(2, 3, 4, 4), random(5, 3), random(4), None, 1.0, True),
            r"bias must be \(K,\)",
        ),
        (lambda: ops.eigen_cam(random(2, 3, 4), True), r"A must be \(N, C, h, w\)"),
        (lambda: ops.heatmap(random(2, 3, 4, 4), 5, 5, torch.int32), "floating point or uint8"),
        (lambda: ops.overlay(random(1, 2, 3, 3), PICTURES, PICTURES[0, 0], 9), "colours must be"),
        (
            lambda: ops.overlay(random(2, 2, 3, 3), PICTURES, PICTURES[0, 0], 9),
            r"images must be .* N = 2",
        ),
        (lambda: ops.preprocess(PICTURES, [0.5], [0.5], torch.float32, False), "3 means and 3"),
        (
            lambda: ops.preprocess(PICTURES, [0.5] * 3, [0.5, 0.5, 0], torch.float32, False),
            "above 0",
        ),
        (lambda: ops.heatmap(random(2, 3, 4), 5, 5), r"maps must be \(N, T, h, w\)"),
        (lambda: ops.heatmap(random(2, 3, 4, 4), 0, 5), "size must be positive"),
    ],
)
def test_errors_say_what_came(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_environment_decides_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    assert not settings.uses_kernels(x)
    monkeypatch.setenv("DIFFCAM_KERNELS", "triton")
    assert settings.uses_kernels(x, None)
    assert not settings.uses_kernels(x, x.double())
    monkeypatch.setenv("DIFFCAM_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'cuda'; it takes auto, triton, reference"):
        ops.pooled_cam(random(1, 2, 3, 3), random(1, 1, 2), True)


def test_operators_are_seen_through() -> None:
    """One graph under `torch.compile` and `torch.export`, with dynamic batch."""

    class Head(torch.nn.Module):
        def forward(self, z: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            weights, _, _ = ops.contrast_channel_weights(z, w, 20, None, 1.0)
            return ops.heatmap(ops.pooled_cam(a, weights, True), 8, 10)

    operands = random(3, 5), random(3, 4, 4, 5), random(5, 4)
    expected = Head()(*operands)
    compiled = torch.compile(Head(), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*operands), expected)
    batch = torch.export.Dim("n")
    shapes = ({0: batch}, {0: batch}, None)
    exported = torch.export.export(Head(), operands, dynamic_shapes=shapes).module()
    larger = random(7, 5), random(7, 4, 4, 5), operands[2]
    assert torch.allclose(exported(*larger), Head()(*larger))


def test_operators_compute_outside_of_autocast() -> None:
    a, w, g = random(2, 30, 9, 9), random(2, 1, 30), random(2, 1, 30, 9, 9)
    calls = [
        lambda: ops.pooled_cam(a, w, False),
        lambda: ops.gradient_cam(a, g, "grad_cam", False),
        lambda: ops.contrast_channel_weights(w[:, 0], g[0, 0, :, 0], 9, None, None)[0],
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(), expected)


def test_targets_that_are_no_class_are_refused() -> None:
    for targets in ([[0], [5]], [[-1], [2]]):
        with pytest.raises(ValueError, match=r"targets must be from 0 to 4, got \[\["):
            ops.contrast_gradient(random(2, 5), torch.tensor(targets), 1.0)
