"""`diffcam verify`, `diffcam explain` on an ONNX file, and Triton's repository."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from commandline import write_images
from diffcam_export.explainer import OnnxExplainer
from diffcam_export.triton_repo import write_triton_repository
from diffcam_export.verify import Report, verify
from diffcam_export.verify_cli import verify as command
from diffcam_export.ways import read_preprocess
from diffcam_fast import Explainer
from diffcam_fast.cli.main import main
from diffcam_fast.images.preprocess import Preprocess
from explained import PREPROCESS, write_explained
from networks import images, pooled

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "any.cam.onnx"
    write_explained(path, targets=True, labels=True)
    return path


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "fixed.cam.onnx"
    write_explained(path, batch=2, size=(10, 12), topk=3)
    return path


@pytest.fixture
def edited(made: Path, tmp_path: Path) -> Callable[[Callable[[onnx.ModelProto], None]], Path]:
    def edit(change: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(made)
        change(model)
        onnx.save(model, tmp_path / "edited.onnx")
        return tmp_path / "edited.onnx"

    return edit


def scale(model: onnx.ModelProto, output: str, factor: float) -> None:
    """Multiplies an output by a number: what is wrong with it is known."""
    inner = f"{output}_before"
    for node in model.graph.node:
        node.output[:] = [inner if name == output else name for name in node.output]
        node.input[:] = [inner if name == output else name for name in node.input]
    tensor = onnx.numpy_helper.from_array(np.array(factor, dtype=np.float32), f"{output}_factor")
    model.graph.initializer.append(tensor)
    node = onnx.helper.make_node("Mul", [inner, f"{output}_factor"], [output])
    model.graph.node.append(node)


def checked(path: Path, *, rounds: int = 0, **options: object) -> Report:
    return verify(path, providers=CPU, threads=1, rounds=rounds, **options)  # type: ignore[arg-type]


def verdicts(report: Report) -> dict[str, str]:
    return {check.name: check.verdict for check in report.checks}


def detail(report: Report, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def test_a_good_file(made: Path) -> None:
    report = checked(made, against=pooled(), rounds=2)
    assert report.ok, report.lines()
    assert set(verdicts(report).values()) == {"ok"}
    assert [name for name in verdicts(report) if name.startswith("runs")] == [
        "runs 1 x 3 x 10 x 12",
        "runs 1 x 3 x 42 x 76",
        "runs 3 x 3 x 10 x 12",
        "runs 3 x 3 x 42 x 76",
    ]
    assert "bit for bit" in detail(report, "own outputs")
    assert "CPUExecutionProvider" in detail(report, "placement")
    assert "times the plain model" in detail(report, "latency")
    # The nodes of the map alone; the network has eight.
    total = sum(node.op_type != "Constant" for node in onnx.load(made).graph.node)
    assert detail(report, "added").startswith(f"{total - 8} nodes, ")


def test_a_file_of_fixed_sizes(fixed: Path) -> None:
    report = checked(fixed, against=pooled())
    assert report.ok, report.lines()
    assert [name for name in verdicts(report) if name.startswith("runs")] == [
        "runs 2 x 3 x 10 x 12"
    ]
    assert verdicts(report)["latency"] == "skipped"


def test_without_the_model_the_maps_are_not_compared(made: Path) -> None:
    report = checked(made)
    assert report.ok
    assert verdicts(report)["map of 0"] == "skipped"
    assert "no PyTorch model" in detail(report, "map of 0")


def test_a_provider_that_is_not_there_is_told_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = verify(made, providers=["CUDAExecutionProvider"], threads=1, rounds=0)
    assert report.ok, report.lines()
    assert verdicts(report)["provider CUDAExecutionProvider"] == "skipped"
    assert "no CUDA device" in detail(report, "provider CUDAExecutionProvider")
    assert detail(report, "placement").startswith("CPUExecutionProvider ")


def test_a_wrong_map_is_found(edited: Callable[..., Path]) -> None:
    report = checked(edited(lambda model: scale(model, "diffcam_map", 1.001)), against=pooled())
    assert not report.ok
    assert [name for name, verdict in verdicts(report).items() if verdict == "failed"] == [
        "map of 0"
    ]
    assert "1.0e-03 of at most 1e-04" in detail(report, "map of 0")


def test_other_outputs_are_found(made: Path, edited: Callable[..., Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain.onnx"
    model = onnx.load(made)
    # The graph without maps, as it was before the export.
    del model.graph.output[1:]
    onnx.save(model, plain)
    assert checked(made, against=plain).ok
    wrong = edited(lambda model: scale(model, "logits", 1.01))
    report = checked(wrong, against=str(plain))
    assert verdicts(report)["own outputs"] == "failed"
    assert "1.0e-02" in detail(report, "own outputs")


def test_nan_and_a_wrong_class_are_found(edited: Callable[..., Path]) -> None:
    report = checked(edited(lambda model: scale(model, "diffcam_map", np.nan)), against=pooled())
    assert verdicts(report)["runs 1 x 3 x 10 x 12"] == "failed"
    assert verdicts(report)["map of 0"] == "failed"

    def largest_becomes_smallest(model: onnx.ModelProto) -> None:
        scale(model, "logits", -1.0)

    report = checked(edited(largest_becomes_smallest))
    assert "not that of the largest logit" in detail(report, "runs 1 x 3 x 10 x 12")


def test_a_damaged_file(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(made.read_bytes()[:700])
    report = checked(path)
    assert verdicts(report) == dict.fromkeys(("checker", "shapes", "opens"), "failed")


def test_verify_command(made: Path, edited: Callable[..., Path], tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(command, [str(made), "--rounds", "0", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["ok"] is True
    assert {check["verdict"] for check in told["checks"]} == {"ok", "skipped"}
    wrong = edited(lambda model: scale(model, "logits", 1.01))
    done = runner.invoke(
        command, [str(wrong), "--against", str(made), "--rounds", "0", "--threads", "1"]
    )
    assert done.exit_code == 1
    assert "own outputs" in done.stdout
    for arguments, message in (
        ([str(tmp_path / "none.onnx")], "there is no file"),
        ([str(made), "--against", str(tmp_path / "none.onnx")], "there is no file"),
        ([str(made), "--against", "cat"], "names no model"),
        ([str(made), "--weights", "random"], "--against, which was not given"),
        ([str(made), "--against", str(made), "--weights", "random"], "leave --weights out"),
    ):
        done = runner.invoke(command, arguments)
        assert done.exit_code == 2
        assert message in done.stderr


def explain(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_explain_takes_an_explained_file(made: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 3)
    out = tmp_path / "out"
    asked = ["-m", made, "-o", out, "--format", "npz", "--target", "class 4", "--target", "1"]
    code, stdout, stderr = explain(tmp_path / "photos", *asked, "--device", "cpu", "--json", "-v")
    assert code == 0, stderr
    told = json.loads(stdout)
    assert told["backend"] == "onnxruntime (CPUExecutionProvider), closed form"
    assert (told["layer"], told["method"], told["contrast"]) == ("0", "diff_grad_cam", "log_odds")
    assert "layer: 0, of a model without a name" in stderr
    preprocess = Preprocess(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in PREPROCESS.items()}
    )  # type: ignore[arg-type]
    engine = Explainer(pooled(), layer="0")
    for photo in photos:
        with Image.open(photo) as image:
            expected = engine(preprocess(image)[None], [[4, 1]])
        (found,) = out.rglob(f"{photo.stem}*.npz")
        with np.load(found) as arrays:
            assert np.allclose(arrays["maps"], expected.maps[0].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "grad_cam"], "--method is grad_cam, but .* exported with diff_grad_cam"),
        (["--contrast", "mean"], "--contrast is mean, but .* exported with log_odds"),
        (["--temperature", "2"], r"--temperature is 2\.0, but .* exported with 1\.0"),
        (["--layer", "layer3"], "none of layer3"),
        (["--weights", "random"], "leave --weights out"),
        (["--device", "meta"], "cpu or cuda"),
        (["--target", "cat"], "cat"),
    ],
)
def test_explain_refuses_what_the_file_has_not(
    made: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    (photo,) = write_images(tmp_path, 1)
    code, _, stderr = explain(photo, "-m", made, *options)
    assert code == 2
    assert re.search(message, " ".join(stderr.split())), stderr


def test_explain_refuses_more_classes_than_the_file_has(tmp_path: Path) -> None:
    (photo,) = write_images(tmp_path, 1)
    write_explained(tmp_path / "best.onnx", topk=2)
    code, _, stderr = explain(photo, "-m", tmp_path / "best.onnx", "--topk", "3")
    assert code == 2
    assert "--topk is 3, but" in " ".join(stderr.split())
    assert "has maps of the best 2" in " ".join(stderr.split())
    code, _, _ = explain(photo, "-m", tmp_path / "best.onnx", "--topk", "2")
    assert code == 0


def test_explain_refuses_other_files(made: Path, fixed: Path, tmp_path: Path) -> None:
    (photo,) = write_images(tmp_path, 1)
    model = onnx.load(made)
    del model.metadata_props[:]
    onnx.save(model, plain := tmp_path / "plain.onnx")
    code, _, stderr = explain(photo, "-m", plain)
    assert code == 2
    assert f"diffcam export {plain}" in " ".join(stderr.split())
    code, _, stderr = explain(photo, "-m", fixed, "--target", "1")
    assert code == 2
    assert "explains the prediction alone" in stderr
    code, _, stderr = explain(photo, "-m", fixed, "--size", "32")
    assert code == 2
    assert "10 x 12 pixels" in stderr


def test_explain_says_which_preparation_it_assumes(made: Path, fixed: Path, tmp_path: Path) -> None:
    (photo,) = write_images(tmp_path, 1)
    # `made` tells how photographs are prepared, `fixed` does not.
    for model, told in ((made, False), (fixed, True)):
        code, _, stderr = explain(photo, "-m", model, "--device", "cpu")
        assert code == 0, stderr
        assert ("does not tell how photographs are prepared" in " ".join(stderr.split())) == told


def test_preprocessing_by_a_word_or_a_file(tmp_path: Path) -> None:
    assert read_preprocess("imagenet") == Preprocess((224, 224))
    half = (0.5, 0.5, 0.5)
    assert read_preprocess("tf:32x48") == Preprocess((32, 48), mean=half, std=half)
    path = tmp_path / "way.json"
    path.write_text('{"size": [32, 48], "crop_pct": 1.0, "interpolation": "bicubic"}')
    assert read_preprocess(str(path)) == Preprocess((32, 48), 1.0, "bicubic")
    for text in ("cat", "tf:axb", "tf:1x2x3", "imagenet:0", "imagenet:-3"):
        with pytest.raises(ValueError, match=r"imagenet, tf, either|both at least 1"):
            read_preprocess(text)
    for content in ("[1]", "{", "{}", '{"size": 3}', '{"sise": [2, 2]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"way\.json is no preprocessing .* expected JSON"):
            read_preprocess(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        read_preprocess(str(tmp_path / "none.json"))


def test_photographs_for_an_onnx_file(made: Path, tmp_path: Path) -> None:
    model = onnx.load(made)
    del model.metadata_props[:], model.graph.output[1:], model.graph.input[1:]
    [default] = [t for t in model.graph.initializer if t.name == "targets"]
    model.graph.initializer.remove(default)
    extractor = onnx.utils.Extractor(model)
    onnx.save(extractor.extract_model(["images"], ["logits"]), plain := tmp_path / "plain.onnx")
    out = tmp_path / "photos.cam.onnx"
    arguments = ["export", str(plain), "-o", str(out), "--photographs", "--no-verify"]
    done = CliRunner().invoke(main, [*arguments, "--preprocess", "tf:32"])
    assert done.exit_code == 0, done.output
    assert OnnxExplainer(out, providers=CPU).inspect().baked
    report = checked(out, against=plain)
    assert report.ok, report.lines()


def test_explain_with_a_fixed_batch(fixed: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 3)
    out = tmp_path / "out"
    code, stdout, stderr = explain(
        tmp_path / "photos", "-m", fixed, "-o", out, "--topk", "3", "--json", "--report"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["counts"]["explained"] == 3


def test_explain_pictures_as_they_are(made: Path, tmp_path: Path) -> None:
    model = onnx.load(made)
    facts = {p.key: p.value for p in model.metadata_props}
    preprocess = json.dumps(PREPROCESS | {"baked": True})
    changed = {"diffcam.input": "pixels", "diffcam.preprocess": preprocess}
    onnx.helper.set_model_props(model, facts | changed)
    before = prepend_pixels()
    model.graph.input[0].CopyFrom(before.input[0])
    nodes = [*before.node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(before.initializer)
    onnx.save(model, path := tmp_path / "baked.onnx")
    photos = tmp_path / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    engine = Explainer(pooled(), layer="0")
    out = tmp_path / "out"
    pictures = {}
    for name, size in (("one", (20, 30)), ("two", (24, 16))):
        pictures[name] = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pictures[name]).save(photos / f"{name}.png")
    code, _, stderr = explain(photos, "-m", path, "-o", out, "--format", "npz", "--device", "cpu")
    assert code == 0, stderr
    for name, pixels in pictures.items():
        expected = engine(torch.tensor(pixels).permute(2, 0, 1)[None] / 255)
        (found,) = out.rglob(f"{name}*.npz")
        with np.load(found) as arrays:
            assert np.allclose(arrays["maps"], expected.maps[0].numpy(), atol=1e-6)
    with pytest.raises(TypeError, match=r"uint8 \(N, H, W, 3\)"):
        OnnxExplainer(path, providers=CPU)(torch.rand(1, 20, 30, 3))


def prepend_pixels() -> onnx.GraphProto:
    """From `pixels` uint8 (n, height, width, 3) to `images` of the network."""
    return onnx.parser.parse_graph(
        """
        before (uint8[n, height, width, 3] pixels) => (float[n, 3, height, width] images)
        <float scale = {255.0}>
        {
            numbers = Cast <to = 1> (pixels)
            planes = Transpose <perm = [0, 3, 1, 2]> (numbers)
            images = Div (planes, scale)
        }
        """
    )


def test_images_of_tensorflow(made: Path, tmp_path: Path) -> None:
    model = onnx.load(made)
    facts = {p.key: p.value for p in model.metadata_props}
    onnx.helper.set_model_props(model, facts | {"diffcam.input": "rows"})
    rows = onnx.helper.make_tensor_value_info("rows", 1, ["n", "height", "width", 3])
    model.graph.input[0].CopyFrom(rows)
    transpose = onnx.helper.make_node("Transpose", ["rows"], ["images"], perm=[0, 3, 1, 2])
    nodes = [transpose, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path := tmp_path / "rows.onnx")
    explainer = OnnxExplainer(path, providers=CPU, threads=1)
    assert explainer.input.channels_last
    expected = Explainer(pooled(), layer="0")(images())
    assert torch.allclose(explainer(images()).maps, expected.maps, atol=1e-6)
    report = checked(path, against=pooled())
    assert report.ok, report.lines()
    assert verdicts(report)["map of 0"] == "ok"


def config(home: Path) -> Any:
    """`config.pbtxt`, read by the schema that Triton's client carries."""
    pytest.importorskip("tritonclient", reason="tritonclient is not installed")
    import tritonclient
    from google.protobuf import text_format

    # The package around the schema needs gRPC, the schema itself does not.
    schema = Path(tritonclient.__path__[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", schema)
    assert spec is not None
    assert spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    return text_format.Parse((home / "config.pbtxt").read_text(), protocol.ModelConfig())


def test_triton_repository(made: Path, tmp_path: Path) -> None:
    home = write_triton_repository(made, tmp_path / "models")
    assert home == tmp_path / "models" / "any"
    assert (home / "1" / "model.onnx").read_bytes() == made.read_bytes()
    assert (home / "labels.txt").read_text().splitlines()[4] == "class 4"
    parsed = config(home)
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("any", "onnxruntime", 32)
    assert parsed.HasField("dynamic_batching")
    inputs = {i.name: (i.data_type, list(i.dims), i.optional) for i in parsed.input}
    # TYPE_FP32 is 11 and TYPE_INT64 9 in Triton's schema.
    assert inputs == {"images": (11, [3, -1, -1], False), "targets": (9, [-1], True)}
    outputs = {o.name: (o.data_type, list(o.dims), o.label_filename) for o in parsed.output}
    assert outputs == {
        "logits": (11, [5], "labels.txt"),
        "diffcam_map": (11, [-1, -1, -1], ""),
        "diffcam_target": (9, [-1], ""),
    }


def test_triton_repository_of_a_fixed_batch(fixed: Path, tmp_path: Path) -> None:
    home = write_triton_repository(fixed, tmp_path, name="other")
    parsed = config(home)
    assert (parsed.name, parsed.max_batch_size) == ("other", 0)
    assert not parsed.HasField("dynamic_batching")
    assert list(parsed.input[0].dims) == [2, 3, 10, 12]
    assert list(parsed.output[1].dims) == [2, 3, 5, 6]


def test_weights_beside_the_file_are_taken_along(made: Path, tmp_path: Path) -> None:
    onnx.save(
        onnx.load(made),
        path := tmp_path / "split.onnx",
        save_as_external_data=True,
        location="split.data",
        size_threshold=100,
    )
    report = checked(path, against=pooled())
    assert report.ok, report.lines()
    assert "bit for bit" in detail(report, "own outputs")
    home = write_triton_repository(path, tmp_path / "models")
    assert (home / "1" / "split.data").read_bytes() == (tmp_path / "split.data").read_bytes()
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="outside of the model's folder"):
        write_triton_repository(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_triton_repository_refusals(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a model"):
        write_triton_repository(made, tmp_path, name="../up")
    with pytest.raises(ValueError, match="no ONNX file"):
        write_triton_repository(tmp_path / "none.onnx", tmp_path)
    with pytest.raises(ValueError, match="max_batch"):
        write_triton_repository(made, tmp_path, max_batch=0)
    model = onnx.load(made)
    del model.metadata_props[:]
    onnx.save(model, plain := tmp_path / "plain.onnx")
    with pytest.raises(ValueError, match="diffcam export"):
        write_triton_repository(plain, tmp_path)
