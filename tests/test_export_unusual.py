"""What comes of ONNX files that are unusual: their images, their names, what they cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from diffcam_export import OnnxExplainer, export_onnx
from diffcam_export.inspection import inspect_onnx
from diffcam_fast.images.preprocess import Preprocess
from onnxfiles import C, K, Writer, image, pooled, run, saved


def tensorflow() -> onnx.ModelProto:
    """`pooled`, with images (N, H, W, C)."""
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features(w("Transpose", "image", perm=[0, 3, 1, 2]))))
    z = w("Gemm", x, w.weight(K, C), w.weight(K), transB=1, name="logits")
    return w.model(z, image=("N", 10, 12, 3))


def test_channels_may_stand_last(tmp_path: Path) -> None:
    first = saved(pooled(), tmp_path / "first.onnx")
    last = saved(tensorflow(), tmp_path / "last.onnx")
    assert inspect_onnx(last).input_shape == inspect_onnx(first).input_shape == (3, 10, 12)
    made = []
    for path in (first, last):
        out = path.with_suffix(".cam.onnx")
        assert export_onnx(path, out, heatmap="float32").report is not None
        [declared] = [v for v in onnx.load(out).graph.output if v.name == "diffcam_heatmap"]
        assert [d.dim_value for d in declared.type.tensor_type.shape.dim[2:]] == [10, 12]
        x = image() if path is first else image().transpose(0, 2, 3, 1)
        made.append(run(onnx.load(out), {"image": x}, "diffcam_map", "diffcam_heatmap"))
        assert OnnxExplainer(out).size == (10, 12)
    assert made[0][1].shape == (2, 1, 10, 12)
    for got, expected in zip(*made, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_photographs_for_channels_that_stand_last(tmp_path: Path) -> None:
    preprocess = Preprocess(size=(10, 12))
    photo = np.random.default_rng(0).integers(0, 256, (1, 20, 24, 3), dtype=np.uint8)
    maps = []
    for name, model in (("first", pooled()), ("last", tensorflow())):
        out = tmp_path / f"{name}.cam.onnx"
        export_onnx(
            saved(model, tmp_path / f"{name}.onnx"),
            out,
            preprocess=preprocess,
            bake_preprocess=True,
            verify=False,
        )
        maps.append(OnnxExplainer(out)(torch.from_numpy(photo)).maps)
    torch.testing.assert_close(*maps)
    with pytest.raises(ValueError, match="10 x 12 pixels, the preprocessing makes 12 x 10"):
        export_onnx(
            tmp_path / "last.onnx",
            tmp_path / "no.onnx",
            preprocess=Preprocess(size=(12, 10)),
            bake_preprocess=True,
        )
