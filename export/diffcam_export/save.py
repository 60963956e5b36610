"""Writing an ONNX file whole or not at all."""

import secrets
from pathlib import Path

import onnx_ir as ir

from diffcam_fast.outputs.atomic import atomic_write, sync_folder

# A protobuf message ends at 2 GiB; the graph needs some of it.
_LARGEST = 2**31 - 2**26
_SUFFIX = ".data"


def save(model: ir.Model, path: Path) -> None:
    """Writes a model; where its weights do not fit into one file, they go into a second beside it.

    The weights' file is never one that another model uses: it is named `<path>.data`, or, where
    that exists, with some random letters before `.data`. The model's own file appears last.

    Args:
        model: whose tensors may lie in files of their own.
        path: the file to write or replace.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _weight_bytes(model) < _LARGEST:
        with atomic_write(path) as file:
            file.write(ir.to_proto(_loaded(model)).SerializeToString())
        return
    data = path.with_name(path.name + _SUFFIX)
    if data.exists():
        data = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    temporary = path.with_name(f".diffcam-{secrets.token_hex(8)}.tmp")
    try:
        ir.save(model, temporary, external_data=data.name)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _weight_bytes(model: ir.Model) -> int:
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def _loaded(model: ir.Model) -> ir.Model:
    """The model with all tensors in memory: its file says nothing of other files."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            array = value.const_value.numpy()
            value.const_value = ir.tensor(
                array, dtype=value.const_value.dtype, name=value.const_value.name
            )
    return model
