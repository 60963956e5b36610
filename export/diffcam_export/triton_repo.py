"""A model repository of Triton Inference Server, with one explained model in it."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto, ValueInfoProto

from diffcam_export.facts import Facts
from diffcam_fast.formats import names_onnx
from diffcam_fast.outputs.atomic import atomic_write

_TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.BFLOAT16: "TYPE_BF16",
}
_LABELS = "labels.txt"
_MAX_BATCH = 32


def write_triton_repository(
    path: str | Path, folder: str | Path, *, name: str | None = None, max_batch: int = _MAX_BATCH
) -> Path:
    """Writes ``<name>/config.pbtxt``, ``<name>/1/model.onnx`` and, where the file has class names,
    ``<name>/labels.txt`` into a model repository.

    Args:
        path: a file that `diffcam export` wrote. Its external data is copied too.
        folder: the repository, as `tritonserver --model-repository` takes it.
        name: of the model; None: that of the file.
        max_batch: the largest batch that the server makes of waiting requests, where the file takes
            any batch.

    Returns:
        The folder of the model.

    Raises:
        ValueError: no explained ONNX file, a name that cannot be a folder's, or external data
            outside of the file's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no ONNX file {path}")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ValueError(f"cannot read {path} as an ONNX model: {error}") from error
    facts = Facts.read({p.key: p.value for p in model.metadata_props}, path=path)
    name = triton_name(path) if name is None else _checked(name)
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")
    home = Path(folder) / name
    for location in _external(model):
        _copy(path.parent / location, home / "1" / location)
    # The model after its data, and the configuration last: a server that polls finds it whole.
    _copy(path, home / "1" / "model.onnx")
    if facts.labels is not None:
        _write(home / _LABELS, "".join(f"{label}\n" for label in map(_one_line, facts.labels)))
    _write(home / "config.pbtxt", triton_config(model, facts, name=name, max_batch=max_batch))
    return home


def triton_name(path: Path) -> str:
    """What a model is called in a repository: as its file, without the suffix.

    Raises:
        ValueError: that cannot be a folder's name.
    """
    stem = path.stem if names_onnx(path.name) else path.name
    return _checked(stem.removesuffix(".cam"))


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"{name!r} cannot name a model in Triton Inference Server; take letters, digits, '_', "
            "'-' and '.'"
        )
    return name


def triton_config(
    model: onnx.ModelProto, facts: Facts, *, name: str, max_batch: int = _MAX_BATCH
) -> str:
    """The text of ``config.pbtxt``."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    values = [*model.graph.input, *model.graph.output]
    batched = all(_dims(value)[:1] == [-1] for value in values)
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch if batched else 0}",
    ]
    for kind, several in (("input", model.graph.input), ("output", model.graph.output)):
        lines.append(f"{kind} [")
        blocks = []
        for value in several:
            extra = []
            if kind == "input" and value.name in defaults:
                extra.append("optional: true")
            if value.name == facts.output and facts.labels is not None and kind == "output":
                extra.append(f'label_filename: "{_LABELS}"')
            blocks.append("\n".join(_tensor(value, batched=batched, extra=extra)))
        lines += [",\n".join(blocks), "]"]
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _tensor(value: ValueInfoProto, *, batched: bool, extra: Sequence[str]) -> Iterator[str]:
    kind = value.type.tensor_type.elem_type
    if kind not in _TYPES:
        raise ValueError(
            f"{value.name} holds {onnx.helper.tensor_dtype_to_string(kind)}, which Triton "
            "Inference Server does not take"
        )
    dims = _dims(value)[1:] if batched else _dims(value)
    yield "  {"
    yield f"    name: {json.dumps(value.name)}"
    yield f"    data_type: {_TYPES[kind]}"
    if dims:
        yield f"    dims: [ {', '.join(map(str, dims))} ]"
    else:
        # Without the batch it is a single number, which has to be called a list of one.
        yield "    dims: [ 1 ]"
        yield "    reshape { shape: [ ] }"
    yield from (f"    {line}" for line in extra)
    yield "  }"


def _dims(value: ValueInfoProto) -> list[int]:
    """The sizes of a value, -1 where any will do."""
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else -1 for d in dims]


def _external(model: onnx.ModelProto) -> list[str]:
    """Files with the data of tensors, relative to the model's."""
    found = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if tensor.data_location == TensorProto.EXTERNAL and entry.key == "location"
    }
    for location in found:
        parts = PurePosixPath(location)
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"external data at {location!r} lies outside of the model's folder")
    return sorted(found)


def _one_line(label: str) -> str:
    return " ".join(label.split())


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as file, atomic_write(target) as copy:
        shutil.copyfileobj(file, copy)


def _write(target: Path, text: str) -> None:
    with atomic_write(target) as file:
        file.write(text.encode())
