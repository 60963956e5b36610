"""Whatever the bytes, an ONNX file is read, or refused with one kind of error, and soon."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from diffcam_export.analysis import OnnxAnalysisError, analyse
from diffcam_export.reading import OnnxFileError, read_onnx
from onnxfiles import C, K, Writer, pooled, saved

LIMIT = 5.0
"""Seconds for a file of two kilobytes; it takes some milliseconds on a machine at rest."""


def old() -> onnx.ModelProto:
    """Of opset 11, with a function-like subgraph: the converter's code runs too."""
    w = Writer(opset=11)
    x = w("Dropout", w("Squeeze", w("GlobalAveragePool", w.features()), axes=[2, 3]))
    x = w("Gemm", x, w.weight(C, K))
    info = helper.make_tensor_value_info("then", TensorProto.FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Softmax", [x], ["then"], axis=1)], "b", [], [info]
    )
    return w.model(w("If", w.constant(np.array(True)), then_branch=branch, else_branch=branch))


SEEDS = [pooled().SerializeToString(), old().SerializeToString()]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with bytes flipped, overwritten, doubled, taken out, or cut off."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "set", "double", "remove", "cut", "insert"]))
        length = draw(st.integers(1, 40))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "double":
            content[at:at] = content[at : at + length]
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "cut":
            del content[at:]
        else:
            content[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(content)


def read_or_refused(path: Path) -> str:
    """What became of a file; any other error than ours is raised."""
    start = time.perf_counter()
    try:
        analyse(read_onnx(path).graph)
        told = "read"
    except OnnxFileError:
        told = "refused"
    except OnnxAnalysisError:
        told = "not explained"
    assert time.perf_counter() - start < LIMIT
    return told


SLOW_IS_FINE = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(SLOW_IS_FINE, max_examples=400)
@given(content=mutated())
def test_mutated_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    read_or_refused(path)
    assert path.read_bytes() == content


@pytest.mark.slow
@settings(SLOW_IS_FINE, max_examples=20_000)
@given(content=mutated())
def test_many_mutated_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    read_or_refused(path)


def every_field(proto: object, found: list[tuple[object, str]]) -> None:
    """The scalar and repeated fields of a message and of those in it."""
    for field, value in proto.ListFields():  # type: ignore[attr-defined]
        found.append((proto, field.name))
        if field.type == field.TYPE_MESSAGE:
            for part in value if hasattr(value, "add") else [value]:
                every_field(part, found)


@settings(SLOW_IS_FINE, max_examples=400)
@given(data=st.data())
def test_wrong_fields(tmp_path: Path, data: st.DataObject) -> None:
    """Valid protobufs that mean nothing: fields removed, doubled, or of strange numbers."""
    proto = onnx.ModelProto.FromString(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 3))):
        found: list[tuple[object, str]] = []
        every_field(proto, found)
        owner, name = found[data.draw(st.integers(0, len(found) - 1))]
        value = getattr(owner, name)
        strange = st.sampled_from([-1, 0, 1, 2, 7, 2**31 - 1, 2**40, 2**63 - 1, -(2**63)])
        try:
            if isinstance(value, str):
                setattr(owner, name, data.draw(st.sampled_from(["", "A", "image", "Relu", "\0"])))
            elif isinstance(value, int):
                setattr(owner, name, data.draw(strange))
            elif hasattr(value, "append") and len(value) and isinstance(value[0], int):
                value[0] = data.draw(strange)
            elif hasattr(value, "append") and len(value) and data.draw(st.booleans()):
                value.append(value[0])
            else:
                owner.ClearField(name)  # type: ignore[attr-defined]
        # Beyond the field's range: as good as no change.
        except ValueError:
            continue
    path = tmp_path / "model.onnx"
    saved(proto, path)
    read_or_refused(path)


def nested(depth: int) -> bytes:
    """Attributes with graphs with nodes with attributes, as bytes: no library writes them."""

    def field(number: int, content: bytes) -> bytes:
        length, size = len(content), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + content

    node, relu = b"", pooled()
    for _ in range(depth):
        node = field(4, b"If") + field(5, field(1, b"g") + field(6, field(1, node)))
    # A graph's fields may come in several pieces.
    return relu.SerializeToString() + field(7, field(1, node))


def huge_constants(kind: str) -> onnx.ModelProto:
    w = Writer()
    x = w("Flatten", w("GlobalAveragePool", w.features()))
    size = w.ints(2**20, 2**20)
    if kind == "ConstantOfShape":
        big = w("ConstantOfShape", size)
    elif kind == "Expand":
        big = w("Expand", w.constant(np.ones((1, 1), np.float32)), size)
    elif kind == "Tile":
        big = w("Tile", w.constant(np.ones((1, 1), np.float32)), size)
    else:
        big = w("Range", *(w.constant(np.float32(v)) for v in (0, 1e12, 1)))
        big = w("Unsqueeze", big, w.ints(0))
    small = w("Slice", big, w.ints(0, 0), w.ints(C, K), w.ints(0, 1))
    return w.model(w("Gemm", x, small, name="logits"))


def huge_channels() -> onnx.ModelProto:
    w = Writer()
    x = w("ReduceMean", w("Relu", "image"), w.ints(2, 3), keepdims=0)
    x = w("MatMul", x, w("ConstantOfShape", w.ints(2**40, K)))
    return w.model(x, image=(1, 2**40, 2**20, 2**20))


def shapes_of_shapes() -> onnx.ModelProto:
    w = Writer()
    x = w.features()
    for _ in range(40):
        x = w("Concat", x, x, axis=1)
    return w.model(w("Gemm", w("Flatten", w("GlobalAveragePool", x)), w.weight(C, K)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nested(60), "refused"),
        (lambda: nested(3000), "refused"),
        (lambda: huge_constants("ConstantOfShape"), "read"),
        (lambda: huge_constants("Expand"), "read"),
        (lambda: huge_constants("Tile"), "read"),
        (lambda: huge_constants("Range"), "not explained"),
        (huge_channels, "not explained"),
        (shapes_of_shapes, "not explained"),
    ],
    ids=["nested", "nested more", "constant", "expand", "tile", "range", "channels", "doubled"],
)
def test_hostile_files_take_little_memory(
    tmp_path: Path, make: Callable[[], Any], expected: str
) -> None:
    """In a process of its own that may take 4 GiB of addresses."""
    content = make()
    path = tmp_path / "model.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path; from test_export_fuzz import read_or_refused\n"
        f"print(read_or_refused(Path({str(path)!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=None,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == expected
