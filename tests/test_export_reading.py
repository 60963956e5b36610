"""ONNX files of every age are read alike; broken and hostile ones are refused, and say why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from diffcam_export.analysis import analyse
from diffcam_export.reading import OnnxFileError, read_onnx
from diffcam_export.wire import MOST_ENTRIES
from onnxfiles import LIGHT, C, K, Writer, image, pooled, run, saved


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_model_zoo_of_opset_9(path: Path) -> None:
    proto, content = onnx.load(path), path.read_bytes()
    model = read_onnx(path)
    assert model.opset_imports[""] == 18
    stored = {tensor.name for tensor in proto.graph.initializer}
    own = [value for value in proto.graph.input if value.name not in stored]
    assert names(model.graph.inputs) == [value.name for value in own]
    assert names(model.graph.outputs) == [value.name for value in proto.graph.output]
    # The converter adds values and takes none away.
    computed = {name for node in proto.graph.node for name in node.output if name}
    assert computed <= {value.name for node in model.graph for value in node.outputs}
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v1"])
def test_conversion_changes_no_result(name: str) -> None:
    path = LIGHT / f"light_{name}.onnx"
    model = read_onnx(path)
    [feed] = model.graph.inputs
    assert feed.shape is not None
    feeds = {str(feed.name): image(*feed.shape.numpy())}
    before, after = run(onnx.load(path), feeds)[0], run(model, feeds)[0]
    assert before.shape == after.shape
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_opsets(tmp_path: Path, opset: int) -> None:
    proto = pooled(opset)
    proto.metadata_props.add(key="who", value="we")
    proto.graph.doc_string = "a network"
    proto.ir_version = 7 if opset < 15 else 10
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    assert model.opset_imports[""] == max(opset, 18)
    assert model.metadata_props["who"] == "we"
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer
    }
    for name, array in weights.items():
        held = model.graph.initializers[name].const_value
        assert held is not None
        np.testing.assert_array_equal(held.numpy(), array)
    feeds = {"image": image()}
    for name in ("logits", "A"):
        np.testing.assert_array_equal(run(model, feeds, name)[0], run(proto, feeds, name)[0])


def test_the_names_that_a_converter_gives_may_be_taken(tmp_path: Path) -> None:
    w = Writer(opset=11)
    x = w("Dropout", w.features(), name="_v_1")
    x = w("Dropout", w("Squeeze", w("GlobalAveragePool", x), axes=[2, 3], name="_v_3"), name="_v_2")
    proto = w.model(w("Gemm", x, w.weight(C, K), name="logits"))
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    for name in ("_v_1", "_v_2", "_v_3", "logits"):
        before, after = (run(m, {"image": image()}, name)[0] for m in (proto, model))
        np.testing.assert_array_equal(after, before)


def test_weights_that_are_inputs(tmp_path: Path) -> None:
    proto = pooled()
    proto.ir_version = 3
    proto.opset_import[0].version = 9
    for tensor in proto.graph.initializer:
        kind = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        proto.graph.input.append(helper.make_value_info(tensor.name, kind))
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    assert names(model.graph.inputs) == ["image"]
    assert analyse(model.graph).weight_layout == "KC"
    np.testing.assert_array_equal(
        run(model, {"image": image()})[0], run(proto, {"image": image()})[0]
    )


def test_weights_that_are_constant_nodes(tmp_path: Path) -> None:
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    array = np.random.default_rng(0).standard_normal((300, C)).astype(np.float32)
    weight = w("Constant", value=onnx.numpy_helper.from_array(array), name="weight")
    proto = w.model(w("Gemm", x, weight, transB=1))
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    found = analyse(model.graph)
    assert found.weight is not None
    assert found.weight.name == "weight"
    np.testing.assert_array_equal(
        run(model, {"image": image()})[0], run(proto, {"image": image()})[0]
    )


@pytest.mark.parametrize("opset", [16, 18])
def test_functions_are_written_out(tmp_path: Path, opset: int) -> None:
    """Also functions of another opset than the model's."""
    w = Writer(opset=18)
    x = w("Act", w.features(), domain="our", name="acted")
    x = w("Flatten", w("GlobalAveragePool", w("Act", x, domain="our", name="B")))
    proto = w.model(w("Gemm", x, w.weight(C, K), name="logits"))
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["t"]),
        helper.make_node("Mul", ["x", "t"], ["y"]),
    ]
    imports = [helper.make_opsetid("", opset)]
    proto.functions.append(helper.make_function("our", "Act", ["x"], ["y"], nodes, imports))
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    found = analyse(model.graph)
    assert found.layer.name == "B"
    for name in ("acted", "B", "logits"):
        before, after = (run(m, {"image": image()}, name)[0] for m in (proto, model))
        np.testing.assert_array_equal(after, before)


def test_nodes_may_be_out_of_order(tmp_path: Path) -> None:
    proto = pooled()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    assert analyse(model.graph).layer.name == "A"
    np.testing.assert_array_equal(
        run(model, {"image": image()})[0], run(pooled(), {"image": image()})[0]
    )


@pytest.mark.parametrize("opset", [13, 18])
def test_external_data_stay_outside(tmp_path: Path, opset: int) -> None:
    onnx.save(
        pooled(opset),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = read_onnx(tmp_path / "model.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    tensor = model.graph.initializers["w2"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert analyse(model.graph).weight_layout == "KC"
    expected = {t.name: onnx.numpy_helper.to_array(t) for t in pooled(opset).graph.initializer}
    np.testing.assert_array_equal(tensor.numpy(), expected["w2"])


def test_the_folder_may_be_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(
        pooled(), "model.onnx", save_as_external_data=True, location="weights", size_threshold=0
    )
    assert analyse(read_onnx("model.onnx").graph).weight_layout == "KC"


def test_a_model_of_more_than_2_gib(tmp_path: Path) -> None:
    """The weights are a hole in a file: nothing reads them."""
    w = Writer(opset=17)
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    proto = w.model(w("Gemm", w("MatMul", x, "wide"), w.weight(K, K)))
    large = proto.graph.initializer.add(name="wide", data_type=TensorProto.FLOAT, dims=[C, K])
    huge = proto.graph.initializer.add(
        name="huge", data_type=TensorProto.FLOAT, dims=[2**10, 2**20]
    )
    for tensor, length in ((large, 4 * C * K), (huge, 2**32)):
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        tensor.external_data.add(key="length", value=str(length))
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(2**32)
    start = time.perf_counter()
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    assert time.perf_counter() - start < 10
    assert model.opset_imports[""] == 18
    assert names(model.graph.inputs) == ["image"]
    assert model.graph.initializers["huge"].const_value is not None
    assert analyse(model.graph).layer.name == "A"


def test_files_that_are_none(tmp_path: Path) -> None:
    content = pooled().SerializeToString()
    cases: list[tuple[bytes | None, str]] = [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n garbage", "is no ONNX file"),
        (b"PK\x03\x04" + bytes(100), "is no ONNX file"),
        (content[:-7], "is truncated"),
        (b"\x08\x08", "no nodes or no outputs"),
        (b"\x3a\x02\x0a\x00" + bytes([0x0A, 0]) * (MOST_ENTRIES + 1), "more than 1000000 entries"),
    ]
    for content_, message in cases:
        path = tmp_path / "file.onnx"
        if content_ is not None:
            path.write_bytes(content_)
        with pytest.raises(OnnxFileError, match=message):
            read_onnx(path)
    with pytest.raises(OnnxFileError, match="is a folder"):
        read_onnx(tmp_path)
    with pytest.raises(OnnxFileError, match="no regular file"):
        read_onnx("/dev/zero")


def cyclic(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "logits"
    proto.graph.node.append(helper.make_node("Relu", ["image"], ["other"]))


def unknown_value(proto: onnx.ModelProto) -> None:
    proto.graph.node[3].input[0] = "nowhere"


def unknown_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "nowhere"


def no_input(proto: onnx.ModelProto) -> None:
    del proto.graph.input[:]


def no_output(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def opset_999(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


def no_opset(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


def two_opsets(proto: onnx.ModelProto) -> None:
    proto.opset_import.add(domain="ai.onnx", version=17)


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type = "ATen"


def unknown_domain(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].domain = "com.acme"


def huge(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = 2**40


def negative(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].dims[0] = -1


def short(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]


def unknown_type(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 77


def computed_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].output[0] = "A"


def calls_itself(proto: onnx.ModelProto) -> None:
    nodes = [helper.make_node("F", ["x"], ["y"], domain="our")]
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("our", 1)]
    proto.functions.append(helper.make_function("our", "F", ["x"], ["y"], nodes, imports))
    proto.graph.node[1].domain, proto.graph.node[1].op_type = "our", "F"


def doubling(proto: onnx.ModelProto) -> None:
    """Thirty functions, each of which calls the next one twice."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("our", 1)]
    for i in range(30):
        kind, domain = (f"F{i + 1}", "our") if i < 29 else ("Relu", "")
        nodes = [
            helper.make_node(kind, [a], [b], domain=domain) for a, b in (("x", "t"), ("t", "y"))
        ]
        proto.functions.append(helper.make_function("our", f"F{i}", ["x"], ["y"], nodes, imports))
    proto.graph.node[1].domain, proto.graph.node[1].op_type = "our", "F0"


def escaping(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cyclic, "cycle"),
        (unknown_value, r"Conv \(n3\) reads 'nowhere', which nothing computes"),
        (unknown_output, "nothing computes the output 'nowhere'"),
        (no_input, "has no input"),
        (no_output, "no outputs"),
        (opset_999, "uses opset 999"),
        (no_opset, "uses opset none"),
        (two_opsets, "two versions"),
        (unknown_operator, r"ATen \(n1\) is no operator of opset 18"),
        (unknown_domain, r"Relu \(n1\) is of operator set 'com.acme', which"),
        (huge, "holds .* of the .* entries or bytes"),
        (negative, "negative size"),
        (short, "truncated or damaged"),
        (unknown_type, "element type 77"),
        (computed_twice, "is damaged"),
        (calls_itself, "'F' calls itself"),
        (doubling, "written out have over 200000 nodes"),
        (escaping("/etc/hostname"), "outside of the model's folder"),
        (escaping("../secret.bin"), "outside of the model's folder"),
        (escaping("link.bin"), "outside of the model's folder"),
        (escaping("missing.bin"), "is no file"),
        (escaping("short.bin"), "a file of 3"),
        (escaping("twin.bin"), "a hard link"),
        (escaping(""), "in no file"),
    ],
)
def test_models_that_contradict_themselves(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(10**4))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "short.bin").write_bytes(b"abc")
    os.link(tmp_path / "secret.bin", folder / "twin.bin")
    proto = pooled()
    change(proto)
    start = time.perf_counter()
    with pytest.raises(OnnxFileError, match=message):
        read_onnx(saved(proto, folder / "model.onnx"))
    assert time.perf_counter() - start < 5


def test_names_that_are_no_text(tmp_path: Path) -> None:
    w = Writer()
    proto = w.model(w("Gemm", w("Flatten", w("GlobalAveragePool", w.features())), w.weight(C, K)))
    content = proto.SerializeToString()
    assert content.count(b"GlobalAveragePool") == 1
    (tmp_path / "model.onnx").write_bytes(content.replace(b"GlobalAveragePool", b"\xc7" * 17))
    with pytest.raises(OnnxFileError, match="is no text in UTF-8"):
        read_onnx(tmp_path / "model.onnx")


def test_a_failed_conversion_names_what_failed(tmp_path: Path) -> None:
    w = Writer(opset=5)
    proto = w.model(w("Cast", w.features(), to="FLOAT"))
    with pytest.raises(OnnxFileError, match=r"cannot be converted from opset 5 to 18.* for Cast"):
        read_onnx(saved(proto, tmp_path / "model.onnx"))


@pytest.mark.parametrize(("kind", "opset"), [("Upsample", 9), ("Resize", 10)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(1.7, 1.5), (0.6, 0.5)])
def test_old_resizing_keeps_its_pixels(
    tmp_path: Path, kind: str, opset: int, mode: str, scales: tuple[float, float]
) -> None:
    if kind == "Upsample" and scales[0] < 1:
        pytest.skip("Upsample only enlarges")
    w = Writer(opset=opset)
    factors = w.constant(np.array([1, 1, *scales], np.float32))
    proto = w.model(w("Relu", w(kind, "image", factors, mode=mode)))
    model = read_onnx(saved(proto, tmp_path / "model.onnx"))
    before, after = (run(m, {"image": image()})[0] for m in (proto, model))
    np.testing.assert_allclose(after, before, atol=1e-6)
