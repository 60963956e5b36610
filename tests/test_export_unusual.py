"""What comes of ONNX files that are unusual: their images, their names, what they cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper
from torch import Tensor, nn

from diffcam_export import OnnxExplainer, export_onnx
from diffcam_export.inspection import inspect_onnx
from diffcam_export.pytorch import ExportError
from diffcam_fast import Contrast
from diffcam_fast.cli.main import main
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


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    path, data = tmp_path / "same.onnx", tmp_path / "same.data"
    onnx.save(pooled(), path, save_as_external_data=True, location=data.name, size_threshold=0)
    before = path.read_bytes(), data.read_bytes()
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    for out in (path, link, data, tmp_path / "." / "same.onnx"):
        with pytest.raises(ValueError, match="is part of the model"):
            export_onnx(path, out)
    result = CliRunner().invoke(main, ["export", str(path), "-o", str(path)])
    assert (result.exit_code, "is part of the model" in result.output) == (2, True)
    assert (path.read_bytes(), data.read_bytes()) == before
    assert link.is_symlink()


@pytest.mark.parametrize("side", [30000, 2**31 - 1])
def test_images_that_no_memory_holds(tmp_path: Path, side: int) -> None:
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    model = w.model(w("Gemm", x, w.weight(C, K)), image=("N", 3, side, side))
    with pytest.raises(ValueError, match=rf"have 3 x {side} x {side} numbers"):
        export_onnx(saved(model, tmp_path / "m.onnx"), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("diffcam_target", {}),
        ("diffcam_heatmap", {"heatmap": "uint8"}),
        ("diffcam_map_1", {"layer": ["A", "maxpool2"]}),
        ("diffcam/1", {"inline": True}),
        ("targets", {"targets": "input"}),
    ],
)
def test_names_that_are_taken(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    w = Writer()
    x = w("Flatten", w("Relu", w("GlobalAveragePool", w.features()), name=name))
    path = saved(w.model(w("Gemm", x, w.weight(C, K))), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    with pytest.raises(ValueError, match=f"has a tensor '{name}'.*rename it"):
        export_onnx(path, out, **options)
    assert not out.exists()


def test_outputs_that_would_be_taken_for_ours(tmp_path: Path) -> None:
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features()), name="diffcam_features")
    path = saved(w.model(w("Gemm", x, w.weight(C, K)), x), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="has a tensor 'diffcam_features'"):
        export_onnx(path, tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        (TypeError, {"topk": "2"}, "topk must be a whole number, got '2'"),
        (TypeError, {"topk": 1.0}, "topk must be a whole number, got 1.0"),
        (TypeError, {"topk": True}, "topk must be a whole number"),
        (ValueError, {"topk": 0}, "topk must be at least 1, got 0"),
        (TypeError, {"labels": "abcde"}, "a sequence of names, got the text 'abcde'"),
        (ValueError, {"layer": []}, "layer names no layer"),
        (ValueError, {"layer": ["A", "A"]}, "layer 'A' is given twice"),
        (ValueError, {"opset": 21}, "an ONNX file is taken as it is; leave out opset"),
        (ValueError, {"dynamic_size": True}, "leave out dynamic_size"),
        (ValueError, {"example_inputs": torch.rand(2, 3, 4, 4)}, "leave out example_inputs"),
        (ValueError, {"contrast": Contrast(reference=(1, 77))}, "leaves the classes 0 to 4"),
        (ValueError, {"contrast": Contrast(reference=tuple(range(K)))}, "is itself among the"),
        (ValueError, {"contrast": Contrast(weights=torch.full((3,), 1 / 3))}, r"must be \(5,\)"),
    ],
)
def test_options_that_do_not_fit_an_onnx_file(
    tmp_path: Path, kind: type[Exception], options: dict[str, Any], match: str
) -> None:
    out = tmp_path / "out.onnx"
    with pytest.raises(kind, match=match):
        export_onnx(saved(pooled(), tmp_path / "m.onnx"), out, **options)
    assert not out.exists()


def small(**options: Any) -> nn.Sequential:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head).to(**options).eval()


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"no, not {tuple(self.convolution(x).shape)}")


@pytest.mark.parametrize(
    ("kind", "model", "options", "match"),
    [
        (TypeError, None, {}, "model must be an nn.Module.*got None"),
        (TypeError, small(), {"opset": "20"}, "opset must be a whole number"),
        (ValueError, small(), {"opset": 3}, "opset must be at least 18, got 3"),
        (ValueError, small(), {"opset": 99}, r"opset must be from 18 to \d\d, got 99"),
        (ValueError, small(), {"logits": "x"}, "leave out logits"),
        (ValueError, small(), {"example_inputs": torch.rand(0, 3, 8, 8)}, "must hold an image"),
        (ValueError, small(), {"layer": ["1", "1"]}, "layer '1' is given twice"),
        (ValueError, small(dtype=torch.float64), {}, "torch.float64 everywhere; give dtype"),
        (ValueError, small(dtype=torch.bfloat16), {}, "torch.bfloat16 everywhere; give dtype"),
        (ValueError, Failing(), {}, r"cannot run on \(1, 3, 8, 8\): RuntimeError: no, not"),
    ],
)
def test_options_that_do_not_fit_a_network(
    tmp_path: Path, kind: type[Exception], model: Any, options: dict[str, Any], match: str
) -> None:
    out = tmp_path / "out.onnx"
    dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32
    examples = options.get("example_inputs", torch.rand(1, 3, 8, 8)).to(dtype)
    with pytest.raises(kind, match=match):
        export_onnx(model, out, **{**options, "example_inputs": examples})
    assert not out.exists()


@pytest.mark.parametrize("declared", [("N", "K"), (None, None), ("N", K)])
def test_the_weights_tell_the_number_of_classes(
    tmp_path: Path, declared: tuple[str | int | None, ...]
) -> None:
    model = pooled()
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, declared)
    )
    out = tmp_path / "out.onnx"
    export_onnx(saved(model, tmp_path / "m.onnx"), out)
    assert OnnxExplainer(out).classes == K


def test_a_logit_without_another_has_no_contrast(tmp_path: Path) -> None:
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    path = saved(w.model(w("Gemm", x, w.weight(C, 1), name="logit")), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    with pytest.raises(ValueError, match="needs at least two classes, got 1"):
        export_onnx(path, out, logits="logit")
    assert not out.exists()
    export_onnx(path, out, logits="logit", method="grad_cam", contrast="none")
    assert out.exists()


def test_names_with_commas(tmp_path: Path) -> None:
    w = Writer()
    x = w("Relu", w.features(), name="[a,b]")
    x = w("Relu", x, name="c")
    z = w("Gemm", w("Flatten", w("GlobalAveragePool", x)), w.weight(C, K))
    path, out = saved(w.model(z), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    export_onnx(path, out, layer=["[a,b]", "c"])
    assert OnnxExplainer(out).inspect().layers == ("[a,b]", "c")
    export_onnx(path, out, layer=["A", "c"])
    metadata = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert metadata["diffcam.layer"] == "A,c"


@pytest.mark.parametrize("inline", [False, True])
def test_nodes_are_counted_alike(tmp_path: Path, inline: bool) -> None:
    path, out = saved(pooled(), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    options: dict[str, Any] = {"inline": inline, "targets": "input", "method": "hires_cam"}
    done = export_onnx(path, out, heatmap="uint8", **options)
    assert done.report is not None
    [added] = [check.detail for check in done.report.checks if check.name == "added"]
    assert added.startswith(f"{done.added_nodes} nodes")
    assert done.nodes == 8


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    path, out = saved(pooled(), tmp_path / "M.ONNX"), tmp_path / "OUT.CAM.ONNX"
    for arguments in (
        ["inspect", str(path)],
        ["export", str(path), "-o", str(out)],
        ["verify", str(out), "--against", str(path), "--rounds", "0"],
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output


def test_what_the_commands_refuse(tmp_path: Path) -> None:
    path, out = saved(pooled(), tmp_path / "m.onnx"), tmp_path / "out (1).onnx"
    export = ["export", str(path), "-o"]
    for arguments, status, match in (
        ([*export, str(path / "out.onnx"), "--no-verify"], 1, "cannot read or"),
        (
            [*export, str(tmp_path / "o.onnx"), "--triton-repo", str(path / "r")],
            1,
            "cannot read or",
        ),
        ([*export, str(out), "--triton-repo", str(tmp_path / "r")], 2, "cannot name a model"),
        ([*export, str(out), "--opset", "21"], 2, "leave out --opset"),
        ([*export, str(out), "--half"], 2, "leave out --half"),
        (["export", "nothing"], 2, "MODEL.onnx"),
        (["verify", str(path), "--weights", "w.pth"], 2, "model of --against"),
        (["verify", str(path), "--against", str(path), "--weights", "w.pth"], 2, "its own weights"),
    ):
        result = CliRunner().invoke(main, arguments)
        shown = " ".join(result.output.split())
        assert (result.exit_code, match in shown) == (status, True), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert not out.exists()


@dataclass
class Result:
    """No tuple or mapping: PyTorch does not look into it."""

    logits: Tensor


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, x: Tensor) -> Result:
        return Result(self.network(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = small()

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.network(x)
        return z + 1 if float(z.detach().sum()) > 0 else z


def test_results_of_a_class_of_the_users(tmp_path: Path) -> None:
    model, out, x = Wrapped().eval(), tmp_path / "out.onnx", torch.rand(2, 3, 8, 8)
    export_onnx(model, out, example_inputs=x)
    torch.testing.assert_close(OnnxExplainer(out)(x).logits, model(x).logits.detach())


def test_the_reason_that_pytorch_gives(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"PyTorch cannot export the model.*\n.*data-dependent"):
        export_onnx(
            Branching().eval(), tmp_path / "out.onnx", example_inputs=torch.rand(2, 3, 8, 8)
        )
