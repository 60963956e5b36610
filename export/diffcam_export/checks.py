"""What is checked of an ONNX file before anything is built from it.

Every check reads what the file declares against what it holds, so that a few hostile bytes cannot
ask for more time or memory than the file itself takes.
"""

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from diffcam_export.wire import WireError, count_entries

MOST_NODES = 200_000
"""Nodes in all graphs and inlined functions together; the largest networks have some ten thousand.
"""

_LARGEST_FILE = 2**31 - 1
_DEEPEST = 50
_BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT8", "UINT8", "BOOL", "FLOAT8E8M0"), 8),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 8),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 6),
    "COMPLEX128": 128,
}


Body = onnx.GraphProto | onnx.FunctionProto


class OnnxFileError(ValueError):
    """A file that is no ONNX model, or one that cannot be worked with; the message says why."""


def parsed(path: Path) -> onnx.ModelProto:
    """The file's protobuf, without its external data.

    Raises:
        OnnxFileError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist or is no regular file"
        raise OnnxFileError(f"{path} {what}; an ONNX file was expected")
    size = path.stat().st_size
    if not 0 < size <= _LARGEST_FILE:
        what = "is empty" if size == 0 else f"has {size} bytes, over the 2 GiB of a protobuf"
        raise OnnxFileError(f"{path} {what}; larger weights belong into external data")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OnnxFileError(f"{path} cannot be read: {error}") from error
    try:
        count_entries(memoryview(content))
        model = onnx.ModelProto()
        model.ParseFromString(content)
        return model
    except WireError as error:
        raise OnnxFileError(f"{path} is no ONNX file: {error}") from error
    # A DecodeError of protobuf; its class differs between implementations.
    except Exception as error:
        raise OnnxFileError(
            f"{path} is no ONNX file: truncated, damaged, nested too deeply, or another format "
            f"({error})"
        ) from error


def check(model: onnx.ModelProto, folder: Path) -> None:
    """Refuses a model that contradicts itself.

    Args:
        model: as `parsed` returns it.
        folder: where its external data lies.

    Raises:
        OnnxFileError: with the tensor or node in question.
    """
    if not model.graph.output or not model.graph.node:
        raise OnnxFileError("the model has no nodes or no outputs")
    stored = {t.name for t in model.graph.initializer}
    if all(value.name in stored for value in model.graph.input):
        raise OnnxFileError("the model has no input")
    imports = _opsets(model)
    functions = {(f.domain, f.name) for f in model.functions}
    nodes = 0
    for root in (model.graph, *model.functions):
        own = imports if isinstance(root, onnx.GraphProto) else _imports(root.opset_import)
        for graph in _nested(root):
            nodes += len(graph.node)
            if nodes > MOST_NODES:
                raise OnnxFileError(f"the model has more than {MOST_NODES} nodes")
            _check_names(graph)
            for tensor in _tensors(graph):
                _check_tensor(tensor, folder)
            for node in graph.node:
                if (node.domain, node.op_type) not in functions:
                    _check_operator(node, own)
    _check_functions(model)


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    imports = _imports(model.opset_import)
    version, newest = imports.get(""), onnx.defs.onnx_opset_version()
    if version is None or not 1 <= version <= newest:
        found = "none" if version is None else str(version)
        raise OnnxFileError(
            f"the model uses opset {found} of ai.onnx; this onnx package knows 1 to {newest}"
        )
    return imports


def _imports(entries: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    imports: dict[str, int] = {}
    for entry in entries:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if imports.setdefault(domain, entry.version) != entry.version:
            raise OnnxFileError(f"two versions of operator set {domain!r} are imported")
    return imports


def _nested(root: Body) -> Iterator[Body]:
    """A graph or function, and the graphs inside it."""
    waiting = [root]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting += attribute.graphs


def _tensors(graph: Body) -> Iterator[onnx.TensorProto]:
    sparse: list[onnx.SparseTensorProto] = []
    if isinstance(graph, onnx.GraphProto):
        yield from graph.initializer
        sparse += graph.sparse_initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                sparse.append(attribute.sparse_tensor)
            sparse += attribute.sparse_tensors
    for tensor in sparse:
        yield tensor.values
        yield tensor.indices


def _check_tensor(tensor: onnx.TensorProto, folder: Path) -> None:
    name = f"tensor {tensor.name!r}"
    if any(d < 0 for d in tensor.dims):
        raise OnnxFileError(f"{name} has a negative size: {list(tensor.dims)}")
    count = math.prod(tensor.dims)
    kinds = onnx.TensorProto.DataType
    kind = kinds.Name(tensor.data_type) if tensor.data_type in kinds.values() else "UNDEFINED"
    if kind == "STRING":
        expected, held = count, len(tensor.string_data)
    elif kind not in _BITS:
        raise OnnxFileError(f"{name} has element type {tensor.data_type}, which is not supported")
    elif tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, (count * _BITS[kind] + 7) // 8, folder)
        return
    elif tensor.HasField("raw_data"):
        expected, held = (count * _BITS[kind] + 7) // 8, len(tensor.raw_data)
    else:
        expected, held = _entries(kind, count), len(getattr(tensor, _field(kind)))
    if expected != held:
        raise OnnxFileError(
            f"{name} declares {list(tensor.dims)} of {kind}, and holds {held} of the {expected} "
            "entries or bytes that takes: the file is truncated or damaged"
        )


def _field(kind: str) -> str:
    if kind in ("FLOAT", "COMPLEX64"):
        return "float_data"
    if kind in ("DOUBLE", "COMPLEX128"):
        return "double_data"
    if kind == "INT64":
        return "int64_data"
    return "uint64_data" if kind in ("UINT32", "UINT64") else "int32_data"


def _entries(kind: str, count: int) -> int:
    if kind.startswith("COMPLEX"):
        return 2 * count
    # Several elements of a few bits share one entry.
    return (count * _BITS[kind] + 7) // 8 if _BITS[kind] < 8 else count


def _check_external(tensor: onnx.TensorProto, expected: int, folder: Path) -> None:
    name = f"tensor {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", expected))
    except ValueError:
        raise OnnxFileError(f"{name} has external data at no number: {entries}") from None
    if not location or "\0" in location:
        raise OnnxFileError(f"{name} has external data in no file: {entries}")
    real, inside = Path(os.path.realpath(folder / location)), Path(os.path.realpath(folder))
    if os.path.isabs(location) or ".." in Path(location).parts or not real.is_relative_to(inside):
        raise OnnxFileError(
            f"{name} has external data in {location!r}, outside of the model's folder; put it "
            "beside the model"
        )
    if not real.is_file():
        raise OnnxFileError(f"{name} has external data in {location!r}, and {real} is no file")
    status = real.stat()
    if status.st_nlink > 1:
        # onnx_ir refuses to load it: another file may have been smuggled in.
        raise OnnxFileError(f"{name} has external data in {location!r}, a hard link; copy the file")
    if length != expected or offset < 0 or offset + length > status.st_size:
        raise OnnxFileError(
            f"{name} takes {expected} bytes, and its external data are {length} bytes from "
            f"{offset} on in {location!r}, a file of {status.st_size}"
        )


def _check_names(graph: Body) -> None:
    """Protobuf hands out as bytes what is no text."""
    values = [*graph.input, *graph.output]
    names: list[object] = [v if isinstance(v, str | bytes) else v.name for v in values]
    for node in graph.node:
        names += [node.op_type, node.domain, node.name, *node.input, *node.output]
        names += [attribute.name for attribute in node.attribute]
    names += [tensor.name for tensor in getattr(graph, "initializer", ())]
    broken = next((name for name in names if not isinstance(name, str)), None)
    if broken is not None:
        raise OnnxFileError(f"the name {broken!r} is no text in UTF-8")


def _check_operator(node: onnx.NodeProto, imports: dict[str, int]) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    if domain not in imports:
        raise OnnxFileError(
            f"{describe(node)} is of operator set {domain!r}, which the model does not import"
        )
    if domain == "" and not onnx.defs.has(node.op_type, imports[""]):
        raise OnnxFileError(f"{describe(node)} is no operator of opset {imports['']} of ai.onnx")


def _check_functions(model: onnx.ModelProto) -> None:
    """No function may call itself, nor may all of them together be too long when written out."""
    bodies = {(f.domain, f.name, f.overload): f for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(root: Body, above: tuple[str, ...]) -> int:
        total = 0
        for graph in _nested(root):
            for node in graph.node:
                key = (node.domain, node.op_type, node.overload)
                if key in bodies and key not in sizes:
                    if len(above) > _DEEPEST or f"{node.domain}::{node.op_type}" in above:
                        raise OnnxFileError(
                            f"function {node.op_type!r} calls itself, or more than {_DEEPEST} deep"
                        )
                    sizes[key] = size(bodies[key], (*above, f"{node.domain}::{node.op_type}"))
                total += sizes.get(key, 1)
        return total

    if model.functions and size(model.graph, ()) > MOST_NODES:
        raise OnnxFileError(f"the model's functions written out have over {MOST_NODES} nodes")


def describe(node: onnx.NodeProto) -> str:
    """`Conv (name, or else its output)`."""
    return f"{node.op_type} ({node.name or ', '.join(node.output)})"
