"""Explained ONNX files give what the engine gives on the network that they were made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from diffcam_export import session
from diffcam_export.explainer import OnnxExplainer
from diffcam_fast import Explainer
from explained import write_explained
from networks import images, relative_error

CPU = ["CPUExecutionProvider"]


def opened(path: Path, **options: object) -> OnnxExplainer:
    return OnnxExplainer(path, providers=CPU, threads=1, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Sequential]:
    """A file with any batch, any size and a `targets` input, and its network."""
    path = tmp_path_factory.mktemp("onnx") / "any.onnx"
    return path, write_explained(path, targets=True, labels=True)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Sequential]:
    """A file of batches of 2, at 10 x 12, with maps of the three best classes."""
    path = tmp_path_factory.mktemp("onnx") / "fixed.onnx"
    return path, write_explained(path, batch=2, size=(10, 12), topk=3)


def assert_same(result: object, expected: object, tolerance: float = 1e-5) -> None:
    for name in ("logits", "scores", "maps"):
        got, want = getattr(result, name), getattr(expected, name)
        assert got.shape == want.shape
        assert relative_error(got, want) <= tolerance, name
    assert result.targets.equal(expected.targets)  # type: ignore[attr-defined]
    assert result.targets.dtype == torch.int64  # type: ignore[attr-defined]
    for name in ("layer", "method", "contrast"):
        assert getattr(result, name) == getattr(expected, name)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [10, 15])
@pytest.mark.parametrize("targets", [None, "predicted", 4, "rows"])
def test_equal_to_the_engine(
    made: tuple[Path, torch.nn.Sequential], n: int, size: int, targets: str | int | None
) -> None:
    path, model = made
    asked = [[0, 4, 2]] * n if targets == "rows" else targets
    inputs = images(n, size)
    result = opened(path)(inputs, asked)
    assert_same(result, Explainer(model, layer="0")(inputs, asked))
    assert result.backend == "onnxruntime (CPUExecutionProvider), closed form"


def test_arrays_and_strides_are_taken(made: tuple[Path, torch.nn.Sequential]) -> None:
    path, _ = made
    inputs = images()
    explainer = opened(path)
    expected = explainer(inputs)
    array = inputs.numpy().astype(np.float64)
    assert_same(explainer(array), expected)
    assert_same(explainer(inputs.to(memory_format=torch.channels_last)), expected)
    assert_same(explainer(inputs.half()), explainer(inputs.half().float()))


@pytest.mark.parametrize("targets", [None, 3])
def test_no_images(made: tuple[Path, torch.nn.Sequential], targets: int | None) -> None:
    result = opened(made[0])(images()[:0], targets)
    assert result.logits.shape == (0, 5)
    assert result.maps.shape == (0, 1, 5, 6)
    assert result.targets.shape == result.scores.shape == (0, 1)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_batches_of_a_fixed_size_are_filled(
    fixed: tuple[Path, torch.nn.Sequential], n: int
) -> None:
    path, model = fixed
    inputs = images(5)[:n]
    explainer = opened(path)
    result = explainer(inputs, topk=3)
    if n == 0:
        assert result.maps.shape == (0, 3, 5, 6)
        return
    engine = Explainer(model, layer="0")
    assert_same(result, engine(inputs, topk=3))
    # Fewer than the file has, down to the prediction.
    assert_same(explainer(inputs, topk=2), engine(inputs, topk=2))
    assert_same(explainer(inputs), engine(inputs))


def test_half_precision(tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    model = write_explained(path, dtype=torch.float16)
    result = opened(path)(images())
    assert result.logits.dtype == torch.float16
    assert result.maps.dtype == torch.float32
    assert_same(result, Explainer(model, layer="0")(images()), 2e-2)


def test_probabilities_become_logits_but_for_a_shift(tmp_path: Path) -> None:
    path = tmp_path / "softmax.onnx"
    model = write_explained(path, softmax=True)
    result = opened(path)(images())
    expected = Explainer(model, layer="0")(images())
    assert relative_error(result.maps, expected.maps) <= 1e-5
    assert relative_error(result.scores, expected.scores) <= 1e-5
    assert relative_error(result.probabilities, expected.probabilities) <= 1e-5


def test_what_a_file_says(made: tuple[Path, torch.nn.Sequential]) -> None:
    explainer = opened(made[0])
    assert (explainer.layer, explainer.method) == ("0", "diff_grad_cam")
    assert explainer.contrast == "log_odds"
    assert explainer.labels == tuple(f"class {k}" for k in range(5))
    assert explainer.preprocess is not None
    assert explainer.preprocess.size == (10, 12)
    assert explainer.size == (None, None)
    assert explainer.inspect().heads == ("closed form",)


def test_a_file_that_takes_targets_explains_the_best_by_a_run_more(
    made: tuple[Path, torch.nn.Sequential],
) -> None:
    path, model = made
    inputs = images(4)
    assert opened(path).takes_targets
    expected = Explainer(model, layer="0")(inputs, topk=3)
    assert_same(opened(path)(inputs, topk=3), expected)


def test_refusals(
    made: tuple[Path, torch.nn.Sequential], fixed: tuple[Path, torch.nn.Sequential]
) -> None:
    any_size, one_size = opened(made[0]), opened(fixed[0])
    refused: list[tuple[OnnxExplainer, object, object, int | None, type[Exception], str]] = [
        (one_size, images(), 3, None, ValueError, "targets='input'"),
        (one_size, images(), None, 4, ValueError, "export it with topk=4"),
        (any_size, images(), None, 0, ValueError, "export it with topk=0"),
        (any_size, images(), None, 6, ValueError, "topk"),
        (any_size, images(), 3, 1, ValueError, "not both"),
        (one_size, images(2, 15), None, None, ValueError, "10 x 12 pixels .* got 15 x 17"),
        (any_size, images(), 5, None, ValueError, "from 0 to 4"),
        (any_size, images(), "cat", None, ValueError, "'cat'"),
        (any_size, images(), [0, 1], None, ValueError, "N = 3"),
        (any_size, images(), 0.5, None, TypeError, "whole numbers"),
        (any_size, images()[0], None, None, ValueError, r"images\[None\]"),
        (any_size, images()[:, :2], None, None, ValueError, "3 channels, got 2"),
        (any_size, images().to(torch.uint8), None, None, TypeError, "floating point"),
        (any_size, "cat.png", None, None, TypeError, "got str"),
    ]
    for explainer, inputs, targets, topk, error, message in refused:
        with pytest.raises(error, match=message):
            explainer(inputs, targets, topk=topk)  # type: ignore[arg-type]


def test_a_file_that_cannot_be_run(made: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ONNX file"):
        opened(tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(made[0].read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot open .*broken\.onnx"):
        opened(broken)
    proto = onnx.load(made[0])
    del proto.metadata_props[:]
    onnx.save(proto, plain := tmp_path / "plain.onnx")
    with pytest.raises(ValueError, match=r"diffcam export \S+plain\.onnx -o \S+plain\.cam\.onnx"):
        opened(plain)
    with pytest.raises(ValueError, match="maps of 0, none of layer3"):
        opened(made[0], layer="layer3")


def test_options_of_the_session(made: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, or None; got -3"):
        OnnxExplainer(made[0], providers=CPU, threads=-3)
    with pytest.raises(ValueError, match="providers is empty; name one"):
        OnnxExplainer(made[0], providers=[])
    write_explained(path := tmp_path / "four.onnx", metadata={"diffcam.labels": '["a", "b"]'})
    with pytest.raises(ValueError, match="names 2 classes and has 5"):
        opened(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("diffcam.labels", "{"),
        ("diffcam.preprocess", '{"sise": [2, 2]}'),
        ("diffcam.temperature", "warm"),
        ("diffcam.weights", "[0.5,"),
        ("diffcam.contrast", "mean"),
    ],
)
def test_damaged_metadata(
    made: tuple[Path, torch.nn.Sequential], tmp_path: Path, key: str, value: str
) -> None:
    proto = onnx.load(made[0])
    facts = {p.key: p.value for p in proto.metadata_props}
    onnx.helper.set_model_props(proto, facts | {key: value})
    onnx.save(proto, path := tmp_path / "damaged.onnx")
    with pytest.raises(ValueError, match=r"metadata of .* is damaged"):
        opened(path)


def test_the_layer_of_several(made: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    proto = onnx.load(made[0])
    facts = {p.key: p.value for p in proto.metadata_props}
    onnx.helper.set_model_props(
        proto, facts | {"diffcam.layer": "0,double", "diffcam.head": "closed form,none"}
    )
    two = onnx.numpy_helper.from_array(np.array(2, dtype=np.float32), "two")
    proto.graph.initializer.append(two)
    proto.graph.node.append(onnx.helper.make_node("Mul", ["diffcam_map", "two"], ["diffcam_map_1"]))
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("diffcam_map_1", 1, ["n", "t", "h", "w"])
    )
    onnx.save(proto, path := tmp_path / "layers.onnx")
    first, second = opened(path)(images()), opened(path, layer="double")(images())
    assert (first.layer, second.layer) == ("0", "double")
    assert second.maps.equal(2 * first.maps)


def test_a_provider_that_is_not_there(
    made: tuple[Path, torch.nn.Sequential], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ["CUDAExecutionProvider"]
    with pytest.raises(ValueError, match="CUDAExecutionProvider cannot be used: no CUDA device"):
        OnnxExplainer(made[0], providers=asked, strict=True)
    with pytest.warns(UserWarning, match="no CUDA device"):
        explainer = OnnxExplainer(made[0], providers=asked, threads=1)
    result = explainer(images())
    assert "CPUExecutionProvider instead of CUDAExecutionProvider" in result.backend
    with pytest.raises(ValueError, match="unknown provider 'cuda'"):
        OnnxExplainer(made[0], providers=["cuda"])
    with pytest.raises(ValueError, match="compiled without it"):
        OnnxExplainer(made[0], providers=["OpenVINOExecutionProvider"], strict=True)


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "_preload", lambda: None)
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: [session.CUDA])
    capi = tmp_path / "capi"
    capi.mkdir()
    monkeypatch.setattr(session.ort, "__file__", str(tmp_path / "__init__.py"))
    reason = session.why_not(session.CUDA)
    assert reason is not None
    assert "a library was not found" in reason
    assert "libonnxruntime_providers_cuda.so" in reason


def test_weights_beside_the_file(made: tuple[Path, torch.nn.Sequential], tmp_path: Path) -> None:
    path = tmp_path / "split.onnx"
    onnx.save(
        onnx.load(made[0]),
        path,
        save_as_external_data=True,
        location="split.data",
        size_threshold=100,
    )
    assert (tmp_path / "split.data").exists()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("split.onnx", "split.data"):
        shutil.move(tmp_path / name, moved / name)
    assert_same(opened(moved / "split.onnx")(images()), opened(made[0])(images()))


@pytest.mark.gpu
def test_cuda(made: tuple[Path, torch.nn.Sequential]) -> None:
    path, model = made
    inputs = images().cuda()
    explainer = OnnxExplainer(path, providers=["CUDAExecutionProvider"], strict=True)
    for targets in (None, [[0, 4]] * 3):
        result = explainer(inputs, targets)
        assert result.maps.device == inputs.device
        expected = Explainer(model, layer="0")(images(), targets)
        assert relative_error(result.maps.cpu(), expected.maps) <= 1e-3
    assert result.backend == "onnxruntime (CUDAExecutionProvider), closed form"
