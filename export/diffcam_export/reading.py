"""Reading an ONNX file of unknown origin, and preparing it for analysis.

`read_onnx` checks the file, and brings it into one form, whatever exporter wrote it: nodes in
order, weights that are no inputs, functions written out, opset 18 or later, shapes inferred. Names
of inputs, outputs, values and weights stay, and so does every number.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from diffcam_export import apart
from diffcam_export.checks import OnnxFileError, check, parsed
from diffcam_export.emit import OPSET
from diffcam_export.native import infer_shapes, rewritten

__all__ = ["OnnxFileError", "read_onnx"]

# The first IR version in which models of opset 18 may be written.
_IR_VERSION = 8
# The opset in which Resize came to place its pixels differently.
_NEW_RESIZE = 11
# Elements of a constant from which on it is a weight.
_SMALL = 1024


def read_onnx(path: str | os.PathLike[str]) -> ir.Model:
    """Reads a model; external data stays on disk until it is used.

    Models of an opset below 18 are converted to 18; the file is not changed.

    Args:
        path: an ONNX file (protobuf); external data must lie in its folder.

    Returns:
        The model, flat: without functions, the nodes of the main graph in topological order.

    Raises:
        OnnxFileError: it is no ONNX file, contradicts itself, or cannot be converted.
    """
    path = Path(path)
    proto = parsed(path)
    check(proto, path.parent)
    with _named(f"{path} is damaged"):
        model = ir.serde.deserialize_model(proto)
        # A folder named "" would switch off the check of where external data lie.
        ir.external_data.set_base_dir(model.graph, path.parent.absolute())
    with _named(f"{path} is damaged, or its nodes form a cycle"):
        model.graph.sort()
    _check_values(model)
    _tidy(model)
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    if model.functions:
        with _named(f"the functions of {path} cannot be written out"):
            model = _inlined(model)
    version = model.opset_imports[""]
    if version < OPSET:
        with _named(f"{path} cannot be converted from opset {version} to {OPSET}"):
            model = rewritten(model, apart.convert)
            if version < _NEW_RESIZE:
                _keep_resizing(model)
            ir.external_data.set_base_dir(model.graph, path.parent.absolute())
    with _named(f"the shapes of {path} cannot be inferred"):
        infer_shapes(model)
    if names != [value.name for value in (*model.graph.inputs, *model.graph.outputs)]:
        raise OnnxFileError(f"{path} has a function that returns its own input; rewrite it")
    return model


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turns what a library raises for a broken model into an error that says what was done."""
    try:
        yield
    except OnnxFileError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise OnnxFileError(f"{what}: {lines[0][:500]}") from error


def _check_values(model: ir.Model) -> None:
    """Every value that is read must come from somewhere."""
    for graph in model.graphs():
        for output in graph.outputs:
            if output.producer() is None and not _given(output):
                raise OnnxFileError(f"nothing computes the output {output.name!r}")
        for node in graph:
            for value in node.inputs:
                if value is not None and value.producer() is None and not _given(value):
                    raise OnnxFileError(
                        f"{node.op_type} ({node.name or node.outputs[0].name}) reads "
                        f"{value.name!r}, which nothing computes"
                    )


def _given(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_initializer()


def _tidy(model: ir.Model) -> None:
    """One form for what older files and some exporters write differently."""
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    for node in model.graph.all_nodes():
        if node.domain == "ai.onnx":
            node.domain = ""
    # Until IR version 3 every weight was an input too, and some exporters go on that way.
    kept = [value for value in model.graph.inputs if not value.is_initializer()]
    model.graph.inputs.clear()
    model.graph.inputs.extend(kept)
    # Some exporters write weights as Constant nodes.
    LiftConstantsToInitializersPass(size_limit=_SMALL)(model)
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _inlined(model: ir.Model) -> ir.Model:
    own = model.opset_imports
    imports = (entry for f in model.functions.values() for entry in f.opset_imports.items())
    if all(own.get(domain, version) == version for domain, version in imports):
        return InlinePass()(model).model
    return rewritten(model, apart.write_out)


def _keep_resizing(model: ir.Model) -> None:
    """Resize as it was before opset 11; onnx's converter leaves the new default in its place."""
    for node in model.graph.all_nodes():
        if node.op_type != "Resize" or node.domain != "":
            continue
        scales = node.inputs[2] if len(node.inputs) > 2 else None
        tensor = None if scales is None else ir.convenience.get_const_tensor(scales)
        factors = None if tensor is None else tensor.numpy()
        if factors is None or ((factors < 1).any() and (factors > 1).any()):
            raise OnnxFileError(f"{node.name or node.outputs[0].name} has scales that are computed")
        nearest = "floor" if (factors >= 1).all() else "ceil"
        node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
        node.attributes.add(ir.AttrString("nearest_mode", nearest))
