"""The nodes of a CAM head against the definitions, value by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from diffcam_export.contrast import chosen_classes, contrast_gradient
from diffcam_export.emit import Emitter
from diffcam_export.pictures import heatmap, prepared
from diffcam_export.reductions import REDUCTIONS
from diffcam_fast.contrast import Contrast
from diffcam_fast.images.preprocess import Preprocess
from diffcam_kernels import reference

FLOAT, INT64, UINT8 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.UINT8


def run(
    inputs: Mapping[str, np.ndarray], write: Callable[..., ir.Value], **shapes: list[Any]
) -> np.ndarray:
    """What ONNX Runtime makes of the nodes that `write` adds for some inputs."""
    emit = Emitter("test")
    values = [
        ir.val(name, ir.DataType.from_numpy(array.dtype), shapes.get(name, list(array.shape)))
        for name, array in inputs.items()
    ]
    result = write(emit, *values)
    graph = ir.Graph(values, [result], nodes=emit.nodes, opset_imports={"": 18}, name="test")
    proto = ir.to_proto(ir.Model(graph, ir_version=9))
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [found] = session.run(None, dict(inputs))
    return np.asarray(found)


CONTRASTS = {
    "mean": Contrast(math.inf),
    "log_odds": Contrast(1.0),
    "runner_up": Contrast(0.0),
    "none": Contrast(None),
    "temperature": Contrast(2.5),
    "tiny temperature": Contrast(1e-30),
    "reference": Contrast(1.0, reference=(5, 6)),
    "mean of a reference": Contrast(math.inf, reference=(5, 6)),
    "weights": Contrast(weights=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.25, 0.25])),
}


@pytest.mark.parametrize("name", CONTRASTS)
def test_contrasts_are_those_of_the_reference(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn((6, 7), generator=generator)
    logits[1, 4] = -math.inf
    logits[2] = 1.0
    logits[3, 2:4] = 80.0
    logits[4, 5] = math.nan
    targets = torch.tensor([[0, 1], [2, 3], [1, 0], [2, 3], [0, 1], [3, 2]])
    contrast = CONTRASTS[name]
    found = run(
        {"z": logits.numpy(), "c": targets.numpy()},
        lambda emit, z, c: contrast_gradient(emit, z, c, contrast, checked=False),
    )
    expected = reference.contrast_gradient(
        logits, targets, *contrast.operands(logits, targets)
    ).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


def test_a_class_that_is_none_gives_nan() -> None:
    found = run(
        {"z": np.zeros((1, 3), np.float32), "c": np.array([[0, 3, -2]])},
        lambda emit, z, c: contrast_gradient(emit, z, c, Contrast(None), checked=True),
    )
    assert np.isnan(found).all(axis=2).tolist() == [[False, True, True]]


def test_targets_predicted_topk_and_asked_for() -> None:
    logits = np.array([[1.0, 5.0, 3.0], [9.0, 2.0, 9.0]], np.float32)

    def chosen(targets: Any, asked: np.ndarray | None = None) -> list[list[int]]:
        inputs = {"z": logits} | ({} if asked is None else {"asked": asked})
        found = run(
            inputs,
            lambda emit, z, *rest: chosen_classes(emit, z, targets, rest[0] if rest else None),
        )
        result: list[list[int]] = found.tolist()
        return result

    assert chosen("predicted") == [[1], [0]]
    assert chosen(2) == [[1, 2], [0, 2]]
    assert chosen("input", np.array([[-1]])) == [[1], [0]]
    assert chosen("input", np.array([[2, -1]])) == [[2, 1], [2, 0]]
    assert chosen("input", np.array([[0, 1], [-1, 2]])) == [[0, 1], [0, 2]]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_are_those_of_the_reference(name: str, signed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn((3, 5, 7, 4), generator=generator)
    a = a if signed else a.relu()
    g = torch.randn((3, 5, 7, 4), generator=generator) / 28
    # A dead channel, and one that no gradient reaches.
    a[:, 1], g[:, 2] = 0, 0
    if signed and name in ("xgrad_cam", "grad_cam_pp"):
        # Sums that come near 0 are right in no precision; these do not.
        a += 2
    found = run(
        {"a": a.flatten(2).numpy(), "g": g.flatten(2).numpy()},
        lambda emit, a, g: REDUCTIONS[name](emit, a, g),
    )
    expected = reference.gradient_cam(a.double(), g.double()[:, None], name, relu=False)
    np.testing.assert_allclose(
        found, expected.flatten(2).numpy(), atol=1e-5 * float(expected.abs().max())
    )


def test_every_reduction_can_be_exported() -> None:
    assert set(REDUCTIONS) == set(reference.REDUCTIONS)


@pytest.mark.parametrize("size", [(14, 21), (7, 5), (3, 2)])
def test_heatmaps_are_those_of_the_reference(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn((3, 2, 7, 5), generator=generator)
    maps[1, 0] = 3.0
    maps[2, 1, 3, 3] = math.nan

    def made(kind: Any) -> np.ndarray:
        return run(
            {"maps": maps.numpy(), "size": np.array(size)},
            lambda emit, maps, size: heatmap(emit, maps, size, kind),
        )

    np.testing.assert_allclose(made("float32"), reference.heatmap(maps, *size).numpy(), atol=2e-6)
    expected = reference.heatmap(maps, *size, torch.uint8).numpy().astype(int)
    # A value half way between two bytes may go either way.
    assert np.abs(made("uint8").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (48, 72)])
@pytest.mark.parametrize("photo", [(120, 90), (81, 200), (64, 64), (40, 30)])
def test_photographs_are_prepared_as_pillow_does(
    photo: tuple[int, int], size: tuple[int, int], interpolation: Any
) -> None:
    from PIL import Image

    generator = np.random.default_rng(3)
    coarse = generator.integers(0, 256, (2, 9, 7, 3), dtype=np.uint8)
    images = np.stack(
        [
            np.asarray(Image.fromarray(one).resize(photo[::-1], Image.Resampling.BICUBIC))
            for one in coarse
        ]
    )
    preprocess = Preprocess(size=size, crop_pct=0.875, interpolation=interpolation)
    found = run(
        {"photos": images},
        lambda emit, photos: prepared(emit, photos, preprocess, FLOAT),
        photos=["n", "h", "w", 3],
    )
    expected = torch.stack([preprocess(Image.fromarray(one)) for one in images]).numpy()
    assert found.shape == expected.shape
    # In units of a byte; Pillow's weights are rounded, so that what is near half a byte differs.
    bytes_off = np.abs(found - expected) * 255 * np.array(preprocess.std)[:, None, None]
    assert bytes_off.max() < 1.01
    assert (bytes_off > 0.01).mean() < 0.003
